"""A swarm as people watch it: a live table on a terminal, a line a node elsewhere. Reads what the nodes write."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from trainsys.rl.swarm import NodeView

_REFRESH_S = 1.0
_LINE_EVERY_S = 10.0
_BAR = "▁▂▃▄▅▆▇█"


@dataclass(slots=True)
class Tail:
    """The newest figures of a node, read from the end of its `metrics.jsonl` as it grows."""

    path: Path
    latest: dict[str, Any] = field(default_factory=dict)
    """The newest value of every figure."""
    rewards: list[float] = field(default_factory=list)
    """Of every round, in order."""
    _offset: int = 0
    _file: int = 0
    """Its number on the disk: a node that resumes writes another."""

    def read(self) -> None:
        """Take in what was written since; a file that was cut (a resumed node) is read again."""
        try:
            found = self.path.stat()
        except FileNotFoundError:
            return
        size = found.st_size
        if size < self._offset or found.st_ino != self._file:
            self._offset, self._file = 0, found.st_ino
            self.rewards.clear()
        with self.path.open("rb") as file:
            file.seek(self._offset)
            grown = file.read(size - self._offset)
        whole = grown[: grown.rfind(b"\n") + 1]
        self._offset += len(whole)
        for line in whole.splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:  # it was replaced while it was read; the next look begins anew
                self._file = 0
                return
            self.latest.update(record)
            if "rl/reward" in record:
                self.rewards.append(record["rl/reward"])


def spark(values: list[float], width: int = 16) -> str:
    """Return values of 0 to 1 as a row of bars, each the mean of its part."""
    if not values:
        return ""
    width = min(width, len(values))
    edges = [index * len(values) // width for index in range(width + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    return "".join(_BAR[min(7, max(0, int(8 * mean)))] for mean in means)


def rewards_of(latest: Mapping[str, Any]) -> dict[str, float]:
    """Return the newest reward of each task."""
    prefix = "rl/reward."
    return {key.removeprefix(prefix): value for key, value in latest.items() if key.startswith(prefix)}


class Screen:
    """A live table (rich) where `stream` is a terminal, else lines; see `swarm.Watcher`."""

    def __init__(self, total_steps: int, tasks: list[str], stream: TextIO) -> None:
        self._total, self._stream = total_steps, stream
        self._tasks = [task.partition(":")[0] for task in tasks]
        self._tails: dict[str, Tail] = {}
        self._shown_s = float("-inf")
        self._live: Any = None

    def begin(self, url: str, views: list[NodeView]) -> None:
        """Say where the swarm can be joined."""
        self._tails = {view.name: Tail(view.folder / "metrics.jsonl") for view in views}
        self._say(f"{len(views)} nodes; join from elsewhere: --rl.sharing.store={url} --rl.sharing.node=NAME")
        if self._stream.isatty():
            from rich.console import Console
            from rich.live import Live

            self._live = Live(self._table(views), console=Console(file=self._stream), refresh_per_second=2)
            self._live.start()

    def update(self, views: list[NodeView]) -> None:
        """Show what is known, not too often, and in any case when all have ended."""
        over = all(view.state not in ("starting", "running") for view in views)
        if not over and time.monotonic() - self._shown_s < (_REFRESH_S if self._live else _LINE_EVERY_S):
            return
        self._shown_s = time.monotonic()
        for tail in self._tails.values():
            tail.read()
        if self._live:
            self._live.update(self._table(views))
        else:
            for view in views:
                self._say(self._line(view))

    def close(self) -> None:
        """Leave the last table on the screen."""
        if self._live:
            self._live.stop()
            self._live = None

    def _say(self, text: str) -> None:
        self._stream.write(text + "\n")
        self._stream.flush()

    def _line(self, view: NodeView) -> str:
        figures = self._tails[view.name].latest
        parts = [f"{view.name}  {view.state}{f' (restart {view.restarts})' if view.restarts else ''}"]
        parts.append(f"step {view.step}/{self._total}")
        if "rl/reward" in figures:
            parts.append(f"reward {figures['rl/reward']:.3f}")
            by_task = rewards_of(figures)
            parts.append(" ".join(f"{task} {by_task[task]:.2f}" for task in self._tasks if task in by_task))
        if "rl/accuracy" in figures:
            parts.append(f"held-out {figures['rl/accuracy']:.1%}")
        if "sharing/taken" in figures:
            parts.append(f"others' {figures['sharing/taken']}, rejected {figures['sharing/rejected']}")
        if view.detail:
            parts.append(view.detail)
        return "  ".join(parts)

    def _table(self, views: list[NodeView]) -> Any:
        from rich.table import Table

        table = Table(box=None, pad_edge=False, header_style="bold")
        for heading in ("node", "state", "step", "reward", "", *self._tasks, "held out", "signal", "others'", "age"):
            table.add_column(heading, justify="left" if heading in ("node", "state", "") else "right")
        table.add_column("rejected", justify="right")
        for view in views:
            table.add_row(*self._cells(view))
        return table

    def _cells(self, view: NodeView) -> list[str]:
        tail = self._tails[view.name]
        figures, by_task = tail.latest, rewards_of(tail.latest)
        state = f"{view.state} ↻{view.restarts}" if view.restarts else view.state
        colour = {"running": "green", "done": "cyan", "died": "red", "failed": "red"}.get(view.state, "yellow")
        return [
            view.name,
            f"[{colour}]{state}[/]",
            f"{view.step}/{self._total}",
            _figure(figures, "rl/reward", ".2f"),
            spark(tail.rewards),
            *(f"{by_task[task]:.2f}" if task in by_task else "" for task in self._tasks),
            _figure(figures, "rl/accuracy", ".0%"),
            _figure(figures, "rl/signal_rate", ".0%"),
            _figure(figures, "sharing/taken", ".0f"),
            _figure(figures, "sharing/age_rounds", ".1f"),
            _figure(figures, "sharing/rejected", ".0f"),
        ]


def _figure(figures: Mapping[str, Any], key: str, form: str) -> str:
    return format(figures[key], form) if isinstance(figures.get(key), (int, float)) else ""
