"""Attention over sequences that ranks share: ring and Ulysses against one process, forward and backward apart.

Claim: with R ranks the time falls towards 1/R of one process's, the more so the longer the sequence, for computation
grows with its square and what travels only with its length; results are those of one process.

Baselines, by turns with ours: the whole sequence on rank 0 while the others wait (on a CPU: with the threads of one
rank), and, on CUDA without documents and where this torch's runs, `torch.distributed.tensor.experimental`'s
`context_parallel`, which takes equal numbers of heads, so keys and values are repeated before.

`forward` and `backward` are the slowest rank's seconds, everything of one attention call included; the plan of
documents, made once for all layers of a model, is not. `sent` is what the busiest rank of ours sends in both, counted.
Bound: the rate of matrix products, measured; `of products` is the share of it that a case reaches with the products
that causal attention needs (2 forward, 5 backward). Gate: no result further from one process's than rounding explains.
"""

# Shapes: B batch, W tokens of a sequence, H query heads, K key/value heads, E head width.

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from parallel import kernels
from parallel.bench import Backend, Bound, Gate, Report, arguments, device_of, spawn
from parallel.blocks import Plan, causal_steps
from parallel.context import Context, number_documents
from parallel.ring import in_order
from parallel.ulysses import by_rank, shared_heads

_TOLERANCE = {"float64": 1e-12, "float32": 2e-5, "bfloat16": 2e-2}
"""Largest difference over the largest value; for the narrow dtypes a few roundings of it."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What is measured."""

    backend: Backend
    lengths: tuple[int, ...]
    documents: int
    """Mean length of packed documents; 0: every row is one."""
    batch: int
    heads: int
    kv_heads: int
    width: int
    dtype: Literal["float64", "float32", "bfloat16"]
    repeats: int


Sample = tuple[str, str, str, float]
"""Case, metric, unit, value."""


def main() -> int:
    """Run the benchmark; 1 if a result is wrong."""
    options, setting = _options()
    results = spawn(measure, options.ranks, setting.backend, setting)
    if results is None:
        return 0
    report = Report("parallel.context", {"ranks": options.ranks, **asdict(setting)})
    samples, rate, notes = results[0]
    for case, metric, unit, value in samples:
        if metric == "error":
            limit = _TOLERANCE[setting.dtype]
            report.gates.append(Gate(f"{case}: difference from one process", value, limit, ok=value <= limit))
        else:
            report.add(case, metric, unit, value)
    report.bounds.append(Bound("products", rate, "FLOP/s", f"{setting.dtype} matrix products on one rank"))
    report.parameters["notes"] = notes
    for note in notes:
        print(note)
    return report.finish(options)


def _options() -> tuple[Any, Setting]:
    parser = arguments(__doc__)
    parser.add_argument("--ranks", type=int, default=2, help="ranks that share a sequence (default: %(default)s)")
    parser.add_argument("--backend", choices=("gloo", "nccl"), default="nccl" if torch.cuda.is_available() else "gloo")
    parser.add_argument("--lengths", help="tokens of a sequence, W,W,… (default: 4096 up, by what the device is)")
    parser.add_argument("--documents", type=int, default=0, metavar="N", help="pack documents of N tokens on average")
    for name, default in (("batch", 1), ("heads", 16), ("kv-heads", 8), ("width", 128)):
        parser.add_argument(f"--{name}", type=int, default=default, help="(default: %(default)s)")
    parser.add_argument("--dtype", choices=tuple(_TOLERANCE), help="(default: bfloat16 on CUDA, else float32)")
    options = parser.parse_args()
    on_gpu = options.backend == "nccl"
    sizes = (options.batch, options.heads, options.kv_heads, options.width)
    lengths = options.lengths or ("4096,16384,65536" if on_gpu else "2048,4096")
    if options.smoke:
        sizes, lengths = (1, 4, 2, 16), "64"
    try:
        numbers = tuple(int(word) for word in lengths.split(","))
    except ValueError:
        parser.error(f"--lengths: '{lengths}'; allowed: whole numbers with commas between")
    wrong = [n for n in numbers if n < 1 or n % (2 * options.ranks)]
    if wrong:
        parser.error(f"--lengths: {wrong} cannot be cut in {2 * options.ranks} equal chunks")
    return options, Setting(
        backend=cast(Backend, options.backend),
        lengths=numbers,
        documents=options.documents if not options.smoke else 16,
        batch=sizes[0],
        heads=sizes[1],
        kv_heads=sizes[2],
        width=sizes[3],
        dtype=options.dtype or ("bfloat16" if on_gpu else "float32"),
        repeats=1 if options.smoke else options.repeats,
    )


