"""AdamW whose fp32 masters and moments live in tiers, with the result of a synchronous step, to the bit."""

from __future__ import annotations

import contextlib
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

import torch
from torch import nn

from offload import gates, norms
from offload.errors import OptimizerError
from offload.machine import Group, Machine, Tiering
from offload.optimizer_checks import check_parameters, check_settings
from offload.optimizer_load import load
from offload.schedule import Mode
from offload.states import KINDS
from offload.updates import Verdict

__all__ = ["TieredAdamW", "Tiering"]


class TieredAdamW(torch.optim.Optimizer):
    """AdamW over fp32, bf16 or fp16 parameters, whose states live in tiers.

    `mode` says when updates run; the parameters that anybody sees are those of a synchronous step in each:

    - `sync`: in `step()`, which returns when they are done.
    - `defer`: under the next forward, which waits module by module (`attach`) or parameter by parameter.
    - `stream`: as gradients arrive in backward; without clipping and loss scaling. Between backward and `step()` no
      parameter may be read.
    - `spec`: like `stream`, but tentatively, for clipping that rarely bites; twice the host memory for states.

    `max_norm` clips the global norm of the gradients without a host that waits for it. A step whose norm, if it is
    known, is not finite is skipped. With `tiering.accumulation_steps` gradients leave the device in the last backward
    before a `step()`, which `stream` and `spec` need; otherwise `step()` takes them. Taken gradients are gone:
    `.grad` is None.

    Learning rates and the like of `param_groups` count as they are at `step()`; in `stream` and `spec` they may not
    change between backward and `step()`. Step pre-hooks run before anything is changed, so in those two modes at the
    first gradient of a step too.

    One thread at a time may use it. A context manager; `close` ends its threads and unpins memory. Of one that is gone
    without, parameters still wait for their updates; its threads end some time later.

    Raises:
        OptimizerError: settings that exclude each other, all of them at once.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        mode: Mode = "defer",
        max_norm: float | None = None,
        tiering: Tiering | None = None,
    ) -> None:
        self.tiering = tiering or Tiering()
        check_settings(mode, max_norm, self.tiering)
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.mode: Mode = mode
        self.max_norm = max_norm
        self._step_supports_amp_scaling = True
        self._machine: Machine | None = None
        self._hooks: list[Any] = []
        self._attached: list[tuple[nn.Module, list[gates.Hook]]] = []
        self._closed = False
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

    def attach(self, model: nn.Module) -> None:
        """Let every module's forward wait for the parameters that it holds. After FSDP2 has wrapped the model.

        From then on a module's `load_state_dict` changes the masters too, and leaves the moments. Other changes of
        weights in place are lost in the next step, which starts from the masters.
        """
        assert self.machine, "made now, not under the first step"
        numbers = {id(parameter): number for number, parameter in enumerate(self._parameters())}
        self._attached.append((model, gates.attach(model, numbers, self)))

    @torch.no_grad()
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, also while training: states are laid out anew, after all updates."""
        if getattr(self, "_machine", None) is None:
            super().add_param_group(param_group)
            return
        saved = self.state_dict()["state"]
        super().add_param_group(param_group)
        self.machine.close()
        self._at_end.detach()
        self._machine = None
        if self.tiering.accumulation_steps is not None:
            self._register_arrivals()
        self.load_state_dict({"state": saved, "param_groups": torch.optim.Optimizer.state_dict(self)["param_groups"]})
        models = [model for model, _ in self._attached]
        self._detach()
        for model in models:
            self.attach(model)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters, or see to it that whoever reads them next gets the updated ones."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if self.tiering.accumulation_steps is not None and (scale is not None or found_inf is not None):
            raise OptimizerError(
                f"accumulation_steps: {self.tiering.accumulation_steps}; a GradScaler looks at .grad before step(), "
                "where it is gone: None, with mode sync or defer"
            )
        machine = self.machine
        self._take_rest()
        if machine.round is None:
            return loss
        if self.mode in ("stream", "spec") and machine.groups_changed(self._groups()):
            raise OptimizerError(
                f"mode: {self.mode}; param_groups changed between backward and step(); change them after"
            )
        round_ = machine.round
        round_.has_stepped = True
        if round_.may_write is None:
            round_.may_write = machine.lanes.now()
        self._submit_rest()
        if self.mode != "stream":
            self._send_for_verdict(scale, found_inf)
        self._arrived.clear()
        self._taken.clear()
        if self.mode == "sync" or not self._guard_all():
            self.wait()
        return loss

    def switch(self, mode: Mode, max_norm: float | None) -> None:
        """Change the mode and the clipping, between two steps. To and from `spec` only before the first step."""
        check_settings(mode, max_norm, self.tiering)
        if self._machine is not None:
            self.wait()
            if "spec" in (mode, self.mode) and mode != self.mode:
                raise OptimizerError("mode: spec has twice the states of the others; make an optimizer of its own")
            self._machine.mode = mode
        self.mode, self.max_norm = mode, max_norm

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

    def wait_for(self, parameters: Any, *, on_host: bool) -> None:
        """Wait for some parameters, by their numbers; forward hooks call it."""
        machine = self._machine
        if machine is None or machine.round is None:
            return
        if not machine.round.has_stepped:
            if not self._taken.isdisjoint(parameters):
                self._refuse_early_read()
            return  # a block that backward computes again
        self._check_usable()
        with self._waiting():
            for number in parameters:
                machine.wait_for(number, on_host=on_host)
        flat = self._parameters()
        for number in parameters:
            gates.release(flat[number])

    @torch.no_grad()
    def take_values(self, parameters: Any) -> None:
        """Take the values of some parameters, by their numbers, for their masters; keep the moments.

        A master whose rounded value the parameter has stays as it is.
        """
        self.wait()
        self.machine.read_parameters(frozenset(parameters))

    @property
    def last_norm(self) -> float | None:
        """Norm of the gradients of the last step, before clipping; waits for it. None where nothing needed it."""
        self._judge.submit(lambda: None).result()
        return self._last_norm

    def state_dict(self) -> dict[str, Any]:
        """Return the state as torch.optim.AdamW's, with a `master` beside the moments; copies, after all updates."""
        found: dict[str, Any] = super().state_dict()
        found["state"] = {
            number: {"step": torch.tensor(float(step)), **{kind: tensor.clone() for kind, tensor in kinds.items()}}
            for number, (step, kinds) in enumerate(self.states())
            if step
        }
        return found

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the state of any `TieredAdamW`, whatever its placement, or of a torch.optim.AdamW.

        Without a `master` the parameters' values are the masters.
        """
        self.wait()
        super().load_state_dict({**state_dict, "state": {}})
        load(self.machine, self._parameters(), state_dict["state"])

    def states(self) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
        """Yield every parameter's step count and fp32 states, in the parameter's shape, after all updates.

        In host memory and on the device they are views, which the next updates change (step pre-hooks tell when);
        of a parameter whose states are in several places, or in the tier, copies. DTensors for DTensors.
        """
        self.wait()
        machine = self.machine
        machine.settle()
        for number, parameter in enumerate(self._parameters()):
            kinds = machine.states_of(number)
            shape = norms.local(parameter).shape
            yield machine.steps[number], {kind: norms.like(kinds[kind].view(shape), parameter) for kind in KINDS}

    def close(self) -> None:
        """Finish all updates, end threads and unpin memory; a second call does nothing."""
        if self._closed:
            return
        try:
            if self._failure is None and self._machine is not None:
                if self._machine.round is not None and not self._machine.round.has_stepped:
                    self._abandon()
                else:
                    self.wait()
        finally:
            self._closed = True
            self._judge.shutdown()
            for hook in self._hooks:
                hook.remove()
            self._detach()
            try:
                if self._machine is not None:
                    self._machine.close()
                    self._at_end.detach()
            finally:
                for parameter in self._parameters():
                    gates.release(parameter)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

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
        return [Group(float(g["lr"]), tuple(g["betas"]), g["eps"], g["weight_decay"]) for g in self.param_groups]

    def _build(self) -> Machine:
        parts = [[norms.local(parameter).detach() for parameter in g["params"]] for g in self.param_groups]
        check_parameters(parts)
        if self.tiering.subgroup_numel % 1024 and parts[0][0].is_cuda:
            raise OptimizerError(f"subgroup_numel: {self.tiering.subgroup_numel}; a multiple of 1024 with CUDA")
        machine = Machine(parts, self.tiering, self.mode)
        self._at_end = weakref.finalize(self, _close_later, machine)
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
        if self.mode in ("stream", "spec"):
            early = ("cpu", "stream") if self.mode == "spec" else ("cpu", "stream", "resident", "tier")
            self._guard(number, parameter)
            assert machine.round is not None
            for index in machine.subgroups_of[number]:
                task = machine.round.tasks[index]
                if task.path in early and all(piece.parameter in self._taken for piece in task.subgroup.pieces):
                    machine.submit(task)

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


def _close_later(machine: Machine) -> None:
    """Close a machine that nobody has closed, in a thread: a collector may run in any, also in the machine's own."""
    with contextlib.suppress(RuntimeError):  # the interpreter ends
        threading.Thread(target=machine.close, name="offload-close", daemon=True).start()
