"""What somebody may try with a TieredAdamW or a tier: the right result, or an error that names it and the remedy."""

from __future__ import annotations

import copy
import dataclasses
import math
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from offload import Corrupted, NvmeTier, TierError
from offload.errors import OptimizerError, SpecError
from offload.movers import IoName
from offload.optimizer import TieredAdamW, Tiering
from offload.placement import TensorUse, TierOffer, place
from offload.schedule import Budget, Mode
from tests.contracts.tier import spec
from tests.test_offload.test_faults import open_file
from tests.test_offload.test_tiers import IOS

pytestmark = pytest.mark.usefixtures("one_thread")


def tiering(**more: Any) -> Tiering:
    return Tiering(**{"kernel": "torch", "subgroup_numel": 1024, "num_threads": 1, **more})


def parameter() -> nn.Parameter:
    return nn.Parameter(torch.linspace(-1, 1, 1500))


_SLOW_LINK = {"link_bytes_per_s": 1e6}


def steps(mode: Mode | None, accumulation_steps: int | None) -> torch.Tensor:
    """Return the parameter after steps with a schedule, and other settings changed by hand as late as they may be."""
    mine = parameter()
    optimizer: Any = (
        torch.optim.AdamW([mine], fused=True)
        if mode is None
        else TieredAdamW([mine], mode=mode, tiering=tiering(accumulation_steps=accumulation_steps, **_SLOW_LINK))
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)
    for step in range(3):
        changes = {"weight_decay": 0.1 * step, "betas": (0.8, 0.9), "eps": 1e-7}
        if mode in ("stream", "spec"):
            optimizer.param_groups[0].update(changes)
        mine.square().sum().backward()  # type: ignore[no-untyped-call]
        optimizer.param_groups[0].update(changes)
        optimizer.step(lambda: None)  # a closure without a loss
        schedule.step()
        optimizer.zero_grad()
        optimizer.step()  # without a gradient: no other update, of what may still be under way
    if mode is not None:
        optimizer.close()
    return mine.detach()


def test_groups_count_as_they_are_at_step() -> None:
    """Also where gradients left in backward, before something was changed; `stream` and `spec` refuse that."""
    expected = steps(None, None)
    cases: tuple[tuple[Mode, int | None], ...] = (
        *(("sync", None), ("sync", 1), ("defer", None)),
        *(("defer", 1), ("stream", 1), ("spec", 1)),
    )
    for case in cases:
        assert torch.equal(steps(*case), expected), case


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": math.nan}, r"param_groups\[0\]\.lr: nan; finite, at least 0"),
        ({"betas": (1.0, 0.9)}, r"param_groups\[0\]\.betas: \(1\.0, 0\.9\); at least 0 and below 1"),
        ({"eps": -1.0, "weight_decay": math.inf}, r"\.eps: -1\.0; .*\n.*\.weight_decay: inf; finite, at least 0"),
        ({"tiering": Tiering(num_tier_slots=0, num_threads=0)}, "num_threads: 0; at least 1\nnum_tier_slots: 0; at l"),
        ({"tiering": Tiering(link_bytes_per_s=math.nan)}, "link_bytes_per_s: nan; above 0"),
        ({"tiering": Tiering(kernel="fast")}, "kernel: 'fast'; native, torch"),  # type: ignore[arg-type]
        ({"tiering": Tiering(budget=Budget(device_bytes=-1, num_slots=0))}, "device_bytes: -1; .*\n.*num_slots: 0; at"),
    ],
)
def test_absurd_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(OptimizerError, match=message):
        TieredAdamW([parameter()], **settings)


def test_what_another_adamw_does_is_refused_before_anything_is_changed() -> None:
    ours, theirs = parameter(), parameter()
    with pytest.raises(OptimizerError, match=r"params: 1 is 0 again; give a tied parameter once"), pytest.warns():
        TieredAdamW([ours, ours])
    with pytest.raises(OptimizerError, match=r"param_groups\[0\]\.amsgrad: True; this AdamW has none"):
        TieredAdamW([{"params": [ours], "amsgrad": True}])
    others: list[tuple[torch.optim.Optimizer, str]] = [
        (torch.optim.AdamW([theirs], amsgrad=True), r"\.amsgrad: True; this AdamW has none"),
        (torch.optim.AdamW([theirs], maximize=True), r"\.maximize: True; this AdamW has none"),
        (torch.optim.SGD([theirs], momentum=0.9), r"param_groups\[0\]: no betas, eps; a state of AdamW has them"),
        (torch.optim.AdamW([nn.Parameter(torch.ones(9))]), r"state\[0\]\.exp_avg: \(9,\); the parameter is \(1500,\)"),
    ]
    with TieredAdamW([ours], mode="sync", tiering=tiering()) as optimizer:
        ours.sum().backward()
        optimizer.step()
        before = copy.deepcopy(optimizer.state_dict())
        for other, message in others:
            for each in other.param_groups[0]["params"]:
                each.grad = torch.ones_like(each)
            other.step()
            with pytest.raises(OptimizerError, match=message):
                optimizer.load_state_dict(other.state_dict())
        after = optimizer.state_dict()
        assert after["param_groups"] == before["param_groups"]
        for kind, saved in before["state"][0].items():
            assert torch.equal(after["state"][0][kind], saved)
        for take in (copy.deepcopy, pickle.dumps):
            with pytest.raises(
                OptimizerError, match=r"neither copied nor pickled; make another one and load state_dict"
            ):
                take(optimizer)