def measure(rank: int, world_size: int, setting: Setting) -> tuple[list[Sample], float, list[str]]:
    """Return all samples, the rate of products, and what there is to say; the same on every rank."""
    device = device_of(setting.backend)
    samples: list[Sample] = []
    notes: list[str] = []
    rate = _product_rate(device, getattr(torch, setting.dtype))
    for length in setting.lengths:
        one = _Length(setting, length, device)
        for case in list(one.cases):
            try:
                error = one.check(case)
            except (RuntimeError, NotImplementedError, ValueError, LookupError) as problem:
                if case != "torch":
                    raise
                notes.append(f"torch's context_parallel does not run this: {str(problem).splitlines()[0]}")
                del one.cases[case]
                continue
            if case != "one process":
                samples.append((f"{case} {length}", "error", "", error))
            if case in one.plans:
                samples.append((f"{case} {length}", "sent", "MB", one.sent_bytes(case) / 1e6))
        for _ in range(setting.repeats):
            for case in one.cases:
                forward, backward = one.time(case)
                share = 1 if case == "one process" else world_size
                reached = one.flops / share / (forward + backward) / rate
                samples += [
                    (f"{case} {length}", "forward", "ms", forward * 1e3),
                    (f"{case} {length}", "backward", "ms", backward * 1e3),
                    (f"{case} {length}", "of products", "", reached),
                ]
    return samples, rate, notes


