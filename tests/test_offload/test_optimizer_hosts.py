"""Engines host the tiered optimizer: two ranks of FSDP2, DeepSpeed ZeRO and its pipeline train as one process does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from offload.bench.cases.checks import differences
from offload.optimizer import TieredAdamW, Tiering
from offload.schedule import Budget, Mode
from tests.ranks import run_ranks

_STEPS = 6
_ROWS = 8
_MICRO_BATCHES = 2


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))


def _tiering(**more: Any) -> Tiering:
    budget = Budget(device_bytes=12 * 128 * 3, num_slots=2)
    return Tiering(subgroup_numel=128, interleave=2, budget=budget, num_threads=1, **more)


def _batches(rank: int, world_size: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    rows = _ROWS // world_size
    return [torch.randn(_ROWS, 16, generator=generator)[rank * rows : (rank + 1) * rows] for _ in range(_STEPS)]


def _alone(max_norm: float | None) -> dict[str, torch.Tensor]:
    model = _model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    for batch in _batches(0, 1):
        model(batch).square().mean().backward()
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        optimizer.zero_grad()
    return dict(model.state_dict())


def _fsdp(rank: int, world_size: int, cases: list[tuple[Mode, int | None, float | None]]) -> list[Any]:
    from torch.distributed.fsdp import fully_shard

    found = []
    for mode, accumulation_steps, max_norm in cases:
        model = _model()
        for layer in (model[0], model[2]):
            fully_shard(layer)
        fully_shard(model)
        settings = _tiering(accumulation_steps=accumulation_steps)
        with TieredAdamW(model.parameters(), lr=1e-2, mode=mode, max_norm=max_norm, tiering=settings) as optimizer:
            optimizer.attach(model)
            for batch in _batches(rank, world_size):
                model(batch).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
            whole = {name: value.full_tensor() for name, value in model.state_dict().items()}
            moment = optimizer.state_dict()["state"][0]["exp_avg"]
            assert moment.full_tensor().shape == (32, 16)
            found.append(whole)
    return found


def test_fsdp2_on_two_ranks_equals_one_process() -> None:
    cases: list[tuple[Mode, int | None, float | None]] = [
        ("sync", None, None),
        ("defer", None, 0.1),
        ("defer", 1, 0.1),
        ("stream", 1, None),
        ("spec", 1, 0.1),
    ]
    ranks = run_ranks(_fsdp, 2, cases)
    for case, first, second in zip(cases, *ranks, strict=True):
        wanted = _alone(case[2])
        for name, value in wanted.items():
            assert torch.equal(first[name], second[name]), (case, name)
            # The mean over two ranks is rounded at other places than that over all rows.
            torch.testing.assert_close(first[name], value, rtol=0, atol=2e-7, msg=lambda text, c=case: f"{c}: {text}")


def _deepspeed(rank: int, world_size: int, stages: list[int]) -> list[dict[str, torch.Tensor]]:
    import deepspeed

    found = []
    for stage in stages:
        model = _model()
        optimizer = TieredAdamW(model.parameters(), lr=1e-2, mode="sync", tiering=_tiering())
        config = {
            "train_micro_batch_size_per_gpu": _ROWS // world_size,
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
        }
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        for batch in _batches(rank, world_size):
            engine.backward(engine(batch).square().mean())
            engine.step()
        found.append({name: value.clone() for name, value in engine.module.state_dict().items()})
        optimizer.close()
    return found


def test_deepspeed_zero_on_two_ranks_equals_one_process() -> None:
    stages = [1, 2]
    ranks = run_ranks(_deepspeed, 2, stages)
    wanted = _alone(None)
    for stage, first, second in zip(stages, *ranks, strict=True):
        for name, value in wanted.items():
            assert torch.equal(first[name], second[name]), (stage, name)
            torch.testing.assert_close(
                first[name], value, rtol=0, atol=2e-7, msg=lambda text, s=stage: f"ZeRO {s}: {text}"
            )


def _pipeline(rank: int, world_size: int) -> dict[str, torch.Tensor]:
    import deepspeed
    from deepspeed.pipe import PipelineModule

    deepspeed.init_distributed(dist_backend="gloo", dist_init_required=False)
    module = PipelineModule(
        list(_model()), num_stages=world_size, loss_fn=lambda out, _: out.square().mean(), partition_method="uniform"
    )
    optimizer = TieredAdamW(module.parameters(), lr=1e-2, mode="sync", tiering=_tiering())
    config = {
        "train_micro_batch_size_per_gpu": _ROWS // _MICRO_BATCHES,
        "gradient_accumulation_steps": _MICRO_BATCHES,
        "steps_per_print": 10**9,
    }
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
    data = iter([(part, part) for batch in _batches(0, 1) for part in batch.chunk(_MICRO_BATCHES)])
    for _ in range(_STEPS):
        engine.train_batch(data)
    optimizer.close()
    return {name: value.clone() for name, value in module.state_dict().items()}


def test_deepspeeds_pipeline_of_two_stages_equals_one_process() -> None:
    stages = run_ranks(_pipeline, 2)
    assert all(stages), "each stage has weights of its own"
    trained = stages[0] | stages[1]
    wanted = _alone(None)
    assert trained.keys() == wanted.keys()
    for name, value in wanted.items():
        # The mean over micro-batches is rounded at other places than that over all rows.
        torch.testing.assert_close(trained[name], value, rtol=0, atol=2e-7, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_every_mode_and_placement_gives_the_bits_of_the_cpus_kernel() -> None:
    assert not [(name, count) for name, count in differences(torch.device("cuda", 0), "native") if count]
