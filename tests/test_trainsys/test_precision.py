"""`engine.precision = auto`: decided once from the devices of all ranks, kept by the run, said in its first line.

What this machine's CPU can do decides no test here: expectations are of given abilities, or asked of the device.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import distributed as dist

import checkpoint as ck
from faulttol.inject import Fault
from tests.ranks import run_ranks
from tests.test_trainsys import runs
from trainsys import ConfigError, drill, elastic, folder, precision, recipe
from trainsys.check import check
from trainsys.folder import RunFolder
from trainsys.precision import Ability, Asked, Choice, Precision, choose

ABLE, UNABLE = Ability("CPU", multiplies_bf16=True), Ability("CPU", multiplies_bf16=False)
GPU = Ability("GPU", multiplies_bf16=True)
_QUICK = ("--parallel.replicate=1", "--evaluation.sequences=0", "--evaluation.sample_tokens=0", "--checkpoint.every=1")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.write_text(tmp_path_factory.mktemp("text") / "corpus")


@pytest.mark.parametrize(
    ("abilities", "told"),
    [
        ([ABLE, ABLE], "bf16 (auto: this CPU multiplies bf16 in hardware)"),
        ([UNABLE, UNABLE], "fp32 (auto: this CPU does not multiply bf16 in hardware)"),
        ([ABLE, UNABLE], "fp32 (auto: the CPU of rank 1 does not multiply bf16 in hardware)"),
        ([ABLE, UNABLE, UNABLE], "fp32 (auto: the CPU of rank 1 (and of 1 more) does not multiply bf16 in hardware)"),
        ([GPU, UNABLE], "fp32 (auto: the CPU of rank 1 does not multiply bf16 in hardware)"),
        ([Ability("GPU", multiplies_bf16=False)], "fp32 (auto: this GPU does not multiply bf16 in hardware)"),
    ],
)
def test_auto_is_bf16_where_every_rank_multiplies_it_and_the_line_says_why(abilities: list[Ability], told: str) -> None:
    choice = choose("auto", "auto", abilities)
    assert str(choice) == told
    assert not choice.warning


@pytest.mark.parametrize("ability", [ABLE, UNABLE])
@pytest.mark.parametrize("began", ["fp32", "bf16"])
def test_auto_is_what_the_run_began_with_whatever_the_ranks_are_now(began: Asked, ability: Ability) -> None:
    assert str(choose("auto", began, [ability])) == f"{began} (auto: as the run began)"


def test_a_named_precision_is_taken_and_bf16_without_hardware_warned_of() -> None:
    named: Precision
    for named in ("fp32", "bf16", "fp16"):
        assert choose(named, named, [GPU]) == Choice(named)
    assert choose("fp32", "fp32", [UNABLE]) == Choice("fp32")
    slow = choose("bf16", "bf16", [ABLE, UNABLE])
    assert str(slow) == "bf16"
    assert slow.warning.startswith("warning: the CPU of rank 1 does not multiply bf16 in hardware")
    assert "--engine.precision=auto" in slow.warning
    assert choose("auto", "bf16", [UNABLE]).warning, "a run that began elsewhere is as slow"


def test_fp16_is_refused_on_all_ranks_where_one_has_no_gpu() -> None:
    for asked in ("fp16", "auto"):
        with pytest.raises(ConfigError, match="fp16 does not train on CPU"):
            choose(asked, "fp16", [GPU, ABLE])


@pytest.mark.parametrize(
    ("capabilities", "does"),
    [
        ({"avx2": True, "avx512_bf16": False, "amx_bf16": False, "cpu_name": "AMD EPYC"}, False),
        ({"avx512_f": True, "avx512_bw": True, "avx512_vnni": True, "avx512_bf16": False}, False),
        ({"avx512_f": True, "avx512_bf16": True}, True),
        ({"amx_tile": True, "amx_bf16": True, "avx512_bf16": True}, True),
        ({"architecture": "aarch64", "bf16": True, "sve": True}, True),
        ({"architecture": "aarch64", "bf16": False}, False),
        ({}, False),
    ],
)
def test_a_cpu_multiplies_bf16_by_its_instructions(capabilities: dict[str, object], does: bool) -> None:
    assert precision.has_instructions(capabilities) is does


def agreed(rank: int, world_size: int) -> str:
    """Of ranks of which the last one's machine is older."""
    assert dist.group.WORLD is not None
    return str(precision.agree("auto", "auto", ABLE if rank + 1 < world_size else UNABLE, dist.group.WORLD))


def test_ranks_on_unlike_machines_agree() -> None:
    assert set(run_ranks(agreed, 2)) == {"fp32 (auto: the CPU of rank 1 does not multiply bf16 in hardware)"}


def test_settings_must_hold_together_for_all_that_auto_may_come_to() -> None:
    settings = ["--engine.zero_stage=0", "--engine.backend=deepspeed"]
    check(recipe.load(["tiny"], [*settings, "--engine.precision=fp32"]).config)
    with pytest.raises(ConfigError, match="its ZeRO 0 is numerically wrong in bf16"):
        check(recipe.load(["tiny"], [*settings, "--engine.precision=auto"]).config)
    with pytest.raises(ConfigError) as refused:
        check(recipe.load(["tiny"], ["--steps=0"]).config)
    assert len(refused.value.problems) == len(set(refused.value.problems)), "once each"


def test_a_resumed_run_is_checked_for_the_precision_that_it_has(tmp_path: Path) -> None:
    """ZeRO 0 of DeepSpeed is right in fp32 alone."""
    settings = ["--engine.zero_stage=0", "--engine.backend=deepspeed", f"--run_dir={tmp_path / 'run'}"]
    with folder.open_run(recipe.load(["tiny"], [*settings, "--engine.precision=fp32"]), resume=False):
        pass
    config = recipe.load(["tiny"], settings).config
    check(folder.as_begun(config, resume=True))
    assert folder.as_begun(config, resume=False) is config
    elsewhere = recipe.load(["tiny"], [f"--run_dir={tmp_path / 'none'}"]).config
    assert folder.as_begun(elsewhere, resume=True) is elsewhere


