"""What the command line prints: tables, sizes, and how far long work is. Rich on a terminal, plain text elsewhere."""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from types import TracebackType

import torch

_UNITS = {
    "": 1,
    "K": 10**3,
    "M": 10**6,
    "G": 10**9,
    "T": 10**12,
    "KI": 1 << 10,
    "MI": 1 << 20,
    "GI": 1 << 30,
    "TI": 1 << 40,
}
_PAUSE_S = 0.2
"""Between two updates of a progress line."""


def print_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print rows in columns: drawn on a terminal where rich is installed, else aligned text, one line a row."""
    lines = [list(header), *(list(map(str, row)) for row in rows)]
    if sys.stdout.isatty() and find_spec("rich"):
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        for title in header:
            table.add_column(title, overflow="fold")
        for line in lines[1:]:
            table.add_row(*map(Text, line))
        Console().print(table)
        return
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        text = "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        sys.stdout.write(f"{text.rstrip()}\n")


class Progress:
    """A line on standard error that says how far something is; nothing where that is no terminal."""

    def __init__(self, verb: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._verb = verb
        self._clock = clock
        self._is_shown = sys.stderr.isatty()
        self._begun_s = self._told_s = clock()
        self._width = 0

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._width:
            sys.stderr.write("\r" + " " * self._width + "\r")

    def __call__(self, done: int, total: int) -> None:
        """Take the bytes done and the bytes there are to do."""
        now_s = self._clock()
        if not self._is_shown or now_s - self._told_s < _PAUSE_S:
            return
        self._told_s = now_s
        rate = done / (now_s - self._begun_s)
        text = f"{self._verb} {size_text(done)} of {size_text(total)} ({size_text(int(rate))}/s)"
        self._width = max(self._width, len(text))
        sys.stderr.write("\r" + text.ljust(self._width))
        sys.stderr.flush()


def size_text(nbytes: int | None) -> str:
    """Return a number of bytes as a person reads it; '-' for none."""
    if nbytes is None:
        return "-"
    if nbytes < 1024:
        return f"{nbytes} B"
    value = nbytes / 1024
    for unit in ("KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def size_of(text: str) -> int:
    """Return the bytes that an argument stands for: 5GB, 512MiB, 1000. Raises argparse's error."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]I?|)B?", text.upper())
    if not match or match[2] not in _UNITS:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; allowed are sizes such as 5GB, 512MiB or 1000")
    return int(float(match[1]) * _UNITS[match[2]])


def dtype_of(text: str) -> torch.dtype:
    """Return the dtype that an argument stands for. Raises argparse's error."""
    found = getattr(torch, text, None)
    if not isinstance(found, torch.dtype):
        raise argparse.ArgumentTypeError(f"{text!r} is no dtype of torch; float32, bfloat16 and float16 are")
    return found
