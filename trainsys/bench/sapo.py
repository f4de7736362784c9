"""Does sharing rollouts help, when, and what does a liar, a slow peer or a dead one cost?

    python -m trainsys.bench.sapo [--repeats SEEDS] [--json FILE] [--smoke] [--device cuda] [--jobs N]
                                  [--lines FILE] [--budget-s S] [--only TEXT,…] [--svg FILE]

Swarms of five small policies (character decoders, d = 64, two layers) train on five built-in tasks with verifiable
answers. In a `skill-gap` swarm each node was shown two of the five tasks before; in a `homogeneous` one all five. A
round of a node trains on I groups of its own and J of others (I + J = 8, G = 8 completions each), every configuration
for as many rounds; so 4/4 generates half of what 8/0 does. Rollouts go through the store, the validation and the
selection of real nodes, advantages and losses are theirs; policies of a process are computed side by side. Two of five
nodes attack: `liars` claim that a wrong answer is right, `crowders` flood the others with true groups of one task that
teach nothing.

Baselines: the same nodes alone (8/0), and alone with twice the sampling and the filter that external groups go through,
which tells sharing from filtering. Intervals are Student's, 95 %, over seeds; a figure of a seed is the mean over its
nodes. What attacked swarms have is divided, seed by seed, by what the three honest nodes have alone and by what all
five have when none attacks: the one tells what an attack costs, the other also what two teachers fewer cost. Accuracy
is greedy on held-out questions of all five tasks; cumulative reward sums over rounds the mean reward of a node's own
completions at temperature 1. All runs of a seed begin with the same weights.

Each scenario and seed is a line of `--lines` when it is done, and is not run again unless settings, device or the code
that decides it are others; with `--budget-s` nothing is begun that would end later, and the exit code is 3 while lines
are missing. The scenario of the dead node is measured with processes that are killed as well: rounds of those that
live, before and after.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from parallel.bench import Gate, Report, arguments
from trainsys.bench.swarms import grid, killing
from trainsys.bench.swarms.alphabet import SKILLS
from trainsys.bench.swarms.grid import HONEST, SCENARIOS
from trainsys.bench.swarms.simulation import Settings
from trainsys.rl.chart import Line, draw

_UNFINISHED = 3
_CLOSE = 0.95
_COLLAPSE = 0.75
_ATTACKED = ("4/4 liars, validated", "4/4 crowders, validated", "4/4 liars, believed")
_CLEAN = {"4/4 liars absent": "the three alone", "skill-gap 4/4": "five honest nodes"}
"""What attacked swarms are held against: with two peers fewer that teach anything, and with two more."""
_T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Student's t, two-sided 95 %, for 2, 3, … samples."""

Node = dict[str, Any]


def main(given: list[str]) -> int:
    """Run what is missing, print the table; 1 where a gate is missed, 3 where lines are missing."""
    parser = arguments(__doc__)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time (default: %(default)s)")
    parser.add_argument("--lines", type=Path, default=Path("sapo.jsonl"), help="where results are kept as they come")
    parser.add_argument("--budget-s", type=float, default=float("inf"), help="begin nothing that would end later")
    parser.add_argument("--only", default="", help="only scenarios with one of these, comma-separated, in their name")
    parser.add_argument("--svg", type=Path, help="draw the curves there")
    parser.add_argument("--markdown", type=Path, help="write the table of the README there")
    for name in ("nodes", "rounds", "dim", "num_layers", "warm_steps", "groups"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(Settings(), name))
    options = parser.parse_args(given)
    shape = {name: getattr(options, name) for name in ("nodes", "rounds", "dim", "num_layers", "warm_steps", "groups")}
    settings = Settings(seeds=options.repeats, **shape)
    scenarios = [
        grid.scaled(scenario, settings)
        for scenario in SCENARIOS
        if any(part in scenario.name for part in options.only.split(","))
    ]
    if options.smoke:
        settings = Settings(
            seeds=2, rounds=4, groups=4, group_size=4, dim=32, num_layers=1, warm_steps=30, questions_per_skill=2
        )
        scenarios = [grid.scaled(scenario, settings) for scenario in SCENARIOS if "4/4" in scenario.name]
    with tempfile.TemporaryDirectory(prefix="bench-sapo-") as folder:
        path = Path(folder, "sapo.jsonl") if options.smoke else options.lines
        done = grid.run(
            scenarios, settings, device=options.device, jobs=options.jobs, path=path, budget_s=options.budget_s
        )
        if not done:
            print(f"{path}: not all is done; the same command goes on")
            return _UNFINISHED
        report = Report("trainsys.sapo", {"device": options.device, **asdict(settings)})
        found = {each.name: list(grid.results(path, each, settings, options.device)) for each in scenarios}
    for name, seeds in found.items():
        _add(report, name, seeds)
    if not options.only:
        _compare(report, found, is_small=options.smoke)
        _kill(report, seconds=0.5 if options.smoke else 10)
    if options.svg:
        options.svg.write_text(picture(found), encoding="utf-8")
    if options.markdown:
        options.markdown.write_text(markdown(report), encoding="utf-8")
    return report.finish(options)


