"""Real processes that share through a folder; one is killed: do the others notice?"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from trainsys.rl import questions, tasks
from trainsys.rl.rollout import Completion, Group, Question
from trainsys.rl.selection import Quota
from trainsys.rl.sharing import Exchange, Identity, Pace
from trainsys.rl.stores import FolderStore
from trainsys.rl.validation import Rules, Validator

_NODES = 3
_VICTIM = 1
_LEAST_ROUNDS = 3
_SPEC = [questions.TaskSpec("reverse")]


def rounds_per_s(seconds: float) -> tuple[list[float], list[float]]:
    """Return the rounds a second of each survivor before and after another node is killed (SIGKILL).

    Each process computes a round of fixed work; all run on one CPU thread each. The killed one leaves its share of the
    machine to the others, so on a machine with fewer cores than nodes they may get faster; they must not get slower.
    """
    with tempfile.TemporaryDirectory(prefix="bench-killing-") as folder:
        command = [sys.executable, "-m", __name__, folder]
        nodes = [subprocess.Popen([*command, str(node)]) for node in range(_NODES)]
        survivors = [node for node in range(_NODES) if node != _VICTIM]
        try:
            _observe(folder, list(range(_NODES)), nodes, 0.0)  # all are there and warm
            before = _observe(folder, survivors, nodes, seconds)
            nodes[_VICTIM].send_signal(signal.SIGKILL)
            nodes[_VICTIM].wait()
            after = _observe(folder, survivors, [nodes[node] for node in survivors], seconds)
        finally:
            for process in nodes:
                process.kill()
                process.wait()
    return before, after


def _observe(folder: str, watched: list[int], alive: list[subprocess.Popen[bytes]], seconds: float) -> list[float]:
    """Return the rounds a second of nodes from now on, over some seconds and at least some rounds of each."""
    began = time.time()

    def rounds() -> list[int]:
        return [sum(moment > began for moment in _times(folder, node)) for node in watched]

    _await(lambda: time.time() > began + seconds and min(rounds()) >= _LEAST_ROUNDS, alive)
    return [count / (time.time() - began) for count in rounds()]


def _await(done: Callable[[], bool], nodes: list[subprocess.Popen[bytes]]) -> None:
    deadline = time.monotonic() + 120
    while not done():
        if any(process.poll() is not None for process in nodes) or time.monotonic() > deadline:
            raise RuntimeError("a node of the benchmark has ended by itself, or made no round within 120 s")
        time.sleep(0.01)


def _times(folder: str, node: int) -> list[float]:
    path = Path(folder, f"node{node}.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _node(folder: str, number: int) -> None:
    """Share and take for ever, and write down when each round ended."""
    torch.set_num_threads(1)
    name = f"node{number}"
    work = torch.randn(256, 256)
    store = FolderStore(str(Path(folder, "store")), keep_s=60)
    exchange = Exchange(store, Validator(name, Rules()), Identity(node=name, model=""), Pace(poll_interval_s=0.1))
    with exchange.start(), open(Path(folder, f"{name}.jsonl"), "a", buffering=1, encoding="utf-8") as file:
        generator, quota, now = random.Random(number), Quota(num_local=4, num_external=4, max_age_rounds=100), 0
        while os.getppid() != 1:
            groups = [_group(question, name, now) for question in questions.draw(_SPEC, 4, (number, now))]
            exchange.share(groups)
            exchange.take(groups, quota, now_round=now, generator=generator)
            for _ in range(40):
                work = torch.tanh(work @ work / 16)
            now += 1
            file.write(f"{time.time()}\n")


def _group(question: Question, node: str, version: int) -> Group:
    texts = [tasks.answer_of(question), "0", "1", "2"]
    completions = tuple(Completion(text, len(text) + 1, True) for text in texts)
    return Group(question, completions, tuple(tasks.score(question, text) for text in texts), node, version)


if __name__ == "__main__":
    _node(sys.argv[1], int(sys.argv[2]))
