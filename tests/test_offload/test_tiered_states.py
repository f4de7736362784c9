"""A run's tiered states are in host memory only while somebody saves or loads them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from offload.optimizer import TieredAdamW, Tiering
from offload.schedule import Budget
from trainsys import tiered
from trainsys.errors import ConfigError
from trainsys.partition import Partition
from trainsys.tiered import TieredMasters


def masters_of(optimizer: TieredAdamW, parameters: list[nn.Parameter], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the masters of an engine that is not there."""
    named: list[Any] = [SimpleNamespace(name=str(n), weight=p.detach()) for n, p in enumerate(parameters)]

    def init(self: Any, module: Any, optimizer: Any, placement: Any, *, separate_master: bool) -> None:
        self._separate_master = separate_master

    monkeypatch.setattr(Partition, "__init__", init)
    monkeypatch.setattr(Partition, "_buffers", lambda _: {})
    hybrid: Any = SimpleNamespace(mesh=None, rank=0, shards=None, module=None)
    data: Any = SimpleNamespace(masters=named, refresh=lambda: None)
    parts: Any = SimpleNamespace(optimizer=optimizer, masters=named)
    monkeypatch.setattr(tiered, "Placement", lambda *_: None)
    return TieredMasters(hybrid, data, parts, lambda _, flat: flat, separate=True)


def test_states_of_a_disk_are_let_go_by_the_next_step_and_after_a_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parameters = [nn.Parameter(torch.randn(2048)) for _ in range(2)]
    disk = tiered._disk(tmp_path)
    budget = Budget(device_bytes=0, host_bytes=1)
    settings = Tiering(kernel="torch", subgroup_numel=1024, budget=budget, tier=disk, num_tier_slots=2, num_threads=1)
    with disk, TieredAdamW(parameters, tiering=settings) as optimizer:
        masters = masters_of(optimizer, parameters, monkeypatch)
        masters.slices()
        assert masters._given
        (parameters[0] * parameters[1]).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        assert not masters._given
        masters.set_steps_taken(1.0)
        masters.slices()["optimizer.exp_avg.1"].fill_(3.0)
        masters.after_load()
        assert not masters._given
        masters.after_load()  # nothing was given in between: states stay
        found = optimizer.state_dict()["state"]
        assert bool((found[1]["exp_avg"] == 3.0).all())
        assert float(found[0]["step"]) == 1.0


def test_a_folder_that_is_missing_is_told_with_its_setting(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"offload\.nvme_dir: .*gone.*No such file"):
        tiered._disk(tmp_path / "gone")