def test_a_swarm_whose_nodes_have_decided_keeps_to_auto(tmp_path: Path) -> None:
    """Its own ranks never meet: what its record says stays as it was asked."""

    def resolved(*settings: str) -> recipe.Resolved:
        return recipe.load(["tiny"], [f"--run_dir={tmp_path / 'run'}", *settings])

    with folder.open_run(resolved(), resume=False) as run:
        (run.path / "nodes" / "node0").mkdir(parents=True)
    for named in ("fp32", "bf16"):
        with (
            pytest.raises(ConfigError, match=f"engine.precision: '{named}', but the run in .* has 'auto'"),
            folder.open_run(resolved(f"--engine.precision={named}"), resume=True),
        ):
            raise AssertionError("unreachable")
    with folder.open_run(resolved(), resume=True) as run:
        assert run.record()["config"]["engine"]["precision"] == "auto"


@pytest.mark.parametrize("settled", ["fp32", "bf16"])
def test_the_record_keeps_what_auto_came_to_through_every_resume(tmp_path: Path, settled: Precision) -> None:
    def resolved(*settings: str) -> recipe.Resolved:
        return recipe.load(["tiny"], [f"--run_dir={tmp_path / 'run'}", *settings])

    def held(run: RunFolder) -> tuple[str, str]:
        record = run.record()
        return record["config"]["engine"]["precision"], record["sources"]["engine.precision"]

    with folder.open_run(resolved(), resume=False) as run:
        assert held(run) == ("auto", "tiny.toml")
    with folder.open_run(resolved("--engine.precision=fp32"), resume=True) as run:
        assert held(run) == ("fp32", "command line"), "its ranks have never met, so nothing is decided"
    with folder.open_run(resolved(), resume=True) as run:
        assert held(run) == ("fp32", "command line")
    (tmp_path / "run" / "config.json").unlink()
    with folder.open_run(resolved(), resume=False) as run:
        run.settle(settled)
        run.settle("bf16" if settled == "fp32" else "fp32")  # a start that stood while this one decided
        assert held(run) == (settled, "tiny.toml: auto")
    for settings in ((), (f"--engine.precision={settled}",), ("--engine.precision=auto",)):
        with folder.open_run(resolved(*settings), resume=True) as run:
            assert held(run)[0] == settled
    other = "bf16" if settled == "fp32" else "fp32"
    with (
        pytest.raises(ConfigError, match=f"engine.precision: '{other}', but the run in .* has '{settled}'"),
        folder.open_run(resolved(f"--engine.precision={other}"), resume=True),
    ):
        raise AssertionError("unreachable")
    assert recipe.load([str(tmp_path / "run" / "config.json")]).config.engine.precision == settled, "it repeats the run"


@pytest.mark.parametrize("began", ["fp32", "bf16"])
def test_a_run_resumed_with_auto_goes_on_as_it_began_on_whatever_machine(
    tmp_path: Path, text: Path, began: str
) -> None:
    """One of the two is not what `auto` would take here, so that run has come from another machine."""
    settings = (f"--data.path={text}", f"--run_dir={tmp_path / 'run'}", *_QUICK)
    first = runs.arguments(*settings, f"--engine.precision={began}", "--steps=4")
    resumed = runs.arguments(*settings, "--engine.precision=auto", "--steps=6")
    output = runs.succeed("launch", *first, cwd=tmp_path)
    is_slow = began == "bf16" and not precision.ability_of(torch.device("cpu")).multiplies_bf16
    assert f"parameters in {began}, " in output
    assert ("--engine.precision=auto" in output) == is_slow
    output = runs.succeed("launch", *resumed, "--resume", cwd=tmp_path)
    assert "resumes after step 4" in output
    assert f"parameters in {began} (auto: as the run began), " in output
    assert sorted(runs.losses(tmp_path / "run")) == [1, 2, 3, 4, 5, 6]
    assert RunFolder(tmp_path / "run").record()["config"]["engine"]["precision"] == began
    with ck.Checkpointer(tmp_path / "run" / "checkpoints") as checkpointer:
        newest = checkpointer.latest()
    assert newest is not None
    weights = {tensor.dtype for tensor in ck.read(newest, "model.*").values()}
    assert weights == {torch.bfloat16 if began == "bf16" else torch.float32}


@pytest.mark.slow
def test_a_generation_after_a_loss_keeps_what_the_first_one_decided(tmp_path: Path, text: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    drill.order(RunFolder(run), Fault(kind="kill", rank=1, step=3))
    settings = runs.arguments(
        *(f"--data.path={text}", f"--run_dir={run}", *_QUICK[1:], "--steps=6", "--engine.precision=auto"),
        *("--engine.backend=torch", "--faulttol.mode=act", "--faulttol.drill=true", "--launch.spares=1"),
        *("--faulttol.heartbeat_interval_s=0.2", "--faulttol.policy.shrink=false"),
        *("--faulttol.health.frozen_after_s=20", "--faulttol.health.stuck_after_s=20"),
    )
    output = runs.succeed("launch", *settings, cwd=tmp_path)
    alone = choose("auto", "auto", [precision.ability_of(torch.device("cpu"))])
    assert f"parameters in {alone}, " in output
    assert f"parameters in {alone.precision} (auto: as the run began), " in output
    assert RunFolder(run).record()["config"]["engine"]["precision"] == alone.precision
    assert elastic.saved_step(RunFolder(run)) == 6
