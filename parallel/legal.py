"""Which layouts run on which engine, and why the others do not: one table, as data. Pure.

A layout is the degrees of a mesh and a ZeRO stage. What is sharded lies on the ranks of shard x context, or with
`shard = 1` on those of replicate x context: one of the two degrees alone is plain ZeRO. Both above 1 is hybrid shard:
state is sharded inside a replica and copied across replicas.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from parallel.config import ParallelConfig
from parallel.errors import ParallelError

Backend = Literal["deepspeed", "torch"]
"""An engine: DeepSpeed's, or one made of torch's FSDP2."""

ZeroStage = Literal[0, 1, 2, 3]


@dataclass(frozen=True, slots=True)
class Rule:
    """Layouts that an engine cannot run."""

    backend: Backend
    applies: Callable[[ParallelConfig, int], bool]
    reason: str


RULES: tuple[Rule, ...] = (
    Rule(
        "deepspeed",
        lambda degrees, stage: degrees.pipeline > 1 and stage >= 2,
        "it reduces gradients in each backward under ZeRO 2 and 3, many times a step with a pipeline",
    ),
    Rule(
        "deepspeed",
        lambda degrees, stage: degrees.expert > 1 and stage == 3,
        "its ZeRO 3 shards experts over ranks that hold others",
    ),
    Rule(
        "deepspeed",
        lambda degrees, stage: degrees.replicate > 1 and degrees.shard > 1 and stage >= 1,
        "its ZeRO shards over all data ranks, not over shard alone",
    ),
)


def refusals(degrees: ParallelConfig, zero_stage: int) -> dict[Backend, str]:
    """Return the engines that cannot run the layout, each with the first reason."""
    found: dict[Backend, str] = {}
    for rule in RULES:
        if rule.applies(degrees, zero_stage):
            found.setdefault(rule.backend, rule.reason)
    return found


def choose(
    degrees: ParallelConfig,
    zero_stage: int,
    wanted: Backend | Literal["auto"] = "auto",
    others: Mapping[Backend, str] | None = None,
) -> Backend:
    """Return the engine that runs the layout: the one `wanted`, or the first that can (DeepSpeed before torch).

    `others` are engines that cannot for other reasons, with these.

    Raises:
        ParallelError: it cannot, or none can; with the reasons.
    """
    known: dict[Backend, str] = {**(others or {}), **refusals(degrees, zero_stage)}
    refused = {backend: known[backend] for backend in get_args(Backend) if backend in known}
    allowed = [backend for backend in get_args(Backend) if backend not in refused]
    if wanted == "auto" and allowed:
        return allowed[0]  # type: ignore[no-any-return]
    if wanted in allowed:
        return wanted  # type: ignore[return-value]
    reasons = {wanted: refused[wanted]} if wanted != "auto" else refused
    told = "; ".join(f"{backend}: {reason}" for backend, reason in reasons.items())
    remedy = f"; allowed: {' or '.join(allowed)}" if allowed else ""
    raise ParallelError(f"{describe(degrees)} with ZeRO {zero_stage} does not run on {told}{remedy}")


SHORT: Mapping[str, str] = {"tensor": "TP", "pipeline": "PP", "context": "CP", "expert": "EP"}
"""How the table calls an axis; replicate and shard together are DP."""


def describe(degrees: ParallelConfig) -> str:
    """Return the kinds of parallelism in a layout: `TP x PP x DP`; `1 rank` where there is none."""
    names = [short for axis, short in SHORT.items() if getattr(degrees, axis) > 1]
    data = "hybrid-sharded DP" if min(degrees.replicate, degrees.shard) > 1 else "DP"
    names += [data] if degrees.replicate * degrees.shard > 1 else []
    return " x ".join(names) or "1 rank"


def _row(**degrees: int) -> ParallelConfig:
    return ParallelConfig(**degrees)  # type: ignore[arg-type]


ROWS: tuple[ParallelConfig, ...] = (
    _row(replicate=2),
    _row(tensor=2),
    _row(pipeline=2),
    _row(context=2),
    _row(replicate=2, expert=2),
    _row(tensor=2, replicate=2),
    _row(pipeline=2, replicate=2),
    _row(context=2, replicate=2),
    _row(pipeline=2, tensor=2),
    _row(context=2, tensor=2),
    _row(pipeline=2, context=2),
    _row(pipeline=2, tensor=2, replicate=2),
    _row(context=2, tensor=2, replicate=2),
    _row(pipeline=2, context=2, replicate=2),
    _row(pipeline=2, context=2, tensor=2),
    _row(replicate=4, expert=2),
    _row(tensor=2, replicate=2, expert=2),
    _row(context=2, replicate=2, expert=2),
    _row(pipeline=2, replicate=2, expert=2),
    _row(pipeline=2, replicate=4, expert=2),
    _row(replicate=2, shard=2),
)
"""The layouts that are tested, each kind of parallelism at degree 2; higher degrees follow the same rules."""


def table() -> str:
    """Return which engine `auto` takes for each row and ZeRO stage, and the reasons for what it refuses."""
    stages = get_args(ZeroStage)
    width = max(len(_name(row)) for row in ROWS)
    lines = ["  ".join([f"{'layout':<{width}}", *(f"{f'ZeRO {stage}':<9}" for stage in stages)]).rstrip()]
    for row in ROWS:
        cells = [_cell(row, stage) for stage in stages]
        lines.append("  ".join([f"{_name(row):<{width}}", *(f"{cell:<9}" for cell in cells)]).rstrip())
    lines += ["", "not on an engine:", *(f"  {rule.backend}: {rule.reason}" for rule in RULES)]
    return "\n".join(lines)


def _name(row: ParallelConfig) -> str:
    """Return the row's kinds with the number of experts' groups told apart: EP x DP has copies of experts, EP none."""
    name = describe(row)
    return name.removesuffix(" x DP") if row.expert == row.replicate * row.shard > 1 else name


def _cell(row: ParallelConfig, stage: int) -> str:
    refused = refusals(row, stage)
    return next((backend for backend in get_args(Backend) if backend not in refused), "-")
