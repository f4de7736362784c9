"""The rank's side of the labelled benchmark: small jobs of three kinds that go on until they are ended.

The work of a device is emulated by sleeping, so that more ranks than CPUs do not disturb each other; gradients,
collectives, messages and the recorder are real.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import FileStore  # type: ignore[attr-defined]

import faulttol
from faulttol import localize, sdc, sockets
from faulttol.agent import answering
from faulttol.heartbeat import Heartbeat
from faulttol.inject import Fault, Injector
from faulttol.recorder import Recorder

WIDTH = 256
ROWS = 64
"""Of a micro-batch: activations of 64 KiB."""
MICRO_BATCHES = 2
TOKENS = 4096
HASH_STEPS = 16
"""Steps between two comparisons of the replicas' parameters."""
BACKLOG_S = 0.2
"""Between two looks at what waits in the connections."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JobSpec:
    """One job of the benchmark."""

    name: str
    """A key of JOBS."""
    num_ranks: int
    work_s: float = 0.03
    """Emulated time of the device in a step."""
    directory: Path
    """Of rings, heartbeats and the record of faults."""
    timeout_s: float = 600.0
    """Of the process groups."""
    faults: tuple[Fault, ...] = ()
    """What strikes without an order."""


@dataclass(frozen=True, slots=True)
class ProbeAt:
    """An order to all ranks: measure the links before this step."""

    step: int


@dataclass(frozen=True, slots=True)
class Withdraw:
    """An order to all ranks: end the faults that act."""


class Job(Protocol):
    """What a step of each kind of job is made of."""

    @property
    def module(self) -> nn.Module:
        """The rank's model."""
        ...

    def run(self, injector: Injector, step: int, work_s: float) -> tuple[float, float | None]:
        """Train one step; return the loss and the norm of this rank's gradient before the reduction, if known."""
        ...


class Replicated:
    """DistributedDataParallel over all ranks."""

    def __init__(self, rank: int, num_ranks: int) -> None:
        self.module = _model()
        self._ddp = nn.parallel.DistributedDataParallel(self.module, bucket_cap_mb=0.3)
        self._norms = sdc.GradientNorms()
        self._optimizer = torch.optim.SGD(self.module.parameters(), lr=1e-3)
        self._generator = torch.Generator().manual_seed(rank)
        self._ddp.register_comm_hook(None, self._norms.hook)

    def run(self, injector: Injector, step: int, work_s: float) -> tuple[float, float | None]:
        """One step; a rank that skips its collectives does so by `no_sync`."""
        x = torch.randn(ROWS, WIDTH, generator=self._generator)
        if injector.skips(step):
            with self._ddp.no_sync():
                loss = _forward(self._ddp, x, work_s / 2)
                torch.autograd.backward(loss)
        else:
            loss = _forward(self._ddp, x, work_s / 2)
            self._norms.before_next(lambda bucket: injector.corrupt(step, {"bucket": bucket}))
            torch.autograd.backward(loss)
        time.sleep(work_s / 2)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return loss.item(), self._norms.take()


class Sharded:
    """FSDP2 over all ranks."""

    def __init__(self, rank: int, num_ranks: int) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        module = _model()
        mesh = init_device_mesh("cpu", (num_ranks,))
        for layer in module:
            if isinstance(layer, nn.Linear):
                fully_shard(layer, mesh=mesh)
        fully_shard(module, mesh=mesh)
        self.module: nn.Module = module
        self._optimizer = torch.optim.SGD(self.module.parameters(), lr=1e-3)
        self._generator = torch.Generator().manual_seed(rank)

    def run(self, injector: Injector, step: int, work_s: float) -> tuple[float, float | None]:
        """One step; a rank that skips does not reduce its gradients."""
        x = torch.randn(ROWS, WIDTH, generator=self._generator)
        self._reduce(not injector.skips(step))
        loss = _forward(self.module, x, work_s / 2)
        torch.autograd.backward(loss)
        time.sleep(work_s / 2)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return loss.item(), None

    def _reduce(self, does: bool) -> None:
        from torch.distributed.fsdp import FSDPModule

        for module in self.module.modules():
            if isinstance(module, FSDPModule):
                module.set_requires_gradient_sync(does, recurse=False)


class Pipeline:
    """Two stages, each with half of the ranks as replicas; messages forward and backward, then an all-reduce."""

    def __init__(self, rank: int, num_ranks: int) -> None:
        half = num_ranks // 2
        self._is_first = rank < half
        self._peer = rank + half if self._is_first else rank - half
        groups = [dist.new_group(list(range(half))), dist.new_group(list(range(half, num_ranks)))]
        self._group = groups[0] if self._is_first else groups[1]
        self._num_replicas = half
        self.module = _model()
        self._optimizer = torch.optim.SGD(self.module.parameters(), lr=1e-3)
        self._generator = torch.Generator().manual_seed(rank)

    def run(self, injector: Injector, step: int, work_s: float) -> tuple[float, float | None]:
        """All micro-batches forward, then all backward; a rank that skips leaves the all-reduce out."""
        share_s = work_s / (2 * MICRO_BATCHES)
        kept: list[tuple[Tensor, Tensor]] = []
        for _ in range(MICRO_BATCHES):
            x = torch.randn(ROWS, WIDTH, generator=self._generator)
            if not self._is_first:
                dist.recv(x, self._peer)
                x.requires_grad_()
            y = self.module(x)
            time.sleep(share_s)
            if self._is_first:
                dist.send(y.detach(), self._peer)
            kept.append((x, y))
        total = 0.0
        for x, y in kept:
            if self._is_first:
                gradient = torch.empty_like(y)
                dist.recv(gradient, self._peer)
                torch.autograd.backward(y, gradient)
                time.sleep(share_s)
            else:
                loss = y.square().mean()
                torch.autograd.backward(loss)
                time.sleep(share_s)
                assert x.grad is not None
                dist.send(x.grad, self._peer)
                total += loss.item()
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        injector.corrupt(step, {str(i): gradient for i, gradient in enumerate(gradients)})
        norm = float(torch.linalg.vector_norm(torch.stack([g.norm() for g in gradients])))
        if not injector.skips(step):
            for gradient in gradients:
                dist.all_reduce(gradient, group=self._group)
                gradient.div_(self._num_replicas)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return total, norm


