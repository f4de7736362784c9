"""Layers streamed through a window against the same model whole on the GPU, and against DeepSpeed ZeRO 3 with CPU
parameters.

Claim: with a window of a few layers a pass takes max(compute, bytes of weights / link), computes the same bits, and
trains what does not fit: `capped` caps the GPU's memory below the model's weights and gradients, trains, and compares
every loss with a run without a cap. Phases: `exact` (losses over steps, and all gradients, against the plain run, on
deterministic kernels), `speed` (forward; forward and backward; alternating, medians of --repeats), `deepspeed` (the
same model in ZeRO 3 with parameters in locked CPU memory: its forward, its forward and backward) and `capped`. Blocks
are recomputed in backward in all cases. Setting up is not timed. Phases that would begin after --limit-s are left out,
which is said and fails no gate.

Without a GPU a small model runs on the CPU, where the device is emulated: bits count, times do not.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from offload.bench import Bound, Gate, Report, arguments
from offload.bench.cases.models import Decoder, batch, build
from offload.cap import capped
from offload.streaming import LayerStream, fit
from offload.tracing import Trace
from offload.window import LayerCost, Window, choose_window, predicted_s

PHASES = ("exact", "speed", "deepspeed", "capped")
_RATE = 2.0**-6
"""Learning rate of the equality runs: a power of two, so that a GPU's fused multiply-add rounds as a CPU does."""


@dataclass(frozen=True, slots=True)
class Size:
    """A model and a batch."""

    num_layers: int
    dim: int
    vocab: int
    rows: tuple[int, ...]
    length: int
    head_dim: int = 128


class Bench:
    """One run: what was asked for, where it runs, and what it found."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = torch.device("cuda" if torch.cuda.is_available() and not options.smoke else "cpu")
        on_gpu = self.device.type == "cuda"
        self.size = (
            Size(options.layers, options.dim, 32_768, tuple(options.rows), 2048)
            if on_gpu
            else Size(4, 64, 128, (2,), 32, head_dim=16)
        )
        self.capped_layers = options.capped_layers if on_gpu else 6
        self.window = min(options.window, self.size.num_layers)
        self.report = Report(
            "offload.streaming", {**vars(options), "json": str(options.json), "device": str(self.device)}
        )
        self.started_s = time.monotonic()

    def say(self, text: str) -> None:
        """Print progress with the time since the start."""
        print(f"[{time.monotonic() - self.started_s:6.1f} s] {text}", flush=True)

    def build(self, num_layers: int) -> Decoder:
        """Return the model, on the CPU."""
        size = self.size
        return build(num_layers=num_layers, dim=size.dim, vocab=size.vocab, head_dim=size.head_dim, device=self.device)

    def batch(self, rows: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a batch on the device."""
        return batch(rows=rows, length=self.size.length, vocab=self.size.vocab, device=self.device, seed=seed)

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def time_s(self, work: Callable[[], object]) -> float:
        """Return how long something takes, to the end of the device's work."""
        self.synchronize()
        start_s = time.perf_counter()
        work()
        self.synchronize()
        return time.perf_counter() - start_s

    def peak_bytes(self) -> int:
        """Return the most device memory since the last `forget`, 0 without a GPU."""
        return torch.cuda.max_memory_allocated() if self.device.type == "cuda" else 0

    def start_peak(self) -> int:
        """Start peaks anew; return what is allocated on the device, 0 without a GPU."""
        if self.device.type != "cuda":
            return 0
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()

    def forget(self) -> None:
        """Give memory back and start peaks anew."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def main() -> int:
    """Run the benchmark; return its exit code."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic products, before CUDA starts
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # a cap counts fragments too
    options = _options()
    options.repeats = 1 if options.smoke else options.repeats
    bench = Bench(options)
    work = {"exact": exact, "speed": speed, "deepspeed": deepspeed, "capped": capped_run}
    for phase in PHASES:
        if phase not in options.phases:
            continue
        if time.monotonic() - bench.started_s > options.limit_s:
            bench.say(f"{phase}: left out, --limit-s {options.limit_s} are over")
            continue
        bench.say(f"{phase}: begins")
        work[phase](bench)
        bench.forget()
    bench.say("done")
    return bench.report.finish(options)


