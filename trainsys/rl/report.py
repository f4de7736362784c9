"""What became of a run by reinforcement learning, alone or in a swarm: a table, curves, one page of HTML."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from trainsys import metrics
from trainsys.errors import RunError
from trainsys.folder import RunFolder
from trainsys.rl.account import account
from trainsys.rl.chart import Line, Picture, plan, svg
from trainsys.rl.raster import png

_ACCURACY, _REJECTED, _FROM = "rl/accuracy.", "sharing/rejected.", "sharing/from."


@dataclass(frozen=True, slots=True)
class NodeReport:
    """One node's run, from its metrics."""

    name: str
    steps: int
    accuracy: dict[str, float]
    """Held-out accuracy by task, at the last evaluation."""
    first_accuracy: dict[str, float]
    """At the last evaluation before the first round, or else at the first."""
    cumulative_reward: float
    signal_rate: float
    """Mean over rounds."""
    sampled: int
    """Own groups, all of which it shared: what the run cost in samples."""
    external: int
    """Groups of others that were trained on."""
    age_rounds: float
    """Mean of these; not a number without any."""
    sources: dict[str, int]
    """These by node."""
    rejected: dict[str, int]
    """Messages and rows of others that were not believed, by reason."""
    unrecorded: int
    """Rounds between the first and the last that are not in the metrics, so that no count has them."""
    alone: str
    """Why nothing of others was trained on, of a node that shares; else empty."""
    curves: dict[str, list[tuple[float, float]]]
    """`reward`, `cumulative reward`, `accuracy` and `accuracy of TASK` over steps."""


def read_node(folder: RunFolder, name: str) -> NodeReport:
    """Return the report of one run.

    Raises:
        RunError: it has made no round yet.
    """
    records = metrics.read(folder.metrics) if folder.metrics.exists() else []
    rounds = [record for record in records if "rl/reward" in record]
    evaluations = [record for record in records if "rl/accuracy" in record]
    if not rounds:
        raise RunError(f"{folder.path}: has made no round yet")
    before = [record for record in evaluations if record["step"] < rounds[0]["step"]]
    sources: Counter[str] = Counter()
    for record in rounds:
        sources.update({key.removeprefix(_FROM): value for key, value in record.items() if key.startswith(_FROM)})
    ages = sum(record.get("sharing/age_rounds", 0) * sum(_starting_with(_FROM, record).values()) for record in rounds)
    return NodeReport(
        name=name,
        steps=rounds[-1]["step"],
        accuracy=_starting_with(_ACCURACY, evaluations[-1]) if evaluations else {},
        first_accuracy=_starting_with(_ACCURACY, (before or evaluations)[-1 if before else 0]) if evaluations else {},
        cumulative_reward=rounds[-1]["rl/cumulative_reward"],
        signal_rate=sum(record["rl/signal_rate"] for record in rounds) / len(rounds),
        sampled=int(sum(record["rl/groups"] for record in rounds)),
        external=int(sum(record["rl/external_groups"] for record in rounds)),
        age_rounds=ages / sources.total() if sources else float("nan"),
        sources=dict(sources),
        rejected={key: int(value) for key, value in _starting_with(_REJECTED, rounds[-1]).items()},
        unrecorded=rounds[-1]["step"] - rounds[0]["step"] + 1 - len(rounds),
        alone=account(rounds[-1]) if "sharing/taken" in rounds[-1] and not sources else "",
        curves=_curves(rounds, evaluations),
    )


def read_nodes(run: Path) -> list[NodeReport]:
    """Return the reports of a run's nodes that have made a round; of a single policy its own.

    Raises:
        RunError: none has.
    """
    folders = sorted((run / "nodes").glob("*"), key=lambda path: (len(path.name), path.name))
    if not folders:
        return [read_node(RunFolder(run), run.name)]
    found = []
    for path in folders:
        try:
            found.append(read_node(RunFolder(path), path.name))
        except RunError:
            continue  # it died before its first round
    if not found:
        raise RunError(f"{run}: no node has made a round yet")
    return found


def has_rounds(run: Path) -> bool:
    """Return whether a node of the run has made a round: there is something to report."""
    paths = (run / "metrics.jsonl", *(run / "nodes").glob("*/metrics.jsonl"))
    return any("rl/reward" in record for path in paths if path.exists() for record in metrics.read(path))


def summarise(run: Path) -> str:
    """Return the table of a run, and what it does not show. Raises: RunError as `read_nodes`."""
    nodes = read_nodes(run)
    return "\n".join([*("  ".join(cells).rstrip() for cells in _aligned(table(nodes))), *_notes(nodes)])


def table(nodes: Sequence[NodeReport]) -> list[list[str]]:
    """Return the figures of nodes as rows of cells, the first their headings."""
    tasks = sorted({task for node in nodes for task in node.accuracy})
    headings = ["node", "steps", *tasks, "held out", "before", "reward", "signal", "sampled", "others'"]
    headings += ["age", "from", "rejected"]
    return [headings, *(_cells(node, tasks) for node in nodes)]


