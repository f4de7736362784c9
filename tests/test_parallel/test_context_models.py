"""Models whose sequences are shared by ring or Ulysses attention, against one process."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from parallel.context import Context
from tests.ranks import run_ranks
from trainsys.config import ModelConfig
from trainsys.errors import ConfigError
from trainsys.models import blocks, build
from trainsys.models.context import attend_through, share_sequences
from trainsys.models.huggingface import HuggingFaceModel
from trainsys.models.recompute import Recompute

Method = Literal["ring", "ulysses"]
EXACT = {"rtol": 1e-12, "atol": 1e-13}
STEPS, BATCH, LENGTH, VOCABULARY = 10, 2, 24, 64
CONFIG = ModelConfig(num_layers=2, dim=32, num_heads=4, num_kv_heads=2, head_dim=8, vocab_size=VOCABULARY)


def decoder(dtype: torch.dtype, recompute: Recompute = "none") -> nn.Module:
    sizes = {"vocab_size": VOCABULARY, "max_positions": LENGTH}
    model = build(CONFIG, **sizes, recompute=recompute, seed=3)
    return model.to(dtype)


def batch(step: int, documents: bool) -> dict[str, Tensor | None]:
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(8, (BATCH, LENGTH + 1), generator=generator)
    ids = positions = None
    if documents:
        changes = torch.rand(BATCH, LENGTH, generator=generator) < 0.2
        ids = changes.cumsum(1)
        index = torch.arange(LENGTH)
        positions = index - (index * changes).cummax(1).values
    return {
        "tokens_BW": tokens[:, :-1],
        "targets_BW": tokens[:, 1:],
        "positions_BW": positions,
        "document_ids_BW": ids,
    }


def summed_loss(model: nn.Module, tokens: Tensor, targets: Tensor | None, **more: Tensor | None) -> Tensor:
    logits, _ = model(tokens, **more)
    assert targets is not None
    return functional.cross_entropy(
        logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32)), targets.flatten(), reduction="sum"
    )


def train(model: nn.Module, context: Context | None, documents: bool) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of some steps, and the gradients of the first."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses: list[float] = []
    first: dict[str, Tensor] = {}
    for step in range(STEPS):
        whole = batch(step, documents)
        if context is None:
            tokens, targets = whole["tokens_BW"], whole["targets_BW"]
            assert tokens is not None
            at = {"positions_BT": whole["positions_BW"], "document_ids_BT": whole["document_ids_BW"]}
            loss = summed_loss(model, tokens, targets, **at) / tokens.numel()
        else:
            part = context.cut_batch(**whole)  # type: ignore[arg-type]
            at = {"positions_BT": part.positions, "document_ids_BT": part.document_ids}
            loss = summed_loss(model, part.tokens, part.targets, **at) / (BATCH * LENGTH)
        loss.backward()  # type: ignore[no-untyped-call]
        total = loss.detach().clone()
        if context is not None:
            dist.all_reduce(total, group=context.group)
            for parameter in model.parameters():
                assert parameter.grad is not None
                dist.all_reduce(parameter.grad, group=context.group)
        if not first:
            first = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        losses.append(float(total))
        optimizer.step()
        optimizer.zero_grad()
    return losses, first


def decoder_rank(rank: int, world_size: int, methods: list[Method]) -> list[list[float]]:
    assert dist.group.WORLD is not None
    found = []
    for method in methods:
        context = Context(dist.group.WORLD, method)
        for documents in (False, True):
            own, shared = decoder(torch.float64), decoder(torch.float64, "full" if documents else "none")
            share_sequences(shared, context.core)
            losses, gradients = train(own, None, documents)
            shared_losses, shared_gradients = train(shared, context, documents)
            for name, gradient in gradients.items():
                torch.testing.assert_close(shared_gradients[name], gradient, **EXACT)
            torch.testing.assert_close(torch.tensor(shared_losses), torch.tensor(losses), **EXACT)
            torch.testing.assert_close(
                nn.utils.parameters_to_vector(shared.parameters()),
                nn.utils.parameters_to_vector(own.parameters()),
                rtol=1e-9,
                atol=1e-12,
            )
            weights = nn.utils.parameters_to_vector(shared.parameters()).detach()
            everyone = [torch.empty_like(weights) for _ in range(world_size)]
            dist.all_gather(everyone, weights)
            assert all(torch.equal(weights, theirs) for theirs in everyone), "weights differ between replicas"
            found.append(shared_losses)
    return found


@pytest.mark.parametrize(
    ("size", "methods"), [(2, ["ring", "ulysses"]), (3, ["ring"]), (4, ["ring", "ulysses"])], ids=str
)
def test_ten_steps_of_the_decoder_equal_one_process(size: int, methods: list[Method]) -> None:
    results = run_ranks(decoder_rank, size, methods)
    assert all(result == results[0] for result in results)
    assert all(losses[-1] < losses[0] for losses in results[0])


def compiled_rank(rank: int, world_size: int) -> None:
    assert dist.group.WORLD is not None
    for method in ("ring", "ulysses"):
        context = Context(dist.group.WORLD, method)
        own, shared = decoder(torch.float64), decoder(torch.float64)
        share_sequences(shared, context.core)
        for block in blocks(shared):
            block.compile(backend="aot_eager")
        for documents in (False, True):
            whole = batch(0, documents)
            part = context.cut_batch(**whole)  # type: ignore[arg-type]
            tokens = whole["tokens_BW"]
            assert tokens is not None
            logits, _ = own(tokens, positions_BT=whole["positions_BW"], document_ids_BT=whole["document_ids_BW"])
            parts, _ = shared(part.tokens, positions_BT=part.positions, document_ids_BT=part.document_ids)
            torch.testing.assert_close(context.gather(parts), logits, **EXACT)
            parts.square().sum().backward()


def test_compiled_blocks_call_the_core_as_it_is() -> None:
    run_ranks(compiled_rank, 2)


def low_precision_rank(rank: int, world_size: int, dtype: torch.dtype) -> list[float]:
    assert dist.group.WORLD is not None
    exact, _ = train(decoder(torch.float64), None, documents=True)
    worst = []
    for method in (None, "ring", "ulysses"):
        context = None if method is None else Context(dist.group.WORLD, method)
        model = decoder(dtype)
        if context is not None:
            share_sequences(model, context.core)
        losses, _ = train(model, context, documents=True)
        worst.append(max(abs(a - b) / b for a, b in zip(losses, exact, strict=True)))
    return worst


# A step's loss is off by the dtype's rounding times a few; AdamW's first steps turn the sign of a gradient that is all
# rounding into a full step, so ten steps allow more. One process in the same dtype is held to the same figure.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)], ids=str)
def test_lower_precision_stays_as_near_to_float64_as_one_process_does(dtype: torch.dtype, tolerance: float) -> None:
    alone, ring, ulysses = run_ranks(low_precision_rank, 2, dtype)[0]
    assert max(alone, ring, ulysses) < tolerance


def huggingface(kind: str, **changes: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": LENGTH,
        "pad_token_id": None,
    }
    torch.manual_seed(1)
    transformers.utils.logging.set_verbosity_error()
    config = transformers.AutoConfig.for_model(kind, **sizes | changes)
    return HuggingFaceModel(transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32))


HF_KINDS = {"llama": {}, "qwen2": {}, "qwen3": {"head_dim": 8}, "mistral": {"sliding_window": None}}


def huggingface_rank(rank: int, world_size: int) -> int:
    assert dist.group.WORLD is not None
    compared = 0
    for kind, changes in HF_KINDS.items():
        own = huggingface(kind, **changes).double()
        whole = batch(0, documents=True)
        tokens = whole["tokens_BW"]
        assert tokens is not None
        loss = summed_loss(own, tokens, whole["targets_BW"], document_ids_BT=whole["document_ids_BW"])
        loss.backward()  # type: ignore[no-untyped-call]
        methods: list[Method] = ["ring", "ulysses"]
        for method in methods:
            context = Context(dist.group.WORLD, method)
            shared = huggingface(kind, **changes).double()
            share_sequences(shared, context.core)
            part = context.cut_batch(**whole)  # type: ignore[arg-type]
            at = {"positions_BT": part.positions, "document_ids_BT": part.document_ids}
            shared_loss = summed_loss(shared, part.tokens, part.targets, **at)
            shared_loss.backward()  # type: ignore[no-untyped-call]
            total = shared_loss.detach()
            dist.all_reduce(total)
            # Theirs take the softmax of attention and the norms in fp32, whatever the model's dtype.
            torch.testing.assert_close(total, loss.detach(), rtol=1e-6, atol=0)
            for mine, theirs in zip(shared.parameters(), own.parameters(), strict=True):
                assert mine.grad is not None
                assert theirs.grad is not None
                dist.all_reduce(mine.grad)
                torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=1e-6)
                compared += 1
    return compared


def test_huggingface_models_equal_one_process() -> None:
    results = run_ranks(huggingface_rank, 2)
    assert results[0] > 100


class NoCore:
    """A core that no forward reaches."""

    def prepare(self, document_ids_BT: Tensor | None, positions_BT: Tensor | None, like: Tensor) -> None:
        raise AssertionError

    def __call__(self, *operands: Tensor, **options: Any) -> Tensor:
        raise AssertionError


@pytest.mark.parametrize(
    ("kind", "changes", "problem"),
    [
        ("mistral", {"sliding_window": 4}, "sliding_window is 4"),
        ("gemma2", {"head_dim": 8}, "layer_types have sliding_attention"),
        ("llama", {"attention_dropout": 0.1}, r"attention_dropout is 0\.1"),
        ("bloom", {"n_layer": 2, "n_head": 4}, "attention is not open"),
    ],
)
def test_other_attention_is_refused(kind: str, changes: dict[str, Any], problem: str) -> None:
    model = huggingface(kind, **changes)
    with pytest.raises(ConfigError, match=rf"parallel\.context: {kind} models cannot share.*{problem}"):
        share_sequences(model, NoCore())
    tokens = torch.tensor([[1, 2, 3]])
    assert model(tokens)[0].shape == (1, 3, VOCABULARY)  # it still works as before


@pytest.mark.parametrize(
    "asked", [{"softcap": 30.0}, {"s_aux": torch.zeros(4)}, {"dropout": 0.1}], ids=lambda a: str([*a])
)
def test_what_a_config_did_not_say_stops_the_first_forward(asked: dict[str, Any]) -> None:
    operands = [torch.zeros(1, 4, 3, 8) for _ in range(3)]
    module = nn.Module()
    module.config = huggingface("llama").config
    with pytest.raises(ConfigError, match=f"llama models cannot share .* asks for {next(iter(asked))}"):
        attend_through(module, *operands, None, core_plan=(NoCore(), None), **asked)


def test_a_model_without_attention_is_refused() -> None:
    with pytest.raises(TypeError, match="Linear has no attention layer"):
        share_sequences(nn.Linear(2, 2), NoCore())
