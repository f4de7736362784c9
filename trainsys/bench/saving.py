"""Saving in every step must cost the loop next to nothing: `tiny` with its saves against `tiny` without.

    python -m trainsys.bench.saving [--repeats PAIRS] [--block STEPS] [--json FILE] [--smoke] [RECIPE… --key=value…]

trains one job of the recipe, by default `tiny --launch.kind=local`, through the whole trainer. In every second block of
steps the state is saved after each step, in the others never; nothing else differs. A save is written while the next
step runs, so the first step of each block, which may still carry the block before, is not counted.

- `step`: seconds from the end of a step to the end of the next, as rank 0 sees it, mean of a block.
- `slowdown`: a block with saves over the mean of the blocks without before and after it. The gate takes the median of
  the pairs; `trimmed` is the mean of the middle half.
- `CPU a save`: seconds of CPU that a rank's process took for a step with a save, more than for one without; a block.
- bound: these CPU seconds of all ranks over what all cores have in a step. It is what a machine loses whose cores are
  all busy computing, however well the rest is hidden.

Gates: the last step's checkpoint verifies to the last byte; slowdown at most 1.03.
"""

from __future__ import annotations

import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import launch
from checkpoint import Checkpointer
from checkpoint.bench import Bound, Gate, Report, arguments
from launch import Job, RankContext
from trainsys import folder, recipe, trainer
from trainsys.check import check, num_ranks
from trainsys.recipe import Resolved
from trainsys.session import rank_payload, threads_per_rank

_DEFAULT = ("tiny", "--launch.kind=local")
_QUIET = ("--evaluation.sequences=0", "--evaluation.sample_tokens=0", "--metrics.every=1000000")
"""Nothing but steps and saves, so that blocks differ in nothing else."""
_SMOKE = (
    *_DEFAULT,
    *("--model.num_layers=1", "--model.dim=32", "--model.num_heads=2", "--model.num_kv_heads=1", "--model.ffn_dim=64"),
    *("--data.sequence_length=32", "--engine.precision=fp32", "--schedule.warmup_steps=1"),
)
_LIMIT = 1.03


@dataclass(frozen=True, slots=True)
class Block:
    """A block of steps as one rank saw it, without its first step."""

    saves: bool
    step_s: float
    """Mean of its steps."""
    cpu_s: float
    """Of this rank's process, a step."""


def main(given: list[str]) -> int:
    """Run the benchmark and print its table; 1 where a correctness gate fails."""
    parser = arguments(__doc__)
    parser.set_defaults(repeats=10)
    parser.add_argument("--block", type=int, default=8, help="counted steps of a block (default: %(default)s)")
    options, settings = parser.parse_known_args(given)
    if options.repeats < 1 or options.block < 1:
        parser.error("--repeats, --block: allowed are integers from 1")
    pairs, size = (2, 2) if options.smoke else (options.repeats, options.block)
    with tempfile.TemporaryDirectory(prefix="bench-saving-") as scratch:
        resolved = _resolve(settings, Path(scratch), pairs, size, smoke=options.smoke)
        ranks = _train(resolved, size)
        is_whole = _is_last_saved(Path(resolved.config.run_dir), resolved.config.steps)
    report = _report(resolved, ranks, pairs, size)
    report.gates.append(Gate("the last step's checkpoint verifies", float(is_whole), 1.0, is_whole))
    report.show()
    if options.json:
        report.write(options.json)
    return 0 if is_whole else 1


def run_rank(context: RankContext, payload: Mapping[str, Any]) -> list[list[float]]:
    """Train on this rank; (seconds, CPU seconds) at the end of every step. The launcher's entry."""
    size, marks = payload["block"], []

    def should_save(checkpointer: Checkpointer, step: int) -> bool:
        marks.append([time.perf_counter(), time.process_time()])
        return _block_of(step, size) % 2 == 0

    # The trainer asks it once a step, when the step is over: the only thing that differs from the recipe's own run.
    Checkpointer.should_save = should_save  # type: ignore[assignment,method-assign]
    trainer.run_rank(context, payload)
    return marks


def _block_of(step: int, size: int) -> int:
    """Return the block of a step (from 1) whose end decides about a save; block 0 warms up."""
    return (step - 1) // (size + 1)


