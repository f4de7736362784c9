"""What is rare around a TieredAdamW: gradients that are missing, steps that are skipped, copies, loads, failures."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from offload import Corrupted, NvmeTier, TierError, TierFull, TierSpec
from offload.errors import OptimizerError
from offload.optimizer import TieredAdamW, Tiering
from offload.schedule import Budget, Mode
from tests.test_offload.test_faults import open_file

_SPEC = TierSpec(name="disk", capacity_bytes=1 << 24, read_bytes_per_s=1e9, write_bytes_per_s=1e9, latency_s=0.0)


def tiering(**more: object) -> Tiering:
    """Return small settings that need no compiler."""
    return Tiering(kernel="torch", subgroup_numel=1024, num_threads=1, **more)  # type: ignore[arg-type]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("mode", ["stream", "spec"])
def test_an_incomplete_window_is_stepped(mode: Mode) -> None:
    both, once = nn.Parameter(torch.randn(1024)), nn.Parameter(torch.randn(1024))
    expected = [nn.Parameter(parameter.detach().clone()) for parameter in (both, once)]
    plain = torch.optim.AdamW(expected)
    with TieredAdamW([both, once], mode=mode, tiering=tiering(accumulation_steps=2)) as optimizer:
        (both * once).sum().backward()  # type: ignore[no-untyped-call]
        (both * both).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        (both * once).sum().backward()  # type: ignore[no-untyped-call]  # the last window ends early
        optimizer.step()
        optimizer.wait()
    (expected[0] * expected[1]).sum().backward()  # type: ignore[no-untyped-call]
    (expected[0] * expected[0]).sum().backward()  # type: ignore[no-untyped-call]
    plain.step()
    plain.zero_grad()
    (expected[0] * expected[1]).sum().backward()  # type: ignore[no-untyped-call]
    plain.step()
    torch.testing.assert_close([both.data, once.data], [parameter.data for parameter in expected])


def test_a_skipped_speculative_step_leaves_no_weight_changed_later() -> None:
    parameters = [nn.Parameter(torch.randn(1024)) for _ in range(6)]
    before = [parameter.detach().clone() for parameter in parameters]
    settings = tiering(
        accumulation_steps=1, interleave=1, budget=Budget(device_bytes=3 * 12 * 1024), link_bytes_per_s=2e5
    )
    with TieredAdamW(parameters, mode="spec", lr=0.1, max_norm=1.0, tiering=settings) as optimizer:
        weights = torch.ones(1024)
        weights[0] = float("nan")
        torch.stack([(parameter * weights).sum() for parameter in parameters]).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.wait()
        time.sleep(0.3)  # what was given up would have been written by then
        assert optimizer.num_skipped == 1
        assert all(torch.equal(a, b) for a, b in zip(parameters, before, strict=True))


@pytest.mark.parametrize("is_attached", [False, True])
def test_a_copy_right_after_a_step_is_plain_and_updated(is_attached: bool) -> None:
    model = nn.Linear(32, 32)
    with TieredAdamW(model.parameters(), tiering=tiering(link_bytes_per_s=1e5)) as optimizer:
        if is_attached:
            optimizer.attach(model)
        model(torch.ones(1, 32)).sum().backward()
        optimizer.step()
        copied = copy.deepcopy(model)
        assert all(type(parameter) is nn.Parameter for parameter in copied.parameters())
        optimizer.wait()
        assert torch.equal(copied.weight, model.weight)


def test_after_a_failure_closing_frees_the_parameters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = TierSpec(name="disk", capacity_bytes=1 << 24, read_bytes_per_s=1e9, write_bytes_per_s=1e9, latency_s=0.0)
    model, x = nn.Linear(64, 96), torch.ones(1, 64)
    with NvmeTier(spec, tmp_path, direct=False) as tier:
        settings = tiering(budget=Budget(device_bytes=0, host_bytes=1), tier=tier, num_tier_slots=2)
        optimizer = TieredAdamW(model.parameters(), tiering=settings)
        optimizer.attach(model)

        def fail(*_: object) -> Future[None]:
            failed: Future[None] = Future()
            failed.set_exception(TierError("disk broke"))
            return failed

        with monkeypatch.context() as broken:
            broken.setattr(tier, "read", fail)
            model(x).sum().backward()
            optimizer.step()
            start_s = time.perf_counter()
            with pytest.raises(TierError, match="disk broke"):
                model(x)
            with pytest.raises(OptimizerError, match="an earlier update failed"):
                optimizer.wait()
            optimizer.close()
            assert time.perf_counter() - start_s < 30
        assert all(type(parameter) is nn.Parameter for parameter in model.parameters())
        model(x)


def test_parameters_wait_for_an_optimizer_that_is_gone() -> None:
    model = nn.Linear(64, 64)
    before, others = model.weight.detach().clone(), threading.active_count()

    def train() -> None:
        settings = tiering(link_bytes_per_s=4e4)
        optimizer = TieredAdamW(model.parameters(), lr=1.0, mode="defer", tiering=settings)
        model(torch.ones(1, 64)).sum().backward()
        optimizer.step()

    train()
    gc.collect()
    after = model.weight.detach().clone()
    assert not torch.isclose(after, before).any()
    deadline_s = time.perf_counter() + 30
    while threading.active_count() > others and time.perf_counter() < deadline_s:
        time.sleep(0.05)
    assert threading.active_count() <= others
    assert torch.equal(model.weight, after)


@pytest.mark.parametrize("whole", [True, False])
def test_a_model_that_was_loaded_after_attach_goes_on_from_what_was_loaded(whole: bool) -> None:
    model, x = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)).bfloat16(), torch.ones(2, 16, dtype=torch.bfloat16)
    with TieredAdamW(model.parameters(), tiering=tiering(link_bytes_per_s=1e5)) as optimizer:
        optimizer.attach(model)
        model(x).sum().backward()
        optimizer.step()
        before = optimizer.state_dict()["state"]
        optimizer.step()
        target = model if whole else model[0]
        loaded = {name: torch.full_like(value, 5.0) for name, value in target.state_dict().items()}
        target.load_state_dict(loaded)
        after = optimizer.state_dict()["state"]
        for number in range(4):
            assert torch.equal(after[number]["exp_avg"], before[number]["exp_avg"])
            is_loaded = whole or number < 2
            assert bool((after[number]["master"] == 5.0).all()) == is_loaded
            assert is_loaded or torch.equal(after[number]["master"], before[number]["master"])
        model(x).sum().backward()
        optimizer.step()
        optimizer.wait()
        assert torch.allclose(next(model.parameters()).float(), torch.tensor(5.0), atol=0.1)


def test_a_load_that_would_put_other_parameters_in_place_is_refused_before_it_does() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    before = list(model.parameters())
    with TieredAdamW(model.parameters(), tiering=tiering()) as optimizer:
        optimizer.attach(model)
        state = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(OptimizerError, match=r"assign=True: it puts other parameters .* 0\.Linear"):
            model.load_state_dict(state, assign=True)
        assert all(a is b for a, b in zip(model.parameters(), before, strict=True))
    model.load_state_dict(state, assign=True)


def test_parameters_added_while_training_go_on_as_with_torch(tmp_path: Path) -> None:
    found = []
    for tiered in (False, True):
        torch.manual_seed(0)
        model, added = nn.Linear(64, 32, bias=False), nn.Linear(32, 32, bias=False)
        with NvmeTier(_SPEC, tmp_path, direct=False) as tier:
            budget = Budget(device_bytes=0, host_bytes=12 * 1024)
            settings = tiering(accumulation_steps=1, tier=tier, budget=budget)
            optimizer: Any = (
                TieredAdamW(model.parameters(), mode="stream", tiering=settings)
                if tiered
                else torch.optim.AdamW(model.parameters(), fused=True)
            )
            whole = nn.Sequential(model, added)
            if tiered:
                optimizer.attach(whole)
            for number in range(4):
                if number == 2:
                    optimizer.add_param_group({"params": list(added.parameters()), "weight_decay": 0.0})
                whole(torch.ones(2, 64)).square().sum().backward()
                if number < 2:
                    added.weight.grad = None
                optimizer.step()
                optimizer.zero_grad()
            if tiered:
                optimizer.wait()
                assert tier.used_bytes > 0
                optimizer.close()
                assert tier.used_bytes == 0, "room in the tier goes back"
            found.append([parameter.detach().clone() for parameter in whole.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("mode", ["sync", "defer", "stream", "spec"])
def test_frozen_and_empty_parameters_are_left_alone(mode: Mode) -> None:
    parameters = [nn.Parameter(torch.randn(2048)), nn.Parameter(torch.zeros(0, 4)), nn.Parameter(torch.randn(1024))]
    parameters[2].requires_grad_(False)
    frozen = parameters[2].clone()
    plain = [parameters[0].detach().clone().requires_grad_()]
    theirs = torch.optim.AdamW(plain, fused=True)
    with TieredAdamW(parameters, mode=mode, tiering=tiering(accumulation_steps=1)) as optimizer:
        optimizer.step()  # nobody has a gradient
        for _ in range(2):
            (parameters[0].square().sum() + parameters[1].sum()).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            plain[0].square().sum().backward()  # type: ignore[no-untyped-call]
            theirs.step()
            theirs.zero_grad()
        state = optimizer.state_dict()
        optimizer.load_state_dict(state)
        assert set(state["state"]) == {0}
    assert torch.equal(parameters[0], plain[0])
    assert torch.equal(parameters[2], frozen)
    with TieredAdamW([nn.Parameter(torch.zeros(0))], mode="sync", tiering=tiering()) as optimizer:
        optimizer.param_groups[0]["params"][0].sum().backward()
        optimizer.step()


@pytest.mark.parametrize("mode", ["sync", "defer", "spec"])
def test_fp16_that_overflows_in_the_first_step_makes_no_step(mode: Mode) -> None:
    model = nn.Linear(64, 64).half()
    before = model.weight.detach().clone()
    settings = tiering(accumulation_steps=1 if mode == "spec" else None)
    with TieredAdamW(model.parameters(), mode=mode, max_norm=1.0, tiering=settings) as optimizer:
        optimizer.attach(model)
        (model(torch.ones(1, 64).half()).float().sum() * 1e30).backward()
        optimizer.step()
        optimizer.wait()
        assert torch.equal(model.weight, before)
        assert optimizer.num_skipped == 1
        assert not optimizer.state_dict()["state"]
        model(torch.ones(1, 64).half()).float().sum().backward()
        optimizer.step()
        optimizer.wait()
        assert float(optimizer.state_dict()["state"][0]["step"]) == 1.0
        assert not torch.equal(model.weight, before)


def test_a_block_that_rots_between_two_steps_ends_the_training_with_its_name(tmp_path: Path) -> None:
    parameter = nn.Parameter(torch.randn(8192))
    with contextlib.ExitStack() as stack:
        tier = stack.enter_context(NvmeTier(_SPEC, tmp_path, direct=False))
        path = open_file(tmp_path)
        other = stack.enter_context(NvmeTier(_SPEC, tmp_path, direct=False))
        settings = tiering(tier=tier, budget=Budget(device_bytes=0, host_bytes=0))
        optimizer = TieredAdamW([parameter], mode="sync", tiering=settings)
        block = other.allocate(4096)  # of another process, as it were: files do not meet
        other.write(block, torch.ones(4096, dtype=torch.uint8)).result(60)
        (parameter * 2).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        with open(path, "r+b") as file:
            file.seek(3 * 12288 + 5)
            file.write(b"rot")
        (parameter * 2).sum().backward()  # type: ignore[no-untyped-call]
        with pytest.raises(Corrupted, match=r"states of parameters 0 to 0 \(subgroup 3\) in tier disk: .* different"):
            optimizer.step()
        with pytest.raises(OptimizerError, match="the states are not to be relied on"):
            optimizer.state_dict()
        optimizer.close()


def test_a_tier_without_room_for_the_states_is_left_as_it_was(tmp_path: Path) -> None:
    parameter = nn.Parameter(torch.randn(4096))
    small = dataclasses.replace(_SPEC, capacity_bytes=20_000)
    others = threading.active_count()
    with NvmeTier(small, tmp_path, direct=False) as tier:
        settings = tiering(tier=tier, budget=Budget(device_bytes=0, host_bytes=0))
        with (
            TieredAdamW([parameter], tiering=settings) as optimizer,
            pytest.raises(TierFull, match=r"no room for 12288 bytes of states of parameters 0 to 0"),
        ):
            optimizer.attach(nn.Module())
        assert tier.used_bytes == 0
    assert threading.active_count() <= others
