"""Records every collective and message of this process into a ring, whoever starts it.

`install()` once a process, before or after the process groups are made. What is written, and when:

    begun    before torch is called; a rank that is stopped or dies inside leaves it in the ring
    ended    CPU, by the part in C++ (`faulttol.compiled`): as it happens, in the backend's thread
             CPU, from Python: after `Work.wait`; for those who wait in C++ when this thread is in the recorder next (it
             begins another, or sets a mark), else by the watcher, every `poll_s`
             device: by the watcher, with the device's own times (`faulttol.device`); nothing waits for the device
    failed   the call or the waiting raised, or the work ended without success

The path of a record is wrapped: a defect in it loses the event, which is counted, and never reaches training.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any

import torch

from faulttol.channels import Channels
from faulttol.compat import Interception, group_of, in_backward, measure, work_of
from faulttol.compiled import KINDS, Compiled
from faulttol.device import DeviceClock, is_capturing, leave_captures_alone
from faulttol.events import MESSAGES, MarkKind
from faulttol.marks import Marks
from faulttol.ongoing import REST_NS, Group, Groups, Resting, Token, has_passed, num_over, work_is_over
from faulttol.operations import ENDS_AT_WAIT, Operation
from faulttol.ring import KIND_NUMBERS, Ring

_LOG = logging.getLogger(__name__)
_IDLE_S = 0.25
"""Between two signs of life while nothing goes on."""
_HELD_NS = 1_000_000_000
"""How long a work is held that cannot be asked whether it is over; by then whoever waits for it has it."""
_DEVICE_POLL_S = 0.005
"""Between two looks of the watcher at works of devices, which hold their tensors until then."""
_LOOK_NS = 1_000_000
"""Between two looks of threads that are in the recorder anyway; many works may go on."""
_MAX_OUTPUTS = 256
"""Results of functional reduce-scatters that are followed until somebody waits for them."""


class Recorder:
    """Records this process until `close()`; `faulttol.install` makes it. Marks belong to the loop's thread."""

    def __init__(self, ring: Ring, rank: int, poll_s: float, compiled: Compiled | None) -> None:
        self.ring, self.rank = ring, rank
        self._compiled = compiled
        """Records collectives of the CPU that it knows; the others, and their first, come here."""
        self._marks = Marks(ring, self._compiled)
        self._groups = Groups(ring)
        self._begun = 0
        """How many operations were begun here."""
        self._pending: dict[int, Token] = {}
        """On the CPU, by `id` of the work."""
        self._on_device: dict[tuple[int, str, int], deque[Token]] = {}
        """By device, group and peer: what is run one after the other."""
        self._stamped: dict[object, deque[Token]] = {}
        """By stream: what has no work, since it runs on the stream that it was called from."""
        self._outputs: OrderedDict[int, Token] = OrderedDict()
        self._resting = Resting()
        self._looked_ns = 0
        self._clocks: dict[int, DeviceClock] = {}
        self._channels = Channels(rank)
        self._follows_tensors = False
        self._complained = False
        self._is_on = True
        self._pid = os.getpid()
        self._poll_s = poll_s
        self._closed = threading.Event()
        self._pause = threading.Lock()
        """Held until the end: to wait for a bare lock takes half of what an event takes."""
        self._pause.acquire()
        self._wake = threading.Event()
        self._is_idle = False
        """Whether the watcher sleeps until something goes on; who begins something then wakes it."""
        self._interception = Interception(self)
        off = weakref.WeakMethod(self.switch_off)
        os.register_at_fork(after_in_child=lambda: (switch_off := off()) and switch_off())
        self._watcher = threading.Thread(target=self._watch, name="faulttol-recorder", daemon=True)
        self._watcher.start()

    # The loop's marks.

    def mark_step(self, step: int, *, phase: str = "train", tokens: int | None = None) -> None:
        """Say that `step` begins, and end the step before if it is open. `tokens`: this rank's share of the work."""
        if self._marks.end():
            self._mark("step_end")
        self._marks.begin(step, phase)
        self._mark("step_begin", tokens=tokens)

    def mark_step_end(
        self, *, loss: float | None = None, grad_norm: float | None = None, tokens: int | None = None
    ) -> None:
        """Say that the step is over, and what came of it; numbers on the host, not tensors of a device."""
        self._marks.end()
        self._mark("step_end", tokens=tokens, loss=loss, grad_norm=grad_norm)

    def mark_phase(self, phase: str) -> None:
        """Say that a phase of the step begins: `eval`, `checkpoint`, …; the next `mark_step` names a new one."""
        self._marks.turn(phase)
        self._mark("phase")

    def _mark(self, kind: MarkKind, **told: Any) -> None:
        if not self._is_on:
            return
        try:
            self._look_in_passing(time.monotonic_ns())
            self._marks.write(kind, **told)
        except Exception:  # noqa: BLE001 - recording may lose a mark, and must not end training
            self._lose()

    # What the interception tells (compat.Sink); none of it raises.

    def begin(self, operation: Operation, group: Any, arguments: tuple[Any, ...]) -> Token | None:
        """Write that an operation begins."""
        if not self._is_on:
            return None
        try:
            first, size = measure(operation, arguments)
            on_device = first is not None and not first.is_cpu
            if on_device and first.is_cuda and is_capturing():
                return None
            place, groups = operation.group, self._groups
            known = groups.of_backend(group, self._channels) if place is None else groups.of(group_of(arguments[place]))
            kind, peer = operation.kind, -1
            device_type = first.device.type if on_device else "cpu"
            what = (device_type, None if operation.tensors is None or first is None else first.dtype)
            names = known.names.get(what) or self._name(known, group, *what)
            if operation.peer is not None:
                local = arguments[operation.peer]
                peer = known.ranks[local] if local < len(known.ranks) else local
            if kind in MESSAGES:
                key = (peer, kind == "send")
                seq = known.messages[key] = known.messages.get(key, 0) + 1
            elif self._compiled is None:
                seq = known.count()
            else:
                seq = known.count_and_tell(self._compiled, None if on_device or kind not in KINDS else names)
            now = time.monotonic_ns()
            index = self.ring.begin(KIND_NUMBERS[kind], now, size, seq, self._marks.where, peer, names)
            self._begun += 1
            token = Token(index, kind, known, now)
            token.on_host = not on_device
            if on_device and known.backends[device_type] != "gloo":
                token.device = first.device.index
                token.channel = (known.name, peer if kind in MESSAGES else -1)
                if first.is_cuda:
                    token.ready = self._clock(known, group, token.device).stamp()[0]
            elif kind in _REDUCE_SCATTERS:
                self._follow_output(arguments[0], token)
            self._look_in_passing(now)
            return token
        except Exception:  # noqa: BLE001 - recording may lose an event, and must not end training
            self._lose()
            return None

    def returned(self, token: Token, result: Any) -> None:
        """Keep the work until it is over."""
        try:
            work = work_of(result)
            if work is not None:
                token.work = work
                if token.device is None:
                    token.in_backward = in_backward()
                    self._pending[id(work)] = token
                else:
                    self._watch_device(token)
            elif token.group.coalesces:
                token.group.unfinished.append(token)
            elif token.ready is not None:
                clock = self._clocks[token.device]
                token.passed, stream = clock.stamp()
                self._stamped.setdefault(stream, deque()).append(token)
            else:
                self._end(token, late=False)
            if self._is_idle:
                self._is_idle = False
                self._wake.set()
        except Exception:  # noqa: BLE001 - as in begin
            self._lose()

    def raised(self, token: Token) -> None:
        """Write that the operation failed."""
        self._end(token, late=False, failed=True)

    def awaited(self, work: Any) -> Token | None:
        """Return the token of a work on the CPU: its wait is its end. A device's wait is only an order."""
        token = self._pending.pop(id(work), None)
        try:
            if token is not None:
                token.is_late = work.is_completed()
        except Exception:  # noqa: BLE001 - as in begin
            self._lose()
        return token

    def over(self, token: Token) -> None:
        """Write that the operation ended; late if it was over before somebody waited."""
        self._end(token, late=token.is_late)

    def coalescing(self, group: Any) -> None:
        """Expect operations without a work of their own."""
        try:
            if self._is_on:
                self._groups.of(group).coalesces = True
        except Exception:  # noqa: BLE001 - as in begin
            self._lose()

    def coalesced(self, group: Any, work: Any) -> None:
        """Let one work stand for all that the group began since coalescing started."""
        try:
            if not self._is_on:
                return
            known = self._groups.named(group.group_name)
            if known is None:
                return
            known.coalesces = False
            tokens, known.unfinished = known.unfinished, []
            for token in tokens:
                token.ready = None  # the device times none of them by itself
                if work is None:
                    self._end(token, late=True)
                else:
                    token.work = work
                    if token.device is None:
                        self._pending[id(token)] = token
                    else:
                        self._watch_device(token)
        except Exception:  # noqa: BLE001 - as in begin
            self._lose()

    def tensor_awaited(self, tensor: Any) -> None:
        """Write the end of the functional reduce-scatter whose result this is, and of what else is over."""
        try:
            token = self._outputs.get(tensor.data_ptr()) if self._outputs else None
            if token is not None:
                self._end(token, late=False)
            if self._pending and self._is_on:
                self._look_in_passing(time.monotonic_ns())
        except Exception:  # noqa: BLE001 - as in begin
            self._lose()

    def making(self, store: Any, rank: int) -> None:
        """Let the other end of a bare backend know who this rank is in the job."""
        try:
            if self._is_on:
                self._channels.announce(store, rank)
        except Exception:  # noqa: BLE001 - as in begin; a store that fails here fails its caller next
            self._lose()

    def made(self, backend: Any, store: Any, rank: int, size: int) -> None:
        """Remember where the other end says who it is."""
        try:
            if self._is_on:
                self._channels.remember(backend, store, rank, size)
        except Exception:  # noqa: BLE001 - as in begin
            self._lose()

    # The end.

    def close(self) -> None:
        """Take back all that was put into torch, and close the ring, which stays on disk. Idempotent."""
        if self._closed.is_set():
            return
        self._closed.set()
        self._is_on = False
        self._interception.close()
        if self._compiled is not None:
            self._compiled.close()
        if not self.is_inherited:  # a forked child has no such thread
            self._wake.set()
            self._pause.release()
            self._watcher.join()
            self._look_at_all()
            if self._resting:
                time.sleep(REST_NS / 1e9)
        self._pending.clear()
        self._on_device.clear()
        self._resting.clear()
        self.ring.close()

    @property
    def num_pending(self) -> int:
        """How many operations go on, as far as the recorder has noticed."""
        return self._num_followed + (self._compiled.num_open if self._compiled is not None else 0)

    @property
    def is_inherited(self) -> bool:
        """Whether this process was forked from the one that it recorded."""
        return os.getpid() != self._pid

    @property
    def is_native(self) -> bool:
        """Whether collectives on the CPU are recorded by the part in C++."""
        return self._compiled is not None

    @property
    def _num_followed(self) -> int:
        """How many have to be looked at to know their end."""
        return len(self._pending) + sum(map(len, (*list(self._on_device.values()), *list(self._stamped.values()))))

    def switch_off(self) -> None:
        """Record nothing any more, without taking anything back: what a forked child does. The ring is not its own."""
        self._is_on = False
        self.ring.close()
        if self._compiled is not None:
            self._compiled.switch_off()

    # Inside.

    def _end(self, token: Token, *, late: bool, failed: bool = False) -> None:
        if token.is_over:
            return
        token.is_over = True
        now = time.monotonic_ns()
        if token.in_backward and token.work is not None:
            self._resting.add(now, token.work)
        try:
            self.ring.end(token.index, now, None, failed=failed, late=late)
            if token.output and self._outputs.get(token.output) is token:
                del self._outputs[token.output]
        except Exception:  # noqa: BLE001 - as in begin
            self._lose()

    def _lose(self) -> None:
        """Count what could not be recorded, and tell of the first one."""
        if not self._is_on:
            return
        self.ring.lose()
        if not self._complained:
            self._complained = True
            _LOG.warning("an event could not be recorded; later losses are only counted", exc_info=True)

    def _name(self, known: Group, bare: Any, device_type: str, dtype: torch.dtype | None) -> tuple[int, int]:
        """Return the ring's numbers of a group and a dtype; and follow waits if it is the first one of gloo."""
        names = self._groups.number(known, bare, device_type, dtype)
        if known.backends[device_type] == "gloo" and not self._follows_tensors:
            self._follows_tensors = True
            self._interception.follow_functional_waits(self)
        return names

    def _clock(self, group: Group, bare: Any, index: int) -> DeviceClock:
        if not group.timed:
            group.timed = True
            if bare is None:
                group.ref()._enable_collectives_timing()  # type: ignore[union-attr]
        if index not in self._clocks:
            self._clocks[index] = DeviceClock(index)
        return self._clocks[index]

    def _follow_output(self, output: Any, token: Token) -> None:
        while isinstance(output, (list, tuple)):
            output = output[0]
        token.output = output.data_ptr()
        self._outputs[token.output] = token
        if len(self._outputs) > _MAX_OUTPUTS:
            self._end(self._outputs.popitem(last=False)[1], late=True)

    def _watch_device(self, token: Token) -> None:
        self._on_device.setdefault((token.device, *token.channel), deque()).append(token)

    # The watcher's thread.

    def _watch(self) -> None:
        is_ready, begun = False, -1
        while not self._closed.is_set():
            if not self._num_followed and self._begun == begun and not self._await_something():
                self.ring.sign()
                self._resting.let_go(time.monotonic_ns())
                continue
            begun = self._begun  # while more begin it need not be woken for them: each time would cost a look
            pause_s = min(self._poll_s, _DEVICE_POLL_S) if self._clocks else self._poll_s
            if self._pause.acquire(timeout=pause_s) or not self._is_on:
                return
            if self._clocks and not is_ready:  # not before: to ask for devices would make their context
                is_ready = True
                if not leave_captures_alone():
                    _LOG.warning("no CUDA runtime found: a graph that is captured while collectives go on may fail")
            self.ring.sign()
            self._look_at_all()

    def _await_something(self) -> bool:
        """Return whether something goes on, as soon as it does, or after `_IDLE_S`."""
        self._is_idle = True  # before looking: who begins something after that sees it, and wakes
        if not self._num_followed and self._wake.wait(_IDLE_S):
            self._wake.clear()
        self._is_idle = False
        return self._closed.is_set() or self._num_followed > 0

    def _look_in_passing(self, now_ns: int) -> None:
        """End what is over on the host, in a thread that trains: a look costs less here than the watcher's waking."""
        if (self._pending or self._resting) and now_ns - self._looked_ns > _LOOK_NS:
            self._looked_ns = now_ns
            self._look_at_works(self._pending, only_host=True)
            self._resting.let_go(now_ns)

    def _look_at_works(self, works: dict[int, Token], *, only_host: bool = False) -> None:
        for key, token in list(works.items()):
            if only_host and not token.on_host:
                continue  # its end would be ordered into this thread's stream
            try:
                self._look(works, key, token)
            except Exception:  # noqa: BLE001 - as in begin
                works.pop(key, None)
                self._lose()

    def _look_at_all(self) -> None:
        self._look_at_works(self._pending)
        self._resting.let_go(time.monotonic_ns())
        for (_, _, peer), tokens in list(self._on_device.items()):
            self._end_those_over(tokens, work_is_over, self._end_of_work, in_order=peer < 0)
        for tokens in list(self._stamped.values()):
            self._end_those_over(tokens, has_passed, self._end_of_stream, in_order=True)

    def _end_those_over(
        self, tokens: deque[Token], is_over: Callable[[Token], bool], end: Callable[[Token], None], *, in_order: bool
    ) -> None:
        """End what is over of operations that a device runs one after the other: those before the first that is not."""
        for _ in range(num_over(tokens, is_over, in_order=in_order)):
            token = tokens[0]
            try:
                end(token)
            except Exception:  # noqa: BLE001 - as in begin; after an error of the device every query raises
                self._end(token, late=True, failed=True)
                self._lose()
            tokens.popleft()

    def _end_of_stream(self, token: Token) -> None:
        clock = self._clocks[token.device]
        span = clock.between(token.ready, token.passed)
        clock.release(token.ready)
        clock.release(token.passed)
        if span is None:
            self._end(token, late=True)
        else:
            token.is_over = True
            self.ring.end(token.index, span.end_ns, span.end_ns - span.begin_ns, failed=False, late=False)

    def _look(self, works: dict[int, Token], key: int, token: Token) -> None:
        work = token.work
        if token.is_over:  # a functional wait was its end
            works.pop(key, None)
            return
        if work is None:
            return  # only its caller holds it now: its wait or its end tells
        if work.is_completed():
            if works.pop(key, None) is not None:
                self._end_on_host(token, work)
        elif token.kind in ENDS_AT_WAIT and time.monotonic_ns() - token.begin_ns > _HELD_NS:
            # Held here, it would hold its tensors for as long as nobody waits for it.
            token.ref = weakref.ref(work, lambda _: self._dropped(key, token))
            token.work = None

    def _dropped(self, key: int, token: Token) -> None:
        """End what nobody can wait for any more, unless its output is still followed."""
        if self._pending.get(key) is token:
            del self._pending[key]
            if self._outputs.get(token.output) is not token:
                self._end(token, late=True)

    def _end_on_host(self, token: Token, work: Any) -> None:
        try:
            self._interception.wait(work)  # it is over: this only tells how
        except RuntimeError:
            self._end(token, late=True, failed=True)
        else:
            self._end(token, late=True)

    def _end_of_work(self, token: Token) -> None:
        clock = self._clocks.get(token.device)
        if clock is None or token.ready is None:
            self._end(token, late=True)
            return
        try:
            duration_ns = round(token.work._get_duration() * 1e6)
        except RuntimeError:  # not timed; or cut off, where its like were timed
            self._end(token, late=True, failed=token.kind in token.group.timed_kinds)
            return
        token.group.timed_kinds.add(token.kind)
        span = clock.span(token.channel, token.ready, duration_ns)
        clock.release(token.ready)
        if span is None or token.is_over:
            self._end(token, late=True)
        else:
            token.is_over = True
            self.ring.end(token.index, span.end_ns, duration_ns, failed=False, late=False)


_REDUCE_SCATTERS = ENDS_AT_WAIT - MESSAGES
