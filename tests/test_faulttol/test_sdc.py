"""A flipped bit is found on the rank, tensor, element and bit where it is; an outlier before the reduction too."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from faulttol import sdc
from faulttol.config import DetectorConfig
from faulttol.finding import FindingKind
from faulttol.inject import Fault, Injector
from faulttol.rules.numeric import lone_outlier, numeric, outliers
from faulttol.view import JobView
from tests.ranks import run_ranks
from tests.test_faulttol.scenes import Scene, proven

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.uint8, torch.complex64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_hash_is_of_the_bits_and_their_places(dtype: torch.dtype) -> None:
    values = torch.arange(1, 25).to(dtype).view(4, 6)
    kept = sdc.fingerprint(values)
    assert torch.equal(kept, sdc.fingerprint(values.clone()))
    assert torch.equal(kept, sdc.fingerprint(values.t().contiguous().t()))
    swapped = values.clone().view(-1)
    swapped[[3, 7]] = swapped[[7, 3]]
    assert not torch.equal(kept, sdc.fingerprint(swapped))


@given(st.integers(0, 999), st.integers(0, 31))
def test_every_single_bit_changes_the_hash(element: int, bit: int) -> None:
    values = torch.linspace(-1, 1, 1000)
    flipped = values.clone()
    flipped.view(torch.int32)[element] ^= (1 << bit) - (1 << 32 if bit == 31 else 0)
    assert not torch.equal(sdc.fingerprint(values), sdc.fingerprint(flipped))


def test_a_hash_of_chunks_is_that_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(1000)
    whole = sdc.fingerprint(values)
    monkeypatch.setattr(sdc, "_CHUNK", 7)
    assert torch.equal(whole, sdc.fingerprint(values))


def _replicas(rank: int, world_size: int, folder: str) -> list[object]:
    from pathlib import Path

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 20), nn.Linear(20, 10))
    parameters = dict(model.named_parameters())
    found: list[object] = [sdc.compare(parameters), sdc.replicas_agree(parameters)]
    flip = Fault(kind="bit_flip", rank=2, step=3, tensor="1.weight", element=417, bit=22)
    injector = Injector([flip], rank=rank, record=Path(folder, "record"))
    assert injector.flip(3, parameters) == (rank == 2)
    found += [sdc.compare(parameters), sdc.replicas_agree(parameters)]
    pair = dist.new_group([0, 2])
    if rank in (0, 2):
        found.append(sdc.compare(parameters, pair))
    return found


def test_a_flipped_bit_is_found_where_it_is(tmp_path: object) -> None:
    results = run_ranks(_replicas, 3, str(tmp_path))
    for result in results:
        assert result[:2] == [None, True]
        assert result[3] is False
        found = result[2]
        assert (found.tensor, found.element, found.ranks, found.bits) == ("1.weight", 417, (2,), (22,))
        assert found.values[0] == found.values[1] != found.values[2]
        finding = found.finding(step=3)
        assert (finding.kind, finding.culprits) == (FindingKind.NUMERIC, (2,))
    assert results[0][4].ranks == (0, 2)  # of two nobody can tell


def test_the_run_goes_back_to_the_last_checkpoint_before() -> None:
    assert sdc.restore_point([100, 200, 300], last_equal_step=250) == 200
    assert sdc.restore_point([100, 200, 300], last_equal_step=300) == 300
    assert sdc.restore_point([100, 200], last_equal_step=50) is None


def _norms(rank: int, world_size: int) -> tuple[list[float | None], float]:
    torch.manual_seed(0)
    model = nn.Linear(16, 4, bias=False, dtype=torch.float64)
    ddp = nn.parallel.DistributedDataParallel(model)
    norms = sdc.GradientNorms()
    ddp.register_comm_hook(None, norms.hook)
    taken = [norms.take()]
    x = torch.full((2, 16), float(rank + 1), dtype=torch.float64)
    torch.autograd.backward(ddp(x).sum())
    taken += [norms.take(), norms.take()]
    assert model.weight.grad is not None
    return taken, float(model.weight.grad[0, 0])


def test_the_norm_is_that_of_the_rank_and_the_gradient_the_mean() -> None:
    for rank, (taken, gradient) in enumerate(run_ranks(_norms, 3)):
        assert taken[0] is taken[2] is None
        assert taken[1] == pytest.approx(2 * (rank + 1) * math.sqrt(64))
        assert gradient == pytest.approx(2 * (1 + 2 + 3) / 3)


def test_an_outlier_is_measured_against_the_ranks_own_usual_norm() -> None:
    usual = {0: 1.0, 1: 1.0, 2: 50.0, 3: 50.0}
    assert not outliers({0: 2.0, 1: 2.1, 2: 100.0, 3: 99.0}, usual, 8.0)
    assert list(outliers({0: 2.0, 1: 90.0, 2: 100.0, 3: 99.0}, usual, 8.0)) == [1]
    assert outliers({0: math.nan, 1: 2.0}, usual, 8.0) == {0: math.inf}
    assert not outliers({0: 1.0, 1: 900.0}, usual, 8.0)  # two cannot be told apart


def test_marks_name_the_rank_whose_gradient_was_wrong_first() -> None:
    def norm(rank: int, step: int) -> float:
        return math.nan if step > 20 or (rank, step) == (1, 20) else 3.0 + 0.1 * rank

    (finding,) = proven(numeric(JobView(Scene(norms=norm).run(30)), DetectorConfig()))
    assert (finding.kind, finding.culprits, finding.step) == (FindingKind.NUMERIC, (1,), 20)
    assert not numeric(JobView(Scene(norms=lambda r, s: 3.0 / (s + 1)).run(30)), DetectorConfig())


def test_a_step_that_some_ranks_have_not_ended_yet_accuses_none_of_those_that_have() -> None:
    def diverged(num_marked: int) -> JobView:
        records = Scene(norms=lambda rank, step: 3.0).run(10)
        for rank in range(num_marked):
            last = replace(records[rank].marks[-1], kind="step_end", loss=math.nan, grad_norm=None)
            records[rank] = replace(records[rank], marks=(*records[rank].marks, last))
        return JobView(records)

    assert not numeric(diverged(1), DetectorConfig())
    (finding,) = numeric(diverged(4), DetectorConfig())
    assert (finding.culprits, finding.step, lone_outlier(finding)) == ((0, 1, 2, 3), 10, None)
    one = Scene(num_ranks=1, norms=lambda rank, step: None).run(3)
    lost = replace(one[0].marks[-1], kind="step_end", loss=math.nan)
    (finding,) = numeric(JobView({0: replace(one[0], marks=(*one[0].marks, lost))}), DetectorConfig())
    assert (finding.culprits, lone_outlier(finding)) == ((0,), None), "a loss alone replaces nobody"


def test_an_outlier_of_several_ranks_hides_no_later_one_of_a_single_rank() -> None:
    def norm(rank: int, step: int) -> float:
        return 3.0 * (1e6 if (rank, step) in {(1, 10), (2, 10), (3, 20), (3, 22)} else 1.0)

    findings = numeric(JobView(Scene(num_ranks=6, norms=norm).run(30)), DetectorConfig())
    assert [(finding.culprits, finding.step) for finding in findings] == [((1, 2), 10), ((3,), 20)]
    assert [lone_outlier(finding) for finding in findings] == [None, 3]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_wrong_product_is_found_with_its_place(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    left, right = torch.randn(60, 50).to(dtype), torch.randn(50, 40).to(dtype)
    product = left @ right
    _, _, difference, tolerance = sdc.check_product(product, left, right)
    assert difference <= tolerance
    product[17, 23] += 1000.0
    row, column, difference, tolerance = sdc.check_product(product, left, right)
    assert (row, column) == (17, 23)
    assert difference > tolerance


def test_sampled_products_of_a_model_are_checked() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 24), nn.Tanh(), nn.Linear(24, 8, bias=False))
    with sdc.ProductChecks(model, every=2) as checks:
        for _ in range(4):
            model(torch.randn(3, 5, 32))
        assert (checks.num_checked, checks.wrong) == (4, [])
        handle = model[2].register_forward_pre_hook(lambda module, inputs: None)
        handle.remove()
        broken = model[0].register_forward_hook(_break, prepend=True)
        model(torch.randn(3, 5, 32))
        model(torch.randn(3, 5, 32))
        broken.remove()
    (wrong,) = checks.wrong
    assert (wrong.module, wrong.row, wrong.column) == ("0", 1, 7)
    assert sdc.finding_of(wrong, rank=3).culprits == (3,)
    model(torch.randn(3, 5, 32))
    assert checks.num_checked == 6


def _break(module: nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor:
    output = output.clone()
    output.view(-1, 24)[1, 7] = 1e4
    return output
