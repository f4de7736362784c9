"""The writer process behind `ProcessDrain`: drains the arena that its parent fills, told and telling by lines of JSON.

It imports neither torch nor the package's `__init__`: it is there in a tenth of a second, in 30 MB.

    commands    ["begin", flow, header, nbytes, parcels, targets]     a target: [tier, arguments of open_storage, path]
                ["put", flow, parcel, slot]    ["cancel", flow, reason]    ["end"]
    reports     ["free", flow, slot]                ["span", flow, name, begin_s, end_s, thread, nbytes]
                ["durable", flow, tier, digests]    ["failed", flow, tier, error, text]

A flow is a number; parcels come at `begin` as [file_start, [bytes of each cut]] and are then named by their index.
"""

from __future__ import annotations

import base64
import ctypes
import itertools
import json
import mmap
import os
import signal
import threading
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from checkpoint.digest import ALIGN_BYTES
from checkpoint.errors import SaveFailed
from checkpoint.spans import Span, Trace
from checkpoint.storage import Storage, open_storage
from checkpoint.writer import Flow, Target, ThreadDrain

if TYPE_CHECKING:
    from checkpoint.arena import Arena, Slot
    from checkpoint.shard import Parcel, ShardPlan

_PR_SET_PDEATHSIG = 1


def main(settings: Mapping[str, Any]) -> None:
    """Serve until told to end, or until the parent is gone."""
    _end_with(settings["parent"])
    reports = _Reports(settings["reports"])
    memory = memoryview(mmap.mmap(settings["arena"], settings["num_slots"] * settings["slot_bytes"]))
    writer = _Writer(memory, settings["slot_bytes"], ThreadDrain(settings["num_threads"]), reports)
    with open(settings["commands"], encoding="utf-8") as commands:
        for line in commands:
            name, *arguments = json.loads(line)
            if name == "end":
                writer.close()
                return
            getattr(writer, name)(*arguments)
    os._exit(1)  # the parent is gone: nobody waits for what is under way


class _Writer:
    """What the commands do."""

    def __init__(self, memory: memoryview, slot_bytes: int, drain: ThreadDrain, reports: _Reports) -> None:
        self._memory = memory
        self._slot_bytes = slot_bytes
        self._drain = drain
        self._reports = reports
        self._storages: dict[str, Storage] = {}
        self._flows: dict[int, _Flow] = {}

    def begin(
        self, number: int, header: str, nbytes: int, parcels: Sequence[Any], targets: Sequence[tuple[str, Any, str]]
    ) -> None:
        self._flows = {n: flow for n, flow in self._flows.items() if not flow.is_over}
        places = []
        for tier, arguments, path in targets:
            try:
                places.append(Target(tier, self._open(arguments), path))
            except Exception as error:  # noqa: BLE001  carried to the parent
                self._reports.failed(number, tier, error)
        plan = _Plan(base64.b64decode(header), nbytes, _parcels(parcels))
        if places:
            self._flows[number] = _Flow(number, plan, places, self._drain, self._reports)

    def put(self, number: int, parcel: int, slot: int) -> None:
        if number in self._flows:
            start = slot * self._slot_bytes
            self._flows[number].put(parcel, _Slot(slot, self._memory[start : start + self._slot_bytes]))
        else:
            self._reports.send("free", number, slot)

    def cancel(self, number: int, reason: str) -> None:
        if number in self._flows:
            self._flows[number].cancel(reason)

    def close(self) -> None:
        """Give back what is on its way; all flows have ended."""
        self._drain.close()

    def _open(self, arguments: Mapping[str, Any]) -> Storage:
        key = json.dumps(arguments, sort_keys=True)
        if key not in self._storages:
            self._storages[key] = open_storage(**arguments)
        return self._storages[key]


class _Flow:
    """One flow, and who waits for its ends."""

    def __init__(
        self, number: int, plan: _Plan, targets: Sequence[Target], drain: ThreadDrain, reports: _Reports
    ) -> None:
        self._number = number
        self._plan = plan
        self._reports = reports
        # Of plans, parcels, slots and arenas a drain needs no more than there is here.
        self._flow: Flow = drain.begin(cast("ShardPlan", plan), cast("Arena", self), targets, _Spans(number, reports))
        self._threads = [
            threading.Thread(target=self._tell_end, args=(target.tier,), daemon=True) for target in targets
        ]
        for thread in self._threads:
            thread.start()

    @property
    def is_over(self) -> bool:
        return not any(thread.is_alive() for thread in self._threads)

    def put(self, parcel: int, slot: _Slot) -> None:
        self._flow.put(cast("Parcel", self._plan.parcels[parcel]), cast("Slot", slot))

    def cancel(self, reason: str) -> None:
        self._flow.cancel(SaveFailed(reason))

    def give_back(self, slot: _Slot) -> None:
        """Be the arena."""
        self._reports.send("free", self._number, slot.index)

    def _tell_end(self, tier: str) -> None:
        try:
            digests = self._flow.wait(tier)
        except BaseException as error:  # noqa: BLE001  carried to the parent
            self._reports.failed(self._number, tier, error)
        else:
            text = base64.b64encode(array("Q", digests).tobytes()).decode()
            self._reports.send("durable", self._number, tier, text)


@dataclass(frozen=True, slots=True, eq=False)
class _Slot:
    index: int
    memory: memoryview


@dataclass(frozen=True, slots=True)
class _Cut:
    start: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class _Parcel:
    index: int
    file_start: int
    nbytes: int
    cuts: tuple[_Cut, ...]

    @property
    def page_offset(self) -> int:
        return self.file_start % ALIGN_BYTES


@dataclass(frozen=True, slots=True)
class _Plan:
    header: bytes
    nbytes: int
    parcels: tuple[_Parcel, ...]


def _parcels(described: Sequence[tuple[int, Sequence[int]]]) -> tuple[_Parcel, ...]:
    found = []
    for index, (file_start, sizes) in enumerate(described):
        starts = itertools.accumulate(sizes, initial=0)
        cuts = tuple(_Cut(start, nbytes) for start, nbytes in zip(starts, sizes, strict=False))
        found.append(_Parcel(index, file_start, sum(sizes), cuts))
    return tuple(found)


class _Spans(Trace):
    """Sends what is recorded to the parent."""

    def __init__(self, number: int, reports: _Reports) -> None:
        super().__init__()
        self._number = number
        self._reports = reports

    def add(self, span: Span) -> None:
        self._reports.send("span", self._number, span.name, span.begin_s, span.end_s, span.thread, span.nbytes)


class _Reports:
    """The way back to the parent. Threads send at once."""

    def __init__(self, descriptor: int) -> None:
        self._file = open(descriptor, "wb", buffering=0)  # noqa: SIM115  open as long as the process lives
        self._lock = threading.Lock()

    def send(self, name: str, *values: object) -> None:
        line = memoryview(json.dumps([name, *values]).encode() + b"\n")
        with self._lock:
            while line.nbytes:
                line = line[self._file.write(line) :]

    def failed(self, number: int, tier: str, error: BaseException) -> None:
        text = "; ".join([str(error), *getattr(error, "__notes__", ())])
        self.send("failed", number, tier, type(error).__name__, text)


def _end_with(parent: int) -> None:
    """Die with the parent, and not before it: signals for the whole group are the parent's to answer."""
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was gone before it could be watched
        os._exit(1)