def _cells(node: NodeReport, tasks: Sequence[str]) -> list[str]:
    return [
        node.name,
        str(node.steps),
        *(f"{node.accuracy[task]:.0%}" if task in node.accuracy else "-" for task in tasks),
        _mean(node.accuracy),
        _mean(node.first_accuracy),
        f"{node.cumulative_reward:.1f}",
        f"{node.signal_rate:.0%}",
        str(node.sampled),
        str(node.external),
        f"{node.age_rounds:.1f}" if node.sources else "-",
        _counts(node.sources),
        _counts(node.rejected),
    ]


def _notes(nodes: Sequence[NodeReport]) -> list[str]:
    told = (
        f"{node.name}: sampled, others' and from miss {node.unrecorded} rounds that are not recorded (metrics.every)"
        for node in nodes
        if node.unrecorded
    )
    return [*told, *(f"{node.name}: {node.alone}" for node in nodes if node.alone)]


def write_report(run: Path) -> Path:
    """Write `RUN/report/`: an SVG and a PNG of each kind of curve and `index.html` with all; return that page.

    Raises:
        RunError: as `read_nodes`, or the folder cannot be written.
    """
    nodes = read_nodes(run)
    pictures = _pictures(nodes)
    folder = run / "report"
    cells = "\n".join(
        "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in row) + "</tr>"
        for tag, row in zip(["th", *["td"] * len(nodes)], table(nodes), strict=True)
    )
    notes = "".join(f"<p>{escape(note)}</p>\n" for note in _notes(nodes))
    drawn = {name: svg(picture) for name, picture in pictures.items()}
    page = _PAGE.format(title=escape(run.name), table=cells, notes=notes, pictures="\n".join(drawn.values()))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, picture in pictures.items():
            (folder / f"{name}.svg").write_text(drawn[name], encoding="utf-8")
            (folder / f"{name}.png").write_bytes(png(picture))
        (folder / "index.html").write_text(page, encoding="utf-8")
    except OSError as error:
        raise RunError(f"{folder}: cannot be written: {error.strerror}") from error
    return folder / "index.html"


def _pictures(nodes: Sequence[NodeReport]) -> dict[str, Picture]:
    """Return charts by name: one of each figure with a curve a node, and of each node with a curve a task."""
    found = {}
    for key, title in (
        ("accuracy", "Held-out accuracy, all tasks"),
        ("reward", "Reward of own completions, running mean"),
        ("cumulative reward", "Cumulative reward"),
    ):
        lines = [Line(node.name, node.curves[key]) for node in nodes if node.curves.get(key)]
        found[key.replace(" ", "-")] = plan(lines, title=title, x_label="steps", y_label=key)
    for node in nodes:
        prefix = "accuracy of "
        lines = [Line(key.removeprefix(prefix), v) for key, v in node.curves.items() if key.startswith(prefix)]
        title = f"Held-out accuracy of {node.name}"
        found[f"skills-{node.name}"] = plan(lines, title=title, x_label="steps", y_label="accuracy")
    return found


def _curves(
    rounds: Sequence[dict[str, Any]], evaluations: Sequence[dict[str, Any]]
) -> dict[str, list[tuple[float, float]]]:
    window = max(1, len(rounds) // 20)
    rewards = [record["rl/reward"] for record in rounds]
    smooth = [sum(rewards[max(0, i + 1 - window) : i + 1]) / min(i + 1, window) for i in range(len(rewards))]
    steps = [float(record["step"]) for record in rounds]
    curves = {
        "reward": list(zip(steps, smooth, strict=True)),
        "cumulative reward": [(float(record["step"]), record["rl/cumulative_reward"]) for record in rounds],
        "accuracy": [(float(record["step"]), record["rl/accuracy"]) for record in evaluations],
    }
    for record in evaluations:
        for task, value in _starting_with(_ACCURACY, record).items():
            curves.setdefault(f"accuracy of {task}", []).append((float(record["step"]), value))
    return curves


def _starting_with(prefix: str, record: dict[str, Any]) -> dict[str, float]:
    return {key.removeprefix(prefix): value for key, value in record.items() if key.startswith(prefix)}


def _mean(values: dict[str, float]) -> str:
    return f"{sum(values.values()) / len(values):.1%}" if values else "-"


def _counts(values: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:g}" for name, count in sorted(values.items())) or "-"


def _aligned(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 14px system-ui, sans-serif; margin: 2em; color: #222; }}
table {{ border-collapse: collapse; margin-bottom: 2em; }}
th, td {{ text-align: left; padding: 0.3em 0.9em 0.3em 0; border-bottom: 1px solid #e4e4e4; }}
svg {{ max-width: 46em; display: block; margin-bottom: 1.5em; }}
</style>
<h1>{title}</h1>
<table>{table}</table>
{notes}{pictures}
</html>
"""
