"""A real DeepSpeed engine that saves and loads through this package, on two gloo ranks, under ZeRO 2 and 3."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import checkpoint
from checkpoint import (
    CheckpointConfig,
    Checkpointer,
    CheckpointError,
    CorruptCheckpoint,
    InvalidState,
    UnsupportedFormat,
)
from checkpoint.deepspeed_engine import checkpoint_engine
from tests.ranks import RankFailed, run_ranks
from tests.test_checkpoint import engines
from tests.test_checkpoint.stalls import stalled
from tests.test_checkpoint.worlds import same, tensor_of

STAGES = (2, 3)
CLIENT_STATE = {"note": {"a": (1, None)}, "shape": torch.Size([2, 3]), "dtype": torch.bfloat16, "rng": torch.arange(5)}


def built(stage: int, seed: int = 0, **options: Any) -> Any:
    """An engine that uses ours."""
    engine = engines.engine_of(stage, seed=seed)
    engine.checkpoint_engine = checkpoint_engine(engine, **options)
    return engine


def keep_truth(engine: Any, stage: int, root: str) -> None:
    """Save what the trainer finds in the engine's memory, apart."""
    run_id = f"{stage}.{engine.global_steps}"
    rank, world_size, config = dist.get_rank(), dist.get_world_size(), CheckpointConfig(keep_last=9)
    with Checkpointer(root, config=config, rank=rank, world_size=world_size, run_id=run_id) as ck:
        ck.save(engine.global_steps, engines.slices(engine, stage))


def report(folder: str, name: str, value: Any) -> None:
    """Leave something for the test, even if this process is about to be killed."""
    Path(folder, f"{name}.{dist.get_rank()}.json").write_text(json.dumps(value))


def save_all(rank: int, world_size: int, folder: str) -> None:
    """Save under every stage, at last while all ranks are killed."""
    for stage in STAGES:
        engine = built(stage)
        out, truth = f"{folder}/{stage}", f"{folder}/truth{stage}"
        engines.train(engine, 1)
        engine.save_checkpoint(out, tag="first")
        engines.train(engine, 1)
        client_state = {**CLIENT_STATE, "mutable": torch.zeros(3)}
        keep_truth(engine, stage, truth)
        ck = engine.checkpoint_engine._checkpointer
        with stalled(ck) as release:
            engine.save_checkpoint(out, client_state=client_state, save_latest=False)
            report(folder, f"unfinished{stage}", Path(out, "latest").read_text())
            client_state["mutable"].fill_(9)
            letting_go(ck, release)
            # Overwrites what is still being copied, unless there is a fence before.
            report(folder, f"losses{stage}", engines.train(engine, 2, seed=7))
        keep_truth(engine, stage, truth)
        engine.save_checkpoint(out)
        report(folder, f"latest{stage}", Path(out, "latest").read_text())
        if stage == STAGES[0]:
            report(folder, "refused", refused(engine, out))
        if stage == STAGES[-1]:
            engines.train(engine, 1)
            keep_truth(engine, stage, truth)
            dist.barrier()
            engine.save_checkpoint(out, save_latest=False)
            os.kill(os.getpid(), signal.SIGKILL)
        engine.destroy()


def letting_go(ck: Checkpointer, release: Callable[[], None]) -> None:
    """Let stalled copies go on when the fence waits for them, and not before."""
    fence = ck.fence

    def watched() -> None:
        threading.Thread(target=release).start()
        fence()

    ck.fence = watched  # type: ignore[method-assign]


def refused(engine: Any, out: str) -> str:
    """Try to save what only pickle keeps; return the error."""
    try:
        engine.save_checkpoint(out, tag="refused", client_state={"path": Path("a")})
    except CheckpointError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks saved before they were killed."""
    folder = tmp_path_factory.mktemp("deepspeed")
    with pytest.raises(RankFailed) as caught:
        run_ranks(save_all, 2, str(folder), timeout_s=180)
    assert all("SIGKILL" in text for text in caught.value.reports.values()), caught.value
    return folder


def told(saved: Path, name: str) -> list[Any]:
    """What the ranks reported."""
    return [json.loads((saved / f"{name}.{rank}.json").read_text()) for rank in range(2)]


def load_all(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    """Load with new engines; return what they hold, and how it goes on."""
    found: dict[str, Any] = {}
    for stage in STAGES:
        engine = built(stage, seed=5)
        _, client_state = engine.load_checkpoint(f"{folder}/{stage}", tag="global_step2")
        found[f"client{stage}"] = {k: client_state[k] for k in [*CLIENT_STATE, "mutable"]}
        found[f"early{stage}"] = own(engine, stage)
        found[f"losses{stage}"] = engines.train(engine, 2, seed=7)
        engine.destroy()
    engine = built(STAGES[-1], seed=5)
    engine.load_checkpoint(f"{folder}/{STAGES[-1]}")
    found["tag"], found["late"] = f"global_step{engine.global_steps}", own(engine, STAGES[-1])
    engine.destroy()
    engine = built(STAGES[0], seed=5)
    for name in ("damaged", "foreign"):
        try:
            engine.load_checkpoint(f"{folder}/{name}", tag="global_step2")
        except CheckpointError as error:
            found[name] = error
    engine.destroy()
    return found


def own(engine: Any, stage: int) -> dict[str, Any]:
    """This rank's part, copied: tensors, and where each starts in its whole."""
    part = engines.slices(engine, stage)
    return {name: (tensor_of(value).clone(), getattr(value, "start", 0)) for name, value in part.items()}


