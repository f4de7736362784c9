"""A state that goes from world to world, its layout another in each, is bit for bit what it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import checkpoint
from checkpoint import CheckpointConfig, Checkpointer
from checkpoint.layout import Layout, fused, grouped_qkv, padded, split, whole
from checkpoint.state import BoxSlice, FlatSlice, LayoutSlice, RankLocal, Replica, TensorLike
from tests.ranks import run_ranks
from tests.test_checkpoint.worlds import bounds, local_part

HIDDEN = 6
WORLDS = [1, 4, 3, 2, 1]
DEGREES = {1: (1, 1), 2: (2, 1), 3: (1, 3), 4: (2, 2)}
"""World size to data and tensor parallel degree."""
SHAPES = {
    "qkv": (48, HIDDEN),  # as [q | k | v]: 12 heads, 6 groups, heads of 2
    "gate_up": (24, HIDDEN),
    "down": (HIDDEN, 12),
    "embedding": (17, HIDDEN),  # padded to 18
    "experts": (5, 24, HIDDEN),
}
MESHED = (7, 5)


def layout_of(name: str, rank: int, degree: int) -> Layout:
    """Return where a tensor-parallel rank's part of a parameter lies in it."""
    if name == "qkv":
        return (grouped_qkv(12, 6, 2, rank, degree), whole(HIDDEN))
    if name == "gate_up":
        return (fused([12, 12], rank, degree), whole(HIDDEN))
    if name == "down":
        return (whole(HIDDEN), split(12, rank, degree))
    if name == "embedding":
        return (padded(17, 18, rank, degree), whole(HIDDEN))
    return (split(5, rank, degree), fused([12, 12], 0, 1), whole(HIDDEN))


def values() -> dict[str, torch.Tensor]:
    """Return the whole tensors: random bits, so that no arithmetic could leave them equal by luck."""
    generator = torch.Generator().manual_seed(1)

    def bits(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randint(-(2**31), 2**31, shape, generator=generator, dtype=torch.int64).to(torch.int32)

    found = {"norm": bits((HIDDEN,)), "step": torch.tensor(7.0), "meshed": bits(MESHED), "boxed": bits((6, 12))}
    for name, shape in SHAPES.items():
        found[name] = bits(shape)
        found[f"{name}.exp_avg"] = bits(shape)
        found[f"{name}.exp_avg_sq"] = bits(shape)
    return found


def state(whole_values: dict[str, torch.Tensor], rank: int, world_size: int) -> dict[str, TensorLike]:
    """Return a rank's part: data over tensor parallel, moments partitioned as ZeRO does, in two ways."""
    data, tensor = DEGREES[world_size]
    data_rank, tensor_rank = divmod(rank, tensor)
    found: dict[str, TensorLike] = {name: whole_values[name].clone() for name in ("norm", "step")}
    for name in SHAPES:
        layout = layout_of(name, tensor_rank, tensor)
        part = local_part(whole_values[name], layout)
        found[name] = Replica(LayoutSlice(part, layout), data_rank, data)
        flat = local_part(whole_values[f"{name}.exp_avg"], layout).flatten()
        start, stop = bounds(len(flat), data_rank, data)
        found[f"{name}.exp_avg"] = LayoutSlice(flat[start:stop].clone(), layout, start)
        flat = whole_values[f"{name}.exp_avg_sq"].flatten()
        start, stop = bounds(len(flat), rank, world_size)
        found[f"{name}.exp_avg_sq"] = FlatSlice(flat[start:stop].clone(), SHAPES[name], start)
    found["head"] = found["embedding"]
    left, right = bounds(12, tensor_rank, tensor)
    box = whole_values["boxed"][:, left:right].clone()
    found["boxed"] = Replica(BoxSlice(box, (6, 12), (0, left)), data_rank, data)
    found["meshed"] = meshed(whole_values["meshed"], rank, world_size)
    found["rng"] = RankLocal(torch.full((3,), rank))
    return found


def meshed(values: torch.Tensor, rank: int, world_size: int) -> TensorLike:
    """Return a rank's part as a DTensor of a mesh with two dimensions; where ranks do not make one, as rows."""
    if world_size % 2:  # importing DTensor takes seconds in each of many ranks
        first, last = bounds(MESHED[0], rank, world_size)
        return BoxSlice(values[first:last].clone(), MESHED, (first, 0))
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2, world_size // 2))
    placements = [Shard(0), Shard(1)] if world_size == 4 else [Shard(1), Replicate()]
    return distribute_tensor(values.clone(), mesh, placements, src_data_rank=None)


def memory(value: Any) -> torch.Tensor:
    """Return the tensor in which an entry's values lie on this rank."""
    while not isinstance(value, torch.Tensor):
        value = value.value if isinstance(value, Replica) else value.tensor
    return value.to_local() if hasattr(value, "to_local") else value


def test_one_to_four_to_three_to_two_to_one_ranks_are_bit_equal(tmp_path: Path):
    for step, world_size in enumerate(WORLDS, start=1):
        run_ranks(_load_and_save, world_size, str(tmp_path), step)
        expected = values()
        expected["head"] = expected["embedding"]
        found = checkpoint.read(tmp_path)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        assert checkpoint.verify(tmp_path).ok
        (newest,) = tmp_path.glob(f"step-{step:08d}.*")
        written = sum(_data_bytes(path) for path in newest.glob("*.safetensors"))
        rng = world_size * 3 * 8
        assert written == sum(tensor.nbytes for tensor in values().values()) + rng  # of ties and copies, one


def _data_bytes(shard: Path) -> int:
    """Return the bytes of a safetensors file behind its header."""
    data = shard.read_bytes()
    return len(data) - 8 - int.from_bytes(data[:8], "little")


def _load_and_save(rank: int, world_size: int, root: str, step: int) -> None:
    config = CheckpointConfig(commit_timeout_s=30, keep_last=1)
    with Checkpointer(root, config=config, rank=rank, world_size=world_size, run_id=f"launch {step}") as ck:
        expected = state(values(), rank, world_size)
        mine = expected
        info = ck.latest("deep")
        if info is not None:
            blank = {name: torch.full_like(tensor, -7) for name, tensor in values().items()}
            mine = state(blank, rank, world_size)
            ck.load(info, mine)
            for name, value in expected.items():
                assert torch.equal(memory(mine[name]), memory(value)), name
        ck.save(step, mine)


# A run


def test_a_run_resumed_on_other_worlds_follows_the_same_loss_curve(tmp_path: Path):
    (expected,) = run_ranks(_train, 1, str(tmp_path / "one"), 9)
    found: list[float] = []
    for world_size, last_step in ((1, 3), (3, 6), (2, 9)):
        found += run_ranks(_train, world_size, str(tmp_path / "many"), last_step)[0]
    assert len(found) == len(expected) == 9
    # The sum over ranks of the gradient is in another order than over samples.
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-12, atol=0)
    assert found[-1] < found[0] / 2


