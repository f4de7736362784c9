"""Where the optimizer's states of every subgroup are: host memory, the device, or an out-of-core tier."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch

from offload.errors import OffloadError, TierError
from offload.kernels import States
from offload.schedule import Path, Subgroup
from offload.tier import Block, Tier
from offload.tracing import Trace
from offload.transfer import TIMEOUT_S, HostMemory

KINDS = ("master", "exp_avg", "exp_avg_sq")


class StateStore:
    """States of all subgroups. Not thread safe, but different subgroups may be used by different threads.

    Neighbouring subgroups in host memory share one tensor of each kind, so that most parameters have views of their
    states. With `two_sides` there are two of each, and `flip` changes which of them counts.
    """

    def __init__(
        self,
        subgroups: Sequence[Subgroup],
        paths: Sequence[Path],
        device: torch.device,
        memory: HostMemory,
        *,
        tier: TierCache | None = None,
        two_sides: bool = False,
    ) -> None:
        self._side = 0
        self._sides: list[dict[int, States]] = [{} for _ in range(2 if two_sides else 1)]
        self._resident: dict[int, States] = {}
        self._tier = tier
        for run in _runs(subgroups, paths):
            count = sum(group.count for group in run)
            for side in self._sides:
                whole = States(*(memory.empty(count, torch.float32, pinned=False) for _ in KINDS))
                start = 0
                for group in run:
                    side[group.index] = part = whole.narrow(start, group.count)
                    start += group.count
                    if paths[group.index] == "stream":
                        for tensor in part.tensors:
                            memory.pin(tensor)
        for group in subgroups:
            if paths[group.index] == "resident":
                self._resident[group.index] = States(*(torch.zeros(group.count, device=device) for _ in KINDS))

    def current(self, index: int) -> States:
        """Return the states that count of a subgroup that is not in the tier."""
        found = self._resident.get(index)
        return self._sides[self._side][index] if found is None else found

    def next(self, index: int) -> States:
        """Return where the next states go: the other side, or in place where there is none."""
        found = self._resident.get(index)
        return self._sides[self._side - 1][index] if found is None else found

    def flip(self) -> None:
        """Let the other side count."""
        self._side = (self._side + 1) % len(self._sides)

    def read(self, index: int) -> States:
        """Return the states of any subgroup on whatever device they are; those of the tier are a copy."""
        if self._tier is not None and self._tier.holds(index):
            return self._tier.snapshot(index)
        return self.current(index)

    def write(self, index: int, values: States) -> None:
        """Set the states of any subgroup, of both sides."""
        if self._tier is not None and self._tier.holds(index):
            self._tier.put(index, values)
        elif index in self._resident:
            self._resident[index].copy_(values)
        else:
            for side in self._sides:
                side[index].copy_(values)


def _runs(subgroups: Sequence[Subgroup], paths: Sequence[Path]) -> Iterator[list[Subgroup]]:
    """Yield runs of subgroups in host memory that follow one another in their group."""
    run: list[Subgroup] = []
    for group in sorted(subgroups, key=lambda subgroup: (subgroup.group, subgroup.start)):
        follows = run and run[-1].group == group.group and run[-1].start + run[-1].count == group.start
        if run and not (follows and paths[group.index] in ("cpu", "stream")):
            yield run
            run = []
        if paths[group.index] in ("cpu", "stream"):
            run.append(group)
    if run:
        yield run


@dataclass(slots=True)
class _Slot:
    """A buffer, and which subgroup's states are in it."""

    buffer: torch.Tensor
    holder: int | None = None
    is_dirty: bool = False
    busy: bool = False
    transfers: list[_Transfer] = field(default_factory=list)
    """What is not known to have ended, each after the one before."""
    used: int = 0
    """When it was last taken."""


@dataclass(frozen=True, slots=True)
class _Entry:
    block: Block
    count: int
    label: str


@dataclass(frozen=True, slots=True)
class _Transfer:
    """A transfer, and whose states it moves."""

    future: Future[None]
    entry: _Entry


