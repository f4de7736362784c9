"""Whether tensors were left alone from the call of `save` until their last byte was copied.

Two signs tell: torch counts the in-place operations on a tensor, and a few of its bytes, read before the first copy
and again after the last one, catch what writes past torch (`.data`, fused optimizers). A write that undoes itself,
or one past torch that spares the bytes looked at, is not seen.
"""

from __future__ import annotations

import bisect
import ctypes
import itertools
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from checkpoint.planning import Draft, version

_SAMPLE_BYTES = 16
"""Bytes looked at in a place."""


class Guard:
    """Watches the tensors of one save, each until its group is copied."""

    def __init__(self, draft: Draft) -> None:
        self._names = draft.blueprint.names
        self._tensors = draft.tensors
        self._groups = draft.blueprint.watched
        self._versions = draft.versions
        self._samples: dict[int, list[bytes]] = {}
        self._devices: dict[tuple[int, torch.device], _DeviceSamples] = {}
        self._settled: set[int] = set()
        self._changed: set[str] = set()
        self._lock = threading.Lock()

    @property
    def changed(self) -> tuple[str, ...]:
        """Names of tensors seen to have changed, sorted."""
        with self._lock:
            return tuple(sorted(self._changed))

    def look(self) -> None:
        """Read the first samples of host memory."""
        self._samples = {i: _sample(self._tensors[i]) for i in itertools.chain(*self._groups)}

    def look_on(self, device: torch.device) -> None:
        """Read the first samples of a device's memory, in the order of its current stream."""
        for group, members in enumerate(self._groups):
            found = [i for i in members if self._tensors[i].device == device and self._tensors[i].numel()]
            if found:
                self._devices[group, device] = _DeviceSamples(found, [self._tensors[i] for i in found])

    def look_again_on(self, device: torch.device, group: int) -> None:
        """Read a group's samples again, in the order of the device's current stream, and compare them there."""
        samples = self._devices.get((group, device))
        if samples:
            samples.compare()

    def settle(self, group: int) -> None:
        """Compare a group's counters and host samples for the only time: its tensors may be mutated from now on."""
        with self._lock:
            if group in self._settled:
                return
            self._settled.add(group)
            for i in self._groups[group]:
                tensor = self._tensors[i]
                if version(tensor) != self._versions[i] or (self._samples and _sample(tensor) != self._samples[i]):
                    self._changed.add(self._names[i])

    def judge(self, group: int) -> None:
        """Take in what the devices found in a group, all of whose copies are over."""
        for (of_group, _), samples in self._devices.items():
            if of_group == group:
                with self._lock:
                    self._changed.update(self._names[i] for i in samples.changed())

    def let_go(self) -> None:
        """Drop the tensors; nothing is compared from here on."""
        with self._lock:
            self._settled.update(range(len(self._groups)))
            self._tensors = ()
            self._samples = {}
            self._devices = {}


def _sample(tensor: Tensor) -> list[bytes]:
    """Return bytes of a host tensor from its middle and its end; nothing of others."""
    if tensor.device.type != "cpu" or not tensor.numel():
        return []
    first, size = tensor.data_ptr(), tensor.element_size()
    if first == 0:
        return []  # its memory was given back
    if tensor.is_contiguous():
        nbytes = tensor.numel() * size
        length = min(_SAMPLE_BYTES, nbytes)
        starts = (nbytes - length) // 2, nbytes - length
    else:
        length = size
        steps = [(n, stride * size) for n, stride in zip(tensor.shape, tensor.stride(), strict=True)]
        starts = sum(n // 2 * step for n, step in steps), sum((n - 1) * step for n, step in steps)
    return [ctypes.string_at(first + start, length) for start in starts]


class _DeviceSamples:
    """Bytes of several tensors of one device, compared on the device."""

    def __init__(self, members: Sequence[int], tensors: Sequence[Tensor]) -> None:
        self._members = members
        self._views = [_middle(t) for t in tensors]
        self._ends = list(itertools.accumulate(v.numel() for v in self._views))
        self._before = torch.cat(self._views)
        self._differs: Tensor | None = None

    def compare(self) -> None:
        differs = torch.cat(self._views) != self._before
        self._differs = torch.empty(differs.shape, dtype=torch.bool, pin_memory=True)
        self._differs.copy_(differs, non_blocking=True)

    def changed(self) -> set[int]:
        """Return which members differ; the comparison must be over."""
        if self._differs is None:
            return set()
        places = self._differs.nonzero().flatten().tolist()
        return {self._members[bisect.bisect_right(self._ends, place)] for place in places}


def _middle(tensor: Tensor) -> Tensor:
    """Return a view of bytes from the middle of a tensor."""
    size = tensor.element_size()
    if tensor.is_contiguous():
        count = min(max(1, _SAMPLE_BYTES // size), tensor.numel())
        start = (tensor.numel() - count) // 2
    else:
        count = 1
        start = sum(n // 2 * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.as_strided((count,), (1,), tensor.storage_offset() + start).view(torch.uint8)
