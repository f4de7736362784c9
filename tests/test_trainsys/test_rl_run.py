"""A run by reinforcement learning from the command line: it learns, resumes to the bit, and leaves a model behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.test_trainsys import runs
from tests.test_trainsys.test_hf import write_jsonl, write_llama
from tests.test_trainsys.test_resume import assert_equal_state
from tests.test_trainsys.wandb_file import history
from trainsys import data, metrics, models
from trainsys.report import summarise
from trainsys.rl import questions, tasks
from trainsys.rl.config import GenerationConfig
from trainsys.rl.policy import Policy

_WARM, _STEPS = 60, 90
_SMALL = (
    "rl_grpo",
    f"--steps={_STEPS}",
    f"--rl.warm_start.steps={_WARM}",
    "--rl.warm_start.lr=1e-2",
    '--rl.tasks=["largest:length=2","reverse:length=2"]',
    "--rl.questions=4",
    "--rl.group_size=8",
    "--rl.updates=2",
    "--rl.loss.importance=behaviour",
    "--rl.evaluation_questions=20",
    "--rl.generation.max_new_tokens=4",
    "--batch.global_sequences=32",
    "--batch.micro_sequences=16",
    "--model.num_layers=2",
    "--model.dim=32",
    "--model.num_heads=2",
    "--model.ffn_dim=64",
    "--data.sequence_length=24",
    "--optim.lr=2e-3",
    "--checkpoint.every=7",
    "--evaluation.every=30",
    "--launch.cpus_per_rank=1",
    "--launch.start_timeout_s=300",
    "--launch.frozen_timeout_s=60",
)


def _arguments(*overrides: str) -> list[str]:
    """`rl_grpo` made small, with `overrides` in place of settings of the same key."""
    keys = {override.partition("=")[0] for override in overrides}
    return [*(setting for setting in _SMALL if setting.partition("=")[0] not in keys), *overrides]


def _records(run_dir: Path) -> list[dict[str, Any]]:
    """Return what a run recorded, without times and what the copies of checkpoints cost."""
    kept = []
    for record in metrics.read(run_dir / "metrics.jsonl"):
        told = {key: value for key, value in record.items() if not key.startswith(("time", "checkpoint", "speed"))}
        if len(told) > 1:
            kept.append(told)
    return kept


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bits_and_its_model_answers(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    output = runs.succeed("train", *_SMALL, f"--run_dir={whole}", cwd=tmp_path)
    assert "held-out accuracy, before the first round and now:" in output
    with runs.running("launch", *_SMALL, f"--run_dir={broken}", cwd=tmp_path) as process:
        runs.wait_for_step(process, broken, _WARM + 8)  # at least one checkpoint among the rounds
        process.kill_tree()
    assert runs.last_step(broken) < _STEPS
    runs.succeed("launch", *_SMALL, "--resume", f"--run_dir={broken}", cwd=tmp_path)
    assert _records(broken) == _records(whole)
    assert_equal_state(whole, broken)

    rounds = [record for record in _records(whole) if "rl/reward" in record]
    assert [record["step"] for record in rounds] == list(range(_WARM + 1, _STEPS + 1))
    assert rounds[-1]["rl/cumulative_reward"] == pytest.approx(sum(record["rl/reward"] for record in rounds))
    assert sum(record["rl/updates"] for record in rounds) > 10, "most rounds had a signal"
    for key in ("rl/signal_rate", "rl/reward.largest", "rl/reward.reverse", "rl/clipped", "rl/kl_to_start"):
        assert key in rounds[0]
    last = [record for record in _records(whole) if "rl/accuracy" in record][-1]
    assert (last["step"], set(last) >= {"rl/accuracy.largest,length=2", "rl/sampled_accuracy.reverse,length=2"}) == (
        _STEPS,
        True,
    )
    _assert_answers(whole, last["rl/accuracy"])
    assert "reverse,length=2" in summarise(whole)


def _assert_answers(run_dir: Path, accuracy: float) -> None:
    """The model folder answers held-out questions as well as the run said."""
    model = models.load_pretrained(run_dir / "model").float()
    policy = Policy(model, data.load_tokenizer("bytes"), GenerationConfig(max_new_tokens=4))
    scores = []
    for text in ("largest:length=2", "reverse:length=2"):
        asked = questions.draw([questions.parse_spec(text)], 20, (1,), held_out=True)  # the key of Learner.evaluate
        answers = policy.answer(asked)
        scores += [tasks.score(question, answer.text) for question, answer in zip(asked, answers, strict=True)]
    assert sum(scores) / len(scores) == pytest.approx(accuracy)
    assert torch.isfinite(next(model.parameters())).all()


def test_someones_own_model_learns_by_rounds_in_its_own_tokens_and_goes_on(tmp_path: Path) -> None:
    llama, run = write_llama(tmp_path / "llama", write_jsonl(tmp_path)), tmp_path / "run"
    changed = ["--model.kind=hf", f"--model.path={llama}", f"--data.tokenizer={llama}", "--rl.warm_start.steps=2"]
    changed += ["--schedule.warmup_steps=0", "--schedule.kind=constant", "--rl.evaluation_questions=2"]
    words = [
        word for word in _arguments(*changed) if not word.startswith(("--model.num", "--model.dim", "--model.ffn"))
    ]
    words = [word for word in words if not word.startswith("--steps")]
    runs.succeed("train", *words, "--steps=4", "--metrics.wandb.mode=offline", f"--run_dir={run}", cwd=tmp_path)
    runs.succeed("train", *words, "--steps=6", f"--run_dir={run}", "--resume", cwd=tmp_path)
    rewards = {record["step"]: record["rl/reward"] for record in _records(run) if "rl/reward" in record}
    assert list(rewards) == [3, 4, 5, 6]
    (logged,) = (run / "wandb").glob("offline-run-*/run-*.wandb")
    shown = {entry["_step"]: entry["rl/reward"] for entry in history(logged) if "rl/reward" in entry}
    assert shown == {step: rewards[step] for step in (3, 4)}
    assert any("rl/accuracy.largest,length=2" in entry for entry in history(logged))
    model = models.load_pretrained(run / "model").float()
    (question,) = questions.draw([questions.parse_spec("largest:length=2")], 1, (1,), held_out=True)
    policy = Policy(model, data.load_tokenizer(str(run / "model")), GenerationConfig(max_new_tokens=4))
    assert policy.answer([question])[0].num_tokens <= 4


@pytest.mark.slow
def test_a_run_starts_from_the_model_of_another_and_stays_near_it(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    runs.succeed("train", *_arguments("--steps=60"), f"--run_dir={first}", cwd=tmp_path)
    changed = [
        "--rl.warm_start.steps=0", f"--rl.start_from={first / 'model'}", "--steps=6", "--rl.loss.kl_weight=0.05",
        "--rl.loss.kind=dapo", "--rl.resamples=2", "--rl.loss.overlong=penalise", "--rl.loss.overlong_tokens=2",
        "--rl.loss.importance=proximal", "--schedule.warmup_steps=0", "--engine.backend=torch", "--engine.zero_stage=0",
    ]  # fmt: skip
    runs.succeed("train", *_arguments(*changed), f"--run_dir={second}", cwd=tmp_path)
    accuracies = [[record for record in _records(run) if "rl/accuracy" in record] for run in (first, second)]
    ended, began = accuracies[0][-1], accuracies[1][0]
    assert began["step"] == 0
    assert began["rl/accuracy"] == ended["rl/accuracy"], "the policy that the first run left"
    rounds = [record for record in _records(second) if "rl/reward" in record]
    assert max(record["rl/groups"] for record in rounds) > 4, "a round asked again"
    assert all(record["rl/trained_groups"] <= 4 for record in rounds)