def markdown(report: Report) -> str:
    """Return the scenarios as a table: means over seeds, of the accuracy with its 95 % interval."""
    columns = ("accuracy, own skills", "accuracy, missing skills", "cumulative reward", "generated", "local signal")
    rows = ["| scenario | accuracy [95 %] | own skills | missing skills | reward | groups generated | signal |"]
    rows.append("|---|---|---|---|---|---|---|")
    names = list(dict.fromkeys(case for case, metric, _ in report.samples if metric == "accuracy"))
    for name in names:
        values = _samples(report, name, "accuracy")
        low, high = interval(values)
        cells = [f"{fmean(values):.3f}" + (f" [{low:.3f}, {high:.3f}]" if len(values) > 1 else "")]
        for column in columns:
            found = report.samples.get((name, column, "1"))
            mean = fmean(found) if found else float("nan")
            cells.append("-" if not found else f"{mean:,.0f}" if mean >= 1000 else f"{mean:.3g}")
        rows.append(f"| {name} | {' | '.join(cells)} |")
    by_skill = {name: [report.samples.get((name, f"not shown: {skill}", "1")) for skill in SKILLS] for name in names}
    rows += ["", f"| accuracy where not shown | {' | '.join(SKILLS)} |", f"|---|{'---|' * len(SKILLS)}"]
    for name, found_of in by_skill.items():
        if any(found_of):
            rows.append(f"| {name} | {' | '.join(f'{fmean(found):.3f}' if found else '-' for found in found_of)} |")
    compared = [key for key in report.samples if " over " in key[1]]
    if compared:
        rows += ["", "| compared seed by seed | ratio [95 %] |", "|---|---|"]
    for key in compared:
        low, high = interval(report.samples[key])
        rows.append(f"| {key[0]}: {key[1]} | {fmean(report.samples[key]):.3f} [{low:.3f}, {high:.3f}] |")
    rows += ["", "| held to | value | limit | |", "|---|---|---|---|"]
    rows += [f"| {g.name} | {g.value:.3g} | {g.limit:.3g} | {'ok' if g.ok else 'missed'} |" for g in report.gates]
    return "\n".join(rows) + "\n"


def interval(samples: list[float]) -> tuple[float, float]:
    """Return the 95 % confidence interval of the mean."""
    if len(samples) < 2:
        return float("-inf"), float("inf")
    half = _T_95[min(len(samples), 10) - 2] * stdev(samples) / len(samples) ** 0.5
    return fmean(samples) - half, fmean(samples) + half


def accuracy(nodes: Iterable[Node], *, of: Callable[[Node], Iterable[str]] = lambda node: SKILLS) -> float:
    """Return the mean held-out accuracy of nodes on some skills."""
    values = [fmean(node["accuracy"][skill] for skill in of(node)) for node in nodes if [*of(node)]]
    return fmean(values) if values else float("nan")


def _own(node: Node) -> list[str]:
    return list(node["own_skills"])


def _missing(node: Node) -> list[str]:
    return [skill for skill in SKILLS if skill not in node["own_skills"]]


def _add(report: Report, name: str, seeds: list[list[Node]]) -> None:
    """Add the figures of a scenario, a sample a seed."""
    for nodes in seeds:
        report.add(name, "accuracy", "1", accuracy(nodes))
        report.add(name, "accuracy, own skills", "1", accuracy(nodes, of=_own))
        if any(map(_missing, nodes)):
            report.add(name, "accuracy, missing skills", "1", accuracy(nodes, of=_missing))
        for skill in SKILLS:
            if without := [node["accuracy"][skill] for node in nodes if skill in _missing(node)]:
                report.add(name, f"not shown: {skill}", "1", fmean(without))
        report.add(name, "accuracy at the start", "1", fmean(fmean(node["start"].values()) for node in nodes))
        report.add(name, "accuracy, nodes 0 2 4", "1", accuracy(node for node in nodes if node["node"] in HONEST))
        for metric in ("cumulative_reward", "generated", "external", "local_signal", "mean_age"):
            report.add(name, metric.replace("_", " "), "1", fmean(node[metric] for node in nodes))
        rejected = sum((Counter(node["rejected"]) for node in nodes), Counter[str]())
        report.add(name, "rejected", "1", float(rejected.total()))
    low, high = interval(_samples(report, name, "accuracy"))
    if len(seeds) > 1:
        report.add(name, "accuracy, 95 % from", "1", low)
        report.add(name, "accuracy, 95 % to", "1", high)


