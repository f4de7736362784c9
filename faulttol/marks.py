"""The marks of a training loop, between the collectives of a ring: which step and phase all that follows belongs to."""

from __future__ import annotations

import operator
import time
from typing import TYPE_CHECKING

import torch

from faulttol.events import MarkKind
from faulttol.ring import MARK_NUMBERS, Ring, numbers_there

if TYPE_CHECKING:
    from faulttol.compiled import Compiled

_STEPS, _TOKENS = range(-(1 << 31), 1 << 31), range((1 << 64) - 1)
"""That a record has room for."""


class Marks:
    """Where the loop is, which it says from its own thread."""

    def __init__(self, ring: Ring, compiled: Compiled | None) -> None:
        self._ring, self._compiled = ring, compiled
        self._step, self._phase = -1, "train"
        self._step_is_open = False
        self._phases: dict[str, int] = {}
        """Their numbers."""
        self.where = (-1, self._number("train"))
        """The step and the number of the phase that the last mark named."""
        if compiled is not None:
            compiled.place(*self.where)

    def begin(self, step: int, phase: str) -> None:
        """Take the step and the phase that the next mark names."""
        self._step, self._phase = step, phase
        self._step_is_open = True

    def end(self) -> bool:
        """Return whether a step was open; none is now."""
        was_open, self._step_is_open = self._step_is_open, False
        return was_open

    def turn(self, phase: str) -> None:
        """Take the phase that the next mark names."""
        self._phase = phase

    def write(
        self, kind: MarkKind, *, tokens: int | None = None, loss: float | None = None, grad_norm: float | None = None
    ) -> None:
        """Write a mark; what begins from now on is where it says, unless it raises.

        Raises: TypeError for a tensor that is not on the host, and for a step or tokens that are no whole numbers;
            ValueError for those that a record has no room for.
        """
        for value in (tokens, loss, grad_norm):
            if isinstance(value, torch.Tensor) and not value.is_cpu:
                raise TypeError("a mark's number is a tensor of a device: reading it would wait for the device")
        step, whole = operator.index(self._step), None if tokens is None else operator.index(tokens)
        if step not in _STEPS or (whole is not None and whole not in _TOKENS):
            raise ValueError(f"step {step}, tokens {tokens}: a record has no room for that")
        numbers, there = (float(loss or 0.0), float(grad_norm or 0.0)), numbers_there(loss, grad_norm)
        phase = self._phases.get(self._phase) or self._number(self._phase)
        self.where = (step, phase)
        if self._compiled is None:
            self._ring.mark(kind, time.monotonic_ns(), self.where, whole, loss, grad_norm)
        else:
            counted = 0 if whole is None else whole + 1
            self._compiled.mark(MARK_NUMBERS[kind], step, phase, counted, *numbers, there)

    def _number(self, phase: str) -> int:
        number = self._ring.number("phase", phase)
        if number:
            self._phases[phase] = number
        return number
