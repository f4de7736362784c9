"""Schedules of pipeline parallelism as values: what every rank does, in which order. Pure.

A stage holds consecutive layers; a micro-batch goes forward through all stages and its gradient backward. p ranks,
m micro-batches, v stages on a rank; F, B and W are the times of a rank's forward, backward for the inputs, and backward
for the weights of one micro-batch (all its stages together). The bubble is the length of a step less the work of a
rank, m (F + B + W), when stages cost alike and messages nothing.

    kind         stages   stage s is on   bubble                             most activations kept (by micro-batches)
    gpipe        p        s               (p-1)(F+B+W)                       m
    1f1b         p        s               (p-1)(F+B+W)                       p - rank
    interleaved  v p      s mod p         (p-1)(F+B+W) / v                   p + (p - 1 - 2 rank) / v
    zb-h1        p        s               (p-1)(F+B-W) if W <= F <= B        p
    zbv          2 p      V               (p-1) F/2 if F = B = W, m >= 2p-1  p
    dualpipev    2 p      V               (p-1) F/2 if F = B = W             p + 1/2

V: stage s < p on rank s, the others back again, so that the first and the last stage share rank 0.

Sources: GPipe (arXiv 1811.06965); 1f1b is PipeDream-Flush (arXiv 2006.09503); interleaved is Megatron-LM's (arXiv
2104.04473); zb-h1 and zbv are the two of Zero Bubble Pipeline Parallelism (arXiv 2401.10241) that keep what 1f1b keeps;
dualpipev is the V-shaped half of DualPipe (DeepSeek-V3, arXiv 2412.19437, section 3.2.1), its forward and backward of
a pair one after the other.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from parallel.errors import PipelineError
from parallel.pipeline import orders
from parallel.pipeline.actions import Action, Work, is_ready

Kind = Literal["gpipe", "1f1b", "interleaved", "zb-h1", "zbv", "dualpipev"]


@dataclass(frozen=True, slots=True)
class Schedule:
    """What every rank does, in order."""

    kind: str
    num_micro_batches: int
    rank_of: tuple[int, ...]
    """Rank of every stage."""
    actions: tuple[tuple[Action, ...], ...]
    """By rank."""

    @property
    def num_stages(self) -> int:
        return len(self.rank_of)

    @property
    def num_ranks(self) -> int:
        return len(self.actions)

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """Return the stages of a rank, first to last."""
        return tuple(stage for stage, owner in enumerate(self.rank_of) if owner == rank)

    @property
    def splits_backward(self) -> bool:
        """Whether some weight gradients are computed apart from the gradients of the inputs."""
        return any(action.work == "backward_weight" for actions in self.actions for action in actions)


def num_stages(kind: Kind, num_ranks: int, per_rank: int = 2) -> int:
    """Return how many stages the ranks have together; `per_rank` counts for `interleaved` alone."""
    if kind == "interleaved":
        return num_ranks * per_rank
    return num_ranks * 2 if kind in ("zbv", "dualpipev") else num_ranks


def build(kind: Kind, num_ranks: int, num_micro_batches: int, *, per_rank: int = 2) -> Schedule:
    """Return the schedule; `per_rank` is the number of stages on a rank and counts for `interleaved` alone.

    Raises: PipelineError if there is none for these numbers, with every reason.
    """
    problems = list(_problems(kind, num_ranks, num_micro_batches, per_rank))
    if problems:
        raise PipelineError("\n".join(problems))
    rank_of = _placement(kind, num_ranks, per_rank)
    if kind == "zbv" and num_micro_batches < 2 * num_ranks - 1:
        # The phases of zb_v need more; what is short anyway is ordered by its rules alone.
        actions = orders.list_schedule(rank_of, num_micro_batches, limit=2 * num_ranks)
    else:
        ranks = range(num_ranks)
        actions = tuple(tuple(_ORDERS[kind](r, num_ranks, num_micro_batches, len(rank_of))) for r in ranks)
    return Schedule(kind, num_micro_batches, rank_of, actions)


def forward_only(rank_of: Sequence[int], num_micro_batches: int) -> Schedule:
    """Return the schedule that only evaluates, for stages that lie as `rank_of` says."""
    actions = orders.list_schedule(tuple(rank_of), num_micro_batches, limit=None)
    return Schedule("forward", num_micro_batches, tuple(rank_of), actions)


def order(schedule: Schedule) -> list[tuple[int, Action]]:
    """Return (rank, action) of all ranks in one order in which everything is there when it is needed.

    Raises: PipelineError if there is none: the ranks would wait for each other.
    """
    done: set[Action] = set()
    found: list[tuple[int, Action]] = []
    at = [0] * schedule.num_ranks
    progress = True
    while progress:
        progress = False
        for rank, actions in enumerate(schedule.actions):
            while at[rank] < len(actions) and is_ready(actions[at[rank]], schedule.num_stages, done):
                done.add(actions[at[rank]])
                found.append((rank, actions[at[rank]]))
                at[rank] += 1
                progress = True
    stuck = [f"rank {r} at {a[i]}" for r, (a, i) in enumerate(zip(schedule.actions, at, strict=True)) if i < len(a)]
    if stuck:
        raise PipelineError(f"schedule {schedule.kind}: ranks wait for each other: {'; '.join(stuck)}")
    return found


def check(schedule: Schedule) -> None:
    """Check that the schedule does everything once, where and when it can be done, within its bound of activations.

    Raises: PipelineError with everything that is wrong.
    """
    name = f"schedule {schedule.kind}"
    problems = []
    for rank, actions in enumerate(schedule.actions):
        problems += [f"{name}: rank {rank}: {a} is not its stage" for a in actions if schedule.rank_of[a.stage] != rank]
        problems += _completeness(f"{name}: rank {rank}", schedule, rank)
        peak, bound = most_kept(actions), in_flight_bound(schedule, rank)
        if peak > bound:
            problems.append(f"{name}: rank {rank}: keeps the activations of {peak} forwards; at most {bound}")
    if not problems:
        order(schedule)
    if problems:
        raise PipelineError("\n".join(problems))


def most_kept(actions: Sequence[Action]) -> int:
    """Return the most forwards of one rank whose backward is not over, weights included."""
    kept = peak = 0
    for action in actions:
        kept += {"forward": 1, "backward": -1, "backward_weight": -1, "backward_input": 0}[action.work]
        peak = max(peak, kept)
    return peak


def in_flight_bound(schedule: Schedule, rank: int) -> int:
    """Return the most forwards (of one stage each) that the kind of schedule may keep on a rank."""
    p, m, stages = schedule.num_ranks, schedule.num_micro_batches, len(schedule.stages_of(rank))
    bounds: Mapping[str, int] = {
        "gpipe": m,
        "forward": m * stages,
        "1f1b": p - rank,
        "interleaved": (stages + 1) * p - 2 * rank - 1,
        "zb-h1": p,
        "zbv": 2 * p,
        "dualpipev": 2 * p + 1,
    }
    return min(bounds[schedule.kind], m * stages)


_ORDERS: Mapping[str, Callable[[int, int, int, int], Iterator[Action]]] = {
    "gpipe": orders.gpipe,
    "1f1b": orders.one_f_one_b,
    "interleaved": orders.interleaved,
    "zb-h1": orders.zb_h1,
    "zbv": orders.zb_v,
    "dualpipev": orders.dual_pipe_v,
}
"""(rank, ranks, micro-batches, stages) -> what the rank does."""


def _problems(kind: Kind, num_ranks: int, m: int, per_rank: int) -> Iterator[str]:
    where = "parallel"
    if kind not in get_args(Kind):
        yield f"{where}.stages.schedule: there is no '{kind}'; allowed: {', '.join(get_args(Kind))}"
        return
    if num_ranks < 1:
        yield f"{where}.pipeline: {num_ranks} ranks cannot share the layers; at least 1"
    if m < 1:
        yield f"{where}.stages.schedule: a step of {m} micro-batches has nothing to schedule; at least 1"
    if kind == "interleaved" and per_rank < 2:
        yield f"{where}.stages.per_rank: {per_rank} stages on a rank leave nothing to interleave; at least 2, or 1f1b"
    if kind == "interleaved" and num_ranks > 0 and m > 0 and m % num_ranks:
        yield (
            f"{where}.stages.schedule: interleaved takes micro-batches in groups of {num_ranks} (pipeline), which "
            f"does not divide {m}; allowed: a multiple of {num_ranks}, or another schedule"
        )
    if kind == "dualpipev" and 0 < m < 2 * num_ranks:
        yield (
            f"{where}.stages.schedule: dualpipev fills {2 * num_ranks} stages (2 x pipeline), for which {m} "
            f"micro-batches are too few; at least {2 * num_ranks}, or another schedule"
        )


def _placement(kind: Kind, num_ranks: int, per_rank: int) -> tuple[int, ...]:
    ranks = range(num_ranks)
    if kind in ("zbv", "dualpipev"):
        return (*ranks, *reversed(ranks))
    return tuple(ranks) * (per_rank if kind == "interleaved" else 1)


def _completeness(where: str, schedule: Schedule, rank: int) -> Iterator[str]:
    """Yield what a rank does not do once for each of its stages and micro-batches."""
    counts: dict[Action, int] = {}
    for action in schedule.actions[rank]:
        counts[action] = counts.get(action, 0) + 1
    pairs = itertools.product(schedule.stages_of(rank), range(schedule.num_micro_batches))
    expected = 0
    for stage, i in pairs:
        forward, whole, inputs, weights = (counts.get(Action(work, stage, i), 0) for work in get_args(Work))
        expected += forward + whole + inputs + weights
        backwards = (whole, inputs, weights)
        allowed = ((0, 0, 0),) if schedule.kind == "forward" else ((1, 0, 0), (0, 1, 1))
        if forward != 1 or backwards not in allowed:
            yield (
                f"{where}: stage {stage}, micro-batch {i}: {forward} forwards, {whole} backwards, {inputs} for inputs, "
                f"{weights} for weights; once each"
            )
    if expected != len(schedule.actions[rank]):
        yield f"{where}: has actions of micro-batches that are not there"
