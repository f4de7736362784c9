"""Runs a schedule: this rank's stages, their micro-batches, and the messages between them.

Our own executor, and neither `torch.distributed.pipelining` nor DeepSpeed's engine, because a step here is: payloads
of an activation and an auxiliary loss; keyword inputs that every rank reads for itself, other ones each micro-batch,
of other shapes if need be; a seed for each loss (summed, over the targets of all ranks); weight gradients that do not
walk or recompute the graph twice. torch's stages fix the shapes at the first step, cut the inputs themselves, take the
loss outside of the last stage with one scale, and find weight gradients by searching the autograd graph; DeepSpeed's
engine has one schedule for a list of layers.

Messages are posted before they are needed, each direction of each pair of ranks on a communicator of its own, and
waited for where they are used: none is on the critical path unless the schedule has nothing else to do.

On GPUs a message that is posted is a kernel that waits for its peer, so a rank that synchronises its device in the
middle of a step may wait for ever. Compiling, autotuning and the loading of kernels do; they come with the first step
of a schedule for inputs of some shapes, whose messages therefore go through the hosts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from parallel.errors import PipelineError
from parallel.pipeline.actions import Action
from parallel.pipeline.messages import Message, Plan, gives, needs, neighbours, plan, sender
from parallel.pipeline.schedule import Schedule, forward_only
from parallel.pipeline.tied import Tied
from parallel.pipeline.weights import Deferred, deferring
from parallel.pipeline.wires import Payload, Receiving, Sending, Wires

Inputs = Mapping[str, Tensor | None]
"""Inputs of a micro-batch by name; `tokens_BT` is the x of the first stage, all others go to every stage by keyword."""
Seed = float | Tensor
"""What a loss is multiplied with for backward."""

_AHEAD = 2
"""Actions by which receives are posted before the one that needs them; each holds a buffer."""


class GradientHooks(Protocol):
    """What an engine that reduces gradients (FSDP2, say) is told; stages are counted along the whole pipeline."""

    def before(self, action: Action, *, last: bool) -> None:
        """`action` is about to add to the gradients of its stage; with `last` none does after it in this step."""

    def finished(self, stage: int) -> None:
        """The gradients of a stage are complete."""


class Pipeline:
    """This rank's part of a pipeline; leaving the `with` block without an error (or `close()`) ends its communicators.

    All ranks of `group`, which is the pipeline axis of the mesh, make it at once and call the same methods with as
    many micro-batches. `stages` are this rank's, first to last. A stage is called as `stage(x, aux, **inputs)`: x is
    `tokens_BT` and aux None for the first stage, else what the stage before returned; it returns (x, aux), the last
    one (loss summed over its targets, aux), or (logits, aux) where inputs have no targets. `aux` is a scalar of at
    least fp32, the auxiliary loss up to there. `new_x(inputs)` returns an uninitialised tensor like the x between
    stages for a micro-batch: shape, dtype, device. Without `overlap` a message is received by the action that needs it,
    which waits for all of its way; the results are the same bits.

    Raises: PipelineError if stages and schedule do not fit the group.
    """

    def __init__(
        self,
        stages: Sequence[nn.Module],
        schedule: Schedule,
        group: ProcessGroup,
        *,
        new_x: Callable[[Inputs], Tensor],
        device: torch.device,
        tied: Sequence[Tied] = (),
        overlap: bool = True,
        timeout_s: float = 600.0,
    ) -> None:
        self.schedule, self.rank = schedule, group.rank()
        own = schedule.stages_of(self.rank) if schedule.num_ranks == group.size() else ()
        if len(own) != len(stages) or not own:
            raise PipelineError(
                f"parallel.pipeline: rank {self.rank} has {len(stages)} stages and the group {group.size()} ranks; the "
                f"schedule has {schedule.num_ranks} ranks with {schedule.num_stages // schedule.num_ranks} stages each"
            )
        self._group, self._device, self._new_x = group, device, new_x
        self._stages = dict(zip(own, stages, strict=True))
        self._hooks: GradientHooks | None = None
        self._tied = tuple(tied)
        self._ahead = _AHEAD if overlap else 0
        self._plans: dict[Schedule, Plan] = {}
        pairs = neighbours(schedule.rank_of)
        self._wires = Wires(group, pairs, device, timeout_s)
        self._host_wires = Wires(group, pairs, device, timeout_s, via_host=True) if device.type == "cuda" else None
        self._known: set[object] = set()

    def step(self, micro_batches: Sequence[Inputs], seeds: Callable[[int], tuple[Seed, Seed]]) -> tuple[Tensor, Tensor]:
        """Run forward and backward of a step; return (summed loss, summed auxiliary loss), the same on every rank.

        `seeds(i)` are the factors of loss and auxiliary loss of micro-batch i in what is differentiated. Gradients are
        added to `.grad` of the stages' parameters; hooks of a parameter fire once a micro-batch: with
        the gradients of the inputs, or, if it is one that is deferred (`parallel.pipeline.weights`), with those of the
        weights; once for each product where several products of a stage share a deferred one.

        Raises: PipelineError if the schedule is for another number of micro-batches.
        """
        if len(micro_batches) != self.schedule.num_micro_batches:
            raise PipelineError(
                f"parallel.pipeline: {len(micro_batches)} micro-batches for a schedule of "
                f"{self.schedule.num_micro_batches}; build the schedule for as many"
            )
        step = self._run(self.schedule, micro_batches, seeds)
        for tied in self._tied:
            tied.finish()
        return self._sum(step.losses)

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[Inputs]) -> tuple[Tensor, Tensor]:
        """Run forward alone; return (summed loss, summed auxiliary loss), the same on every rank."""
        return self._sum(self._run(self._forward_only(len(micro_batches)), micro_batches, None).losses)

    @torch.no_grad()
    def forward(self, micro_batches: Sequence[Inputs]) -> list[Payload]:
        """Run forward alone; return what the last stage returns for each micro-batch on its rank, else nothing."""
        return self._run(self._forward_only(len(micro_batches)), micro_batches, None).losses

    def hand_over(self, hooks: GradientHooks) -> tuple[Tied, ...]:
        """Leave gradients to an engine, which `hooks` tell of them; it also sums those of the tied ones returned."""
        tied, self._hooks, self._tied = self._tied, hooks, ()
        return tied

    def close(self) -> None:
        """End the communicators; a second call does nothing."""
        self._wires.close()
        if self._host_wires is not None:
            self._host_wires.close()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:  # else the others would hear of closed connections before they hear of the error
            self.close()

    def _forward_only(self, num_micro_batches: int) -> Schedule:
        known = (s for s in self._plans if (s.kind, s.num_micro_batches) == ("forward", num_micro_batches))
        return next(known, None) or forward_only(self.schedule.rank_of, num_micro_batches)

    def _run(
        self, schedule: Schedule, inputs: Sequence[Inputs], seeds: Callable[[int], tuple[Seed, Seed]] | None
    ) -> _Step:
        if schedule not in self._plans:
            self._plans[schedule] = plan(schedule, self.rank, self._ahead)
        wires = self._wires_for(schedule, inputs, seeds is not None)
        post = _Post(wires, schedule, self.rank, self._plans[schedule], lambda i: self._new_x(inputs[i]))
        step = _Step(self._stages, schedule, inputs, seeds)
        remaining = _gradient_actions(schedule.actions[self.rank])
        for index, action in enumerate(schedule.actions[self.rank]):
            post.receive_ahead(index)
            if action.work == "forward":
                self._forward(step, post, action)
            else:
                self._backward(step, post, action, remaining)
        post.drain()
        return step

    def _wires_for(self, schedule: Schedule, inputs: Sequence[Inputs], is_training: bool) -> Wires:
        """Return what carries the messages of a step: the hosts, if kernels may have to be made in it."""
        if self._host_wires is None:
            return self._wires
        shapes = {
            tuple((name, None if value is None else value.shape) for name, value in each.items()) for each in inputs
        }
        step = (schedule.kind, is_training, frozenset(shapes))
        if step in self._known:
            return self._wires
        self._known.add(step)
        return self._host_wires

    def _forward(self, step: _Step, post: _Post, action: Action) -> None:
        made = step.forward(action, post.take(needs(action, step.schedule.rank_of)))
        post.send(gives(action, step.schedule.rank_of), made)

    def _backward(self, step: _Step, post: _Post, action: Action, remaining: dict[int, int]) -> None:
        stage = action.stage
        remaining[stage] -= 1
        last = not remaining[stage]
        if self._hooks is not None:
            self._hooks.before(action, last=last)
        made = step.backward(action, post.take(needs(action, step.schedule.rank_of)))
        post.send(gives(action, step.schedule.rank_of), made)
        if last:
            if self._hooks is not None:
                self._hooks.finished(stage)
            for tied in self._tied:
                if tied.stage == stage:
                    tied.start()

    def _sum(self, losses: Iterable[Payload]) -> tuple[Tensor, Tensor]:
        """Sum over micro-batches, and tell the ranks that do not hold the last stage."""
        total = torch.zeros(2, dtype=torch.float64, device=self._device)
        for loss, aux in losses:
            total += torch.stack((loss.detach().double(), aux.detach().double()))
        if self._group.size() > 1:
            dist.all_reduce(total, group=self._group)
        return total[0], total[1]


@dataclass(slots=True)
class _Flight:
    """A micro-batch in a stage, between its forward and the end of its backward."""

    inputs: Payload | None
    """Leaves; None for the first stage."""
    outputs: Payload | None
    """None once it is differentiated, which frees their graph."""
    deferred: Deferred | None


class _Step:
    """The micro-batches of one step on this rank; hands over between stages of one rank."""

    def __init__(
        self,
        stages: Mapping[int, nn.Module],
        schedule: Schedule,
        inputs: Sequence[Inputs],
        seeds: Callable[[int], tuple[Seed, Seed]] | None,
    ) -> None:
        self.schedule = schedule
        self.losses: list[Payload] = []
        self._stages, self._inputs, self._seeds = stages, inputs, seeds
        self._last = schedule.num_stages - 1
        self._split = {
            (a.stage, a.micro_batch) for rank in schedule.actions for a in rank if a.work == "backward_weight"
        }
        self._flights: dict[tuple[int, int], _Flight] = {}
        self._local: dict[Message, Payload] = {}

    def forward(self, action: Action, arrived: Payload | None) -> Payload:
        """Run a stage; return what the next one needs."""
        _, stage, i = action
        given = arrived if arrived is not None else self._local.pop(Message("input", stage, i), None)
        training = self._seeds is not None
        if given is not None:
            given = (given[0].detach().requires_grad_(training), given[1].detach().requires_grad_(training))
        deferred = Deferred() if (stage, i) in self._split else None
        outputs = self._call(stage, i, given, deferred)
        if training:
            self._flights[stage, i] = _Flight(given, outputs, deferred)
        if stage == self._last:
            self.losses.append((outputs[0].detach(), outputs[1].detach()))
        elif stage + 1 in self._stages and self.schedule.rank_of[stage + 1] == self.schedule.rank_of[stage]:
            self._local[Message("input", stage + 1, i)] = outputs
        return outputs

    def backward(self, action: Action, arrived: Payload | None) -> Payload | None:
        """Run a backward; return what the stage before needs, None behind the first and for weights alone."""
        work, stage, i = action
        if work == "backward_weight":
            deferred = self._flights.pop((stage, i)).deferred
            assert deferred is not None
            deferred.pay()
            return None
        gradients = arrived if arrived is not None else self._local.pop(Message("gradient", stage, i), None)
        flight = self._flights[stage, i] if work == "backward_input" else self._flights.pop((stage, i))
        if gradients is None:
            assert self._seeds is not None
            assert stage == self._last
            assert flight.outputs is not None
            gradients = tuple(  # type: ignore[assignment]
                torch.as_tensor(seed, dtype=out.dtype, device=out.device)
                for seed, out in zip(self._seeds(i), flight.outputs, strict=True)
            )
        assert gradients is not None
        self._differentiate(flight, gradients)
        if flight.inputs is None:
            return None
        made = tuple(x.grad if x.grad is not None else torch.zeros_like(x) for x in flight.inputs)
        flight.inputs = None
        if self.schedule.rank_of[stage - 1] == self.schedule.rank_of[stage]:
            self._local[Message("gradient", stage - 1, i)] = (made[0], made[1])
        return made[0], made[1]

    def _call(self, stage: int, i: int, given: Payload | None, deferred: Deferred | None) -> Payload:
        named = {name: value for name, value in self._inputs[i].items() if name != "tokens_BT"}
        x, aux = given if given is not None else (self._inputs[i]["tokens_BT"], None)
        if deferred is None:
            outputs: Payload = self._stages[stage](x, aux, **named)
        else:
            with deferring(deferred):
                outputs = self._stages[stage](x, aux, **named)
        return outputs

    def _differentiate(self, flight: _Flight, gradients: Payload) -> None:
        assert flight.outputs is not None
        pairs = [(out, grad) for out, grad in zip(flight.outputs, gradients, strict=True) if out.requires_grad]
        outputs, grads = [out for out, _ in pairs], [grad.to(out.dtype) for out, grad in pairs]
        flight.outputs = None
        if not outputs:
            return
        if flight.deferred is None:
            torch.autograd.backward(outputs, grads)
        else:
            flight.deferred.backward(outputs, grads)


class _Post:
    """The messages of one step of this rank: posted ahead, and kept until they are certain to have arrived."""

    def __init__(self, wires: Wires, schedule: Schedule, rank: int, plan: Plan, new_x: Callable[[int], Tensor]) -> None:
        self._wires, self._rank_of, self._rank, self._plan, self._new_x = wires, schedule.rank_of, rank, plan, new_x
        self._arriving: dict[Message, Receiving] = {}
        self._leaving: dict[Message, Sending] = {}

    def receive_ahead(self, index: int) -> None:
        """Post what is to be received before action `index` runs."""
        for peer, message in self._plan.receives[index]:
            self._arriving[message] = self._wires.receive(self._new_x(message.micro_batch), peer, self._rank)

    def take(self, message: Message | None) -> Payload | None:
        """Return the payload of a message when it is there."""
        if message is None:
            return None
        payload = self._arriving.pop(message).wait()
        for sent in self._plan.settled[message]:  # its sender has had these: nothing to wait for
            self._leaving.pop(sent).wait()
        return payload

    def send(self, message: Message | None, payload: Payload | None) -> None:
        """Post a message."""
        if message is not None:
            assert payload is not None
            target = self._rank_of[message.stage]
            assert sender(message, self._rank_of) == self._rank
            self._leaving[message] = self._wires.send(payload, self._rank, target)

    def drain(self) -> None:
        """Wait for what is still leaving."""
        for sending in self._leaving.values():
            sending.wait()


def _gradient_actions(actions: Iterable[Action]) -> dict[int, int]:
    """Count, for every stage, the actions that add to its gradients."""
    counts: dict[int, int] = {}
    for action in actions:
        if action.work != "forward":
            counts[action.stage] = counts.get(action.stage, 0) + 1
    return counts