def test_a_sparse_gradient_is_refused_by_its_number() -> None:
    model, message = nn.Embedding(8, 4, sparse=True), r"parameter 0: its gradient is sparse_coo; .* SparseAdam"
    with TieredAdamW(model.parameters(), mode="sync", tiering=tiering()) as optimizer:
        model(torch.tensor([1])).sum().backward()
        with pytest.raises(OptimizerError, match=message):
            optimizer.step()
    with TieredAdamW(model.parameters(), mode="stream", tiering=tiering(accumulation_steps=1)):
        loss = model(torch.tensor([1])).sum()
        with pytest.raises(OptimizerError, match=message):
            loss.backward()


def forked(work: Callable[[], object]) -> Iterator[str]:
    """Yield what it raises in a forked process."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            work()
        except Exception as error:  # noqa: BLE001  told to the parent
            os.write(write, f"{type(error).__name__}: {error}".encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as told:
        yield told.read().decode()
    os.waitpid(child, 0)


def test_a_forked_worker_is_told_that_it_has_no_threads(tmp_path: Path) -> None:
    """It would wait for ever; what it closes or drops stays the parent's."""
    ours = parameter()
    with NvmeTier(spec(), tmp_path) as tier:
        settings = tiering(tier=tier, budget=Budget(device_bytes=0, host_bytes=0))
        with TieredAdamW([ours], tiering=settings) as optimizer:
            ours.sum().backward()
            optimizer.step()
            message = f"process {os.getpid()}'s: this one was forked from it"
            for work in (optimizer.step, optimizer.state_dict, lambda: ours * 2, lambda: tier.allocate(8)):
                assert message in "".join(forked(work)), work
            assert not "".join(forked(lambda: (optimizer.close(), tier.close())))
            ours.sum().backward()
            optimizer.step()
            assert float(optimizer.state_dict()["state"][0]["step"]) == 2.0


@pytest.mark.parametrize("io", IOS)
def test_a_flipped_bit_and_a_lost_end_of_states_stop_the_step(io: IoName, tmp_path: Path) -> None:
    for spoil, error, message in (
        (lambda path: _flip(path, 12288 + 77), Corrupted, r"parameters 0 to 0 \(subgroup 1\) in tier t: .* different"),
        (
            lambda path: os.truncate(path, 8192),
            TierError,
            r"parameters 0 to 0 \(subgroup 0\) in tier t: .* ended 4096 bytes too early",
        ),
    ):
        ours = parameter()
        with NvmeTier(spec(), tmp_path, io=io) as tier:
            settings = tiering(tier=tier, budget=Budget(device_bytes=0, host_bytes=0))
            with TieredAdamW([ours], mode="sync", tiering=settings) as optimizer:
                optimizer.attach(nn.Module())
                path = open_file(tmp_path)
                tmp_path.chmod(0)  # which no open file minds
                spoil(path)
                tmp_path.chmod(0o700)
                ours.sum().backward()
                with pytest.raises(error, match=message):
                    optimizer.step()
                with pytest.raises(OptimizerError, match="not to be relied on"):
                    optimizer.state_dict()
        assert not list(tmp_path.iterdir())


def _flip(path: Path, where: int) -> None:
    with open(path, "r+b") as file:
        file.seek(where)
        (byte,) = file.read(1)
        file.seek(where)
        file.write(bytes([byte ^ 16]))


def test_a_placement_takes_no_absurd_numbers() -> None:
    offers = [TierOffer(kind="cpu", spec=spec(0, name="cpu")), TierOffer(kind="nvme", spec=spec(0, name="disk"))]
    assert place([TensorUse(name="none", num_bytes=0, walker="cpu")], offers).used_bytes == {"cpu": 0, "disk": 0}
    with pytest.raises(SpecError, match=r"tensor x: num_bytes: -1; .*\ntensor x: reads_per_step: nan; finite, at lea"):
        TensorUse(name="x", num_bytes=-1, walker="cpu", reads_per_step=math.nan)
    with pytest.raises(SpecError, match="tensor x: walker: 'tpu'; allowed: gpu, cpu, dma"):
        TensorUse(name="x", num_bytes=1, walker="tpu")  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="latency_s: inf; finite, at least 0"):
        dataclasses.replace(offers[0].spec, latency_s=math.inf)
