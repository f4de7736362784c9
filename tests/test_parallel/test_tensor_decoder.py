"""The built-in decoder shared over tensor ranks against one process, in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.errors import PlanError
from parallel.plans import plan_for
from parallel.shards import shard_of, shards_of
from parallel.styles import VocabularyEmbedding
from parallel.tensor import parallelize
from tests.ranks import run_ranks
from tests.test_parallel.tensor_models import ALL, How, Trained, assert_equal, batch, train, train_shared
from trainsys.config import ModelConfig, MoEConfig
from trainsys.models import blocks, build, materialise
from trainsys.models.decoder import Decoder

SMALL = ModelConfig(num_layers=2, dim=16, num_heads=4, num_kv_heads=4, ffn_dim=24, vocab_size=32, tied_head=False)
VARIANTS = {
    "even": SMALL,
    "tied, grouped": replace(SMALL, num_kv_heads=2, tied_head=True),
    "one key head, odd feed-forward and vocabulary": replace(SMALL, num_kv_heads=1, ffn_dim=23, vocab_size=33),
    "odd and tied": replace(SMALL, num_kv_heads=2, ffn_dim=9, vocab_size=35, tied_head=True),
}


def make(config: ModelConfig) -> Decoder:
    model = build(config, vocab_size=30, max_positions=64, recompute="none", seed=1)
    assert isinstance(model, Decoder)
    return model.double()


def _train_all(rank: int, world_size: int, names: list[str], hows: list[How]) -> list[Trained]:
    return [train_shared(make(VARIANTS[name]), 30, how) for name in names for how in hows]


@pytest.mark.parametrize(
    ("world_size", "names", "hows"),
    [(2, list(VARIANTS), ALL), (4, list(VARIANTS)[2:], [How(False, True), How(True, True, 10)])],
    ids=["2 ranks", "4 ranks"],
)
def test_a_shared_decoder_trains_as_one_process_does(world_size: int, names: list[str], hows: list[How]) -> None:
    cases = [(name, how) for name in names for how in hows]
    results = run_ranks(_train_all, world_size, names, hows, timeout_s=300)
    for (name, how), *ranks in zip(cases, *results, strict=True):
        assert_equal(ranks, train(make(VARIANTS[name]), 30, {}, how.num_steps))


def _share(model: nn.Module, *, sequence: bool = True) -> nn.Module:
    assert dist.group.WORLD is not None
    parallelize(model, plan_for(model), dist.group.WORLD, sequence=sequence, overlap=True)
    return model


def _materialised(rank: int, world_size: int) -> None:
    config = VARIANTS["odd and tied"]
    wanted = _share(build(config, vocab_size=30, max_positions=64, recompute="none", seed=1)).bfloat16()
    with torch.device("meta"):
        model = build(config, vocab_size=30, max_positions=64, recompute="none", seed=1)
    _share(model)
    assert all(parameter.is_meta for parameter in model.parameters())
    materialise(model, torch.device("cpu"), torch.bfloat16, 1)
    assert isinstance(model, Decoder)
    assert model.head.weight is model.embedding.weight
    assert shards_of(model) == shards_of(wanted)
    mine, theirs = dict(model.named_parameters()), dict(wanted.named_parameters())
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def _refusals(rank: int, world_size: int) -> None:
    odd = replace(SMALL, num_heads=3, num_kv_heads=3, head_dim=4)
    with pytest.raises(PlanError, match=r"blocks\.0\.attention: 2 ranks cannot share 3 query heads and 3 key and"):
        _share(make(odd))
    with pytest.raises(PlanError, match=r"allowed: parallel\.tensor of 1, 3"):
        _share(make(odd))
    model = _share(make(SMALL))
    tokens, targets, _ = batch(30, length=7)
    with pytest.raises(ValueError, match=r"2 tensor ranks cannot share 7 tokens evenly; allowed: a multiple of 2"):
        model(tokens, targets_BT=targets)
    with pytest.raises(PlanError, match=r"no way is known to share 0 of Sequential; allowed: the built-in decoder"):
        plan_for(nn.Sequential(nn.Linear(2, 2)))
    assert dist.group.WORLD is not None
    with pytest.raises(PlanError, match=r"parallel\.tensor: nothing\.\*: no module has such a name"):
        parallelize(make(SMALL), {"nothing.*": ()}, dist.group.WORLD, sequence=False, overlap=False)
    tiny = nn.Sequential(nn.Embedding(1, 4))
    with pytest.raises(PlanError, match=r"0: 2 ranks cannot share 1 rows of a vocabulary: the last would have none"):
        parallelize(tiny, {"0": (VocabularyEmbedding(),)}, dist.group.WORLD, sequence=False, overlap=False)


def _tags(rank: int, world_size: int) -> None:
    one_key_head = _share(make(replace(SMALL, num_kv_heads=1)))
    assert isinstance(one_key_head, Decoder)
    qkv = one_key_head.blocks[0].attention.qkv  # type: ignore[union-attr]
    copies = [(run.copy, run.num_copies) for run in shard_of(qkv.weight).dims[0].runs]  # type: ignore[union-attr, arg-type]
    assert copies == [(0, 1), (rank, 2), (rank, 2)]
    assert qkv.row_splits == {"weight": (8, 4, 4)}  # type: ignore[union-attr]
    # Experts are another's to share; what is around them is shared.
    mixed = replace(SMALL, moe=MoEConfig(num_experts=4, top_k=2, ffn_dim=8, num_shared_experts=1, first_dense_layers=1))
    shards = shards_of(_share(make(mixed)))
    assert {name for name, shard in shards.items() if "blocks.1.feed_forward." in name and shard.axes} == set()
    assert shards["blocks.0.feed_forward.down.weight"].axes == ("tensor",)


def _compiled(rank: int, world_size: int) -> None:
    tokens, targets, _ = batch(30)
    for sequence in (False, True):
        found = []
        for compiled in (False, True):
            model = build(
                SMALL,
                vocab_size=30,
                max_positions=64,
                recompute="selective" if sequence else "none",
                seed=1,
            )
            _share(model, sequence=sequence)
            if compiled:
                for block in blocks(model):
                    block.compile(backend="aot_eager", fullgraph=True)  # type: ignore[no-untyped-call]
            loss, _ = model(tokens, targets_BT=targets)
            loss.backward()
            found.append({name: p.grad for name, p in model.named_parameters()})
        torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)  # fp32, other orders of sums


def test_shared_blocks_are_one_graph_for_the_compiler() -> None:
    run_ranks(_compiled, 2)


def _all(rank: int, world_size: int) -> None:
    for check in (_materialised, _refusals, _tags):
        check(rank, world_size)


def test_parts_come_from_the_whole_what_does_not_fit_is_refused_and_copies_are_tagged() -> None:
    run_ranks(_all, 2)


def _dropped(rank: int, world_size: int, sequence: bool) -> Tensor:
    model = make(replace(SMALL, dropout=0.5, num_layers=1))
    _share(model, sequence=sequence)
    kept: list[Tensor] = []
    block = model.blocks[0]
    block.attention.output.register_forward_hook(lambda module, args, y: torch.ones_like(y))  # type: ignore[union-attr]
    block.feed_forward_norm.register_forward_pre_hook(lambda module, args: kept.append(args[0] - entered[0]))  # type: ignore[union-attr]
    entered: list[Tensor] = []
    block.attention_norm.register_forward_pre_hook(lambda module, args: entered.append(args[0]))  # type: ignore[union-attr]
    torch.manual_seed(rank if sequence else 5)
    model(batch(30)[0])
    return kept[0].round().detach()


def test_without_a_sequence_shard_ranks_drop_the_elements_that_one_process_drops() -> None:
    (alone,) = run_ranks(_dropped, 1, False)
    one, other = run_ranks(_dropped, 2, False)
    assert torch.equal(one, alone)
    assert torch.equal(other, alone)
    parts = run_ranks(_dropped, 2, True)
    assert parts[0].shape[1] == parts[1].shape[1] == 6
    assert not torch.equal(parts[0], parts[1])
    whole = torch.cat(parts, 1)
    assert set(whole.unique().tolist()) == {0.0, 2.0}
    assert abs(float((whole == 0).double().mean()) - 0.5) < 0.1  # 384 draws: four standard deviations