def _options() -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.add_argument("--layers", type=int, default=12, help="blocks (default: %(default)s)")
    parser.add_argument("--dim", type=int, default=4096, help="width (default: %(default)s)")
    parser.add_argument(
        "--rows", type=int, nargs="+", default=[4, 16], help="rows of 2,048 tokens a pass (default: 4 16)"
    )
    parser.add_argument("--window", type=int, default=3, help="layers on the device (default: %(default)s)")
    parser.add_argument("--capped-layers", type=int, default=32, help="blocks under the cap (default: %(default)s)")
    parser.add_argument("--cap-gb", type=float, default=20.0, help="cap of device memory (default: %(default)s)")
    parser.add_argument("--limit-s", type=float, default=150.0, help="begin no phase later (default: %(default)s)")
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=list(PHASES))
    return parser.parse_args()


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Let kernels that add in an order of chance choose a fixed one."""
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def losses(bench: Bench, model: Decoder, steps: int) -> list[float]:
    """Train by plain gradient descent and return every loss; parameters may be on the device or at home."""
    told = []
    for step in range(steps):
        loss = model(*bench.batch(bench.size.rows[0], seed=step))
        loss.backward()
        told.append(loss.item())
        with torch.no_grad():
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter.add_(parameter.grad, alpha=-_RATE)
                parameter.grad = None
    return told


def exact(bench: Bench) -> None:
    """Compare losses over three steps and the gradients of a fourth, to the bit."""
    with deterministic():
        plain = bench.build(bench.size.num_layers).to(bench.device)
        expected = losses(bench, plain, 3)
        plain(*bench.batch(bench.size.rows[0], seed=9)).backward()
        gradients = [parameter.grad.cpu() for parameter in plain.parameters() if parameter.grad is not None]
        del plain
        bench.forget()
        model = bench.build(bench.size.num_layers)
        with LayerStream(model, list(model.blocks), device=bench.device, window=bench.window):
            found = losses(bench, model, 3)
            model(*bench.batch(bench.size.rows[0], seed=9)).backward()
            wrong = sum(
                int((parameter.grad.cpu() != expected_gradient).sum())
                for parameter, expected_gradient in zip(model.parameters(), gradients, strict=True)
                if parameter.grad is not None
            )
    bench.say(f"losses {found}, plain {expected}")
    differing = sum(one != other for one, other in zip(found, expected, strict=True))
    bench.report.gates += [
        Gate("streamed losses that differ from the plain run's", differing, 0, ok=differing == 0),
        Gate("elements of gradients that differ from the plain run's", wrong, 0, ok=wrong == 0),
    ]


def speed(bench: Bench) -> None:
    """Time passes of the plain and the streamed model in turns."""
    report, size = bench.report, bench.size
    empty = bench.start_peak()
    plain = bench.build(size.num_layers).to(bench.device)
    held = {"plain": bench.start_peak() - empty}
    model = bench.build(size.num_layers)
    trace = Trace()
    with LayerStream(model, list(model.blocks), device=bench.device, window=bench.window, trace=trace) as stream:
        weight_bytes = stream.layer_bytes * size.num_layers
        held["streamed"] = bench.start_peak() - empty - held["plain"]
        for rows in size.rows:
            tokens = f"{rows * size.length} tokens"
            given = bench.batch(rows)
            for name, training in (("forward", False), ("forward and backward", True)):
                for repeat in range(bench.options.repeats + 1):
                    for case, each in (("plain", plain), ("streamed", model)):
                        before = bench.start_peak()
                        taken_s = bench.time_s(partial(_pass, each, given, training))
                        each.zero_grad()
                        record = trace.step()
                        if repeat:
                            report.add(f"{case}, {tokens}", name, "s", taken_s)
                            peak = held[case] + bench.peak_bytes() - before
                            report.add(f"{case}, {tokens}", f"{name}, peak memory", "B", peak)
                        if repeat and case == "streamed":
                            report.add(f"{case}, {tokens}", f"{name}, stall", "s", sum(record.stalls_s.values()))
                plain_s, ours_s = (report.median(f"{case}, {tokens}", name) for case in ("plain", "streamed"))
                bench.say(f"{tokens}: {name}: plain {plain_s:.4f} s, streamed {ours_s:.4f} s")
                report.gates.append(
                    Gate(
                        f"{tokens}: {name}, times the plain run's", ours_s / plain_s, 1.5, ours_s <= 1.5 * plain_s, True
                    )
                )
            _predict(bench, stream, rows)
        link = _link_bytes_per_s(bench, stream.layer_bytes)
        report.bounds.append(Bound("link", link, "B/s", "locked memory to the device, a layer at a time"))
        report.bounds.append(Bound("forward", weight_bytes / link, "s", "all layers' weights over the link"))


def _pass(model: Decoder, given: tuple[torch.Tensor, torch.Tensor], training: bool) -> None:
    if training:
        model(*given).backward()
        return
    with torch.no_grad():
        model(*given)


def _link_bytes_per_s(bench: Bench, num_bytes: int) -> float:
    host = torch.ones(num_bytes, dtype=torch.uint8)
    if bench.device.type == "cuda":
        host = host.pin_memory()
    on_device = torch.empty_like(host, device=bench.device)
    taken = [bench.time_s(lambda: on_device.copy_(host, non_blocking=True)) for _ in range(5)]
    return num_bytes / statistics.median(taken)


def _predict(bench: Bench, stream: LayerStream, rows: int) -> None:
    """Compare the window's model of a forward with the time that it took."""
    tokens = f"{rows * bench.size.length} tokens"
    layers = bench.size.num_layers
    cost = LayerCost(
        num_bytes=stream.layer_bytes,
        compute_s=bench.report.median(f"plain, {tokens}", "forward") / layers,
        transfer_s=stream.layer_bytes / _link_bytes_per_s(bench, stream.layer_bytes),
    )
    told = predicted_s(Window(num_layers=layers, resident=bench.window), cost, training=False)
    measured = bench.report.median(f"streamed, {tokens}", "forward")
    bench.report.add(f"streamed, {tokens}", "forward, predicted", "s", told)
    budget = (layers + 2) * stream.layer_bytes
    chosen = choose_window(cost, num_layers=layers, other_bytes=0, budget_bytes=budget - 1, training=False)
    bench.say(f"{tokens}: forward {measured:.4f} s, predicted {told:.4f} s; window {chosen.resident}: {chosen.reason}")


