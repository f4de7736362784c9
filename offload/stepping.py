"""The inside of TieredAdamW: takes gradients as they come, opens and ends rounds, lets readers of parameters wait."""

from __future__ import annotations

import contextlib
import os
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import nn

from offload import gates, norms
from offload.errors import OptimizerError
from offload.group import Group
from offload.machine import Machine, Tiering
from offload.optimizer_checks import check_apart, check_gradient, check_groups, check_parameters
from offload.rounds import Verdict
from offload.schedule import Mode


class Stepping(torch.optim.Optimizer):
    """One step after another over the subgroups of a `Machine`; `step` and what is public is TieredAdamW's."""

    def _prepare(self, mode: Mode, max_norm: float | None, tiering: Tiering) -> None:
        """Begin, with the parameter groups that there are."""
        self.tiering = tiering
        self.mode: Mode = mode
        self.max_norm = max_norm
        self._step_supports_amp_scaling = True
        self._machine: Machine | None = None
        self._hooks: list[Any] = []
        self._attached: list[tuple[nn.Module, list[gates.Hook]]] = []
        self._closed = False
        self._pid = os.getpid()
        self._failure: BaseException | None = None
        self._judge = ThreadPoolExecutor(1, thread_name_prefix="offload-judge")
        self._arrived: dict[int, int] = {}
        self._taken: set[int] = set()
        self._norms: dict[int, torch.Tensor] = {}
        self._listened: set[int] = set()
        self._last_norm: float | None = None
        self.num_skipped = 0
        """Steps that were not made because something was not finite."""
        self.stall_s = 0.0
        """Time that the caller has waited for updates so far."""
        check_apart(self._parameters())
        check_groups(self.param_groups)
        if self.tiering.accumulation_steps is not None:
            self._register_arrivals()

    @property
    def machine(self) -> Machine:
        """The subgroups, plan, rates and lanes; made at the first use, with the parameters that there are then."""
        if self._closed:
            raise OptimizerError("the optimizer is closed; make a new one and load its state")
        if self._machine is None:
            self._machine = self._build()
        return self._machine

    def wait(self) -> None:
        """Return when every update is done and every parameter may be read by anybody; raises what went wrong."""
        self._check_usable()
        machine = self._machine
        if machine is None or machine.round is None:
            return
        if not machine.round.has_stepped:
            self._refuse_early_read()
            return
        self._end_round(machine)
        if machine.device.type == "cuda":
            torch.cuda.current_stream(machine.device).synchronize()

    synchronize = wait

    def _detach(self) -> None:
        while self._attached:
            for hook in self._attached.pop()[1]:
                hook.remove()

    def _refuse_early_read(self) -> None:
        """Raise where updates begin in backward: what is read may be of this step, or of the next one."""
        if self.mode in ("stream", "spec"):
            raise OptimizerError(
                f"mode: {self.mode}; parameters are read between backward and step(); call step() first, or use defer"
            )

    def _end_round(self, machine: Machine) -> None:
        """Let the caller's stream wait for every update; take stock of the step."""
        with self._waiting():
            verdict = machine.finish()
        for parameter in self._parameters():
            gates.release(parameter)
        if verdict is not None and verdict.skip:
            self.num_skipped += 1

    def _parameters(self) -> list[torch.Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def _groups(self) -> list[Group]:
        return check_groups(self.param_groups)

    def _build(self) -> Machine:
        parts = [[norms.local(parameter).detach() for parameter in g["params"]] for g in self.param_groups]
        check_parameters(parts)
        if self.tiering.subgroup_numel % 1024 and parts[0][0].is_cuda:
            raise OptimizerError(f"subgroup_numel: {self.tiering.subgroup_numel}; a multiple of 1024 with CUDA")
        machine = Machine(parts, self.tiering, self.mode)
        self._at_end = weakref.finalize(self, _close_later, machine, self._pid)
        self._at_end.atexit = False
        return machine

    def _register_arrivals(self) -> None:
        this = weakref.ref(self)
        for number, parameter in enumerate(self._parameters()):
            if number in self._listened or not parameter.requires_grad:
                continue  # what is frozen now and trained later is taken in step()
            self._listened.add(number)

            def arrived(parameter: torch.Tensor, number: int = number) -> None:
                optimizer = this()
                if optimizer is not None:
                    optimizer._arrive(number, parameter)

            self._hooks.append(parameter.register_post_accumulate_grad_hook(arrived))  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def _arrive(self, number: int, parameter: torch.Tensor) -> None:
        """Count a gradient's arrivals; take it at the last one of a step."""
        wanted = self.tiering.accumulation_steps
        assert wanted is not None
        self._arrived[number] = self._arrived.get(number, 0) + 1
        if self._arrived[number] < wanted:
            return
        if self._arrived[number] > wanted:
            raise OptimizerError(
                f"accumulation_steps: {wanted}; parameter {number} got gradient {self._arrived[number]} of this step; "
                "give the number of backwards before each step()"
            )
        machine = self._open()
        self._take(number, parameter)
        assert machine.round is not None
        tasks = [machine.round.tasks[index] for index in machine.subgroups_of[number]]
        whole = [task for task in tasks if all(piece.parameter in self._taken for piece in task.subgroup.pieces)]
        if self.mode in ("stream", "spec"):
            early = ("cpu", "stream") if self.mode == "spec" else ("cpu", "stream", "resident", "tier")
            self._guard(number, parameter)
            for task in whole:
                if task.path in early:
                    machine.submit(task)
            return
        for task in whole:
            machine.prefetch(task)

    def _open(self) -> Machine:
        """Return the machine with a round open; the one before ends first."""
        self._check_usable()
        machine = self.machine
        if machine.round is not None and machine.round.has_stepped:
            self._end_round(machine)
        if machine.round is None:
            if self.mode in ("stream", "spec"):
                for hook in list(self._optimizer_step_pre_hooks.values()):
                    hook(self, (), {})
            machine.begin(self._groups())
            self._norms.clear()
        return machine

    def _take(self, number: int, parameter: torch.Tensor) -> None:
        gradient = parameter.grad
        assert gradient is not None
        mine = norms.local(gradient)
        check_gradient(number, mine)
        if self.mode != "stream":
            self._norms[number] = norms.norm_of(mine)
        self.machine.take(number, mine)
        self._taken.add(number)
        parameter.grad = None

    def _take_rest(self) -> None:
        """Take the gradients that no hook took."""
        for number, parameter in enumerate(self._parameters()):
            if number not in self._taken and parameter.grad is not None:
                self._open()
                self._take(number, parameter)

    def _submit_rest(self) -> None:
        """Submit what was not yet: everything, or the subgroups that no last gradient completed."""
        machine = self.machine
        assert machine.round is not None
        round_ = machine.round
        if self.mode in ("stream", "spec"):
            for task in round_.tasks:
                if not task.submitted:
                    machine.submit(task)
            return
        machine.submit_all(to_and_fro=self.mode == "sync")

    def _send_for_verdict(self, scale: torch.Tensor | None, found_inf: torch.Tensor | None) -> None:
        machine = self.machine
        flat = self._parameters()
        numbers = sorted(self._norms)
        cut_over = [norms.groups_of(flat[number]) for number in numbers]
        norm = norms.total([self._norms[number] for number in numbers], cut_over, machine.device)
        scalars = norms.Scalars.send(norm, scale, found_inf, machine.lanes)

        def judge() -> None:
            try:
                verdict, self._last_norm = scalars.verdict(self.max_norm)
            except Exception as error:  # noqa: BLE001  carried to whoever waits
                self._failure = error
                verdict = Verdict(1.0, skip=True)
            machine.judge(verdict)

        self._judge.submit(judge)

    def _guard_all(self) -> bool:
        """Guard every parameter; False: one of them has neither a guard nor a hook."""
        parameters = self._parameters()
        for number, parameter in enumerate(parameters):
            self._guard(number, parameter)
        return bool(self._attached) or all(gates.can_guard(parameter) for parameter in parameters)

    def _guard(self, number: int, parameter: torch.Tensor) -> None:
        if gates.can_guard(parameter):
            this, machine = weakref.ref(self), self.machine

            def gate() -> None:
                optimizer = this()
                if optimizer is not None:
                    optimizer._read(number)
                    return
                if machine.round is not None and machine.round.has_stepped:
                    machine.wait_for(number)
                else:
                    machine.close()  # which ends what was begun in backward
                gates.release(parameter)

            gates.guard(parameter, gate)

    def _read(self, number: int) -> None:
        self._check_usable()
        machine = self.machine
        if machine.round is not None and not machine.round.has_stepped:
            self._refuse_early_read()
        elif machine.round is not None:
            with self._waiting():
                machine.wait_for(number)
        gates.release(self._parameters()[number])

    def _abandon(self) -> None:
        """End a round that no `step()` followed."""
        machine = self.machine
        assert machine.round is not None
        machine.round.has_stepped = True
        self._submit_rest()
        if not machine.round.verdict.done():
            machine.judge(Verdict(1.0, skip=True))
        self.wait()

    def _check_usable(self) -> None:
        if self._pid != os.getpid():
            raise OptimizerError(
                f"the optimizer is process {self._pid}'s: this one was forked from it, and its threads were not; "
                "use it there, and give workers copies of what they read, made after wait()"
            )
        if self._failure is not None:
            raise OptimizerError(
                f"an earlier update failed, the states are not to be relied on: {self._failure}"
            ) from (self._failure)

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[None]:
        """Count the time, and remember what went wrong."""
        start_s = time.perf_counter()
        try:
            yield
        except BaseException as error:
            self._failure = error
            raise
        finally:
            self.stall_s += time.perf_counter() - start_s


def _close_later(machine: Machine, pid: int) -> None:
    """Close a machine that nobody has closed, in a thread: a collector may run in any, also in the machine's own."""
    if pid != os.getpid():  # forked, without the threads
        return
    with contextlib.suppress(RuntimeError):  # the interpreter ends
        threading.Thread(target=machine.close, name="offload-close", daemon=True).start()
