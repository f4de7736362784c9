"""The decoder must run at what its matrix products cost: forward and backward on one CPU thread, fp32 and bf16.

Claims and baselines, with T = 256 tokens and 8 sequences:

    step       forward and backward (with cross-entropy) of the default decoder, about 10M parameters; bound: its own
               operations (`flops_per_token`) over the rate of one of its products, measured in the same pass
    attention  forward and backward of one layer's attention in bf16: `attend`, against torch's fused kernel
    norm       forward and backward of RMSNorm: ours, against torch's composite backward
    experts    forward and backward of 8 experts in bf16: one grouped product, against a loop over experts

Gates: the outputs of candidate and baseline agree within the rounding of their dtype.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from parallel.bench import commit
from trainsys.config import ModelConfig
from trainsys.models import build, flops_per_token
from trainsys.models.attention import attend
from trainsys.models.layers import RMSNorm, swiglu
from trainsys.models.moe import Experts

SEQUENCES, LENGTH, DIM, HEADS, HEAD_DIM, EXPERTS, EXPERT_DIM = 8, 256, 384, 6, 64, 8, 256
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main(arguments: list[str]) -> int:
    """Runs the benchmark and prints its table; 1 where a correctness gate fails."""
    parser = argparse.ArgumentParser(prog="python -m trainsys.bench.decoder", description=__doc__)
    parser.add_argument("--repeats", type=int, default=7, help="timed passes of every case (default 7)")
    parser.add_argument("--json", type=Path, help="write the results there")
    parser.add_argument("--smoke", action="store_true", help="one pass with 1 sequence of 32 tokens: does it run?")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    bench = Bench(*((1, 32) if chosen.smoke else (SEQUENCES, LENGTH)))
    repeats = 1 if chosen.smoke else chosen.repeats
    for repeat in range(repeats + 1):  # the first pass warms up and is not counted
        bench.measure(keep=repeat > 0)
    document = bench.document({"repeats": repeats, "smoke": chosen.smoke})
    if chosen.json:
        chosen.json.write_text(json.dumps(document, indent=1) + "\n")
    _print(document)
    return 0 if all(gate["ok"] for gate in document["gates"]) else 1


class Bench:
    """The cases and their samples."""

    def __init__(self, sequences: int, length: int) -> None:
        self._sequences, self._length = sequences, length
        self._samples: dict[tuple[str, str, str], list[float]] = {}
        self._worst: dict[str, float] = {}

    def measure(self, *, keep: bool) -> None:
        """One pass over every case, baseline and candidate in turn."""
        taken: dict[tuple[str, str], float] = {}
        for name, dtype in DTYPES.items():
            taken |= self._step(name, dtype)
            taken |= self._pair(f"norm {name}", *self._norms(dtype))
        taken |= self._pair("attention bf16", *self._attentions())
        taken |= self._pair("experts bf16", *self._experts())
        if keep:
            for (case, metric), value in taken.items():
                unit = metric.rpartition(" ")[2]
                self._samples.setdefault((case, metric, unit), []).append(value)

    def document(self, parameters: dict[str, object]) -> dict[str, Any]:
        """Everything measured, in the schema that all benchmarks share."""
        results = [
            {"case": case, "metric": metric, "unit": unit, "samples": samples}
            | {"median": statistics.median(samples), "min": min(samples), "max": max(samples)}
            for (case, metric, unit), samples in self._samples.items()
        ]
        bounds = [
            {
                "metric": f"{row['case']}: forward + backward",
                "value": row["median"],
                "unit": "ms",
                "how": "the step's operations over the rate of one of its products",
            }
            for row in results
            if row["metric"] == "bound ms"
        ]
        limits = {"attention bf16": 2**-5, "experts bf16": 2**-5, "norm fp32": 2**-19, "norm bf16": 2**-5}
        gates = [
            {"name": f"{case}: largest difference over largest value", "value": self._worst[case]}
            | {"limit": limit, "ok": self._worst[case] <= limit}
            for case, limit in limits.items()
        ]
        return {
            "name": "trainsys.decoder",
            "commit": commit(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": {"system": platform.platform(), "processor": platform.machine(), "cpus": os.cpu_count()},
            "versions": {"torch": version("torch")},
            "parameters": parameters | {"sequences": self._sequences, "length": self._length, "threads": 1},
            "results": results,
            "bounds": bounds,
            "gates": gates,
        }

    def _step(self, name: str, dtype: torch.dtype) -> dict[tuple[str, str], float]:
        model = build(
            ModelConfig(dim=DIM, num_heads=HEADS, head_dim=HEAD_DIM),
            vocab_size=257,
            max_positions=self._length,
            recompute="none",
            seed=0,
        ).to(dtype)
        tokens = torch.randint(0, 257, (self._sequences, self._length))
        left, right = (torch.randn(size, DIM, dtype=dtype) for size in (tokens.numel(), 1024))
        functional.linear(left, right)
        rate = 2 * tokens.numel() * 1024 * DIM / _seconds(lambda: functional.linear(left, right))
        for _ in range(2):  # the first builds what torch keeps for these shapes
            began_s = time.perf_counter()
            logits, aux_loss = model(tokens)
            between_s = time.perf_counter()
            loss = functional.cross_entropy(logits.float().flatten(0, 1), tokens.flatten()) + aux_loss
            loss.backward()
            ended_s = time.perf_counter()
        case = f"step {name}"
        return {
            (case, "product GFLOP/s"): rate / 1e9,
            (case, "bound ms"): 1e3 * flops_per_token(model, self._length) * tokens.numel() / rate,
            (case, "forward ms"): 1e3 * (between_s - began_s),
            (case, "backward ms"): 1e3 * (ended_s - between_s),
        }

    def _pair(
        self, case: str, ours: Callable[[], list[Tensor]], baseline: Callable[[], list[Tensor]]
    ) -> dict[tuple[str, str], float]:
        differences = [
            float((a.double() - b.double()).abs().max() / b.double().abs().max())
            for a, b in zip(ours(), baseline(), strict=True)
        ]
        self._worst[case] = max(self._worst.get(case, 0.0), *differences)
        return {(case, "torch ms"): 1e3 * _seconds(baseline), (case, "ours ms"): 1e3 * _seconds(ours)}

    def _norms(self, dtype: torch.dtype) -> tuple[Callable[[], list[Tensor]], Callable[[], list[Tensor]]]:
        norm = RMSNorm(DIM, 1e-5).to(dtype)
        x, grad = (torch.randn(self._sequences, self._length, DIM, dtype=dtype) for _ in range(2))
        x.requires_grad_()

        def composite() -> list[Tensor]:
            y = functional.rms_norm(x, norm.weight.shape, norm.weight, norm.eps)
            return [y.detach(), *torch.autograd.grad(y, (x, norm.weight), grad)]

        def ours() -> list[Tensor]:
            y = norm(x)
            return [y.detach(), *torch.autograd.grad(y, (x, norm.weight), grad)]

        return ours, composite

    def _attentions(self) -> tuple[Callable[[], list[Tensor]], Callable[[], list[Tensor]]]:
        shape = (self._sequences, HEADS, self._length, HEAD_DIM)
        query, key, value, grad = (torch.randn(shape, dtype=torch.bfloat16) for _ in range(4))
        inputs = tuple(x.requires_grad_() for x in (query, key, value))

        def kernel() -> list[Tensor]:
            y = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
            return [y.detach(), *torch.autograd.grad(y, inputs, grad)]

        def ours() -> list[Tensor]:
            y = attend(query, key, value, None)
            return [y.detach(), *torch.autograd.grad(y, inputs, grad)]

        return ours, kernel

    def _experts(self) -> tuple[Callable[[], list[Tensor]], Callable[[], list[Tensor]]]:
        experts = Experts(DIM, EXPERT_DIM, EXPERTS).to(torch.bfloat16)
        for parameter in experts.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
        rows = 2 * self._sequences * self._length
        x, grad = (torch.randn(rows, DIM, dtype=torch.bfloat16) for _ in range(2))
        x.requires_grad_()
        counts = torch.randint(0, EXPERTS, (rows,)).bincount(minlength=EXPERTS)
        inputs = (x, experts.gate_up, experts.down)

        def loop() -> list[Tensor]:
            parts = zip(torch.split(x, counts.tolist()), experts.gate_up.unbind(), experts.down.unbind(), strict=True)
            mapped = [functional.linear(swiglu(functional.linear(part, up)), down) for part, up, down in parts]
            y = torch.cat(mapped)
            return [y.detach(), *torch.autograd.grad(y, inputs, grad)]

        def ours() -> list[Tensor]:
            y = experts(x, counts)
            return [y.detach(), *torch.autograd.grad(y, inputs, grad)]

        return ours, loop


def _seconds(action: Callable[[], object], times: int = 3) -> float:
    began_s = time.perf_counter()
    for _ in range(times):
        action()
    return (time.perf_counter() - began_s) / times


def _print(document: dict[str, Any]) -> None:
    for row in document["results"]:
        numbers = "  ".join(f"{row[key]:10.2f}" for key in ("median", "min", "max"))
        print(f"{row['case']:16s} {row['metric']:18s} {numbers}")
    for gate in document["gates"]:
        print(f"{'ok' if gate['ok'] else 'FAILED':6s} {gate['name']}: {gate['value']:.2g} (limit {gate['limit']:.2g})")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