@dataclass(slots=True)
class TierCache:
    """Subgroups in an out-of-core tier, with a few buffers through which they are updated.

    A subgroup is read ahead into a buffer (`stage`), taken, changed, and given back, which starts its way to the tier
    unless it is to be kept: then the next step finds it in its buffer, as MLP-Offload does with the subgroups that a
    step ends with and the next one begins with.
    """

    tier: Tier
    memory: HostMemory
    num_slots: int
    trace: Trace | None = None
    _entries: dict[int, _Entry] = field(default_factory=dict)
    _slots: list[_Slot] = field(default_factory=list)
    _clock: int = 0
    num_hits: int = 0
    """Times that a subgroup was still in a buffer."""
    num_reads: int = 0

    def add(self, index: int, count: int, label: str) -> None:
        """Make room in the tier for a subgroup; `label` says in errors what it is. Before the first use."""
        self._entries[index] = _Entry(self.tier.allocate(12 * count, label), count, label)

    def holds(self, index: int) -> bool:
        """Whether a subgroup is in the tier."""
        return index in self._entries

    def stage(self, index: int) -> bool:
        """Begin to read a subgroup into a buffer; False: all buffers are in use."""
        self._clock += 1
        slot = self._find(index)
        if slot is None:
            slot = self._free_slot()
            if slot is None:
                return False
            entry = self._entries[index]
            slot.holder = None
            self._read(slot, entry)
            slot.holder = index
            self.num_reads += 1
        elif not slot.busy:
            self.num_hits += 1
        slot.busy, slot.used = True, self._clock
        return True

    def take(self, index: int) -> States:
        """Return a staged subgroup's states, once they have been read."""
        slot = self._staged(index)
        self._finish(slot)
        return _views(slot.buffer, self._entries[index].count)

    def give(self, index: int, *, keep: bool = False) -> None:
        """Take a changed subgroup back."""
        slot = self._staged(index)
        slot.is_dirty, slot.busy = True, False
        if not keep:
            self._write(slot)

    def drop(self, index: int) -> None:
        """Take an unchanged subgroup back."""
        self._staged(index).busy = False

    def snapshot(self, index: int) -> States:
        """Return a copy of a subgroup's states."""
        slot = self._find(index)
        if slot is not None:
            self._finish(slot)
            return States(*(tensor.clone() for tensor in _views(slot.buffer, self._entries[index].count).tensors))
        entry = self._entries[index]
        buffer = torch.empty(3 * entry.count)
        self._wait(self.tier.read(entry.block, buffer), entry)
        return _views(buffer, entry.count)

    def put(self, index: int, values: States) -> None:
        """Set a subgroup's states."""
        entry, slot = self._entries[index], self._find(index)
        if slot is not None:
            self._finish(slot)
            slot.holder, slot.is_dirty = None, False
        buffer = torch.cat([tensor.cpu() for tensor in values.tensors])
        self._wait(self.tier.write(entry.block, buffer), entry)

    def close(self) -> None:
        """Give the room in the tier back, which may have failed or be closed; a second call does nothing."""
        while self._entries:
            _, entry = self._entries.popitem()
            with contextlib.suppress(OffloadError):
                self.tier.free(entry.block)

    def _find(self, index: int) -> _Slot | None:
        return next((slot for slot in self._slots if slot.holder == index), None)

    def _staged(self, index: int) -> _Slot:
        slot = self._find(index)
        assert slot is not None, f"subgroup {index} was not staged"
        return slot

    def _free_slot(self) -> _Slot | None:
        if not self._slots:
            largest = max(entry.count for entry in self._entries.values())
            self._slots = [_Slot(self.memory.empty(3 * largest, torch.float32)) for _ in range(self.num_slots)]
        idle = [slot for slot in self._slots if not slot.busy]
        if not idle:
            return None
        slot = min(idle, key=lambda found: found.used)
        if slot.is_dirty:
            self._write(slot)
        return slot

    def _write(self, slot: _Slot) -> None:
        assert slot.holder is not None
        assert not slot.transfers
        entry = self._entries[slot.holder]
        written = self._seen(self.tier.write(entry.block, slot.buffer[: 3 * entry.count]), entry, "write")
        slot.transfers.append(_Transfer(written, entry))
        slot.is_dirty = False

    def _read(self, slot: _Slot, entry: _Entry) -> None:
        """Begin to read as soon as the buffer's last transfer has ended, without anybody waiting for that.

        Whoever updates goes on meanwhile, and the disk has the next read the moment that it has done with a write.
        """

        def begin() -> Future[None]:
            return self._seen(self.tier.read(entry.block, slot.buffer[: 3 * entry.count]), entry, "read")

        last = slot.transfers[-1].future if slot.transfers else None
        slot.transfers.append(_Transfer(begin() if last is None else _behind(last, begin), entry))

    def _seen(self, transfer: Future[None], entry: _Entry, verb: str) -> Future[None]:
        """Let the trace have the transfer, from when it was asked for."""
        if self.trace is not None:
            trace, start_s = self.trace, self.trace.now_s()
            lane = f"{self.tier.spec.label} {verb}"
            transfer.add_done_callback(
                lambda _: trace.add(entry.label, lane, start_s, trace.now_s(), entry.block.num_bytes)
            )
        return transfer

    def _finish(self, slot: _Slot) -> None:
        try:
            for transfer in slot.transfers:
                self._wait(transfer.future, transfer.entry)
        except BaseException:
            slot.holder, slot.is_dirty, slot.busy = None, False, False
            raise
        finally:
            slot.transfers.clear()

    def _wait(self, transfer: Future[None], entry: _Entry) -> None:
        try:
            transfer.result(TIMEOUT_S)
        except TimeoutError as error:
            raise TierError(f"{entry.label}: no answer from tier {self.tier.spec.name} in {TIMEOUT_S} s") from error
        except OffloadError as error:
            kind = type(error) if isinstance(error, TierError) else TierError
            raise kind(f"{entry.label} in tier {self.tier.spec.name}: {error}") from error


def _behind(last: Future[None], begin: Callable[[], Future[None]]) -> Future[None]:
    """Return a future for what `begin` begins when `last` is done; if that failed, it is cancelled instead."""
    whole: Future[None] = Future()

    def settle(begun: Future[None]) -> None:
        error = begun.exception()
        whole.set_result(None) if error is None else whole.set_exception(error)

    def go_on(done: Future[None]) -> None:
        if done.cancelled() or done.exception() is not None:
            whole.cancel()
            return
        try:
            begun = begin()
        except Exception as error:  # noqa: BLE001 - whoever waits gets it
            whole.set_exception(error)
            return
        begun.add_done_callback(settle)

    last.add_done_callback(go_on)
    return whole


def _views(buffer: torch.Tensor, count: int) -> States:
    return States(*(buffer[start * count : (start + 1) * count] for start in range(3)))
