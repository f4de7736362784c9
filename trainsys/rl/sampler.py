"""Many completions of many prompts at a time from one model, each decided by its own seed.

Prompts are read once, however many completions they get, and their keys and values copied into a slot for each. Then
every step draws one token for all slots; one that has ended leaves its slot to the next in the queue, and the slots in
use are kept together at the front, so that no step computes more than there is. Sequences have their own positions and
noise: what a completion says depends on its prompt and seed, not on its neighbours.

On CUDA a step touches device memory only, is captured in a graph for each of a few sizes, and the host looks every
few steps which sequences have ended.
"""

# Shapes: B slots in use, V vocabulary, N new tokens at most.

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trainsys.models.attention import set_core
from trainsys.models.context import share_sequences
from trainsys.models.decoder import Block, Decoder
from trainsys.models.huggingface import HuggingFaceModel
from trainsys.rl.cache import Fill, SlotCache, SlotCore, Step
from trainsys.rl.errors import PolicyError

_LOOK_EVERY = {"cuda": 8, "cpu": 1}
"""Steps between two looks at what has ended: on CUDA the host waits for the device then."""
_FILL_TOKENS = 2**14
"""Most tokens of one forward over prompts, padding included."""
_CUDA_SPAN = 128


@dataclass(frozen=True, slots=True)
class Draw:
    """One completion as drawn."""

    tokens: tuple[int, ...]
    """The stop token included where it came."""
    log_probs: tuple[float, ...]
    """Of each under the model at the temperature of the draw (1 where that is 0)."""
    finished: bool
    """Whether the stop token came."""


@dataclass(frozen=True, slots=True)
class Drawing:
    """How tokens are chosen."""

    vocab_size: int
    """Ids from here on are never drawn: the model has more rows than the tokenizer has tokens."""
    stop_token: int
    max_new_tokens: int
    temperature: float
    """0 takes the most likely token."""


