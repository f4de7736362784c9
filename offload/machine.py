"""What a tiered optimizer is made of once its parameters are known: subgroups, states, threads, the step in flight."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
from collections.abc import Callable, Sequence, Set
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, field

import torch

from offload import calibrate
from offload.errors import OptimizerError
from offload.group import Group
from offload.kernels import Kernel, KernelName, States, Step, make_kernel
from offload.room import room_of
from offload.rounds import Round, Run, Task, Verdict
from offload.schedule import STATE_BYTES, Budget, Interleave, Mode, Plan, Rates, cut, plan
from offload.states import KINDS, StateStore, TierCache
from offload.tier import Tier
from offload.tracing import STALL, Trace
from offload.transfer import TIMEOUT_S, HostMemory, Lanes, Ring, Ticket, finished, make_lanes
from offload.updates import DeviceWorker, HostWorker, Worker, Workplace

NUM_OUTS = 4
"""Subgroups of new parameters on their way to the device at once."""
_PAGE_NUMEL = 1024
"""fp32 elements of a page of memory, the least that can be pinned."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tiering:
    """Where states live and how they are updated. Every choice gives the same parameters, to the bit."""

    accumulation_steps: int | None = None
    """Backwards before a `step()`. With it gradients leave the device in the last one, and `.grad` is None after it;
    without, `step()` takes them."""
    subgroup_numel: int = 1 << 24
    """Parameters that travel together; a multiple of 1024."""
    interleave: Interleave | None = None
    """See `offload.schedule.plan`; None: `auto` with parameters on a GPU, all on the CPU with parameters there."""
    budget: Budget = field(default_factory=Budget)
    """Device and host memory that states may take."""
    rates: Rates | None = None
    """Measured rates; None: measured where `interleave` is `auto`, in a few seconds."""
    tier: Tier | None = None
    """Out-of-core tier for what `budget.host_bytes` does not hold."""
    num_tier_slots: int = 4
    """Subgroups of the tier in host memory at once."""
    kernel: KernelName = "native"
    """`torch` needs no compiler and is many times slower."""
    num_threads: int | None = None
    """Threads of the CPU's updates; None: all CPUs of this process but two, which launch and copy."""
    link_bytes_per_s: float | None = None
    """Emulates a link of this rate, with parameters on a CPU."""
    prefetch: bool | None = None
    """Brings states that are streamed to the device under backward, in `sync` and `defer` with `accumulation_steps`:
    where a step's own peak of memory leaves room, and until the end of the next forward. None: on a GPU."""
    trace: Trace | None = None
    """Gets transfers, updates and stalls."""


def default_threads() -> int:
    """Return how many threads update where nobody says."""
    return max(1, len(os.sched_getaffinity(0)) - 2)


