"""AdamW whose fp32 masters and moments live in tiers, with the result of a synchronous step, to the bit."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any, Self

import torch
from torch import nn

from offload import gates, norms
from offload.errors import OptimizerError
from offload.machine import Tiering
from offload.optimizer_checks import check_entries, check_groups, check_settings
from offload.optimizer_load import load
from offload.schedule import Mode
from offload.states import KINDS
from offload.stepping import Stepping

__all__ = ["TieredAdamW", "Tiering"]


class TieredAdamW(Stepping):
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
        tiering = tiering or Tiering()
        check_settings(mode, max_norm, tiering)
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._prepare(mode, max_norm, tiering)

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
        check_groups([{**self.defaults, **param_group}])
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
        self._check_usable()
        machine = self.machine
        self._take_rest()
        if machine.round is None or machine.round.has_stepped:  # nobody has got a gradient since
            return loss
        if self.mode in ("stream", "spec") and machine.groups_changed(self._groups()):
            raise OptimizerError(
                f"mode: {self.mode}; param_groups changed between backward and step(); change them after"
            )
        if self.mode not in ("stream", "spec"):
            machine.use(self._groups())
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
        check_groups(state_dict["param_groups"])
        check_entries(self._parameters(), state_dict["state"])
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
        if self._closed or self._pid != os.getpid():
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

    def __getstate__(self) -> dict[str, Any]:
        """Raise OptimizerError: threads, locked memory and a tier's blocks have no copies."""
        raise OptimizerError("a TieredAdamW can be neither copied nor pickled; make another one and load state_dict()")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