def deepspeed(bench: Bench) -> None:
    """Time DeepSpeed's ZeRO 3 with parameters in CPU memory on the same model, where it is there and runs."""
    if bench.device.type != "cuda":
        bench.say("deepspeed: its CPU parameters are for a GPU; left out")
        return
    try:
        engine = _deepspeed_engine(bench)
        _time_deepspeed(bench, engine)
        engine.destroy()
    except Exception as error:  # noqa: BLE001  a rival may fail in any way, which is told and not a fault of ours
        bench.say(f"deepspeed: did not run: {type(error).__name__}: {error}")


def _time_deepspeed(bench: Bench, engine: Any) -> None:
    for rows in bench.size.rows:
        tokens = f"{rows * bench.size.length} tokens"
        given = bench.batch(rows)

        def forward() -> None:
            with torch.no_grad():
                engine(*given)  # noqa: B023 - run at once

        def both() -> None:
            engine.backward(engine(*given))  # noqa: B023 - run at once

        for name, work in (("forward", forward), ("forward and backward", both)):
            for repeat in range(bench.options.repeats + 1):
                bench.start_peak()
                taken_s = bench.time_s(work)
                if name != "forward":
                    engine.optimizer.zero_grad()
                if repeat:
                    bench.report.add(f"deepspeed, {tokens}", name, "s", taken_s)
                    bench.report.add(f"deepspeed, {tokens}", f"{name}, peak memory", "B", bench.peak_bytes())
            bench.say(f"{tokens}: {name}: deepspeed {bench.report.median(f'deepspeed, {tokens}', name):.4f} s")