class Machine:
    """Subgroups of the parameters, their states at home, the lanes and the two workers."""

    def __init__(self, parameters: Sequence[Sequence[torch.Tensor]], tiering: Tiering, mode: Mode) -> None:
        """`parameters`: by group, this rank's part of each, contiguous, all on one device, of one dtype a group."""
        flat = [parameter for group in parameters for parameter in group]
        self.device = flat[0].device
        self.subgroups = cut([[p.numel() for p in group] for group in parameters], tiering.subgroup_numel)
        self._group_of = [index for index, group in enumerate(parameters) for _ in group]
        self.subgroups_of: list[list[int]] = [[] for _ in flat]
        for subgroup in self.subgroups:
            for piece in subgroup.pieces:
                self.subgroups_of[piece.parameter].append(subgroup.index)
        self.rates = tiering.rates
        self.plan = self._plan(tiering)
        self.memory = HostMemory(pinned=self.device.type == "cuda")
        prefetches = self.device.type == "cuda" if tiering.prefetch is None else tiering.prefetch
        self.room = room_of(self.device) if prefetches else None
        self._trace = tiering.trace
        self.lanes: Lanes = make_lanes(self.device, bytes_per_s=tiering.link_bytes_per_s, trace=tiering.trace)
        self.tier: TierCache | None = None
        self._flat = [parameter.detach().view(-1) for parameter in flat]
        self.steps = [0] * len(flat)
        self._groups: list[Group] = []
        self.mode = mode
        self.workers: list[Worker] = []
        self._kernels: list[Kernel] = []
        self.round: Round | None = None
        self.passed: set[int] = set()
        self.prefetched: set[int] = set()
        """Subgroups of the round, or of the last one, whose states were on the device before the end of backward."""
        self._num_rounds = 0
        try:
            self._furnish(tiering)
        except BaseException:
            self.close()
            raise

    def _furnish(self, tiering: Tiering) -> None:
        """Make what holds memory, room in a tier, and threads."""
        if tiering.tier is not None:
            self.tier = TierCache(tiering.tier, self.memory, tiering.num_tier_slots, tiering.trace)
            self._reserve(self.tier)
        self.store = StateStore(
            self.subgroups, self.plan.paths, self.device, self.memory, tier=self.tier, two_sides=self.mode == "spec"
        )
        self._gradients = self._host_gradients()
        self._load_masters()
        self._kernels = self._make_kernels(tiering)
        self.workers = self._make_workers(tiering)
        for worker in self.workers:
            worker.start()

    def begin(self, groups: Sequence[Group]) -> Round:
        """Open a round with the hyper-parameters that it will use."""
        assert self.round is None
        self._groups = list(groups)
        tasks = [
            Task(group, path, host_gradient=self._gradients.get(group.index))
            for group, path in zip(self.subgroups, self.plan.paths, strict=True)
        ]
        self.round = Round(tasks, speculates=self.mode == "spec", is_early=self.mode in ("stream", "spec"))
        self.passed, self.prefetched = set(), set()
        if self.mode == "stream":
            self.round.verdict.set_result(Verdict(1.0))
        return self.round

    def use(self, groups: Sequence[Group]) -> None:
        """Let the round, of which nothing is submitted yet, use these hyper-parameters."""
        self._groups = list(groups)

    def groups_changed(self, groups: Sequence[Group]) -> bool:
        """Whether the hyper-parameters are not those that the round was opened with."""
        return list(groups) != self._groups

    def take(self, number: int, gradient: torch.Tensor) -> list[Task]:
        """Take a parameter's whole gradient, which is on the device; return the tasks that it belongs to."""
        assert self.round is not None
        flat = gradient.detach().reshape(-1)
        arrived = self.lanes.now()
        mine = [self.round.tasks[index] for index in self.subgroups_of[number]]
        if self.room is not None:
            self.room.look()
        for task in mine:
            task.present.add(number)
            if task.host_gradient is None:
                task.gradients[number] = flat
                task.tickets.append(arrived)
                continue
            pieces = [piece for piece in task.subgroup.pieces if piece.parameter == number]
            for piece in pieces:
                target = task.host_gradient.narrow(0, piece.offset, piece.count)
                source = flat.narrow(0, piece.start, piece.count)
                copied = self.lanes.lane("gradients down").run(
                    _copy(target, source), after=[arrived], num_bytes=source.nbytes, uses=[flat]
                )
                task.tickets.append(copied)
        return mine

    def prefetch(self, task: Task) -> None:
        """Bring the states of a subgroup whose gradients were taken to the device, if a step's peak leaves room.

        For updates that wait for the end of backward, whose own way up is idle until then.
        """
        assert self.round is not None
        if self.room is None or task.path != "stream" or self.round.is_early:
            return
        if not self.room.borrow(STATE_BYTES * task.subgroup.count):
            return
        self._device_worker.prefetch(task, States.empty(task.subgroup.count, self.device))
        self.prefetched.add(task.index)

    @property
    def num_early(self) -> int:
        """Subgroups that have memory which was lent to them."""
        return self._device_worker.num_early

    def drop_prefetched(self) -> None:
        """Forget states that are on the device early; call it before others are written to their home."""
        for task in [] if self.round is None else self.round.tasks:
            if task.prefetched is not None:
                task.prefetched.is_over, task.prefetched = True, None

    def submit(self, task: Task, *, order: int | None = None) -> None:
        """Let a worker update a subgroup, whose gradients have all been taken."""
        assert self.round is not None
        task.submitted = True
        if not task.present:
            if self.round.speculates and task.path in ("cpu", "stream"):
                # Nothing updates it, and yet it has to be on the side that will count.
                self._device_worker.returned(task.index)
                self.store.next(task.index).copy_(self.store.current(task.index))
            task.updated.set_result(finished())
            return
        self._worker(task).backlog.put(self.round, task, order)

    def submit_all(self, *, to_and_fro: bool) -> None:
        """Submit all subgroups, those in device and host memory first.

        `to_and_fro`: the tier's in turn from the first and from the last, so that a step begins with what the one
        before ended with, which is still in the buffers.
        """
        assert self.round is not None
        tasks = self.round.tasks
        out_of_core = [task for task in tasks if task.path == "tier"]
        if to_and_fro and self.tier is not None and out_of_core:
            if self._num_rounds % 2:
                out_of_core.reverse()
            kept = max(0, self.tier.num_slots - 2)
            self.round.keep = frozenset(task.index for task in out_of_core[len(out_of_core) - kept :])
            self._num_rounds += 1
            for position, task in enumerate(out_of_core):
                self.submit(task, order=len(tasks) + position)
        for task in tasks:
            if not (to_and_fro and task.path == "tier"):
                self.submit(task)

    def judge(self, verdict: Verdict) -> None:
        """Give the round its verdict; speculative updates that it contradicts are made again."""
        round_ = self.round
        assert round_ is not None
        agrees = verdict == Verdict(1.0)
        settled: list[tuple[Task, Ticket]] = []
        again: list[Task] = []
        with round_.lock:
            round_.verdict.set_result(verdict)
            for task in round_.tasks:
                if task.speculated is not None:
                    ticket, task.speculated = task.speculated, None
                    if agrees:
                        settled.append((task, ticket))
                    else:
                        task.tickets.append(ticket)  # what comes instead waits for what is given up
                        again.append(task)
        for task, ticket in settled:
            task.gradients.clear()
            task.updated.set_result(ticket)
        for task in again:
            self.submit(task)

    def wait_for(self, number: int, *, on_host: bool = False) -> None:
        """Let the caller's stream, or the caller, wait until a parameter is updated; raises what went wrong."""
        if self.round is None:
            return
        for index in self.subgroups_of[number]:
            if index not in self.passed or on_host:
                self._pass(index, on_host)

    def finish(self) -> Verdict | None:
        """Wait for all of the round and end it; return its verdict, or None where there was no round."""
        round_ = self.round
        if round_ is None:
            return None
        try:
            for task in round_.tasks:
                self._pass(task.index, on_host=False)
        finally:
            self.round = None
        verdict = round_.wait()
        if not verdict.skip:
            if round_.speculates:
                self.store.flip()
            for number in {number for task in round_.tasks for number in task.present}:
                self.steps[number] += 1
        return verdict

    def states_of(self, number: int) -> dict[str, torch.Tensor]:
        """Return the flat states of a parameter: views where they lie in one piece, else copies."""
        parts: list[States] = []
        for index in self.subgroups_of[number]:
            found = self.store.read(index)
            pieces = [piece for piece in self.subgroups[index].pieces if piece.parameter == number]
            parts += [found.narrow(piece.offset, piece.count) for piece in pieces]
        if not parts:
            return {kind: torch.zeros(0) for kind in KINDS}
        return {kind: _joined([part.tensors[place] for part in parts]) for place, kind in enumerate(KINDS)}

    def read_parameters(self, numbers: Set[int]) -> None:
        """Set the masters of some parameters to their values, but for those that round to them already."""
        self.settle()
        self.drop_prefetched()
        for index in sorted({index for number in numbers for index in self.subgroups_of[number]}):
            states = self.store.read(index)
            for piece in self.subgroups[index].pieces:
                if piece.parameter in numbers:
                    master = states.master.narrow(0, piece.offset, piece.count)
                    value = self._flat[piece.parameter].narrow(0, piece.start, piece.count).to(master.device)
                    master.copy_(torch.where(master.to(value.dtype) == value, master, value.float()))
            self.store.write(index, states)

    def settle(self) -> None:
        """Wait until states that were streamed are back in host memory, so that they can be read there."""
        for subgroup, path in zip(self.subgroups, self.plan.paths, strict=True):
            if path == "stream":
                self._device_worker.returned(subgroup.index)

    def close(self) -> None:
        """End threads, lanes and pinning, give room in a tier back; a second call does nothing."""
        for worker in self.workers:
            worker.close()
        self.lanes.close()
        for kernel in self._kernels:
            kernel.close()
        if self.tier is not None:
            self.tier.close()
        self.memory.close()

    def _pass(self, index: int, on_host: bool) -> None:
        assert self.round is not None
        task = self.round.tasks[index]
        with self._stall(task):
            try:
                ticket = task.updated.result(TIMEOUT_S)
            except FutureTimeout as error:
                if task.updated.done():
                    raise
                raise OptimizerError(f"the update of subgroup {index} did not end in {TIMEOUT_S} s") from error
            if on_host:
                ticket.wait()
            else:
                self.lanes.hold(ticket)
        if index in self.passed:
            return
        self.passed.add(index)
        if self.room is not None and len(self.passed) == len(self.subgroups):
            self.room.give_back(self._device_worker.release())
            self.room.measure()

    def _stall(self, task: Task) -> contextlib.AbstractContextManager[None]:
        """Record what is waited for a task, if anything is, under the name of where its states are."""
        trace = self._trace
        if trace is None or (task.updated.done() and not task.updated.exception() and task.updated.result().done()):
            return contextlib.nullcontext()
        where = "cpu" if task.path == "cpu" else "gpu"
        if task.path == "tier" and self.tier is not None:
            where = self.tier.tier.spec.label
        if self.device.type == "cuda":
            return trace.device_span(where, STALL, stream=torch.cuda.current_stream(self.device))
        return trace.span(where, STALL)

    def _runs(self, task: Task, scale: float) -> list[Run]:
        runs: list[Run] = []
        last = (-1, -1)
        hyper = self._groups[task.subgroup.group]
        for piece in task.subgroup.pieces:
            if piece.parameter not in task.present:
                continue
            number = self.steps[piece.parameter] + 1
            if runs and last == (piece.offset, number):
                runs[-1] = Run(runs[-1].offset, runs[-1].count + piece.count, runs[-1].step)
            else:
                step = Step(number, hyper.lr, hyper.betas, hyper.eps, hyper.weight_decay, scale)
                runs.append(Run(piece.offset, piece.count, step))
            last = (piece.offset + piece.count, number)
        return runs

    def _plan(self, tiering: Tiering) -> Plan:
        interleave, budget = tiering.interleave, tiering.budget
        if interleave is None and self.device.type == "cuda":
            interleave = "auto"
        elif interleave is None:  # there is no other memory than the CPU's
            interleave, budget = "cpu", dataclasses.replace(budget, device_bytes=0)
        if interleave == "auto" and self.rates is None:
            self.rates = calibrate.calibrate(
                self.device,
                num_threads=tiering.num_threads or default_threads(),
                kernel=tiering.kernel,
                tier=tiering.tier,
            )
        found = plan([group.count for group in self.subgroups], self.rates, interleave=interleave, budget=budget)
        if "tier" in found.paths and tiering.tier is None:
            missing = 12 * found.numel(self.subgroups, "tier")
            raise OptimizerError(
                f"budget.host_bytes: {budget.host_bytes}; {missing} bytes of states do not fit: "
                f"give it {missing} more, or a tier"
            )
        return found

    def _reserve(self, cache: TierCache) -> None:
        for group, path in zip(self.subgroups, self.plan.paths, strict=True):
            if path == "tier":
                first, last = group.pieces[0].parameter, group.pieces[-1].parameter
                cache.add(group.index, group.count, f"states of parameters {first} to {last} (subgroup {group.index})")

    def _host_gradients(self) -> dict[int, torch.Tensor]:
        return {
            group.index: self.memory.empty(group.count, self._flat[group.pieces[0].parameter].dtype)
            for group, path in zip(self.subgroups, self.plan.paths, strict=True)
            if path in ("cpu", "tier")
        }

    def _load_masters(self) -> None:
        for group in self.subgroups:
            masters = [
                self._flat[piece.parameter].narrow(0, piece.start, piece.count).float() for piece in group.pieces
            ]
            zeros = torch.zeros(group.count, device=self.device)
            self.store.write(group.index, States(torch.cat(masters), zeros, zeros))

    def _make_kernels(self, tiering: Tiering) -> list[Kernel]:
        threads = tiering.num_threads or default_threads()
        host = make_kernel(tiering.kernel, torch.device("cpu"), num_threads=threads)
        device = make_kernel(tiering.kernel, self.device, num_threads=1)
        return [host, device]

    def _make_workers(self, tiering: Tiering) -> list[Worker]:
        place = Workplace(self.store, self.lanes, self._flat, self._runs, self._trace)
        largest = max((group.count for group in self.subgroups), default=0)
        width = max(parameter.element_size() for parameter in self._flat)
        outs = Ring([self.memory.empty(largest * width, torch.uint8) for _ in range(NUM_OUTS)])
        slots = None
        if self.plan.num_slots:
            slots = Ring([States.empty(largest, self.device) for _ in range(self.plan.num_slots)])
        self._device_worker = DeviceWorker(place, self._kernels[1], slots)
        self._host_worker = HostWorker(place, self._kernels[0], outs, self.tier)
        return [self._host_worker, self._device_worker]

    def _worker(self, task: Task) -> Worker:
        return self._host_worker if task.path in ("cpu", "tier") else self._device_worker


def _joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return parts end to end: a view where they already lie so in one memory."""
    storages = {part.untyped_storage().data_ptr() for part in parts}
    follows = all(one.data_ptr() + one.nbytes == other.data_ptr() for one, other in itertools.pairwise(parts))
    if len(storages) == 1 and follows:
        return parts[0].as_strided((sum(part.numel() for part in parts),), (1,))
    return torch.cat([part.cpu() for part in parts])


def _copy(target: torch.Tensor, source: torch.Tensor) -> Callable[[], None]:
    def copy() -> None:
        target.copy_(source, non_blocking=True)

    return copy