def _samples(report: Report, case: str, metric: str) -> list[float]:
    return report.samples[case, metric, "1"]


def _compare(report: Report, found: dict[str, list[list[Node]]], *, is_small: bool) -> None:
    """Hold the scenarios to the issue's figures; a small run only to what must be so at any size."""
    lies = sum(node["rejected"].get("reward", 0) for nodes in found["4/4 liars, validated"] for node in nodes)
    report.gates.append(Gate("lies found by validation", lies, 1, lies >= 1))
    rounds = report.parameters["rounds"]
    slowest = min(node["rounds"] for nodes in found["4/4 one killed"] for node in nodes if node["node"] != 1)
    report.gates.append(Gate("rounds of each node that outlives another", slowest, rounds, slowest == rounds))
    if is_small:
        return
    shared = _samples(report, "skill-gap 4/4", "accuracy")
    for name in ("skill-gap 8/0", "8/0 sampling twice, filtered"):
        gap = interval(shared)[0] - interval(_samples(report, name, "accuracy"))[1]
        report.gates.append(Gate(f"4/4 above {name}: gap between 95 % intervals", gap, 0, gap > 0))
    best = report.median("skill-gap 4/4", "accuracy") - report.median("skill-gap 2/6", "accuracy")
    report.gates.append(Gate("4/4 above 2/6: an optimum inside", best, 0, best > 0, is_speed=True))
    waited = fmean(_samples(report, "4/4 at speeds 1 to 4", "accuracy")) / fmean(shared)
    report.gates.append(Gate("speeds 1 to 4, accuracy over equal speeds", waited, _CLOSE, waited >= _CLOSE))
    for name in _ATTACKED:
        for clean, text in _CLEAN.items():
            ratio = fmean(_over(report, name, clean))
            ok, limit = (ratio >= _CLOSE, _CLOSE) if "validated" in name else (ratio <= _COLLAPSE, _COLLAPSE)
            title = f"{name}: accuracy of honest nodes over {text}"
            # That two peers fewer teach less is no fault of validation: told, but no error of the run.
            report.gates.append(Gate(title, ratio, limit, ok, is_speed="five" in text))
            report.add(name, f"accuracy of honest nodes over {text}", "1", *_over(report, name, clean))


def _over(report: Report, name: str, other: str) -> list[float]:
    """Return the honest nodes' accuracy in one scenario over that in another, seed by seed: both began alike."""
    mine, others = (_samples(report, each, "accuracy, nodes 0 2 4") for each in (name, other))
    return [one / two for one, two in zip(mine, others, strict=True)]


def _kill(report: Report, *, seconds: float) -> None:
    """Measure rounds of processes of which one is killed."""
    before, after = killing.rounds_per_s(seconds)
    report.add("processes, one killed", "rounds before", "1/s", *before)
    report.add("processes, one killed", "rounds after", "1/s", *after)
    ratio = min(after) / min(before)
    report.gates.append(Gate("rounds of who lives, after a kill over before", ratio, 0.9, ratio >= 0.9, is_speed=True))


def picture(found: dict[str, list[list[Node]]]) -> str:
    """Return the curves of the skill-gap configurations and controls as SVG: accuracy over rounds, mean over seeds."""
    names = [name for name in found if name.startswith("skill-gap") or name == "8/0 sampling twice, filtered"]
    return draw(
        [Line(name.removeprefix("skill-gap "), _curve(found[name])) for name in names if found[name]],
        title="Held-out accuracy, skill-gap swarm",
        x_label="rounds",
        y_label="accuracy",
    )


def _curve(seeds: list[list[Node]]) -> list[tuple[float, float]]:
    start = fmean(fmean(node["start"].values()) for nodes in seeds for node in nodes)
    curves = [node["curve"] for nodes in seeds for node in nodes]
    return [(0.0, start), *((fmean(x for x, _ in at), fmean(y for _, y in at)) for at in zip(*curves, strict=False))]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
