"""Which engine runs which layout."""

from __future__ import annotations

from pathlib import Path

import pytest

import parallel
from parallel import ParallelConfig, ParallelError
from parallel.legal import ROWS, choose, describe, refusals, table


def test_deepspeed_is_taken_where_it_can_and_torch_elsewhere() -> None:
    assert choose(ParallelConfig(tensor=2, replicate=2), 3) == "deepspeed"
    assert choose(ParallelConfig(pipeline=2), 1) == "deepspeed"
    assert choose(ParallelConfig(pipeline=2), 2) == "torch"
    assert choose(ParallelConfig(replicate=2, expert=2), 2) == "deepspeed"
    assert choose(ParallelConfig(replicate=2, expert=2), 3) == "torch"
    assert choose(ParallelConfig(replicate=2, shard=2), 3) == "torch"
    assert choose(ParallelConfig(tensor=2), 0, "torch") == "torch"


def test_what_cannot_run_is_refused_with_every_reason() -> None:
    with pytest.raises(ParallelError, match=r"PP with ZeRO 3 does not run on deepspeed: .*; allowed: torch"):
        choose(ParallelConfig(pipeline=2), 3, "deepspeed")
    with pytest.raises(ParallelError, match=r"deepspeed: it reduces .*; torch: it offloads nothing"):
        choose(ParallelConfig(pipeline=2), 3, "auto", {"torch": "it offloads nothing"})


def test_the_table_has_a_line_for_every_row_and_a_reason_for_every_refusal() -> None:
    lines = table().splitlines()
    assert len([line for line in lines if "deepspeed  " in line]) == len(ROWS)
    reasons = {reason for row in ROWS for stage in range(4) for reason in refusals(row, stage).values()}
    assert all(any(reason in line for line in lines) for reason in reasons)


def test_layouts_are_called_by_their_kinds() -> None:
    assert describe(ParallelConfig()) == "1 rank"
    assert describe(ParallelConfig(pipeline=2, tensor=2, context=2, shard=4, expert=4)) == "TP x PP x CP x EP x DP"


def test_the_readme_has_the_table_as_it_is() -> None:
    readme = Path(parallel.__file__).with_name("README.md").read_text(encoding="utf-8")
    assert f"```text\n{table()}\n```" in readme
