"""Silent data corruption: finding the rank that computed something else, while nothing raises.

    replicas' parameters differ     `compare`: a hash of all, then bisection to the tensor, the element and the bits
    a gradient is far from its own  `GradientNorms`: before the reduction, which spreads it to every rank
    a matrix product is wrong       `ProductChecks`: row and column sums of sampled products (ABFT)

Replicas of data parallelism stay equal to the bit, because each applies the same reduced gradient; that makes a hash
enough. What differs from the majority is wrong; of two replicas nobody can tell which. `restore_point` says from where
to go on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from faulttol.finding import Finding, FindingKind, Suspect

_CHUNK = 1 << 20
"""Elements hashed at once: bounds the memory that hashing needs."""
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_GOLDEN = -7046029254386353131  # 2^64 / golden ratio, as a signed number
_MIX = -4658895280553007687


@dataclass(frozen=True, slots=True)
class Divergence:
    """The first place where replicas differ."""

    tensor: str
    element: int
    """Place in the flattened tensor."""
    values: Mapping[int, float]
    """What each rank (in the job) has there."""
    ranks: tuple[int, ...]
    """The minority; all that differ where there is none."""
    bits: tuple[int, ...]
    """Which bits of the minority's first rank differ from the others'; bit 0 is the least."""

    def finding(self, step: int = -1) -> Finding:
        """Return it as a finding."""
        return Finding(
            kind=FindingKind.NUMERIC,
            suspects=tuple(Suspect(rank, 1.0 / len(self.ranks)) for rank in self.ranks),
            summary=f"element {self.element} of {self.tensor} differs on rank {', '.join(map(str, self.ranks))} "
            f"in bits {', '.join(map(str, self.bits))}",
            evidence={f"value of rank {rank}": value for rank, value in sorted(self.values.items())},
            step=step,
        )


def fingerprint(tensor: Tensor) -> Tensor:
    """Return a 64-bit hash of the tensor's bits as an int64 tensor on its device; waits for nothing.

    The same on every device and for every stride. One changed element always changes it: each element's bits are
    multiplied by an odd number of its place, modulo 2^64, and the products are added.
    """
    flat = _bits(tensor)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for begin in range(0, flat.numel(), _CHUNK):
        part = flat[begin : begin + _CHUNK].to(torch.int64)
        weights = torch.arange(begin, begin + part.numel(), dtype=torch.int64, device=tensor.device)
        weights = (weights + 1) * _GOLDEN
        weights = ((weights ^ (weights >> 29)) * _MIX) | 1
        total += (part * weights).sum()
    return total


def compare(tensors: Mapping[str, Tensor], group: dist.ProcessGroup | None = None) -> Divergence | None:
    """Return the first place where the ranks' tensors differ, the same on every rank; None where they are equal.

    All ranks of the group call it, with tensors of equal names, shapes and dtypes in equal order. Equal tensors cost
    one exchange of 8 bytes; else as many more as the bisection has halves: log2 of the tensors, then of the elements.
    """
    names = list(tensors)
    if not names:
        return None
    prints = torch.stack([fingerprint(tensors[name]) for name in names])
    low, high = 0, len(names)
    if _agree(_combined(prints, low, high), group):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _agree(_combined(prints, low, middle), group) else (low, middle)
    flat = _bits(tensors[names[low]])
    name, begin, end = names[low], 0, flat.numel()
    while end - begin > 1:
        middle = (begin + end) // 2
        begin, end = (middle, end) if _agree(fingerprint(flat[begin:middle]), group) else (begin, middle)
    return _divergence(name, begin, tensors[name], flat, group)


def replicas_agree(tensors: Mapping[str, Tensor], group: dist.ProcessGroup | None = None) -> bool:
    """Return whether the ranks' tensors are equal to the bit; all ranks of the group call it."""
    prints = torch.stack([fingerprint(tensor) for tensor in tensors.values()])
    return _agree(_combined(prints, 0, len(tensors)), group)


def restore_point(checkpoint_steps: Sequence[int], last_equal_step: int) -> int | None:
    """Return the newest checkpoint that holds no corruption: not after the last step at which replicas agreed.

    None where every checkpoint is younger, and the run has to begin anew.
    """
    return max((step for step in checkpoint_steps if step <= last_equal_step), default=None)


class GradientNorms:
    """The norm of this rank's gradient before the reduction, as DistributedDataParallel makes its buckets.

    `model.register_comm_hook(None, norms.hook)`, and `norms.take()` after the backward pass, for `mark_step_end`.
    The hook averages as DDP does without one; the norm is computed on the device and read by `take`, which waits.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group
        self._squares: list[Tensor] = []
        self._before: Callable[[Tensor], object] | None = None

    @property
    def hook(self) -> Callable[[object, Any], torch.futures.Future[Tensor]]:
        """What to register: it keeps each bucket's norm and reduces the bucket."""
        return lambda state, bucket: self._reduce(bucket)  # unlike a method's, its annotations DDP does not refuse

    def _reduce(self, bucket: Any) -> torch.futures.Future[Tensor]:
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import _allreduce_fut

        buffer = bucket.buffer()
        if self._before is not None:
            before, self._before = self._before, None
            before(buffer)
        self._squares.append(torch.linalg.vector_norm(buffer, dtype=torch.float64).square())
        group = dist.group.WORLD if self._group is None else self._group
        assert group is not None
        return _allreduce_fut(group, buffer)

    def before_next(self, action: Callable[[Tensor], object]) -> None:
        """Call `action` with the next bucket before its norm is taken: how a test damages a gradient."""
        self._before = action

    def take(self) -> float | None:
        """Return the norm over the buckets since the last call; None where there were none."""
        squares, self._squares = self._squares, []
        return None if not squares else float(torch.stack(squares).sum().sqrt())


