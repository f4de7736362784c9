"""The decoder against its slow reference, and what it promises of masks, seeds and memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.test_trainsys.decoder_reference import reference_logits
from trainsys.config import ModelConfig, MoEConfig
from trainsys.errors import ConfigError
from trainsys.models import blocks, build, flops_per_token, num_parameters
from trainsys.models.attention import PlainCore, attend, document_mask, set_core
from trainsys.models.decoder import Decoder
from trainsys.models.initialisation import initialise
from trainsys.models.moe import Experts, balance_loss
from trainsys.models.recompute import Recompute

SMALL = ModelConfig(num_layers=2, dim=16, num_heads=4, num_kv_heads=2, ffn_dim=24, vocab_size=32)
EXPERTS = MoEConfig(num_experts=5, top_k=2, num_shared_experts=2, ffn_dim=8, first_dense_layers=1)
VARIANTS = {
    "grouped queries, tied head": SMALL,
    "one key head, wide heads": replace(SMALL, num_kv_heads=1, head_dim=6, tied_head=False),
    "as many key as query heads": replace(SMALL, num_kv_heads=0, rope_theta=100.0),
    "experts after a dense layer": replace(SMALL, moe=EXPERTS),
    "experts everywhere, one a token": replace(SMALL, moe=MoEConfig(num_experts=3, top_k=1, balance_weight=0.5)),
}
TOKENS = torch.randint(0, 32, (2, 10), generator=torch.Generator().manual_seed(1))
DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 0, 0, 2], [5, 5, 5, 5, 5, 5, 5, 5, 6, 6]])
POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0, 1, 0], [3, 4, 5, 6, 7, 8, 9, 10, 0, 1]])


def make(config: ModelConfig, *, seed: int = 0, checkpointing: bool = False, std: float = 0.4) -> Decoder:
    """A float64 decoder with weights large enough that attention and routing are far from uniform."""
    model = build(config, vocab_size=32, max_positions=64, recompute="full" if checkpointing else "none", seed=seed)
    assert isinstance(model, Decoder)
    initialise(model, num_layers=1, seed=seed, std=std)
    return model.double()


def gradients(model: nn.Module, output: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Gradients of a loss that weighs every logit differently."""
    logits, aux_loss = output
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2), dtype=logits.dtype)
    model.zero_grad()
    ((logits * weights).sum() + aux_loss).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("packed", [True, False])
def test_the_decoder_equals_its_reference_in_outputs_and_every_gradient(config: ModelConfig, packed: bool) -> None:
    model = make(config)
    documents = DOCUMENTS if packed else torch.zeros_like(DOCUMENTS)
    positions = POSITIONS if packed else torch.arange(10).expand(2, 10)

    wanted = reference_logits(dict(model.named_parameters()), model.config, TOKENS, documents, positions)
    wanted_gradients = gradients(model, wanted)
    boundaries = {"positions_BT": positions, "document_ids_BT": documents} if packed else {}
    got = model(TOKENS, **boundaries)

    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    got_gradients = gradients(model, got)
    assert got_gradients.keys() == wanted_gradients.keys() == {name for name, _ in model.named_parameters()}
    torch.testing.assert_close(got_gradients, wanted_gradients, rtol=1e-12, atol=1e-11)


def test_packed_documents_give_the_logits_that_each_document_gives_alone() -> None:
    model = make(SMALL)
    packed, _ = model(TOKENS, positions_BT=POSITIONS, document_ids_BT=DOCUMENTS)
    for start, stop in ((0, 3), (3, 7), (7, 9), (9, 10)):
        alone, _ = model(TOKENS[:1, start:stop])
        torch.testing.assert_close(packed[:1, start:stop], alone, rtol=1e-12, atol=1e-12)


def test_no_token_sees_a_later_token_or_another_document() -> None:
    model = make(replace(SMALL, moe=EXPERTS))
    embedded = model.embedding(TOKENS).detach().requires_grad_()
    model.embedding.register_forward_hook(lambda module, inputs, output: embedded)
    logits, _ = model(TOKENS, document_ids_BT=DOCUMENTS)
    (grad,) = torch.autograd.grad(logits[0, 5].sum(), embedded)
    assert [position for position in range(10) if grad[0, position].abs().max() > 0] == [3, 4, 5]
    assert grad[1].abs().max() == 0


def test_a_document_id_that_comes_back_is_another_document() -> None:
    mask = document_mask(torch.tensor([[0, 1, 0]]), torch.float32)
    assert mask is not None
    inf = float("inf")
    assert mask.tolist() == [[[[0, -inf, -inf], [-inf, 0, -inf], [-inf, -inf, 0]]]]


