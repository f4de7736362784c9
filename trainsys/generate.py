"""Text from a trained model, on one rank."""

# Shapes: B batch (1), T tokens, V vocabulary rows.

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice

import torch
from torch import Tensor, nn

from trainsys.data import Tokenizer
from trainsys.models.decoder import Decoder
from trainsys.models.huggingface import HuggingFaceModel


def generate(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompt: str,
    num_tokens: int,
    temperature: float,
    seed: int,
    *,
    top_k: int | None = None,
    stop_at_end: bool = False,
) -> str:
    """The prompt and what the model adds to it: `num_tokens` tokens, or fewer with `stop_at_end`.

    `temperature` 0 takes the most likely token each time, `top_k` limits the choice; the same seed chooses
    the same. An empty prompt begins a document. The model is evaluated as it is on its device, and left in
    the mode it was in; once its positions are used up the older half of the text is forgotten.
    """
    context = [int(token) for token in tokenizer.encode_batch([prompt])[0]]
    stream = sample(
        model,
        context or [tokenizer.end_of_document],
        vocab_size=tokenizer.vocab_size,
        temperature=temperature,
        seed=seed,
        top_k=top_k,
    )
    training = model.training
    model.eval()
    added: list[int] = []
    try:
        for token in islice(stream, num_tokens):
            if stop_at_end and token == tokenizer.end_of_document:
                break
            added.append(token)
    finally:
        model.train(training)
    return tokenizer.decode(context + added)


def sample(
    model: nn.Module,
    context: list[int],
    *,
    vocab_size: int,
    temperature: float,
    seed: int,
    top_k: int | None = None,
) -> Iterator[int]:
    """Endless tokens that continue `context`, each under `vocab_size`, drawn on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    limit = positions_of(model)
    seen = list(context)
    step: Callable[[list[int]], Tensor] | None = None
    new: list[int] = []
    while True:
        if limit is not None and len(seen) > limit:
            seen, step = seen[-max(1, limit // 2) :], None
        if step is None:
            step, new = _stepper(model), seen
        with torch.no_grad():
            logits_V = step(new)[:vocab_size].double().cpu()
        token = _choose(logits_V, temperature, top_k, generator)
        yield token
        seen, new = [*seen, token], [token]


def positions_of(model: nn.Module) -> int | None:
    """The most tokens the model can see at once; None is any number."""
    if isinstance(model, HuggingFaceModel):
        return getattr(model.config.get_text_config(), "max_position_embeddings", None)
    assert isinstance(model, Decoder)
    return model.max_positions


def _choose(logits_V: Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits_V.argmax())
    ids = torch.arange(len(logits_V))
    if top_k is not None:
        logits_V, ids = logits_V.topk(min(top_k, len(logits_V)))
    chosen = torch.multinomial((logits_V / temperature).softmax(-1), 1, generator=generator)
    return int(ids[chosen])


def _stepper(model: nn.Module) -> Callable[[list[int]], Tensor]:
    """A function from the next tokens to the logits [V] after them, which remembers the tokens before."""
    device = next(model.parameters()).device
    if isinstance(model, HuggingFaceModel):
        past = None

        def huggingface_step(new: list[int]) -> Tensor:
            nonlocal past
            tokens_BT = torch.tensor([new], device=device)
            output = model.causal_lm(input_ids=tokens_BT, past_key_values=past, use_cache=True)
            past = output.past_key_values
            return output.logits[0, -1]  # type: ignore[no-any-return]

        return huggingface_step
    assert isinstance(model, Decoder)
    cache = model.new_cache()

    def decoder_step(new: list[int]) -> Tensor:
        logits_BTV: Tensor = model(torch.tensor([new], device=device), cache=cache)[0]
        return logits_BTV[0, -1]

    return decoder_step
