"""Muon: its numbers, and that flat partitions on several ranks give the bits of whole matrices on one."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist

from tests.ranks import run_ranks
from trainsys.muon import Muon, Shard, matched_update, orthogonalise

SETTINGS = {"lr": 0.02, "initial_lr": 0.02, "weight_decay": 0.1}
SHAPES = {"wide": (8, 24), "tall": (24, 8), "stack": (3, 10, 6), "square": (16, 16), "row": (1, 5)}
SPLITS = {"wide": (8,), "tall": (8, 10, 6), "stack": (6, 4), "square": (16,), "row": (1,)}


def weights(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator, dtype=dtype) for name, shape in SHAPES.items()}


def gradient(name: str, step: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + list(SHAPES).index(name))
    return torch.randn(SHAPES[name], generator=generator, dtype=dtype)


def make(parameters: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> Muon:
    group = {"params": list(parameters.values()), "names": list(parameters), "name": "muon", "kind": "muon"}
    return Muon([{**group, **SETTINGS, "momentum": 0.9}], SPLITS, dtype)


def train_whole(
    steps: int, dtype: torch.dtype = torch.float32, iteration: torch.dtype | None = None
) -> dict[str, Tensor]:
    parameters = {name: nn.Parameter(value) for name, value in weights(dtype).items()}
    optimizer = make(dict(parameters), iteration or dtype)
    for step in range(steps):
        for name, parameter in parameters.items():
            parameter.grad = gradient(name, step, dtype)
        optimizer.step()
    return {name: parameter.detach() for name, parameter in parameters.items()}


@pytest.mark.parametrize("shape", [(16, 64), (64, 16), (32, 32), (4, 16, 64)])
def test_orthogonalising_brings_every_singular_value_near_one(shape: tuple[int, ...]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalise(matrix, torch.float32))
    assert float(values.min()) > 0.5
    assert float(values.max()) < 1.5


def test_orthogonalising_keeps_the_singular_vectors() -> None:
    matrix = torch.randn(12, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    u, _, vt = torch.linalg.svd(matrix, full_matrices=False)
    core = u.T @ orthogonalise(matrix, torch.float64) @ vt.T
    torch.testing.assert_close(core, core.diagonal().diag(), rtol=0, atol=1e-12)


def test_the_update_does_not_depend_on_the_gradients_scale_and_none_comes_of_zero() -> None:
    matrix = torch.randn(6, 9)
    update = matched_update(matrix, (6,), torch.float32)
    torch.testing.assert_close(matched_update(matrix * 2**20, (6,), torch.float32), update, rtol=1e-5, atol=1e-6)
    assert matched_update(torch.zeros(6, 9), (6,), torch.float32).abs().max() == 0


@pytest.mark.parametrize("shape", [(64, 64), (64, 256), (256, 64)])
def test_an_elements_step_has_the_size_that_adamw_gives_it(shape: tuple[int, int]) -> None:
    update = matched_update(torch.randn(shape), (shape[0],), torch.float32)
    assert float(update.square().mean().sqrt()) == pytest.approx(0.2, rel=0.25)


def test_stacked_matrices_are_orthogonalised_each_by_itself() -> None:
    stacked = torch.randn(2, 10, 6)
    together = matched_update(stacked, (6, 4), torch.float32)
    for index in range(2):
        for rows in (slice(0, 6), slice(6, 10)):
            alone = matched_update(stacked[index, rows], (rows.stop - rows.start,), torch.float32)
            torch.testing.assert_close(together[index, rows], alone, rtol=1e-5, atol=1e-6)


def test_muon_follows_its_formula_in_float64() -> None:
    wanted = weights(torch.float64)
    momentum = {name: torch.zeros_like(value) for name, value in wanted.items()}
    for step in range(3):
        for name in wanted:
            grad = gradient(name, step, torch.float64)
            momentum[name] = 0.9 * momentum[name] + 0.1 * grad
            update = torch.cat(
                [
                    torch.stack([_newton_schulz(m) for m in matrix.reshape(-1, *matrix.shape[-2:])]).view(matrix.shape)
                    for matrix in (0.1 * grad + 0.9 * momentum[name]).split(SPLITS[name], dim=-2)
                ],
                dim=-2,
            )
            wanted[name] = (1 - 0.02 * 0.1) * wanted[name] - 0.02 * update
    torch.testing.assert_close(train_whole(3, torch.float64), wanted, rtol=1e-12, atol=1e-13)


def _newton_schulz(matrix: Tensor) -> Tensor:
    """The polynomial applied to the singular values, by decomposition instead of products."""
    u, values, vt = torch.linalg.svd(matrix, full_matrices=False)
    values = values / values.square().sum().sqrt()
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return 0.2 * math.sqrt(max(matrix.shape)) * u @ values.diag() @ vt


def test_muon_agrees_with_torchs_own() -> None:
    torch.manual_seed(0)
    start = torch.randn(48, 32)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    group = {"params": [ours], "names": ["m"], "name": "muon", "kind": "muon", **SETTINGS, "momentum": 0.9}
    mine = Muon([group], {"m": (48,)}, torch.bfloat16)
    other = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    for _ in range(5):
        ours.grad = theirs.grad = torch.randn(48, 32)
        mine.step()
        other.step()
    # Both iterate in bf16 and round in another order: singular values may differ by a few 2^-8.
    moved = float((theirs - start).norm().detach())
    assert float((ours - theirs).norm().detach()) < 0.02 * moved


def test_the_adamw_groups_take_torchs_adamw_steps_to_the_bit() -> None:
    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(torch.linspace(-1, 1, 37)) for _ in range(2))
    settings = {"lr": 1e-2, "weight_decay": 0.3, "betas": (0.8, 0.9), "eps": 1e-6}
    mine = Muon([{"params": [ours], "kind": "adamw", "name": "rest", **settings}], {}, torch.float32)
    other = torch.optim.AdamW([{"params": [theirs], **settings}], fused=True)
    for _ in range(4):
        ours.grad = theirs.grad = torch.randn(37)
        mine.step()
        other.step()
    assert torch.equal(ours, theirs)
    assert mine.state[ours].keys() == other.state[theirs].keys()


def test_a_flat_partition_that_was_not_described_is_refused() -> None:
    optimizer = make({"wide": nn.Parameter(torch.zeros(8, 24))})
    flat = nn.Parameter(torch.zeros(96))
    flat.grad = torch.zeros(96)
    optimizer.param_groups[0]["params"] = [flat]  # what ZeRO does to an optimizer it is given
    with pytest.raises(RuntimeError, match=r"flat partition; Muon\.shard"):
        optimizer.step()


def contiguous(rank: int, world_size: int) -> list[list[Shard]]:
    """ZeRO 1 and 2: the group's parameters in a row, cut into equal ranges with padding behind."""
    total = sum(math.prod(shape) for shape in SHAPES.values())
    width = -(-total // world_size) + 3
    shards, position = [], 0
    for name, shape in SHAPES.items():
        first, last = max(position, rank * width), min(position + math.prod(shape), (rank + 1) * width)
        if first < last:
            shards.append(Shard(name, shape, first - position, first - rank * width, last - first))
        position += math.prod(shape)
    return [shards]


def sliced(rank: int, world_size: int) -> list[list[Shard]]:
    """ZeRO 3: two sub-groups, every parameter cut into as many ranges as there are ranks."""
    groups: list[list[Shard]] = []
    for members in (["wide", "tall", "row"], ["stack", "square"]):
        shards, offset = [], 0
        for name in members:
            numel = math.prod(SHAPES[name])
            width = -(-numel // world_size)
            start = min(rank * width, numel)
            shards.append(Shard(name, SHAPES[name], start, offset, min(width, numel - start)))
            offset += width
        groups.append(shards)
    return groups


def train_sharded(
    rank: int, world_size: int, layout: str, iteration: torch.dtype
) -> dict[str, list[tuple[int, Tensor]]]:
    """What this rank owns of each parameter after three steps: (first element, values)."""
    groups = contiguous(rank, world_size) if layout == "contiguous" else sliced(rank, world_size)
    whole = weights()
    holders = []
    for shards in groups:
        size = max((s.offset + s.numel for s in shards), default=0) + 5
        holder = nn.Parameter(torch.zeros(size))
        for s in shards:
            holder.data[s.offset : s.offset + s.numel] = whole[s.name].flatten()[s.start : s.start + s.numel]
        holders.append(holder)
    optimizer = make({name: nn.Parameter(value) for name, value in whole.items()}, iteration)
    world = dist.group.WORLD
    assert world is not None
    optimizer.shard(list(zip(holders, groups, strict=True)), world)
    for step in range(3):
        for holder, shards in zip(holders, groups, strict=True):  # one call a holder, as DeepSpeed does
            holder.grad = torch.zeros_like(holder)
            for s in shards:
                part = gradient(s.name, step).flatten()[s.start : s.start + s.numel]
                holder.grad[s.offset : s.offset + s.numel] = part
            optimizer.param_groups[0]["params"] = [holder]
            optimizer.step()
    owned: dict[str, list[tuple[int, Tensor]]] = {}
    for holder, shards in zip(holders, groups, strict=True):
        for s in shards:
            owned.setdefault(s.name, []).append((s.start, holder.detach()[s.offset : s.offset + s.numel].clone()))
    return owned


def train_in_both_dtypes(rank: int, world_size: int, layout: str) -> list[dict[str, list[tuple[int, Tensor]]]]:
    return [train_sharded(rank, world_size, layout, iteration) for iteration in (torch.float32, torch.bfloat16)]


@pytest.mark.parametrize(("layout", "world_size"), [("contiguous", 3), ("sliced", 2)])
def test_sharded_steps_give_the_bits_of_whole_matrices(layout: str, world_size: int) -> None:
    results = run_ranks(train_in_both_dtypes, world_size, layout)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the ranks: the number of threads decides the order of sums
    both = [train_whole(3, iteration=iteration) for iteration in (torch.float32, torch.bfloat16)]
    torch.set_num_threads(threads)
    for index, wanted in enumerate(both):
        for name, value in wanted.items():
            got = torch.full((value.numel(),), float("nan"))
            for of_rank in results:
                for start, part in of_rank[index].get(name, []):
                    got[start : start + len(part)] = part
            assert torch.equal(got, value.flatten()), name


def describe_a_hole(rank: int, world_size: int) -> str:
    optimizer = make({"wide": nn.Parameter(torch.zeros(8, 24))})
    world = dist.group.WORLD
    assert world is not None
    with pytest.raises(ValueError) as caught:
        optimizer.shard([(torch.zeros(96), [Shard("wide", (8, 24), 96 * rank, 0, 96 - rank)])], world)
    return str(caught.value)


def test_shards_that_do_not_make_up_a_matrix_are_refused_on_every_rank() -> None:
    assert run_ranks(describe_a_hole, 2) == ["wide: shards hold 191 of 192 elements"] * 2
