"""Microbenchmarks of collectives: their formulas, the check of results, the table, JSON and Parquet."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist

from parallel import MeshError, ParallelConfig, microbench
from parallel.bench.collectives import main, sizes_of
from parallel.microbench import KINDS, Kind, bandwidths
from tests.ranks import run_ranks
from tests.test_bench_smoke import faults


@pytest.mark.parametrize(
    ("kind", "num_ranks", "bus"),
    [
        # 1 GB in 0.5 s is 2 GB/s; times the factor by hand.
        ("all-reduce", 2, 2.0e9),  # 2 x 1/2
        ("all-reduce", 8, 3.5e9),  # 2 x 7/8
        ("reduce-scatter", 4, 1.5e9),  # 3/4
        ("all-gather", 4, 1.5e9),
        ("all-to-all", 8, 1.75e9),  # 7/8
        ("broadcast", 8, 2.0e9),  # 1
        ("send-recv", 8, 2.0e9),
    ],
)
def test_bandwidths_follow_the_formulas(kind: Kind, num_ranks: int, bus: float) -> None:
    assert bandwidths(kind, num_ranks, 10**9, 0.5) == (2.0e9, pytest.approx(bus, rel=1e-15))


def test_an_axis_or_a_size_of_groups_makes_a_layout() -> None:
    degrees = ParallelConfig(pipeline=2, shard=2, expert=2)
    names = [(layout.name, layout.axis) for layout in microbench.layouts_of(degrees, [2], 4)]
    assert names == [("2 neighbours", "tensor"), ("pipeline", "pipeline"), ("shard", "shard"), ("expert", "expert")]
    with pytest.raises(MeshError, match="multiply to 3"):
        microbench.layouts_of(ParallelConfig(), [3], 4)


def test_sizes_are_read_with_their_units() -> None:
    assert sizes_of("4B,1KiB,2MB, 3") == (4, 1024, 2_000_000, 3)
    for text in ("1TB", "x", "0", "1.5MiB"):
        with pytest.raises(argparse.ArgumentTypeError, match="is no size; like 4B"):
            sizes_of(text)


def _broken(rank: int, world_size: int, kind: Kind) -> tuple[int, int]:
    """Count wrong elements of a right result, and of one on which rank 1 did something else."""
    assert dist.group.WORLD is not None
    counts = []
    for is_broken in (False, True):
        operation, wrong = microbench.OPERATIONS[kind](dist.group.WORLD, 6, torch.bfloat16, torch.device("cpu"))
        if is_broken and rank == 1 and kind == "broadcast":
            operation = lambda: None  # noqa: E731 - rank 1 keeps what it has
        if is_broken and kind == "broadcast" and rank == 0:
            operation = lambda: None  # noqa: E731 - so rank 0 sends nothing
        operation()
        if is_broken and rank == 1 and kind != "broadcast":
            cells = operation.__closure__ or ()
            tensors = [cell.cell_contents for cell in cells if isinstance(cell.cell_contents, torch.Tensor)]
            for tensor in tensors:
                tensor.add_(1)
        num_wrong = wrong()
        dist.all_reduce(num_wrong)
        counts.append(int(num_wrong))
    return counts[0], counts[1]


@pytest.mark.parametrize("kind", KINDS)
def test_a_result_that_is_not_exact_is_counted(kind: Kind) -> None:
    for right, broken in run_ranks(_broken, 2, kind):
        assert right == 0
        assert broken > 0


def test_two_ranks_measure_every_collective_and_write_what_they_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, planner = tmp_path / "out.json", tmp_path / "out.parquet"
    code = main(["--smoke", "--sizes=8,30", "--dtype=bfloat16", f"--json={out}", f"--parquet={planner}"])
    printed = capsys.readouterr().out
    assert code == 0
    assert [line.split()[3] for line in printed.splitlines() if " neighbours  2 " in line] == [
        kind for kind in KINDS for _ in range(2)
    ]
    document = json.loads(out.read_text())
    assert not faults(document)
    assert document["gates"] == [{"name": "wrong elements", "value": 0, "limit": 0, "ok": True}]
    rows = pq.read_table(planner).to_pylist()
    assert [(row["collective"], row["num_bytes"]) for row in rows] == [(kind, n) for kind in KINDS for n in (8, 28)]
    for row in rows:
        assert row["median_s"] > 0
        assert row["algorithm_bytes_per_s"] == row["num_bytes"] / row["median_s"]
        assert (row["group"], row["num_ranks"], row["num_hosts"], row["dtype"]) == ("2 neighbours", 2, 1, "bfloat16")
        assert row["first_call_s"] is None  # the group of all ranks was there


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ranks=1"], "a size is 2 or more and divides the ranks"),
        (["--groups=3", "--ranks=4"], "a size is 2 or more and divides the ranks"),
        (["--tensor=3"], "degrees multiply to 3 (tensor 3) but there are 2 ranks"),
        (["--repeats=0"], "--repeats: at least 1"),
        (["--ranks=2", "--backend=nccl"], "2 ranks need a GPU each; there are"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_the_command_is_there() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "parallel", "bench-collectives", "--kinds=all-duce"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "no collective all-duce; of all-reduce" in done.stderr
