"""Entry functions that ranks run in the tests of the launchers; only those that need torch import it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from faulttol.inject import Fault, Injector
from launch import RankContext


def echo(context: RankContext, payload: dict[str, Any]) -> dict[str, Any]:
    """Return who this rank is, and what it was given."""
    print(f"rank {context.env.rank} says {payload['word']}")
    return {"rank": context.env.rank, "world_size": context.env.world_size, "payload": payload}


def places(context: RankContext, payload: dict[str, Any]) -> list[int]:
    """Return where this rank is among the others."""
    env = context.env
    return [env.rank, env.local_rank, env.local_world_size, env.node_rank]


def steps(context: RankContext, payload: dict[str, Any]) -> int:
    """Walk through `num_steps` steps beside the other ranks, struck by the faults of the schedule."""
    _note_process(context, payload)
    while len(list(Path(payload["folder"]).glob("rank*.pid"))) < context.env.world_size:
        time.sleep(0.01)
    faults = [Fault(**fields) for fields in payload.get("faults", [])]
    injector = Injector(faults, rank=context.env.rank, record=Path(payload["folder"]) / "fired")
    for step in range(payload["num_steps"]):
        context.heartbeat.beat(step=step, phase="forward")
        injector.at(step)
        print(f"rank {context.env.rank} did step {step}", flush=True)
    _stand_still_until_told(context, payload)
    return int(payload["num_steps"])


def until_stopped(context: RankContext, payload: dict[str, Any]) -> int:
    """Make progress until asked to stop, or for ever if told to be deaf to that; return the number of steps."""
    _note_process(context, payload)
    if context.env.rank == 0 and payload.get("child"):
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        (Path(payload["folder"]) / "child.pid").write_text(str(child.pid))
    print("ready", flush=True)
    step = 0
    heard = False
    while True:  # one step at least: the other rank may have been ready, and the stop here, before this one began
        step += 1
        context.heartbeat.beat(step=step, phase="forward")
        if context.stop_requested() and not heard:
            heard = True
            print("heard", flush=True)
        if heard and not payload.get("deaf"):
            break
        time.sleep(0.01)
    print("saved", flush=True)
    return step


def reduced(context: RankContext, payload: dict[str, Any]) -> list[float]:
    """Return the sum over the ranks of (rank + offset), by a collective of the job's process group."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    context.init_process_group("gloo", timeout_s=60)
    values = torch.full((2,), float(context.env.rank + payload["offset"]))
    dist.all_reduce(values)
    return [float(value) for value in values]


def lost_peer(context: RankContext, payload: dict[str, Any]) -> None:
    """Raise on one rank while the others wait for it in a collective, and so lose it."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    context.init_process_group("gloo", timeout_s=60)
    dist.barrier()
    context.heartbeat.beat(step=1, phase="forward")
    if context.env.rank == payload["rank"]:
        raise ValueError("the cause of it all")
    dist.barrier()


def generations(context: RankContext, payload: dict[str, Any]) -> int | None:
    """Add up ones over the ranks, again and again and in each generation anew, until a file is there; return steps."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    folder = Path(payload["folder"])

    def work() -> int:
        _note_process(context, payload)
        context.init_process_group("gloo", timeout_s=60)
        step, is_over = 0, False
        while not is_over:
            step += 1
            context.heartbeat.beat(step=step, phase="train")
            votes = torch.tensor([1.0, float((folder / "finish").exists())])
            dist.all_reduce(votes)
            assert votes[0] == context.env.world_size
            is_over = bool(votes[1])
            if context.env.rank == 0 and step % 20 == 0:
                print(f"generation {context.generation} did step {step}", flush=True)
            time.sleep(0.01)
        return step

    return context.run(work)


def thread_left_behind(context: RankContext, payload: dict[str, Any]) -> str:
    """Return, while a thread of the process never ends."""
    _note_process(context, payload)
    threading.Thread(target=threading.Event().wait).start()
    return "returned"


def not_json(context: RankContext, payload: dict[str, Any]) -> object:
    """Return what no launcher can carry."""
    return {1, 2, 3}


def leave(context: RankContext, payload: dict[str, Any]) -> None:
    """End the process without a word of Python's."""
    print("about to leave", flush=True)
    os._exit(payload["code"])


def _note_process(context: RankContext, payload: dict[str, Any]) -> None:
    (Path(payload["folder"]) / f"rank{context.env.rank}.pid").write_text(str(os.getpid()))


def _stand_still_until_told(context: RankContext, payload: dict[str, Any]) -> None:
    """Where other ranks have faults, wait for them as in a collective that cannot complete."""
    while payload.get("faults") and not context.stop_requested():
        time.sleep(0.01)