def blocks(marks: Sequence[Sequence[float]], size: int) -> list[Block]:
    """Return the blocks after the first from the marks of all steps; pure."""
    found = []
    for index in range(1, len(marks) // (size + 1)):
        # A save asked for at the end of a step runs in the step after: the second interval is the first to count.
        first = index * (size + 1) + 1
        last = min(first + size, len(marks) - 1)
        wall_s, cpu_s = ((b - a) / (last - first) for a, b in zip(marks[first], marks[last], strict=True))
        found.append(Block(index % 2 == 0, wall_s, cpu_s))
    return found


def slowdowns(found: Sequence[Block]) -> list[float]:
    """Return each block with saves over the mean of its neighbours without; pure."""
    ratios = []
    for before, block, after in zip(found, found[1:], found[2:], strict=False):
        if block.saves:
            ratios.append(2 * block.step_s / (before.step_s + after.step_s))
    return ratios


def _resolve(settings: Sequence[str], scratch: Path, pairs: int, size: int, *, smoke: bool) -> Resolved:
    if smoke:
        corpus = scratch / "corpus"
        corpus.mkdir()
        for index in range(40):
            (corpus / f"{index}.txt").write_text(f"the quick brown fox jumps over {index} lazy dogs\n" * 10)
        settings = [*_SMOKE, f"--data.path={corpus}"]
    words = [*(settings or _DEFAULT), *_QUIET, f"--run_dir={scratch / 'run'}"]
    # One block warms up; a block without saves is on both sides of each with saves.
    words.append(f"--steps={(2 * pairs + 2) * (size + 1) + 1}")
    overrides = [word for word in words if word.startswith("--")]
    resolved = recipe.load([word for word in words if word not in overrides], overrides)
    check(resolved.config)
    return resolved


def _train(resolved: Resolved, size: int) -> list[list[Block]]:
    """Run the job; the blocks of every rank."""
    config = resolved.config
    with folder.open_run(resolved, resume=False) as run:
        payload = rank_payload(config, run, resume=False, threads=threads_per_rank(config))
        job = Job(
            entry="trainsys.bench.saving:run_rank",
            payload={**payload, "block": size},
            world_size=num_ranks(config.parallel),
            log_dir=run.logs,
            name=config.name,
        )
        done = launch.run(
            job, config.launch, heartbeat_interval_s=config.faulttol.heartbeat_interval_s, on_output=lambda _: None
        )
    return [blocks(marks, size) for marks in done.results]


def _is_last_saved(run_dir: Path, step: int) -> bool:
    with Checkpointer(run_dir / "checkpoints") as checkpointer:
        newest = checkpointer.latest(verify="deep")
    return newest is not None and newest.step == step


def _report(resolved: Resolved, ranks: list[list[Block]], pairs: int, size: int) -> Report:
    config = resolved.config
    report = Report("trainsys.saving", {"pairs": pairs, "block": size, "config": recipe.to_tree(config)})
    for block in ranks[0]:
        report.add("with saves" if block.saves else "without", "step", "s", block.step_s)
    ratios = slowdowns(ranks[0])
    for ratio in ratios:
        report.add(config.name, "slowdown", "ratio", ratio)
    quarter = len(ratios) // 4
    trimmed = statistics.fmean(sorted(ratios)[quarter : len(ratios) - quarter])
    report.add(config.name, "slowdown, trimmed", "ratio", trimmed)
    costs = []
    for rank, found in enumerate(ranks):
        for with_saves, without in itertools.pairwise(found):
            if with_saves.saves:
                report.add(f"rank {rank}", "CPU a save", "s", with_saves.cpu_s - without.cpu_s)
        costs.append(report.median(f"rank {rank}", "CPU a save"))
    step_s, cores = report.median("without", "step"), os.cpu_count() or 1
    how = f"CPU of all ranks' saves over the time of {cores} cores in a step of {step_s:.3g} s"
    report.bounds.append(Bound("slowdown", 1 + sum(costs) / (cores * step_s), "ratio", how))
    median = report.median(config.name, "slowdown")
    report.gates.append(Gate("slowdown by a save in every step", median, _LIMIT, median <= _LIMIT))
    return report


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