class Sampler:
    """Draws from one model, whose attention it takes over; several on one device do not know of each other."""

    def __init__(self, model: nn.Module, *, slots: int, cuda_graphs: bool = True) -> None:
        """Take over the attention of a built model (`slot_core`). `slots` completions are drawn at a time."""
        self._model: Any = model
        self._core = slot_core(model)
        self._num_slots = slots
        self._device = next(model.parameters()).device
        self._graphs: dict[tuple[int, int, Drawing], torch.cuda.CUDAGraph] = {}
        self._seen: set[tuple[int, int, Drawing]] = set()
        self._captures = cuda_graphs and self._device.type == "cuda"
        self._slots: _Slots | None = None
        self._weights: tuple[int, ...] = ()
        self._pool = torch.cuda.graph_pool_handle() if self._captures else None

    @torch.no_grad()
    def draw(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[Sequence[int]], drawing: Drawing
    ) -> list[list[Draw]]:
        """Return a completion of each prompt for each of its seeds.

        Raises:
            PolicyError: a prompt is empty, or with its completion longer than the model has positions.
        """
        assert len(prompts) == len(seeds)
        self._check(prompts, drawing)
        training = self._model.training
        self._model.eval()
        try:
            return self._draw(prompts, seeds, drawing)
        finally:
            self._model.train(training)

    def _draw(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[Sequence[int]], drawing: Drawing
    ) -> list[list[Draw]]:
        requests = [_Request(prompt, seed) for prompt, of_prompt in enumerate(seeds) for seed in of_prompt]
        queue, found = deque(range(len(requests))), dict[int, Draw]()
        slots = self._ready(max(map(len, prompts), default=1), min(len(requests), self._num_slots), drawing)
        while queue or slots.owners:
            room = slots.capacity - len(slots.owners)
            # A forward over prompts is launched kernel by kernel, so on CUDA it is worth waiting for several.
            if queue and (not slots.owners or room >= (slots.capacity // 4 if self._captures else 1)):
                self._fill(slots, [queue.popleft() for _ in range(min(room, len(queue)))], requests, prompts, drawing)
            steps = min(_LOOK_EVERY[self._device.type], drawing.max_new_tokens)
            for _ in range(steps):
                self._advance(slots, drawing)
            found.update(slots.collect(drawing.stop_token))
        rest = iter(range(len(requests)))
        return [[found[next(rest)] for _ in of_prompt] for of_prompt in seeds]

    def _check(self, prompts: Sequence[Sequence[int]], drawing: Drawing) -> None:
        limit = max_positions(self._model)
        for prompt in prompts:
            if not prompt:
                raise PolicyError("a prompt is empty; it needs a token to continue")
            if limit is not None and len(prompt) + drawing.max_new_tokens > limit:
                raise PolicyError(
                    f"a prompt of {len(prompt)} tokens and {drawing.max_new_tokens} new ones do not fit the model's "
                    f"{limit} positions; lower rl.generation.max_new_tokens, or raise data.sequence_length"
                )

    def _ready(self, longest_prompt: int, num_slots: int, drawing: Drawing) -> _Slots:
        """Return slots that are large enough: those of the last call where they are, so that graphs stay valid."""
        span, new = longest_prompt + drawing.max_new_tokens, drawing.max_new_tokens
        held = self._slots
        if held is None or held.capacity < num_slots or held.span < span or held.max_new_tokens < new:
            self._graphs.clear()
            self._seen.clear()
            self._slots = held = _Slots(
                _up_to(num_slots, 1) if self._captures else num_slots,
                _up_to(span, _CUDA_SPAN) if self._captures else span,
                new,
                self._device,
                self._noise_dtype(),
            )
        weights = tuple(parameter.data_ptr() for parameter in self._model.parameters())
        if weights != self._weights:  # graphs read weights where they were
            self._graphs.clear()
            self._weights = weights
        return held

    def _noise_dtype(self) -> torch.dtype:
        return torch.promote_types(next(self._model.parameters()).dtype, torch.float32)

    def _fill(
        self,
        slots: _Slots,
        chosen: Sequence[int],
        requests: Sequence[_Request],
        prompts: Sequence[Sequence[int]],
        drawing: Drawing,
    ) -> None:
        """Give slots to requests: prompts but for their last token, which the next step takes, go through the model."""
        first = len(slots.owners)
        slots.admit(
            chosen,
            [prompts[requests[index].prompt] for index in chosen],
            [requests[index].seed for index in chosen],
            drawing.max_new_tokens,
        )
        by_prompt: dict[int, list[int]] = {}
        for slot, index in enumerate(chosen, first):
            by_prompt.setdefault(requests[index].prompt, []).append(slot)
        pending = sorted(by_prompt, key=lambda prompt: len(prompts[prompt]))
        while pending:
            length = len(prompts[pending[-1]]) - 1
            size = max(1, _FILL_TOKENS // max(1, length))
            part, pending = pending[-size:], pending[:-size]
            if length:
                self._read(slots, part, by_prompt, prompts, length)

    def _read(
        self,
        slots: _Slots,
        part: Sequence[int],
        by_prompt: dict[int, list[int]],
        prompts: Sequence[Sequence[int]],
        length: int,
    ) -> None:
        tokens = torch.zeros(len(part), length, dtype=torch.int64)
        for row, prompt in enumerate(part):
            kept = prompts[prompt][:-1]
            tokens[row, : len(kept)] = torch.tensor(kept, dtype=torch.int64)
        places = [(slot, row) for row, prompt in enumerate(part) for slot in by_prompt[prompt]]
        where = torch.tensor(places, dtype=torch.int64).to(self._device)
        fill = Fill(slots.cache, where[:, 0], where[:, 1])
        positions = torch.arange(length, device=self._device).expand(len(part), -1)
        self._core.forward(self._features, fill, tokens.to(self._device), positions)

    def _features(self, tokens_BT: Tensor, positions_BT: Tensor) -> Tensor:
        if _head(self._model) is None:
            return self._model(tokens_BT, positions_BT=positions_BT)[0]  # type: ignore[no-any-return]
        return self._model.features(tokens_BT, positions_BT=positions_BT)[0]  # type: ignore[no-any-return]

    def _advance(self, slots: _Slots, drawing: Drawing) -> None:
        """Draw one token for every slot in use."""
        used, span = len(slots.owners), slots.longest + 1
        slots.longest += 1
        if not self._captures:
            self._step(slots, used, min(span, slots.span), drawing)
            return
        key = (min(_up_to(used, 1), slots.capacity), min(_up_to(span, _CUDA_SPAN), slots.span), drawing)
        if (graph := self._graphs.get(key)) is not None:
            graph.replay()
        elif key not in self._seen:  # a step that is not captured makes the kernels' workspaces
            self._seen.add(key)
            self._step(slots, *key)
        else:
            torch.cuda.synchronize(self._device)
            graph = torch.cuda.CUDAGraph()
            # Other threads, which copy checkpoints, may use the device meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                self._step(slots, *key)
            self._graphs[key] = graph
            graph.replay()

    def _step(self, slots: _Slots, used: int, span: int, drawing: Drawing) -> None:
        lengths_B = slots.lengths[:used]
        step = Step(slots.cache, lengths_B, span, next(self._model.parameters()).dtype)
        out = self._core.forward(self._features, step, slots.tokens[:used, None], lengths_B[:, None])[:, 0]
        head = _head(self._model)
        if head is not None:
            out = nn.functional.linear(out, head.weight[: drawing.vocab_size])
        logits_BV = out[:, : drawing.vocab_size].to(slots.noise.dtype)
        counts_B1 = slots.counts[:used, None]
        noise_B1 = slots.noise[:used].gather(1, counts_B1)
        tokens_B, log_probs_B = choose(logits_BV, noise_B1, drawing.temperature)
        slots.record(used, tokens_B, log_probs_B, drawing)


@dataclass(frozen=True, slots=True)
class _Request:
    prompt: int
    seed: int


class _Slots:
    """The state of the sequences that are being drawn; those in use are the first `len(owners)`."""

    def __init__(
        self, capacity: int, span: int, max_new_tokens: int, device: torch.device, noise_dtype: torch.dtype
    ) -> None:
        self.capacity, self.span, self.max_new_tokens = capacity, span, max_new_tokens
        self.cache = SlotCache(capacity, span)
        self.owners: list[int] = []
        """The request of each slot in use."""
        self.longest = 0
        """At least the largest of `lengths` in use."""

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        self.tokens = zeros(capacity)
        """The next token to feed."""
        self.lengths = zeros(capacity)
        """Tokens in the cache: the position of the next."""
        self.counts = zeros(capacity)
        """Tokens drawn."""
        self.alive = zeros(capacity, dtype=torch.bool)
        # One column more: what an ended sequence draws goes there.
        self.drawn = zeros(capacity, max_new_tokens + 1)
        self.log_probs = zeros(capacity, max_new_tokens + 1, dtype=noise_dtype)
        self.noise = zeros(capacity, max_new_tokens + 1, dtype=noise_dtype)

    def admit(
        self, owners: Sequence[int], prompts: Sequence[Sequence[int]], seeds: Sequence[int], max_new_tokens: int
    ) -> None:
        """Begin sequences in the slots behind those in use."""
        taken = slice(len(self.owners), len(self.owners) + len(owners))
        device = self.tokens.device
        lengths = [len(prompt) - 1 for prompt in prompts]
        self.tokens[taken] = torch.tensor([prompt[-1] for prompt in prompts], dtype=torch.int64).to(device)
        self.lengths[taken] = torch.tensor(lengths, dtype=torch.int64).to(device)
        self.counts[taken] = 0
        self.alive[taken] = True
        self.noise[taken, :max_new_tokens] = noise(seeds, max_new_tokens).to(device, self.noise.dtype)
        self.owners += owners
        self.longest = max(self.longest, *lengths)

    def record(self, used: int, tokens_B: Tensor, log_probs_B: Tensor, drawing: Drawing) -> None:
        """Note one drawn token a slot, in place; ended sequences stay as they are."""
        alive_B, counts_B = self.alive[:used], self.counts[:used]
        column_B1 = torch.where(alive_B, counts_B, self.max_new_tokens)[:, None]
        self.drawn[:used].scatter_(1, column_B1, tokens_B[:, None])
        self.log_probs[:used].scatter_(1, column_B1, log_probs_B[:, None])
        counts_B += alive_B
        self.lengths[:used] += alive_B
        self.tokens[:used] = torch.where(alive_B, tokens_B, self.tokens[:used])
        alive_B &= (tokens_B != drawing.stop_token) & (counts_B < drawing.max_new_tokens)

    def collect(self, stop_token: int) -> list[tuple[int, Draw]]:
        """Return what has ended, with its request, and close the gaps."""
        used = len(self.owners)
        alive, counts, lengths = (state[:used].tolist() for state in (self.alive, self.counts, self.lengths))
        ended = [slot for slot in range(used) if not alive[slot]]
        if not ended:
            self.longest = max(lengths)
            return []
        index = torch.tensor(ended).to(self.tokens.device)
        drawn, log_probs = self.drawn[index].tolist(), self.log_probs[index].tolist()
        found = []
        for row, slot in enumerate(ended):
            tokens = tuple(drawn[row][: counts[slot]])
            draw = Draw(tokens, tuple(log_probs[row][: counts[slot]]), tokens[-1] == stop_token)
            found.append((self.owners[slot], draw))
        self._close_gaps(alive, lengths)
        return found

    def _close_gaps(self, alive: Sequence[bool], lengths: Sequence[int]) -> None:
        """Move the last sequences in use into the slots of ended ones."""
        kept = [slot for slot, is_alive in enumerate(alive) if is_alive]
        self.longest = max((lengths[slot] for slot in kept), default=0)
        holes = [slot for slot in range(len(kept)) if not alive[slot]]
        movers = [slot for slot in kept if slot >= len(kept)]
        for source, hole in zip(movers, holes, strict=True):
            self.owners[hole] = self.owners[source]
        del self.owners[len(kept) :]
        if movers:
            device = self.tokens.device
            sources, destinations = torch.tensor(movers).to(device), torch.tensor(holes).to(device)
            self.cache.move(sources, destinations, self.longest)
            for state in (self.tokens, self.lengths, self.counts, self.drawn, self.log_probs, self.noise):
                state[destinations] = state[sources]
        self.alive[: len(kept)] = True
        self.alive[len(kept) :] = False
        self.lengths[len(kept) :] = 0  # of slots that a larger graph computes along: inside any span
        self.counts[len(kept) :] = 0


def slot_core(model: nn.Module) -> SlotCore:
    """Return the core through which a built model attends; the first call takes over its attention.

    Call it once while the model is in fp32: a Hugging Face model's own attention is compared with ours.

    Raises:
        ConfigError: a Hugging Face model's attention is more than causal softmax.
    """
    if isinstance(model, HuggingFaceModel):
        if not isinstance(model.core, SlotCore):
            text = model.config.get_text_config()
            head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
            share_sequences(model, SlotCore(head_dim))
        assert isinstance(model.core, SlotCore)
        return model.core
    assert isinstance(model, Decoder)
    first = model.blocks[0]
    assert isinstance(first, Block)
    if not isinstance(first.attention.core, SlotCore):
        set_core(model, SlotCore(model.config.head_dim))
    core = first.attention.core
    assert isinstance(core, SlotCore)
    return core


def choose(logits_BV: Tensor, uniform_B1: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return (token, its log-probability) of each row, both [B], by inverting the distribution at `uniform_B1`.

    The first token whose cumulative probability is above the number in [0, 1): one number decides a token, and no
    token of probability 0 comes. With temperature 0 the most likely one, its log-probability that of temperature 1.
    """
    log_probs_BV = (logits_BV / temperature if temperature not in (0, 1) else logits_BV).log_softmax(-1)
    if temperature == 0:
        tokens_B1 = logits_BV.argmax(-1, keepdim=True)
    else:
        cumulative_BV = log_probs_BV.exp().cumsum(-1)
        # Its last value is 1 but for rounding; a little less of it is always below.
        threshold_B1 = uniform_B1 * cumulative_BV[:, -1:] * (1 - 2**-20)
        tokens_B1 = torch.searchsorted(cumulative_BV, threshold_B1, right=True).clamp(max=logits_BV.shape[-1] - 1)
    return tokens_B1[:, 0], log_probs_BV.gather(1, tokens_B1)[:, 0]


def noise(seeds: Sequence[int], length: int) -> Tensor:
    """Return uniform numbers in [0, 1), float64 [len(seeds), length], each row from its seed."""
    rows = torch.empty(len(seeds), length, dtype=torch.float64)
    generator = torch.Generator()
    for row, seed in zip(rows, seeds, strict=True):
        generator.manual_seed(seed)
        row.uniform_(generator=generator)
    return rows


def max_positions(model: nn.Module) -> int | None:
    """Return the most tokens that the model can see; None is any number."""
    if isinstance(model, HuggingFaceModel):
        return getattr(model.config.get_text_config(), "max_position_embeddings", None)
    assert isinstance(model, Decoder)
    return model.max_positions


def _head(model: nn.Module) -> nn.Linear | None:
    """Return the head where the logits are its product with the features, without bias; None otherwise."""
    head = model.head
    assert head is None or isinstance(head, nn.Linear)
    return head if head is not None and head.bias is None else None


def _up_to(size: int, least: int) -> int:
    """Return the next power of two times `least`."""
    result = least
    while result < size:
        result *= 2
    return result