@dataclass(frozen=True, slots=True)
class WrongProduct:
    """A matrix product whose sums do not fit its factors."""

    module: str
    row: int
    column: int
    """Where the largest differences of the row sums and of the column sums meet."""
    difference: float
    """Of the sums from what they should be."""
    tolerance: float


def check_product(
    product: Tensor, left: Tensor, right: Tensor, *, rounding: float = 8.0
) -> tuple[int, int, float, float]:
    """Return (row, column, difference, tolerance) of `product` against `left @ right`, all of two dimensions.

    Compares sums over rows and over columns, which cost a matrix-vector product each. The difference is wrong where it
    exceeds the tolerance: `rounding` times what rounding the elements of the product can make of the sums.
    """
    exact = torch.float64
    columns = left.to(exact).sum(0) @ right.to(exact)
    rows = left.to(exact) @ right.to(exact).sum(1)
    column_errors = (product.to(exact).sum(0) - columns).abs()
    row_errors = (product.to(exact).sum(1) - rows).abs()
    # Each element is rounded in its inner sum: relative to the sum of the magnitudes.
    step = torch.finfo(product.dtype).eps
    magnitude = left.to(exact).abs().sum(0) @ right.to(exact).abs()
    tolerance = rounding * step * float(magnitude.max())
    row = int(torch.nan_to_num(row_errors, nan=torch.inf).argmax())
    column = int(torch.nan_to_num(column_errors, nan=torch.inf).argmax())
    difference = float(torch.nan_to_num(column_errors, nan=torch.inf).max())
    return row, column, difference, tolerance


class ProductChecks:
    """Checks every `every`-th product of each `nn.Linear` of a module; use as a context manager.

    What was found wrong is in `wrong`, in order; the products go on as they are. A check waits for the device.
    """

    def __init__(self, module: nn.Module, *, every: int) -> None:
        if every < 1:
            raise ValueError(f"every: {every} is not above 0")
        self.wrong: list[WrongProduct] = []
        self.num_checked = 0
        self._every = every
        self._counts: Counter[str] = Counter()
        self._handles = [
            inner.register_forward_hook(self._hook(name))
            for name, inner in module.named_modules()
            if isinstance(inner, nn.Linear) and type(inner).forward is nn.Linear.forward  # what it returns is a product
        ]

    def close(self) -> None:
        """Check no more. Idempotent."""
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _hook(self, name: str) -> Callable[[nn.Linear, tuple[Tensor, ...], Tensor], None]:
        def check(module: nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            self._counts[name] += 1
            if self._counts[name] % self._every:
                return
            self.num_checked += 1
            with torch.no_grad():
                left = inputs[0].flatten(0, -2).to(output.dtype)
                right = module.weight.t().to(output.dtype)
                product = output.flatten(0, -2)
                if module.bias is not None:
                    product = product.to(torch.float64) - module.bias
                row, column, difference, tolerance = check_product(product.to(output.dtype), left, right)
            if not difference <= tolerance:
                self.wrong.append(WrongProduct(name, row, column, difference, tolerance))

        return check


def _bits(tensor: Tensor) -> Tensor:
    """The tensor's elements as integers, flat."""
    flat = tensor.detach().contiguous().view(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat).view(-1)
    if flat.dtype is torch.bool:
        return flat.view(torch.int8)
    return flat.view(_INTEGERS[flat.element_size()])


def _combined(prints: Tensor, low: int, high: int) -> Tensor:
    return fingerprint(prints[low:high])


def _gather(value: Tensor, group: dist.ProcessGroup | None) -> list[int]:
    """Every rank's int64, in the order of the group."""
    gathered = [torch.empty(1, dtype=torch.int64, device=value.device) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, value.reshape(1), group=group)
    return [int(one) for one in torch.cat(gathered).tolist()]


def _agree(value: Tensor, group: dist.ProcessGroup | None) -> bool:
    return len(set(_gather(value, group))) == 1


def _divergence(name: str, element: int, tensor: Tensor, flat: Tensor, group: dist.ProcessGroup | None) -> Divergence:
    patterns = _gather(flat[element].to(torch.int64), group)
    ranks = dist.get_process_group_ranks(dist.group.WORLD if group is None else group)
    counts = Counter(patterns)
    most = max(counts.values())
    usual = [pattern for pattern, count in counts.items() if count == most]
    odd = [rank for rank, pattern in zip(ranks, patterns, strict=True) if len(usual) > 1 or pattern != usual[0]]
    first = next(pattern for pattern in patterns if pattern != usual[0])
    width = 8 * flat.element_size()
    differing = (first ^ usual[0]) & ((1 << width) - 1)
    values = torch.tensor(patterns).to(flat.dtype)
    if tensor.is_floating_point():
        values = values.view(tensor.dtype)
    return Divergence(
        tensor=name,
        element=element,
        values={rank: float(value) for rank, value in zip(ranks, values.tolist(), strict=True)},
        ranks=tuple(odd),
        bits=tuple(bit for bit in range(width) if differing >> bit & 1),
    )


def finding_of(product: WrongProduct, rank: int, step: int = -1) -> Finding:
    """Return a wrong product of a rank as a finding."""
    evidence: dict[str, Any] = {"difference": product.difference, "tolerance": product.tolerance}
    return Finding(
        kind=FindingKind.NUMERIC,
        suspects=(Suspect(rank, 1.0),),
        summary=f"rank {rank}: the product of {product.module} is wrong at row {product.row}, column {product.column}",
        evidence=evidence,
        step=step,
    )