@pytest.fixture(scope="module")
def loaded(saved: Path) -> list[dict[str, Any]]:
    """What two new ranks loaded of it; beside it a damaged copy, and one of another engine's files."""
    shutil.copytree(saved / str(STAGES[0]), saved / "damaged")
    for shard in (saved / "damaged").glob("step-00000002.*/r00000.safetensors"):
        data = bytearray(shard.read_bytes())
        data[4096] ^= 1
        shard.write_bytes(data)
    tag = saved / "foreign/global_step2"
    tag.mkdir(parents=True)
    torch.save({}, tag / "mp_rank_00_model_states.pt")
    return run_ranks(load_all, 2, str(saved), timeout_s=180)


def holds(part: dict[str, Any], truth: dict[str, torch.Tensor]) -> bool:
    """Whether a rank's part is of these whole tensors."""
    return all(
        torch.equal(tensor.flatten(), truth[name].flatten()[start : start + tensor.numel()])
        for name, (tensor, start) in part.items()
    )


@pytest.mark.parametrize("stage", STAGES)
def test_a_new_engine_goes_on_where_the_old_one_saved(saved: Path, loaded: list[dict[str, Any]], stage: int):
    truth = {info.step: checkpoint.read(info) for info in Checkpointer(saved / f"truth{stage}").list()}
    for rank, found in enumerate(loaded):
        assert holds(found[f"early{stage}"], truth[2])
        assert not holds(found[f"early{stage}"], truth[4])
        assert found[f"losses{stage}"] == told(saved, f"losses{stage}")[rank]
        client_state = found[f"client{stage}"]
        assert torch.equal(client_state.pop("rng"), CLIENT_STATE["rng"])
        assert torch.equal(client_state.pop("mutable"), torch.zeros(3))
        assert client_state == {k: v for k, v in CLIENT_STATE.items() if k != "rng"}


def test_latest_names_what_is_committed(saved: Path, loaded: list[dict[str, Any]]):
    for stage in STAGES:
        assert told(saved, f"latest{stage}") == ["global_step4"] * 2
        tags = [info.shared["deepspeed"]["tag"] for info in Checkpointer(saved / str(stage)).list()]
        assert told(saved, f"unfinished{stage}") == ["first"] * 2
        assert tags[:3] == ["first", "global_step2", "global_step4"]
        assert (saved / str(stage) / "latest").read_text() in tags
        assert checkpoint.verify(saved / str(stage)).ok
    truth = Checkpointer(saved / f"truth{STAGES[-1]}").list()
    (whole,) = [checkpoint.read(info) for info in truth if f"global_step{info.step}" == loaded[0]["tag"]]
    assert all(holds(found["late"], whole) for found in loaded)


def test_a_corrupted_byte_is_detected(loaded: list[dict[str, Any]]):
    for found in loaded:
        assert isinstance(found["damaged"], CorruptCheckpoint)
        assert "digest does not match" in str(found["damaged"]) or "found it damaged" in str(found["damaged"])


def test_files_of_another_engine_are_told_from_ours(saved: Path, loaded: list[dict[str, Any]]):
    assert all(isinstance(found["foreign"], UnsupportedFormat) for found in loaded)
    with pytest.raises(InvalidState, match="is of this package already"):
        checkpoint.import_from(saved / str(STAGES[0]), saved / "imported")
    with pytest.raises(UnsupportedFormat, match="it is part of a checkpoint of this package"):
        checkpoint.import_from(saved / str(STAGES[0]) / "first", saved / "imported")


def test_what_only_pickle_keeps_is_refused_on_all_ranks(saved: Path):
    first, second = told(saved, "refused")
    assert first.startswith("InvalidState: mp_rank_00_model_states.pt['path']: is a pathlib.PosixPath, which can only")
    assert second.startswith("SaveAborted: rank 0 cannot save its state")


def test_tensors_of_a_rank_are_read_by_name(saved: Path):
    (_, info, *_) = Checkpointer(saved / str(STAGES[0])).list()
    name = "mp_rank_00_model_states.pt['module']['first.weight']"
    truth = checkpoint.read(Checkpointer(saved / f"truth{STAGES[0]}").list()[0])
    assert same(checkpoint.read(info, [name], rank=0), {name: truth["model.first.weight"]})
