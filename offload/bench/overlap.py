"""How much of an update on a slow tier lies under backward and forward: on a CPU, with an emulated tier.

Claim: an update whose tier takes as long as backward is hidden in it but for its end: the host waits for at most 0.4 of
what it waits for in `sync`, where nothing is hidden, and for less when the update defers to the next forward than when
it does not. Baseline: the same optimizer, states and tier in `sync`, alternating in one process.

hidden = 1 - waited(mode) / waited(sync), where waited is what the caller of the optimizer waits in a step. `under
compute` is the share of the time of the tier's reads that the trace finds under a phase of compute.

The tier is a file behind a throttle that is set to the time that backward takes here, measured before; all of it is
labelled emulated. Before anything is timed, parameters after steps of every mode are compared to the bit.
"""

from __future__ import annotations

import sys
import tempfile
import time
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import nn

from offload.bench import Bound, Gate, Report, arguments
from offload.nvme import NvmeTier
from offload.optimizer import TieredAdamW, Tiering
from offload.schedule import STATE_BYTES, Budget, Mode
from offload.tier import TierSpec
from offload.tracing import Trace

_MODES: tuple[Mode, ...] = ("sync", "defer", "stream")
_LIMITS: dict[Mode, float] = {"stream": 0.6}
"""Least share that is hidden."""


@dataclass(frozen=True, slots=True)
class _Sample:
    waited_s: float
    step_s: float
    under_compute: float


class _Trained:
    """A model with its optimizer on a tier of its own."""

    def __init__(self, options: Namespace, mode: Mode, bytes_per_s: float, folder: Path) -> None:
        self.model, self.trace = _model(options), Trace()
        num_bytes = STATE_BYTES * sum(p.numel() for p in self.model.parameters())
        self._tier = NvmeTier(
            TierSpec(
                name="tier",
                capacity_bytes=2 * num_bytes + (1 << 24),
                read_bytes_per_s=bytes_per_s,
                write_bytes_per_s=bytes_per_s,
                latency_s=1e-4,
                emulated=True,
            ),
            folder,
            direct=False,
        )
        settings = Tiering(
            accumulation_steps=1,
            subgroup_numel=options.width * options.width,
            budget=Budget(device_bytes=0, host_bytes=0),
            tier=self._tier,
            num_threads=1,
            trace=self.trace,
        )
        self._optimizer = TieredAdamW(self.model.parameters(), mode=mode, tiering=settings)
        self._optimizer.attach(self.model)

    def step(self, x: torch.Tensor) -> _Sample:
        """Make a step, from the end of one backward to the end of the next."""
        before_s, start_s = self._optimizer.stall_s, time.perf_counter()
        self._optimizer.step()
        with self.trace.phase("forward", x.device):
            loss = self.model(x).square().mean()
        with self.trace.phase("backward", x.device):
            loss.backward()
        taken_s = time.perf_counter() - start_s
        hidden = self.trace.step().hidden
        return _Sample(self._optimizer.stall_s - before_s, taken_s, hidden.get("tier (emulated) read", 0.0))

    def close(self) -> list[torch.Tensor]:
        """Finish; return the parameters."""
        self._optimizer.step()
        self._optimizer.close()
        self._tier.close()
        return [parameter.detach() for parameter in self.model.parameters()]


def main() -> int:
    """Run the benchmark; 1 if parameters differ."""
    parser = arguments(__doc__)
    for name, default in (("layers", 16), ("width", 512), ("batch", 2048)):
        parser.add_argument(f"--{name}", type=int, default=default, help="(default: %(default)s)")
    parser.add_argument("--share", type=float, default=0.7, help="of backward that the tier is busy (default: 0.7)")
    options = parser.parse_args()
    if options.smoke:
        options.layers, options.width, options.batch, options.repeats = 4, 32, 16, 1
    x = torch.randn(options.batch, options.width)
    backward_s = _backward_s(options, x)
    num_bytes = STATE_BYTES * options.layers * options.width * options.width
    # Reads and writes go both ways at once.
    bytes_per_s = num_bytes / (options.share * backward_s)
    names = ("layers", "width", "batch", "share", "repeats")
    report = Report("offload.overlap", {name: getattr(options, name) for name in names} | {"emulated": "tier"})
    report.bounds += [
        Bound("backward", backward_s, "s", "median of the plain model's"),
        Bound("tier (emulated) each way", bytes_per_s, "B/s", "set so that it is busy for `share` of backward"),
    ]
    with tempfile.TemporaryDirectory() as folder:
        trained = {mode: _Trained(options, mode, bytes_per_s, Path(folder)) for mode in _MODES}
        for one in trained.values():
            one.step(x)  # nothing to update yet
            one.step(x)
        for _ in range(options.repeats):
            for mode, one in trained.items():
                sample = one.step(x)
                report.add(mode, "waited", "s", sample.waited_s)
                report.add(mode, "step", "s", sample.step_s)
                report.add(mode, "under compute", "of the tier's reads", sample.under_compute)
        found = {mode: one.close() for mode, one in trained.items()}
    for mode in _MODES[1:]:
        different = sum(int((a != b).sum()) for a, b in zip(found["sync"], found[mode], strict=True))
        report.gates.append(Gate(f"parameters of {mode} that differ", different, 0, ok=different == 0))
    waited_s = {mode: report.median(mode, "waited") for mode in _MODES}
    for mode in _MODES[1:]:
        hidden = 1 - waited_s[mode] / waited_s["sync"] if waited_s["sync"] else 0.0
        report.add(mode, "hidden", "of what sync waits", hidden)
        if mode in _LIMITS:
            name = f"update hidden in backward, {mode}, emulated tier"
            report.gates.append(Gate(name, hidden, _LIMITS[mode], ok=hidden >= _LIMITS[mode], is_speed=True))
    return report.finish(options)


def _model(options: Namespace) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(options.width, options.width, bias=False) for _ in range(options.layers)))


def _backward_s(options: Namespace, x: torch.Tensor) -> float:
    model, samples = _model(options), list[float]()
    for _ in range(4):
        loss = model(x).square().mean()
        start_s = time.perf_counter()
        loss.backward()
        samples.append(time.perf_counter() - start_s)
        model.zero_grad()
    return median(samples[1:])


if __name__ == "__main__":
    sys.exit(main())