JOBS: Mapping[str, Callable[[int, int], Job]] = {
    "ddp": Replicated,
    "fsdp": Sharded,
    "pipeline": Pipeline,
}


def serve(rank: int, spec: JobSpec, orders: Connection) -> None:
    """Train until the process is ended; take faults and orders from the connection at each step."""
    log = os.open(spec.directory / f"log{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    directory = spec.directory
    store = FileStore(str(directory / "store"), spec.num_ranks)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=spec.num_ranks, timeout=timedelta(seconds=spec.timeout_s)
    )
    recorder = faulttol.install(directory, rank=rank, world_size=spec.num_ranks)
    job = JOBS[spec.name](rank, spec.num_ranks)
    links = sockets.connections()
    injector = Injector(
        spec.faults, rank=rank, record=directory / "strikes", connections=links, mark_phase=recorder.mark_phase
    )
    with Heartbeat(directory / f"heart{rank}", 0.1) as heart, answering(directory / f"answers{rank}"):
        voice = _Voice(rank, directory, orders, links)
        voice.say("ready", os.getpid())
        _train(job, spec, injector, recorder, heart, voice)


class _Voice:
    """Tells the observer things, from a thread of its own too: what waits in the connections while the loop stands."""

    def __init__(self, rank: int, directory: Path, orders: Connection, links: Mapping[int, list[int]]) -> None:
        self._rank, self._directory = rank, directory
        self.orders = orders
        self.step = -1
        self._links = links
        self._lock = threading.Lock()
        threading.Thread(target=self._watch_backlogs, daemon=True).start()

    def say(self, kind: str, value: object) -> None:
        """Send one message."""
        with self._lock:
            self.orders.send((kind, value))

    def _watch_backlogs(self) -> None:
        step, before = -1, dict[int, int]()
        while True:
            time.sleep(BACKLOG_S)
            now = {peer: sockets.backlog_bytes(descriptors) for peer, descriptors in self._links.items()}
            if step == self.step:  # the loop stands
                self.say("backlog", {peer: count for peer, count in now.items() if count and before.get(peer)})
            step, before = self.step, now
            if (self._directory / "dump").exists():
                self._dump()

    def _dump(self) -> None:
        """Write torch's own flight record, once."""
        from torch._C._distributed_c10d import _dump_fr_trace  # type: ignore[attr-defined]

        path = self._directory / f"torch_rank_{self._rank}"
        if not path.exists():
            unfinished = self._directory / f"unfinished{self._rank}"  # the analyser reads whatever has the prefix
            unfinished.write_bytes(_dump_fr_trace(True, False, False))
            unfinished.rename(path)


def _train(job: Job, spec: JobSpec, injector: Injector, recorder: Recorder, heart: Heartbeat, voice: _Voice) -> None:
    probes: set[int] = set()
    for step in itertools.count():
        _take(voice.orders, injector, probes, step)
        tokens = injector.tokens(step, TOKENS)
        recorder.mark_step(step, tokens=tokens)
        heart.beat(step=step, phase="train")
        voice.step = step
        if step in probes:
            recorder.mark_phase("probe")
            voice.say("probe", (step, localize.probe(repeats=6)))
            recorder.mark_phase("train")
        injector.at(step)
        loss, norm = job.run(injector, step, spec.work_s)
        injector.flip(step, dict(job.module.named_parameters()))
        recorder.mark_step_end(loss=loss, grad_norm=norm)
        if spec.name == "ddp" and step % HASH_STEPS == HASH_STEPS - 1:
            recorder.mark_phase("verify")
            found = sdc.compare(dict(job.module.named_parameters()))
            if recorder.rank == 0 and found is not None:
                voice.say("divergence", found)


def _take(orders: Connection, injector: Injector, probes: set[int], step: int) -> None:
    """Take orders at the beginning of a step, in which a fault strikes then."""
    while orders.poll():
        order = orders.recv()
        if isinstance(order, Fault):
            injector.add(replace(order, step=step))
        elif isinstance(order, ProbeAt):
            probes.add(order.step)
        elif isinstance(order, Withdraw):
            injector.close()


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(3):
        layers += [nn.Linear(WIDTH, WIDTH), nn.Tanh()]
    return nn.Sequential(*layers)


def _forward(module: nn.Module, x: Tensor, work_s: float) -> Tensor:
    output: Tensor = module(x)
    time.sleep(work_s)
    return output.square().mean()
