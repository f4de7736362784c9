"""TieredAdamW equals torch.optim.AdamW to the bit, wherever states live and whenever they are updated."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from offload import NvmeTier, TierError, TierSpec
from offload.errors import OptimizerError
from offload.gates import PendingParameter
from offload.optimizer import TieredAdamW, Tiering
from offload.schedule import Budget, Mode
from offload.transfer import _ThreadLane
from tests.test_offload.reference import HYPER, Reference, decay_groups, differences, small_model, train

NUMEL = 1600
_SPEC = TierSpec(name="disk", capacity_bytes=1 << 24, read_bytes_per_s=1e9, write_bytes_per_s=1e9, latency_s=0.0)
SCHEDULES: tuple[Any, ...] = ("cpu", 1, 2, 3, 4, "nvme", "mixed")


@contextmanager
def tiering(schedule: Any, folder: Path, **more: Any) -> Iterator[Tiering]:
    """Yield the settings of a schedule: all CPU, every k-th streamed with two resident, out of core, or all of it."""
    if schedule in ("nvme", "mixed"):
        with NvmeTier(_SPEC, folder, direct=False) as tier:
            device_bytes = 12 * NUMEL * 3 if schedule == "mixed" else 0
            yield Tiering(
                subgroup_numel=NUMEL,
                interleave=2 if schedule == "mixed" else "cpu",
                budget=Budget(device_bytes=device_bytes, host_bytes=12 * NUMEL * 4, num_slots=2),
                tier=tier,
                num_threads=1,
                **more,
            )
        return
    resident = 0 if schedule in ("cpu", 1) else 2
    slots = 0 if schedule == "cpu" else 2
    budget = Budget(device_bytes=12 * NUMEL * (slots + resident), num_slots=2)
    yield Tiering(subgroup_numel=NUMEL, interleave=schedule, budget=budget, num_threads=1, **more)


@contextmanager
def optimizer_of(model: nn.Module, mode: Mode, max_norm: float | None, settings: Tiering) -> Iterator[TieredAdamW]:
    """Yield an optimizer over the model's two groups, attached."""
    with TieredAdamW(decay_groups(model), **HYPER, mode=mode, max_norm=max_norm, tiering=settings) as optimizer:
        optimizer.attach(model)
        yield optimizer


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("mode", ["sync", "defer", "stream", "spec"])
def test_every_schedule_equals_torchs_adamw_after_50_steps(mode: Mode, tmp_path: Path) -> None:
    # Clipping at 1 bites in every step, at 9 in some; step 7 overflows where the mode can skip it.
    skips = None if mode == "stream" else 7
    cases: list[tuple[torch.dtype, float | None, int, int | None, tuple[Any, ...]]] = [
        (torch.bfloat16, None, 1, skips, SCHEDULES),
        (torch.float32, None, 2, None, ("mixed", "nvme")),
    ]
    if mode != "stream":
        cases += [(torch.bfloat16, 9.0, 1, None, ("mixed", 3)), (torch.float32, 1.0, 2, 7, (2, "nvme"))]
    for dtype, max_norm, accumulation, overflow_at, schedules in cases:
        reference_model = small_model(dtype)
        reference = Reference(reference_model, max_norm)
        train(reference_model, reference, steps=50, accumulation=accumulation, overflow_at=overflow_at)
        for schedule in schedules:
            is_early = mode in ("stream", "spec") or accumulation > 1 or schedule in (1, 3, "mixed")
            early = accumulation if is_early else None  # with it states come to the device under backward
            model = small_model(dtype)
            with (
                tiering(schedule, tmp_path, accumulation_steps=early, prefetch=is_early) as settings,
                optimizer_of(model, mode, max_norm, settings) as optimizer,
            ):
                train(model, optimizer, steps=50, accumulation=accumulation, overflow_at=overflow_at)
                wrong = differences(reference, model, optimizer.state_dict()["state"])
                assert not wrong, (schedule, dtype, max_norm, accumulation, wrong)
                assert optimizer.num_skipped == (overflow_at is not None)
                if mode != "stream":
                    assert optimizer.last_norm == reference.last_norm