class _Length:
    """Inputs of one length and the ways to attend to them."""

    def __init__(self, setting: Setting, length: int, device: torch.device) -> None:
        assert dist.group.WORLD is not None
        self.group = dist.group.WORLD
        self.setting, self.length, self.device = setting, length, device
        generator = torch.Generator().manual_seed(length)
        heads = (setting.heads, setting.kv_heads, setting.kv_heads, setting.heads)
        self.wholes = [
            torch.randn(setting.batch, length, n, setting.width, generator=generator).to(
                device, getattr(torch, setting.dtype)
            )
            for n in heads
        ]
        self.ids = None
        if setting.documents:
            changes = torch.rand(setting.batch, length, generator=generator) < 1 / setting.documents
            self.ids = changes.cumsum(1).to(device)
        self.cases: dict[str, Callable[..., Tensor]] = {"one process": self._alone()}
        self.plans: dict[str, Any] = {}
        methods: list[Literal["ring", "ulysses"]] = ["ring", "ulysses"]
        for method in methods:
            context = Context(self.group, method)
            plan = None if self.ids is None else context.cut_documents(self.ids)
            self.plans[method] = context.core.prepare(plan, None, self.wholes[0])
            self.cases[method] = self._shared(context, self.plans[method])
        if device.type == "cuda" and self.ids is None:
            self.cases["torch"] = self._torch()

    @property
    def flops(self) -> float:
        """Operations of the products that this attention needs."""
        pairs = self.setting.batch * self.length * (self.length + 1) / 2
        if self.ids is not None:
            rows = torch.arange(len(self.ids), device=self.device)[:, None]
            sizes = (number_documents(self.ids) + rows * self.length).flatten().bincount().double()
            pairs = float((sizes * (sizes + 1) / 2).sum())
        return 7 * 2 * pairs * self.setting.heads * self.setting.width

    def _alone(self) -> Callable[..., Tensor]:
        scale, found = self.setting.width**-0.5, kernels.documents(self.ids, self.wholes[0])
        apply: Callable[..., Tensor] = kernels.CausalAttention.apply
        return lambda *operands: apply(*operands, scale, found)

    def _shared(self, context: Context, plan: Any) -> Callable[..., Tensor]:
        return lambda query, key, value: context.core(query, key, value, plan)

    def _torch(self) -> Callable[..., Tensor]:
        group = self.setting.heads // self.setting.kv_heads

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            key, value = (x.repeat_interleave(group, 2) for x in (key, value))
            query, key, value = (x.transpose(1, 2) for x in (query, key, value))
            return functional.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2)

        return attend

    def _operands(self, case: str) -> list[Tensor]:
        parts = self.wholes
        if case != "one process":
            rank, size = self.group.rank(), self.group.size()
            parts = [by_rank(x, size)[rank].contiguous() for x in self.wholes]
        return [x.detach().clone().requires_grad_() for x in parts[:3]] + [parts[3]]

    def _run(self, case: str) -> tuple[list[Tensor], float, float]:
        """Output and gradients, and the seconds of forward and backward on this rank."""
        *operands, grad = self._operands(case)
        start = self._now()
        if case == "torch":
            from torch.distributed.device_mesh import DeviceMesh
            from torch.distributed.tensor.experimental import context_parallel

            mesh = DeviceMesh.from_group(self.group, "cuda")
            cut = torch.zeros(1, self.length, device=self.device)  # it wants one; our operands are cut as it would
            cutting = context_parallel(mesh, buffers=[cut], buffer_seq_dims=[1], no_restore_buffers={cut})
            with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION), cutting:
                start = self._now()
                out = self.cases[case](*operands)
                middle = self._now()
                out.backward(grad)  # type: ignore[no-untyped-call]
        else:
            out = self.cases[case](*operands)
            middle = self._now()
            out.backward(grad)  # type: ignore[no-untyped-call]
        end = self._now()
        grads = [x.grad for x in operands if x.grad is not None]
        return [out.detach(), *grads], middle - start, end - middle

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def time(self, case: str) -> tuple[float, float]:
        """Return the seconds of forward and backward on the slowest rank that works."""
        dist.barrier()
        forward = backward = 0.0
        if case != "one process" or self.group.rank() == 0:
            _, forward, backward = self._run(case)
        slowest = torch.tensor([forward, backward], dtype=torch.float64, device=self.device)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        return float(slowest[0]), float(slowest[1])

    def check(self, case: str) -> float:
        """Return the largest difference from one process, over the largest value; warms up too."""
        alone = self._run("one process")[0]
        mine = self._run(case)[0]
        worst = 0.0
        for whole, part in zip(alone, mine, strict=True):
            if case != "one process":
                parts = [torch.empty_like(part) for _ in range(self.group.size())]
                dist.all_gather(parts, part.contiguous(), group=self.group)
                part = in_order(torch.stack(parts))
            worst = max(worst, float((whole - part).abs().max() / whole.abs().max()))
        found = torch.tensor(worst, device=self.device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return float(found)

    def sent_bytes(self, case: str) -> float:
        """Return what the busiest rank sends in forward and backward."""
        size, setting = self.group.size(), self.setting
        tokens = setting.batch * self.length // size
        a_head = setting.width * self.wholes[0].element_size()
        if case == "ring":
            plan = self.plans[case] or Plan(None, causal_steps(self.length // size, self.group.rank(), size))
            found = 2 * setting.kv_heads * a_head * sum(_tokens_sent(plan, tokens // setting.batch, setting.batch))
        else:
            kv_heads = len(shared_heads(setting.heads, setting.kv_heads, size)[0])
            exchanged = 2 * (setting.heads // size) + 2 * kv_heads
            found = 2 * (size - 1) * tokens * exchanged * a_head
        busiest = torch.tensor(float(found), dtype=torch.float64, device=self.device)
        dist.all_reduce(busiest, dist.ReduceOp.MAX)
        return float(busiest)


def _tokens_sent(plan: Plan, length: int, batch: int) -> list[int]:
    """Tokens whose keys and values (or their gradients) a rank sends: given in both passes, and given back."""
    spans = []
    for step in plan.steps:
        if step.given is not None:
            spans += [step.given, step.given]
        if step.block is not None:
            spans.append(step.block.keys)
    return [len(range(length)[span.along]) * batch if span.index_N is None else len(span.index_N) for span in spans]


def _product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a square product, the best of some."""
    side = 8192 if device.type == "cuda" else 1024
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(5):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        left @ right
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best


if __name__ == "__main__":
    sys.exit(main())