def _train(rank: int, world_size: int, root: str, last_step: int) -> list[float]:
    """Train to a step from where the newest checkpoint is: data parallel, moments partitioned; return the losses."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(12, 8, generator=generator, dtype=torch.float64)
    targets = inputs @ torch.randn(8, 5, generator=generator, dtype=torch.float64)
    weight = torch.zeros(5, 8, dtype=torch.float64, requires_grad=True)
    start, stop = bounds(weight.numel(), rank, world_size)
    part = torch.nn.Parameter(weight.detach().view(-1)[start:stop])
    optimizer = torch.optim.AdamW([part], lr=0.1)
    part.grad = torch.zeros_like(part)
    optimizer.step()  # makes its state, which a load fills
    moments = optimizer.state[part]
    state: dict[str, TensorLike] = {"weight": weight, "step": moments["step"]}
    state |= {name: FlatSlice(moments[name], (5, 8), start) for name in ("exp_avg", "exp_avg_sq")}
    for tensor in (weight.detach(), *moments.values()):
        tensor.zero_()
    losses = []
    config = CheckpointConfig(commit_timeout_s=30)
    with Checkpointer(root, config=config, rank=rank, world_size=world_size, run_id=f"to {last_step}") as ck:
        info = ck.latest()
        first_step = ck.load(info, state).step if info else 0
        for step in range(first_step + 1, last_step + 1):
            share = slice(*bounds(len(inputs), rank, world_size))
            loss = (inputs[share] @ weight.T - targets[share]).square().sum() / targets.numel()
            (gradient,) = torch.autograd.grad(loss, weight)
            total = torch.cat([loss.detach().view(1), gradient.flatten()])
            torch.distributed.all_reduce(total)
            part.grad = total[1 + start : 1 + stop]
            ck.fence()
            optimizer.step()
            updated = torch.zeros(weight.numel(), dtype=torch.float64)
            updated[start:stop] = part.detach()
            torch.distributed.all_reduce(updated)  # of each element one rank has more than zero
            weight.detach().view(-1).copy_(updated)
            losses.append(float(total[0]))
            ck.save(step, state)
    return losses