def _deepspeed_engine(bench: Bench) -> Any:
    import deepspeed as ds

    os.environ.update({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"})
    os.environ.setdefault("MASTER_PORT", "29517")
    model = bench.build(bench.size.num_layers)
    largest = max(parameter.numel() for parameter in model.parameters())
    engine, *_ = ds.initialize(
        model=model,
        # Without states, as what is timed is forward and backward: its masters and gradients stay in CPU memory.
        optimizer=torch.optim.SGD(model.parameters(), lr=1e-6),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "bf16": {"enabled": True},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": {
                "stage": 3,
                "offload_param": {"device": "cpu", "pin_memory": True},
                "offload_optimizer": {"device": "cpu", "pin_memory": True},
                "overlap_comm": True,
                "contiguous_gradients": True,
                "reduce_bucket_size": largest,
                "stage3_prefetch_bucket_size": 12 * bench.size.dim**2,
                "stage3_max_live_parameters": bench.window * 12 * bench.size.dim**2,
                "stage3_max_reuse_distance": 0,
                "stage3_param_persistence_threshold": bench.size.dim,
            },
        },
    )
    bench.say("deepspeed: engine is there")
    return engine


def capped_run(bench: Bench) -> None:
    """Train under a cap that the model's weights and gradients do not fit under; compare with a run without."""
    layers = bench.capped_layers
    with deterministic():
        model = bench.build(layers)
        needed = 2 * sum(parameter.nbytes for parameter in model.parameters())
        cap = int(bench.options.cap_gb * 1e9) if bench.device.type == "cuda" else needed * 3 // 8
        tokens = bench.size.rows[0] * bench.size.length
        # A block that is being recomputed, its gradients, logits in two dtypes, and every block's input.
        activations = 2 * tokens * (40 * bench.size.dim + 8 * bench.size.vocab + layers * bench.size.dim) + (1 << 30)
        if bench.device.type != "cuda":
            activations = 0
        bench.forget()
        limit: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if bench.device.type == "cuda":
            limit = capped(bench.device, cap)
        with (
            limit as usage,
            fit(
                model,
                list(model.blocks),
                device=bench.device,
                budget_bytes=cap - cap // 12,
                activation_bytes=activations,
            ) as stream,
        ):
            bench.say(
                f"capped: {layers} layers, {stream.window.resident} of them on the device: {stream.window.reason}"
            )
            found = losses(bench, model, 3)
            device_bytes = stream.device_bytes
        peak = usage.peak_bytes if usage is not None else device_bytes
        bench.say(f"capped: losses {found}, peak {peak / 1e9:.2f} GB of {cap / 1e9:.2f}")
        del model, stream
        bench.forget()
        plain = bench.build(layers).to(bench.device)
        expected = losses(bench, plain, 3)
    bench.say(f"without a cap: losses {expected}, peak {bench.peak_bytes() / 1e9:.2f} GB")
    differing = sum(one != other for one, other in zip(found, expected, strict=True))
    bench.report.add("capped", "peak memory", "B", peak)
    bench.report.add("without a cap", "peak memory", "B", bench.peak_bytes() or needed)
    bench.report.gates += [
        Gate("capped: bytes of weights and gradients over the cap", needed / cap, 1.0, needed > cap),
        Gate("capped: peak over cap", peak / cap, 1.0, peak <= cap),
        Gate("capped: losses that differ from the run without a cap", differing, 0, differing == 0),
    ]


if __name__ == "__main__":
    sys.exit(main())