def test_ids_without_a_boundary_need_no_mask() -> None:
    assert document_mask(torch.tensor([[3, 3], [4, 4]]), torch.float32) is None
    assert document_mask(None, torch.float32) is None


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_bf16_attention_by_products_is_as_accurate_as_its_inputs(masked: bool, kv_heads: int) -> None:
    torch.manual_seed(0)
    heads = (4, kv_heads, kv_heads)
    query, key, value = (torch.randn(2, count, 48, 16, requires_grad=True) for count in heads)
    ids = torch.arange(48).div(20, rounding_mode="floor").expand(2, 48)
    out_grad = torch.randn(2, 4, 48, 16)

    def run(dtype: torch.dtype) -> tuple[Tensor, ...]:
        mask = document_mask(ids, dtype) if masked else None
        out = attend(query.to(dtype), key.to(dtype), value.to(dtype), mask)
        return out, *torch.autograd.grad(out, (query, key, value), out_grad.to(dtype))

    # bf16 keeps 8 bits, so operands, scores and shares are each off by up to 2^-9; sums of a few such errors
    # stay under 2^-5 of the largest value.
    for exact, rounded in zip(run(torch.float64), run(torch.bfloat16), strict=True):
        assert (exact - rounded).abs().max() <= 2**-5 * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_in_a_production_dtype_follows_float64(dtype: torch.dtype) -> None:
    model = make(replace(SMALL, moe=EXPERTS), std=0.1)
    with torch.no_grad():
        wanted, wanted_aux = model(TOKENS, document_ids_BT=DOCUMENTS)
        got, got_aux = model.to(dtype)(TOKENS, document_ids_BT=DOCUMENTS)
    assert got.dtype == dtype
    assert got_aux.dtype == torch.float32
    # Two layers round every activation about ten times, each to half a unit in the last place.
    allowed = 10 * torch.finfo(dtype).eps * float(wanted.abs().max())
    torch.testing.assert_close(got.double(), wanted, rtol=0, atol=allowed)
    torch.testing.assert_close(got_aux.double(), wanted_aux, rtol=100 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("config", [SMALL, replace(SMALL, dropout=0.3), replace(SMALL, moe=EXPERTS)])
def test_recomputation_changes_no_bit(config: ModelConfig) -> None:
    results = []
    for checkpointing in (False, True):
        model = make(config, checkpointing=checkpointing)
        torch.manual_seed(3)
        output = model(TOKENS, document_ids_BT=DOCUMENTS)
        results.append((output, gradients(model, output)))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


def test_recomputation_keeps_one_activation_a_block() -> None:
    def saved_elements(checkpointing: bool) -> int:
        model = make(replace(SMALL, num_layers=4), checkpointing=checkpointing)
        sizes: list[int] = []

        def note(tensor: Tensor) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            model(TOKENS)
        return sum(sizes)

    assert saved_elements(True) < saved_elements(False) / 4


@pytest.mark.filterwarnings("ignore")  # what dynamo does to tensors and functions makes torch warn
@pytest.mark.parametrize("config", [SMALL, replace(SMALL, moe=EXPERTS)], ids=["dense", "experts"])
def test_compiled_blocks_change_no_bit_and_no_name(config: ModelConfig) -> None:
    eager, compiled = (make(config).bfloat16() for _ in range(2))
    for block in blocks(compiled):
        block.compile(backend="aot_eager", fullgraph=True)
    outputs = [model(TOKENS, document_ids_BT=DOCUMENTS) for model in (eager, compiled)]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=0)
    wanted, got = (gradients(model, output) for model, output in zip((eager, compiled), outputs, strict=True))
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)


class OutsideGraphs(PlainCore):
    """A core that compiled code calls as it is, as it does those of ranks that share sequences."""

    __call__ = torch.compiler.disable(PlainCore.__call__)  # type: ignore[assignment]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_blocks_are_compiled_once_for_all_around_a_core_that_is_not(recompute: Recompute) -> None:
    """Eleven blocks: one more than dynamo compiles anew before it gives up."""
    config = replace(SMALL, num_layers=11)
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    found = []
    for is_compiled in (False, True):
        model = build(config, vocab_size=32, max_positions=64, recompute=recompute, seed=0).double()
        set_core(model, OutsideGraphs(4))
        for block in blocks(model) if is_compiled else ():
            block.compile(backend=backend)
        found.append(gradients(model, model(TOKENS)))
    assert 0 < len(graphs) <= 5, "parts of one block"
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-13)


def test_dropout_acts_in_training_only() -> None:
    model = make(replace(SMALL, dropout=0.5))
    assert not torch.equal(model(TOKENS)[0], model(TOKENS)[0])
    model.eval()
    assert torch.equal(model(TOKENS)[0], model(TOKENS)[0])


