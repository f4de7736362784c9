"""Looking for numbers that are wrong while nothing raises, in every step of a run, and from where it then goes on.

    backward ── compare replicas, to the bit ── look at checked products ── update ── save (copied during the next step)

Everything is judged before the update: what is found then has touched no later state, and every checkpoint of an
earlier step has been copied by now. So a comparison in step N that finds nothing says that the state after step N - 1
is right, and the checkpoint of it as well; what is found in step N is gone with the checkpoints after the last such.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.tensor import DTensor

import checkpoint as ck
from checkpoint.state import TensorLike
from faulttol import sdc
from faulttol.errors import Corrupted
from faulttol.finding import Finding
from trainsys import setup
from trainsys.distrust import distrust
from trainsys.drill import Drill
from trainsys.engines import Engine
from trainsys.hostmemory import gather_on


class Inspector:
    """Inspects one rank's numbers; every rank makes one and calls the same methods in the same steps."""

    def __init__(
        self,
        engine: Engine,
        shared: setup.Setup,
        *,
        right_step: int,
        drill: Drill | None,
        say: Callable[[str], None],
        admit: Callable[[], object],
    ) -> None:
        """`right_step` is the last whose state is known to be right: it was just loaded. `say` tells a person.

        `admit` raises where this process may write nothing any more.
        """
        config = shared.config
        self._config, self._shared, self._engine = config.faulttol, shared, engine
        self._keeps_whole = config.engine.zero_stage == 0 and config.offload.optimizer != "tiered"
        self._right_step = right_step
        self._drill, self._say, self._admit = drill, say, admit
        self._told: set[object] = set()
        looked_for = config.faulttol.corruption
        self._products = None
        if looked_for.products_every:
            self._products = sdc.ProductChecks(engine.module, every=looked_for.products_every)
        self._norm = _LocalNorm(engine.module, self._spoil) if looked_for.gradient_norms else None
        self._step = 0

    def close(self) -> None:
        """Look no more. Idempotent."""
        if self._products is not None:
            self._products.close()
        if self._norm is not None:
            self._norm.close()

    def begin(self, step: int) -> None:
        """Begin a step; a drill may strike this rank's parameters now."""
        self._step = step
        if self._drill is not None:
            named = self._engine.module.named_parameters()
            self._drill.flip(step, {name: _local(parameter.detach()) for name, parameter in named})

    def before_update(self) -> None:
        """Look at what the step made of forward and backward, once all ranks have.

        Raises:
            Corrupted: numbers are wrong, and the run is to act on that; on every rank alike, after it is written down
                from where to go on.
        """
        every = self._config.corruption.replicas_every
        is_due = every > 0 and self._step % every == 0
        found: list[Finding] = []
        if is_due:
            divergence = sdc.compare(self._replicated(), self._shared.groups.get("replicate"))
            if divergence is not None:
                found.append(divergence.finding(self._step))
        wrong_products = self._products.wrong if self._products is not None else []
        found += [sdc.finding_of(wrong, self._shared.rank, self._step) for wrong in wrong_products]
        wrong_products.clear()
        if self._products is None and not is_due:
            return
        is_any = torch.tensor(len(found))
        dist.all_reduce(is_any, group=self._shared.control)
        if is_any:
            facts = [[finding.culprits, finding.summary] for finding in found]
            self._judge([fact for mine in gather_on(self._shared.control)(facts) for fact in mine])
        elif is_due:
            self._right_step = self._step - 1

    def take_norm(self) -> float | None:
        """Return the norm of this rank's gradient of the step, before the reduction; None where nobody asks for it."""
        return self._norm.take() if self._norm is not None else None

    def _judge(self, facts: Sequence[tuple[Sequence[int], str]]) -> None:
        """Tell of what any rank found, and end the generation where the run is to act."""
        group = self._shared.mesh.size("replicate")
        ranks = sorted({rank for culprits, _ in facts if len(culprits) < group for rank in culprits})
        whys = list(dict.fromkeys(why for _, why in facts))
        who = f"of rank {', '.join(map(str, ranks))}" if ranks else "of one of the replicas, which nobody can tell,"
        text = f"numbers {who} are wrong in step {self._step}: {'; '.join(whys[:4])}"
        if self._config.mode != "act":
            if text not in self._told and len(self._told) < _MOST_TOLD:
                self._told.add(text)
                self._say(f"found numeric: {text}")
            return
        step = self._right_step

        def write_down() -> None:
            self._admit()
            distrust(self._shared.folder, step, text)

        setup.all_or_none(write_down if self._shared.rank == 0 else lambda: None, self._shared.control)
        raise Corrupted(f"{text}; the state after step {step} was right", tuple(ranks))

    def _replicated(self) -> Mapping[str, Tensor]:
        """What every replica has the same of: all that is saved, where none keeps a part alone, else parameters."""
        if not self._keeps_whole:
            return {name: parameter.detach() for name, parameter in self._engine.module.named_parameters()}
        return {name: _bare(part) for name, part in self._engine.slices().items()}

    def _spoil(self, name: str, gradient: Tensor) -> Tensor:
        if self._drill is None:
            return gradient
        spoilt = gradient.clone()
        return spoilt if self._drill.corrupt(self._step, {name: spoilt}) else gradient


_MOST_TOLD = 8


class _LocalNorm:
    """The norm of what backward adds to the gradients of this rank, over all micro-batches of a step."""

    def __init__(self, module: nn.Module, spoil: Callable[[str, Tensor], Tensor]) -> None:
        """`spoil` is given the gradient of the largest parameter, and returns what to take for it."""
        self._squares: list[Tensor] = []
        named = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
        largest = max(named, key=lambda name: named[name].numel())
        self._handles = []
        for name, parameter in named.items():
            first = spoil if name == largest else _as_it_is
            self._handles.append(parameter.register_hook(_noting(self._squares, name, first)))  # type: ignore[no-untyped-call]

    def take(self) -> float | None:
        """Return it since the last call; None where backward did not run. Waits for the device."""
        if not self._squares:
            return None
        norm = float(torch.stack(self._squares).sum().sqrt())
        self._squares.clear()
        return norm

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()


def _as_it_is(name: str, gradient: Tensor) -> Tensor:
    return gradient


def _noting(squares: list[Tensor], name: str, first: Callable[[str, Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A hook that keeps the square of what `first` makes of a gradient."""

    def note(gradient: Tensor) -> Tensor:
        gradient = first(name, gradient)
        squares.append(torch.linalg.vector_norm(gradient.detach(), dtype=torch.float64).square())
        return gradient

    return note


def _local(tensor: Tensor) -> Tensor:
    """This rank's part of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _bare(part: TensorLike) -> Tensor:
    """The numbers of what a checkpoint takes."""
    if isinstance(part, ck.Replica):
        part = part.value
    return _local(part if isinstance(part, Tensor) else part.tensor)
