"""The scenarios of the bench, run once each and kept as lines of JSON, so that a run that was stopped goes on."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import torch

from trainsys.bench.swarms.simulation import Scenario, Settings, Swarms
from trainsys.bench.swarms.version import code_version

_LIARS = (1, 3)
"""Of five nodes; the others know every skill between them."""


def _split(swarm: Literal["skill-gap", "homogeneous"], num_local: int) -> Scenario:
    name = f"{swarm} {num_local}/{8 - num_local}"
    return Scenario(name=name, swarm=swarm, num_local=num_local, num_external=8 - num_local)


SCENARIOS = (
    _split("skill-gap", 8),
    _split("skill-gap", 4),
    Scenario(name="8/0 sampling twice, filtered", oversample=2, filter_local=True),
    Scenario(name="4/4 liars, validated", num_local=4, num_external=4, liars=_LIARS),
    Scenario(name="4/4 liars, believed", num_local=4, num_external=4, liars=_LIARS, validated=False),
    Scenario(name="4/4 liars absent", num_local=4, num_external=4, absent=_LIARS),
    Scenario(name="4/4 crowders, validated", num_local=4, num_external=4, crowders=_LIARS),
    Scenario(name="4/4 at speeds 1 to 4", num_local=4, num_external=4, period=(1, 2, 3, 4, 2)),
    Scenario(name="4/4 one killed", num_local=4, num_external=4, killed=(1,)),
    Scenario(name="4/4 without filter", num_local=4, num_external=4, filter_external=False),
    Scenario(name="4/4 not filled", num_local=4, num_external=4, fill=False),
    _split("skill-gap", 6),
    _split("skill-gap", 2),
    _split("homogeneous", 8),
    _split("homogeneous", 4),
    Scenario(name="4/4 signed advantages", num_local=4, num_external=4, external="signed"),
    _split("homogeneous", 6),
    _split("homogeneous", 2),
)
"""What the gates compare comes first: a run that is stopped early says most."""
HONEST = tuple(node for node in range(5) if node not in _LIARS)


def scaled(scenario: Scenario, settings: Settings) -> Scenario:
    """Return a scenario for settings with another number of groups in a round."""
    return replace(
        scenario,
        num_local=scenario.num_local * settings.groups // 8,
        num_external=scenario.num_external * settings.groups // 8,
    )


def run(
    scenarios: Sequence[Scenario], settings: Settings, *, device: str, jobs: int, path: Path, budget_s: float
) -> bool:
    """Run what `path` does not hold yet, `jobs` at a time, and return whether all is done; begins no second unit late.

    A seed of a scenario is a unit of work on a CPU; on CUDA, where a larger stack costs little more, all seeds are.
    """
    began = time.monotonic()
    size = settings.seeds if device == "cuda" else 1
    part = replace(settings, seeds=size)
    todo = [
        (scenario, first)
        for scenario in scenarios
        for first in range(0, settings.seeds, size)
        if not all(
            any(_is_of(line, scenario, settings, seed, device) for line in lines(path))
            for seed in range(first, first + size)
        )
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    if others := sum(line.get("version") != code_version() for line in lines(path)):
        print(f"{path}: {others} lines were made by other code and count for nothing", flush=True)
    longest_s = 0.0
    with ProcessPoolExecutor(jobs, initializer=_one_thread) as pool:
        waiting, running = list(todo), dict[Future[Any], tuple[Scenario, int]]()
        while waiting or running:
            while waiting and len(running) < jobs:
                is_late = time.monotonic() - began + longest_s >= budget_s
                if is_late and len(waiting) < len(todo):
                    break
                scenario, first = waiting.pop(0)
                running[pool.submit(_one, scenario, part, first, device, path.parent)] = (scenario, first)
            if not running:
                return False
            done = next(as_completed(running))
            scenario, first = running.pop(done)
            nodes, seconds = done.result()
            longest_s = max(longest_s, seconds)
            with path.open("a", encoding="utf-8") as file:
                for seed in range(first, first + size):
                    of_seed = [node for node in nodes if node["seed"] == seed]
                    line = {"scenario": scenario.name, "seed": seed, "key": _key(scenario, settings, device)}
                    line |= {"version": code_version(), "seconds": seconds / size, "nodes": of_seed}
                    file.write(json.dumps(line) + "\n")
            print(f"{scenario.name}, seed {first}{'' if size == 1 else ' and on'}: {seconds:.0f} s", flush=True)
    return True


def lines(path: Path) -> list[dict[str, Any]]:
    """Return what was run before, without a last line that a kill cut off."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def results(path: Path, scenario: Scenario, settings: Settings, device: str) -> Iterator[list[dict[str, Any]]]:
    """Yield the nodes of each seed of a scenario."""
    for seed in range(settings.seeds):
        for line in lines(path):
            if _is_of(line, scenario, settings, seed, device):
                yield line["nodes"]
                break


def _is_of(line: dict[str, Any], scenario: Scenario, settings: Settings, seed: int, device: str) -> bool:
    return bool(line["seed"] == seed and line["key"] == _key(scenario, settings, device))


def _key(scenario: Scenario, settings: Settings, device: str) -> str:
    """Return what tells apart results of other scenarios, settings, devices or code; more seeds add to the same."""
    told = {"scenario": asdict(scenario), "settings": asdict(settings) | {"seeds": 0}, "device": device}
    told["version"] = code_version()
    return hashlib.blake2b(json.dumps(told, sort_keys=True).encode(), digest_size=8).hexdigest()


def _one_thread() -> None:
    torch.set_num_threads(1)


def _one(
    scenario: Scenario, settings: Settings, first_seed: int, device: str, folder: Path
) -> tuple[list[dict[str, Any]], float]:
    """Run a scenario for some seeds, from the weights that every scenario of this swarm begins with."""
    began = time.monotonic()
    swarms = Swarms(scenario, settings, first_seed=first_seed, device=torch.device(device))
    told = asdict(settings) | {"rounds": 0, "lr": 0, "group_size": 0, "groups": 0, "swarm": scenario.swarm}
    name = hashlib.blake2b(json.dumps([told, first_seed, device, code_version()]).encode(), digest_size=8).hexdigest()
    kept = folder / f"warm-{name}.pt"
    if kept.exists():
        swarms.load(torch.load(kept, weights_only=True))
    else:
        swarms.warm_start()
        partial = kept.with_suffix(f".{os.getpid()}")
        torch.save(swarms.state(), partial)
        os.replace(partial, kept)
    nodes = [asdict(node) for node in swarms.run()]
    return nodes, time.monotonic() - began
