"""What a save writes when most of the state is as it was.

Claim: with `delta` a save writes what changed, by 8 MiB, and costs the comparison of the rest; a state that changes
everywhere is saved as fast as without.

Baseline: the same saves without `delta`, by turns, in one process, one state each:

- `lora`: a base that is frozen; adapters and their moments, 1 % of the base each, are updated.
- `embedding`: two tables, a parameter and its moments, of which a step touches a few rows in one place.
- `dense`: everything is updated.

After each save the state is changed as described. `written` is the shard's tensors in MB, `staged` the seconds from the
call until the fence would let go, `durable` until the commit. The first save of each case, in which there is nothing to
refer to, is not counted. Every checkpoint left is read back and compared.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import checkpoint
from checkpoint import CheckpointConfig, Checkpointer
from checkpoint.bench import Gate, Report, arguments

_MIB = 1 << 20

State = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Case:
    """A state and what a training step does to it."""

    name: str
    state: State
    change: Callable[[int], None]
    """Changes the state after a step."""


def main() -> int:
    """Run the benchmark; return 1 if a checkpoint is not what was saved."""
    parser = arguments(__doc__)
    parser.add_argument("--mib", type=int, default=512, help="size of each state (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="on the disk to be measured (default: the temporary folder)")
    options = parser.parse_args()
    mib, repeats = (16, 1) if options.smoke else (options.mib, options.repeats)
    if mib < 16 or repeats < 1:
        parser.error("--mib: at least 16; --repeats: at least 1")
    report = Report("checkpoint.delta", {"state_mib": mib, "repeats": repeats, "threads": torch.get_num_threads()})
    wrong = 0
    for make in (lora, embedding, dense):
        with tempfile.TemporaryDirectory(dir=options.folder, prefix="delta-") as folder:
            wrong += measure(report, make(mib * _MIB // 4), Path(folder), repeats)
    judge(report, wrong)
    report.show()
    if options.json:
        report.write(options.json)
    return int(wrong > 0)


def lora(numel: int) -> Case:
    """Return a frozen base with adapters that train."""
    state = {f"base.{i}": torch.randn(numel // 32) for i in range(31)}
    trained = {f"adapter.{i}.{kind}": torch.randn(numel // 3200) for i in range(31) for kind in ("w", "m", "v")}
    return Case("lora", state | trained, lambda step: _update(trained))


def embedding(numel: int) -> Case:
    """Return tables of which a step touches rows near to each other."""
    tables = {f"embedding.{kind}": torch.randn(numel // 3 // 256, 256) for kind in ("w", "m", "v")}

    def change(step: int) -> None:
        rows = len(tables["embedding.w"])
        first = step * 7919 % rows
        _update({name: table[first : first + 16] for name, table in tables.items()})

    return Case("embedding", tables, change)


def dense(numel: int) -> Case:
    """Return a state that changes everywhere."""
    state = {f"layer.{i}": torch.randn(numel // 32) for i in range(32)}
    return Case("dense", state, lambda step: _update(state))


def measure(report: Report, case: Case, folder: Path, repeats: int) -> int:
    """Save with and without by turns; return how many checkpoints were not what was saved."""
    wrong = 0
    savers = {
        name: Checkpointer(folder / name, config=CheckpointConfig(delta=name == "delta", keep_last=2))
        for name in ("plain", "delta")
    }
    for step in range(1, repeats + 2):
        for name, saver in savers.items():
            stats = saver.save(step, case.state).stats()
            if step > 1:
                report.add(f"{case.name}, {name}", "written", "MB", stats.written_bytes / 1e6)
                report.add(f"{case.name}, {name}", "staged", "s", stats.staged_s)
                report.add(f"{case.name}, {name}", "durable", "s", stats.durable_s)
        if step <= repeats:
            case.change(step)
    for saver in savers.values():
        saver.close()
        info = saver.latest("deep")
        found = checkpoint.read(info) if info else {}
        wrong += found.keys() != case.state.keys() or not all(torch.equal(found[n], t) for n, t in case.state.items())
    return wrong


def judge(report: Report, wrong: int) -> None:
    """Add the gates: what the changed 8 MiB of each case come to, and that nothing else suffers."""
    report.gates.append(Gate("checkpoints that differ from what was saved", wrong, 0, wrong == 0))
    for case, limit in (("lora", 0.05), ("embedding", 0.2)):
        ratio = report.median(f"{case}, delta", "written") / report.median(f"{case}, plain", "written")
        report.gates.append(Gate(f"{case}: written over all of it", ratio, limit, ratio <= limit))
    ratio = report.median("dense, delta", "durable") / report.median("dense, plain", "durable")
    report.gates.append(Gate("dense: durable over that without delta", ratio, 1.1, ratio <= 1.1))


def _update(tensors: State) -> None:
    for tensor in tensors.values():
        tensor.add_(1)


if __name__ == "__main__":
    sys.exit(main())
