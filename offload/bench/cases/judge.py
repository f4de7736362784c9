"""The issue's figures, on what `offload.bench.iteration` has measured."""

from __future__ import annotations

from collections.abc import Sequence

from offload.bench import Gate, Report


def judge(report: Report, all_tokens: Sequence[int]) -> None:
    """Add the issue's figures."""

    def of(case: str, metric: str = "iteration") -> float | None:
        try:
            return report.median(case, metric)
        except ValueError:
            return None

    def gate(name: str, ours: float | None, theirs: float | None, limit: float, *, least: bool) -> None:
        if ours and theirs:
            value = theirs / ours if least else ours / theirs
            ok = value >= limit if least else value <= limit
            report.gates.append(Gate(name, value, limit, ok=ok, is_speed=True))

    few = all_tokens[0]
    fast = min((v for v in (of(f"tiered {mode} {few}") for mode in ("stream", "defer")) if v), default=None)
    clipped = of(f"tiered defer clip {few}")
    gate(f"DeepSpeed ZeRO-2 offload / ours, no clipping, {few} tokens", fast, of(f"zero2 {few}"), 2.5, least=True)
    gate(f"DeepSpeed ZeRO-2 offload / ours, clipping, {few} tokens", clipped, of(f"zero2 clip {few}"), 1.9, least=True)
    for tokens, limit in ((32768, 1.10), (65536, 1.05)):
        ours, theirs = of(f"tiered defer clip {tokens}"), of(f"resident clip {tokens}")
        gate(f"ours / resident, clipping, {tokens} tokens", ours, theirs, limit, least=False)
    for tokens in all_tokens:
        theirs, name = of(f"zero2 clip {tokens}", "memory"), f"tiered defer clip {tokens}"
        ours = of(name, "memory")
        if ours and theirs:
            extra = (ours - theirs) * 1e9 / (1 << 30)
            report.gates.append(
                Gate(f"GiB more than DeepSpeed, {tokens} tokens", extra, 2, ok=extra <= 2, is_speed=True)
            )
    for (case, metric, _), values in list(report.samples.items()):
        if metric == "predicted":
            wrong = abs(values[0] / report.median(case, "iteration") - 1)
            report.gates.append(Gate(f"prediction of {case}", wrong, 0.15, ok=wrong <= 0.15, is_speed=True))