def test_weights_depend_on_seed_and_name_alone() -> None:
    one = dict(build_small(SMALL, seed=7).named_parameters())
    torch.manual_seed(99)
    deeper = dict(build_small(replace(SMALL, num_kv_heads=4), seed=7).named_parameters())
    other = dict(build_small(SMALL, seed=8).named_parameters())
    assert torch.equal(one["embedding.weight"], deeper["embedding.weight"])
    gate_up = "blocks.{}.feed_forward.gate_up.weight"
    assert torch.equal(one[gate_up.format(1)], deeper[gate_up.format(1)])
    assert not torch.equal(one["embedding.weight"], other["embedding.weight"])
    assert not torch.equal(one[gate_up.format(0)], one[gate_up.format(1)])


def build_small(config: ModelConfig, *, seed: int = 0) -> nn.Module:
    return build(config, vocab_size=30, max_positions=64, recompute="none", seed=seed)


def test_building_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    build_small(SMALL)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("dim", "std"), [(128, 0.05), (1024, 1 / 32)])
def test_initial_spread_is_as_documented(dim: int, std: float) -> None:
    config = ModelConfig(num_layers=8, dim=dim, num_heads=1, head_dim=32, ffn_dim=64, vocab_size=512)
    model = build(config, vocab_size=512, max_positions=8, recompute="none", seed=0)
    for name, parameter in model.requires_grad_(False).named_parameters():
        if parameter.ndim == 1:
            assert bool((parameter == 1).all()), name
            continue
        wanted = std / 4 if "output" in name or "down" in name else std
        assert float(parameter.std()) == pytest.approx(wanted, rel=0.05), name
        assert float(parameter.abs().max()) <= 3 * wanted, name


def test_a_model_on_the_meta_device_has_names_and_shapes_but_no_memory() -> None:
    with torch.device("meta"):
        empty = build_small(SMALL)
    full = build_small(SMALL)
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert {n: p.shape for n, p in empty.named_parameters()} == {n: p.shape for n, p in full.named_parameters()}


def test_the_vocabulary_is_rounded_up_to_64_rows_and_a_tied_head_shares_them() -> None:
    model = build(replace(SMALL, vocab_size=0), vocab_size=257, max_positions=8, recompute="none", seed=0)
    assert isinstance(model, Decoder)
    assert model.embedding.weight.shape == (320, 16)
    assert model.head.weight is model.embedding.weight


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused_with_both_numbers() -> None:
    with pytest.raises(ConfigError, match=r"model\.vocab_size: 32 is under the tokenizer's 33 tokens"):
        build(SMALL, vocab_size=33, max_positions=8, recompute="none", seed=0)


def test_more_tokens_than_positions_are_refused() -> None:
    model = build(SMALL, vocab_size=32, max_positions=9, recompute="none", seed=0)
    with pytest.raises(ValueError, match="10 tokens do not fit the model's limit of 9 positions"):
        model(TOKENS)


def test_blocks_are_the_layers_in_order() -> None:
    model = make(SMALL)
    assert [block.layer for block in blocks(model)] == [0, 1]


def test_flops_are_three_times_the_products_of_a_forward() -> None:
    """Products are counted by torch, on the path that writes attention as products."""
    for config in (replace(SMALL, tied_head=False), SMALL, replace(SMALL, moe=EXPERTS)):
        model = make(config)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            model(TOKENS)
        length = TOKENS.shape[1]
        half_scores = 2 * config.num_layers * length * config.dim  # torch counts all T^2 scores, the formula half
        weighing = 2 * config.moe.top_k * config.dim if config.moe.num_experts else 0  # of the chosen outputs
        forward = counter.get_total_flops() // TOKENS.numel() - half_scores - weighing
        assert flops_per_token(model, length) == 3 * forward


def test_parameters_are_counted_once_when_shared() -> None:
    tied, untied = make(SMALL), make(replace(SMALL, tied_head=False))
    assert num_parameters(untied) - num_parameters(tied) == 32 * 16


def test_an_expert_without_tokens_gets_a_gradient_of_zeros() -> None:
    experts = Experts(4, 6, 3)
    initialise(experts, num_layers=1, seed=0, std=0.1)
    mapped = experts(torch.randn(5, 4), torch.tensor([2, 0, 3]))
    mapped.backward(torch.randn_like(mapped))
    for parameter in experts.parameters():
        assert parameter.grad is not None
        assert parameter.grad[1].abs().max() == 0
        assert parameter.grad[0].abs().max() > 0


def test_the_balance_loss_is_one_when_balanced_and_the_number_of_experts_when_collapsed() -> None:
    assert float(balance_loss(torch.full((6, 4), 0.25), torch.tensor([3, 3, 3, 3]))) == pytest.approx(1)
    collapsed = torch.tensor([[1.0, 0, 0, 0]]).expand(6, 4)
    assert float(balance_loss(collapsed, torch.tensor([6, 0, 0, 0]))) == pytest.approx(4)