@pytest.mark.parametrize("what", ["model", "states"])
def test_what_is_loaded_between_backward_and_step_replaces_states_that_came_early(what: str, tmp_path: Path) -> None:
    found = []
    for early in (None, 1):
        model = small_model(torch.bfloat16)
        with (
            tiering(1, tmp_path, accumulation_steps=early, prefetch=True) as settings,
            optimizer_of(model, "defer", None, settings) as optimizer,
        ):
            train(model, optimizer, steps=2)
            saved = optimizer.state_dict()
            train(model, optimizer, steps=1)
            loss = model(torch.arange(8)).float().sum()
            assert not optimizer.machine.num_early  # the end of forward let go of them
            loss.backward()
            assert bool(optimizer.machine.prefetched) == (early == 1)
            if what == "model":
                model.load_state_dict({name: value / 2 for name, value in model.state_dict().items()})
            else:
                optimizer.load_state_dict(saved)
            optimizer.step()
            found.append(optimizer.state_dict()["state"])
    for number, plain in found[0].items():
        for kind, value in plain.items():
            assert torch.equal(found[1][number][kind], value), (number, kind)


def test_states_that_are_still_on_their_way_back_do_not_come_over_what_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An update is over before its states are back in host memory."""
    run = _ThreadLane.run

    def slowly(lane: _ThreadLane, work: Callable[[], None], **how: Any) -> Any:
        def late() -> None:
            time.sleep(0.02 if lane.name == "states down" else 0.0)
            work()

        return run(lane, late, **how)

    monkeypatch.setattr(_ThreadLane, "run", slowly)
    model = small_model(torch.bfloat16)
    with tiering(1, tmp_path) as settings, optimizer_of(model, "defer", None, settings) as optimizer:
        train(model, optimizer, steps=1)
        saved = optimizer.state_dict()
        train(model, optimizer, steps=1)
        optimizer.load_state_dict(saved)
        loaded = optimizer.state_dict()["state"]
    for number, kinds in saved["state"].items():
        assert all(torch.equal(loaded[number][kind], value) for kind, value in kinds.items()), number


def test_the_torch_kernel_gives_the_same_bits(tmp_path: Path) -> None:
    found = []
    for kernel in ("native", "torch"):
        model = small_model(torch.bfloat16)
        with (
            tiering(2, tmp_path, kernel=kernel) as settings,
            optimizer_of(model, "defer", 1.0, settings) as optimizer,
        ):
            train(model, optimizer, steps=5)
            found.append([p.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_clipping_is_that_of_torch() -> None:
    model = small_model(torch.float32)
    with TieredAdamW(model.parameters(), mode="sync", max_norm=1.0, tiering=Tiering(num_threads=1)) as optimizer:
        model(torch.arange(8)).square().sum().backward()
        expected = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        optimizer.step()
        assert optimizer.last_norm == pytest.approx(float(expected), rel=1e-6)


def test_a_parameter_without_gradient_keeps_its_value_and_its_step() -> None:
    def run(make: Any) -> tuple[list[torch.Tensor], Any]:
        model = small_model(torch.float32)
        optimizer = make(model)
        for number in range(4):
            model(torch.arange(8)).square().sum().backward()
            if number == 1:
                model[1].weight.grad = None  # type: ignore[union-attr]
            optimizer.step()
            optimizer.zero_grad()
        return [p.clone() for p in model.parameters()], optimizer

    wanted, _ = run(lambda model: torch.optim.AdamW(model.parameters(), fused=True))
    settings = Tiering(subgroup_numel=NUMEL, num_threads=1)
    got, optimizer = run(lambda model: TieredAdamW(model.parameters(), tiering=settings))
    assert all(torch.equal(a, b) for a, b in zip(wanted, got, strict=True))
    optimizer.close()


def test_frozen_parts_of_a_model_do_not_hold_streams_up(tmp_path: Path) -> None:
    for mode in ("stream", "spec"):
        results = []
        for make in (lambda m: torch.optim.AdamW(m.parameters(), fused=True), None):
            model = small_model(torch.float32)
            # Two resident, half of the others streamed.
            budget = Budget(device_bytes=12 * NUMEL * 4, num_slots=2)
            settings = Tiering(subgroup_numel=NUMEL, num_threads=1, accumulation_steps=1, interleave=2, budget=budget)
            optimizer: Any = make(model) if make else TieredAdamW(model.parameters(), mode=mode, tiering=settings)  # type: ignore[arg-type]
            for number in range(4):
                hidden = model[0](torch.arange(8))
                out = hidden if number % 2 else model[1](hidden)  # half of the model has no gradient now and then
                out.square().sum().backward()
                optimizer.step()
                optimizer.zero_grad()
            results.append([p.clone() for p in model.parameters()])
            if not make:
                optimizer.close()
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)), mode


def test_a_read_outside_of_any_module_gets_the_updated_value() -> None:
    reference_model = small_model(torch.float32)
    reference = Reference(reference_model)
    model = small_model(torch.float32)
    settings = Tiering(subgroup_numel=NUMEL, num_threads=1, link_bytes_per_s=2e6)
    with TieredAdamW(decay_groups(model), **HYPER, tiering=settings) as optimizer:
        for number in range(3):
            for one, trained in ((reference_model, reference), (model, optimizer)):
                one(torch.arange(8)).square().sum().backward()
                trained.step()
                trained.zero_grad()
            weight, wanted = model[4].weight, reference_model[4].weight
            assert type(weight) is PendingParameter
            assert weight.shape == wanted.shape
            assert weight.grad is None
            assert type(weight) is PendingParameter, "what says nothing of values does not wait"
            if number == 0:
                assert torch.equal(weight.detach().clone(), wanted)
            elif number == 1:
                assert torch.equal(torch.stack([weight, weight])[1], wanted)
            else:
                assert all(
                    torch.equal(a, b)
                    for a, b in zip(model.state_dict().values(), reference_model.state_dict().values(), strict=True)
                )
            assert type(weight) is nn.Parameter


def test_spec_refuses_a_read_before_the_verdict() -> None:
    model = small_model(torch.float32)
    settings = Tiering(subgroup_numel=NUMEL, num_threads=1, accumulation_steps=1)
    optimizer = TieredAdamW(model.parameters(), mode="spec", max_norm=1.0, tiering=settings)
    model(torch.arange(8)).square().sum().backward()
    with pytest.raises(OptimizerError, match=r"between backward and step\(\)"):
        model[4].weight.sum()
    optimizer.close()


def test_settings_that_exclude_each_other_are_refused_together() -> None:
    model = small_model(torch.float32)
    with pytest.raises(OptimizerError) as caught:
        TieredAdamW(model.parameters(), mode="stream", max_norm=1.0)
    assert "max_norm needs spec" in str(caught.value)
    assert "accumulation_steps is needed" in str(caught.value)
    with pytest.raises(OptimizerError, match=r"max_norm: -1(.|\n)*accumulation_steps: 0"):
        TieredAdamW(model.parameters(), max_norm=-1.0, tiering=Tiering(accumulation_steps=0))
    with (
        TieredAdamW(model.double().parameters(), tiering=Tiering(num_threads=1)) as optimizer,
        pytest.raises(OptimizerError, match="float64; one of"),
    ):
        optimizer.attach(model)


def test_one_backward_too_many_is_refused() -> None:
    model = small_model(torch.float32)
    settings = Tiering(accumulation_steps=1, num_threads=1)
    with TieredAdamW(model.parameters(), mode="stream", tiering=settings) as optimizer:
        model[0](torch.arange(8)).sum().backward()
        with pytest.raises(OptimizerError, match=r"read between backward and step\(\)"):
            model[0](torch.arange(8))
        optimizer.step()
    with TieredAdamW(model.parameters(), mode="defer", tiering=settings) as optimizer:
        model[0](torch.arange(8)).sum().backward()
        with pytest.raises(OptimizerError, match="gradient 2 of this step"):
            model[0](torch.arange(8)).sum().backward()


def test_a_learning_rate_changed_before_a_streamed_step_is_refused() -> None:
    model = small_model(torch.float32)
    settings = Tiering(accumulation_steps=1, num_threads=1)
    optimizer = TieredAdamW(model.parameters(), mode="stream", tiering=settings)
    model(torch.arange(8)).sum().backward()
    optimizer.param_groups[0]["lr"] = 1.0
    with pytest.raises(OptimizerError, match="param_groups changed"):
        optimizer.step()
    optimizer.close()


def test_a_grad_scalers_overflow_skips_the_step_and_its_scale_is_undone() -> None:
    found = []
    for tiered in (False, True):
        model = small_model(torch.float32)
        settings = Tiering(subgroup_numel=NUMEL, num_threads=1)
        optimizer: Any = (
            TieredAdamW(model.parameters(), tiering=settings)
            if tiered
            else torch.optim.AdamW(model.parameters(), fused=True)
        )
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
        for number in range(6):
            loss = model(torch.arange(8)).square().sum() * (float("inf") if number == 3 else 1.0)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        found.append([p.detach().clone() for p in model.parameters()])
        if tiered:
            optimizer.wait()
            assert optimizer.num_skipped == 1
            optimizer.close()
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_grad_scaler_that_cannot_see_gradients_is_refused() -> None:
    model = small_model(torch.float32)
    settings = Tiering(accumulation_steps=1, num_threads=1)
    with TieredAdamW(model.parameters(), mode="spec", tiering=settings) as optimizer:
        scaler = torch.amp.GradScaler("cpu")
        scaler.scale(model(torch.arange(8)).square().sum()).backward()
        with pytest.raises(OptimizerError, match=r"a GradScaler looks at \.grad"):
            scaler.step(optimizer)


def test_state_moves_to_another_placement_and_to_and_from_torch(tmp_path: Path) -> None:
    reference_model = small_model(torch.bfloat16)
    reference = Reference(reference_model)
    train(reference_model, reference, steps=12)
    states: list[dict[str, Any]] = []
    model = small_model(torch.bfloat16)
    # 12 steps in three placements; `train` begins its data anew, so each part is compared with its own reference.
    for schedule in ("cpu", "mixed", 2):
        part_model = small_model(torch.bfloat16)
        with (
            tiering(schedule, tmp_path) as settings,
            optimizer_of(part_model, "defer", None, settings) as optimizer,
        ):
            train(part_model, optimizer, steps=12)
            states.append(optimizer.state_dict())
            model = part_model
    for state in states:
        assert not differences(reference, model, state["state"])
    for schedule in ("mixed", 3):
        other = small_model(torch.bfloat16)
        with tiering(schedule, tmp_path) as settings, optimizer_of(other, "defer", None, settings) as optimizer:
            optimizer.load_state_dict(states[0])
            assert not differences(reference, other, optimizer.state_dict()["state"])
    torch_model = small_model(torch.float32)
    theirs = torch.optim.AdamW(decay_groups(torch_model), **HYPER, fused=True)
    train(torch_model, theirs, steps=3)
    mine = small_model(torch.float32)
    mine.load_state_dict(torch_model.state_dict())
    with tiering(2, tmp_path) as settings, optimizer_of(mine, "defer", None, settings) as optimizer:
        optimizer.load_state_dict(theirs.state_dict())
        train(torch_model, theirs, steps=3)
        train(mine, optimizer, steps=3)
        assert all(torch.equal(a, b) for a, b in zip(torch_model.parameters(), mine.parameters(), strict=True))


def test_states_are_views_that_a_step_pre_hook_can_fence(tmp_path: Path) -> None:
    model = small_model(torch.float32)
    with tiering("cpu", tmp_path, accumulation_steps=1) as settings:
        optimizer = TieredAdamW(model.parameters(), mode="stream", tiering=settings)
        called: list[float] = []
        views = [kinds["exp_avg"] for _, kinds in optimizer.states()]
        optimizer.register_step_pre_hook(lambda *_: called.append(float(sum(view.abs().sum() for view in views))))
        model(torch.arange(8)).square().sum().backward()
        assert called == [0.0], "before anything changed"
        optimizer.step()
        optimizer.wait()
        assert float(sum(view.abs().sum() for view in views)) > 0
        optimizer.close()


class _Broken(NvmeTier):
    """A disk that stops answering."""

    fails = False

    def read(self, block: Any, into: torch.Tensor) -> Any:
        if self.fails:
            failed: Future[None] = Future()
            failed.set_exception(TierError("the device does not answer"))
            return failed
        return super().read(block, into)


def test_a_broken_tier_names_what_it_held_and_ends_the_training(tmp_path: Path) -> None:
    model = small_model(torch.float32)
    with _Broken(_SPEC, tmp_path, direct=False) as tier:
        settings = Tiering(subgroup_numel=NUMEL, tier=tier, budget=Budget(device_bytes=0, host_bytes=0), num_threads=1)
        optimizer = TieredAdamW(model.parameters(), mode="sync", tiering=settings)
        train(model, optimizer, steps=2)
        tier.fails = True
        with pytest.raises(TierError, match=r"states of parameters \d.* in tier disk: the device does not answer"):
            train(model, optimizer, steps=3)
        with pytest.raises(OptimizerError, match="an earlier update failed"):
            train(model, optimizer, steps=1)
        optimizer.close()


def test_the_buffers_of_a_tier_serve_the_next_step_first(tmp_path: Path) -> None:
    model = small_model(torch.float32)
    with (
        tiering("nvme", tmp_path) as settings,
        optimizer_of(model, "sync", None, settings) as optimizer,
    ):
        train(model, optimizer, steps=6)
        cache = optimizer.machine.tier
        assert cache is not None
        in_tier = optimizer.machine.plan.paths.count("tier")
        kept = settings.num_tier_slots - 2
        # All are read in the first step, and in the others all but those that were still there.
        assert cache.num_hits >= 5 * kept
        assert cache.num_reads == 6 * in_tier - cache.num_hits


def test_without_room_for_states_the_missing_bytes_are_named() -> None:
    model = small_model(torch.float32)
    settings = Tiering(subgroup_numel=NUMEL, budget=Budget(device_bytes=0, host_bytes=12 * NUMEL), num_threads=1)
    total = sum(p.numel() for p in model.parameters())
    with (
        TieredAdamW(model.parameters(), tiering=settings) as optimizer,
        pytest.raises(OptimizerError, match=f"{12 * (total - NUMEL)} bytes of states do not fit"),
    ):
        optimizer.attach(model)


def test_a_closed_optimizer_leaves_hooks_and_parameters_alone() -> None:
    model = small_model(torch.float32)
    settings = Tiering(accumulation_steps=1, num_threads=1)
    optimizer = TieredAdamW(model.parameters(), tiering=settings)
    optimizer.attach(model)
    model(torch.arange(8)).sum().backward()
    optimizer.step()
    optimizer.close()
    optimizer.close()
    assert all(type(p) is nn.Parameter for p in model.parameters())
    model(torch.arange(8)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    with pytest.raises(OptimizerError, match="closed"):
        optimizer.step()
    del optimizer
    gc.collect()
