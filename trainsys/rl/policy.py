"""A model and its tokenizer as something that answers questions, and reads the answers of others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from trainsys.data import Tokenizer
from trainsys.rl import questions
from trainsys.rl.config import GenerationConfig
from trainsys.rl.errors import PolicyError
from trainsys.rl.rollout import Completion, Group, Question
from trainsys.rl.sampler import Draw, Drawing, Sampler, max_positions


@dataclass(frozen=True, slots=True)
class Row:
    """A prompt and a completion of it in the policy's own tokens."""

    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    """The end token included where it ended."""
    behaviour: tuple[float, ...] | None = None
    """Log-probability of each token of the completion under the policy that drew it; None where that is not known."""


class Policy:
    """Draws completions from one model; on a device there may be several, each with its own cache."""

    def __init__(self, model: nn.Module, tokenizer: Tokenizer, config: GenerationConfig) -> None:
        """Take over the attention of a built model that is on its device; its weights may change between calls."""
        self._tokenizer, self._config = tokenizer, config
        self._sampler = Sampler(model, slots=config.slots, cuda_graphs=config.cuda_graphs)
        self.max_positions = max_positions(model)
        """The most tokens of a prompt with its completion; None is any number."""

    def sample(self, asked: Sequence[Question], num_each: int, seed: int) -> list[tuple[Completion, ...]]:
        """Return `num_each` completions of each question; each depends on (seed, its question, its index) alone.

        Raises:
            PolicyError: a prompt is empty or too long for the model.
        """
        seeds = [[questions.seed_of(seed, question.seed, index) for index in range(num_each)] for question in asked]
        return [tuple(map(self._read, of_question)) for of_question in self._draw(asked, seeds, drawn_greedily=False)]

    def answer(self, asked: Sequence[Question]) -> list[Completion]:
        """Return the most likely completion of each question, token by token."""
        return [self._read(draw) for (draw,) in self._draw(asked, [[0]] * len(asked), drawn_greedily=True)]

    def rows(self, group: Group) -> list[Row | None]:
        """Return a group's completions in this policy's tokens: those told, or its text's.

        None where these are more than `max_new_tokens`: the reward was for the whole, so a part of it is not taken.

        Raises:
            PolicyError: token ids that the tokenizer does not have, or a prompt that does not fit.
        """
        prompt = self.encode(group.question.prompt)
        self._check(prompt)
        return [self._row(prompt, completion) for completion in group.completions]

    def example(self, question: Question, answer: str) -> Row:
        """Return a question with a right answer, as supervised training shows it."""
        prompt = self.encode(question.prompt)
        self._check(prompt)
        completion = (*self.encode(answer), self._tokenizer.end_of_document)
        return Row(prompt, completion[: self._config.max_new_tokens])

    def encode(self, text: str) -> tuple[int, ...]:
        """Return the tokens of a text."""
        return tuple(int(token) for token in self._tokenizer.encode_batch([text])[0])

    def _draw(
        self, asked: Sequence[Question], seeds: Sequence[Sequence[int]], *, drawn_greedily: bool
    ) -> list[list[Draw]]:
        drawing = Drawing(
            vocab_size=self._tokenizer.vocab_size,
            stop_token=self._tokenizer.end_of_document,
            max_new_tokens=self._config.max_new_tokens,
            temperature=0.0 if drawn_greedily else self._config.temperature,
        )
        return self._sampler.draw([self.encode(question.prompt) for question in asked], seeds, drawing)

    def _read(self, draw: Draw) -> Completion:
        kept = draw.tokens[:-1] if draw.finished else draw.tokens
        return Completion(self._tokenizer.decode(kept), len(draw.tokens), draw.finished, draw.tokens, draw.log_probs)

    def _row(self, prompt: tuple[int, ...], completion: Completion) -> Row | None:
        tokens, limit = completion.token_ids, self._config.max_new_tokens
        if any(not 0 <= token < self._tokenizer.vocab_size for token in tokens):
            raise PolicyError(f"a completion has ids outside the tokenizer's 0 to {self._tokenizer.vocab_size - 1}")
        if not tokens:
            tokens = self.encode(completion.text)
            tokens += (self._tokenizer.end_of_document,) if completion.finished else ()
        return Row(prompt, tokens, completion.log_probs or None) if len(tokens) <= limit else None

    def _check(self, prompt: Sequence[int]) -> None:
        limit = self.max_positions
        if not prompt or (limit is not None and len(prompt) + self._config.max_new_tokens > limit):
            raise PolicyError(
                f"a prompt of {len(prompt)} tokens; allowed: 1 or more, and with rl.generation.max_new_tokens = "
                f"{self._config.max_new_tokens} at most the model's {limit} positions"
            )
