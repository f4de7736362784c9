"""Questions and answers are made again from (task, version, seed, parameters) alone, and scored on this node."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections import Counter

import pytest

from trainsys.errors import MissingExtraError
from trainsys.rl import questions, schema, tasks
from trainsys.rl.errors import TaskError
from trainsys.rl.rollout import Completion, Group, Question
from trainsys.rl.validation import Rules, Validator

_HAS_GYM = importlib.util.find_spec("reasoning_gym") is not None
_OF_GYM = [f"reasoning_gym.{name}" for name in ("leg_counting", "chain_sum", "letter_counting", "number_sorting")]
_needs_gym = pytest.mark.skipif(not _HAS_GYM, reason="reasoning-gym is not installed (extra `rl`)")
_every_task = pytest.mark.parametrize(
    "name", [*sorted(tasks.BUILT_IN), *(pytest.param(name, marks=_needs_gym) for name in _OF_GYM)]
)


@_every_task
def test_a_question_is_made_again_from_its_seed_and_its_answer_scores_one(name: str) -> None:
    for seed in (0, 7, 2**63 - 1):
        question = tasks.ask(name, seed)
        forged = dataclasses.replace(question, prompt="what the sender says")
        assert tasks.regenerate(forged) == question
        answer = tasks.answer_of(question)
        assert tasks.score(question, answer) == tasks.score(question, f" {answer}\n") == 1
        for wrong in (f"{answer}0", "", "\0", "é" * 100):
            assert 0 <= tasks.score(question, wrong) < 1
        assert tasks.score(question, "x" * 9999) == 0


@_every_task
def test_what_a_node_shares_of_a_task_is_made_again_and_scored_by_whoever_asks_it(name: str) -> None:
    (question,) = questions.draw([questions.TaskSpec(name)], 1, (3,))
    texts = (tasks.answer_of(question), "no")
    rewards = tuple(tasks.score(question, text) for text in texts)
    group = Group(question, tuple(Completion(text, 1, True) for text in texts), rewards, "anna", 1)
    rules = Rules(asked=frozenset({(name, "{}")}))
    for claimed, reasons in ((rewards, []), (rewards[::-1], ["reward"])):
        sent = schema.row_of(dataclasses.replace(group, rewards=claimed), sequence=1, model="", created_ms=0)
        encoded = schema.encode([sent])
        accepted, rejected = Validator("me", rules).check(schema.name_of(encoded, node="anna", sequence=1), encoded)
        assert [rejection.reason for rejection in rejected] == reasons
        assert [found.group for found in accepted] == ([] if reasons else [group])


def test_answers_are_right() -> None:
    made = {
        name: [(q.prompt, tasks.answer_of(q)) for q in (tasks.ask(name, seed) for seed in range(50))]
        for name in tasks.BUILT_IN
    }
    for prompt, answer in made["add"]:
        first, second = prompt.removeprefix("add ").rstrip("=").split("+")
        assert int(first) + int(second) == int(answer)
    for prompt, answer in made["sort"]:
        assert answer == "".join(sorted(prompt.split()[1].rstrip("=")))
    for prompt, answer in made["reverse"]:
        assert answer == prompt.split()[1].rstrip("=")[::-1]
    for prompt, answer in made["count"]:
        digit, _, digits = prompt.removeprefix("count ").rstrip("=").split()
        assert int(answer) == digits.count(digit) > 0


def test_seeds_decide_questions_and_neighbours_are_unrelated() -> None:
    prompts = {tasks.ask("reverse", seed, {"length": 12}).prompt for seed in range(200)}
    assert len(prompts) == 200


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "no_such"}, "no such task; allowed: add, count"),
        ({"version": "0"}, "version '0' asked for, here is '1'"),
        ({"seed": -1}, "seed -1 is out of range"),
        ({"seed": 2**63}, "is out of range"),
        ({"parameters": '{"length":1000000000}'}, "allowed: length = 1 to 32"),
        ({"parameters": '{"length":true}'}, "allowed: length = 1 to 32"),
        ({"parameters": '{"length":"4"}'}, "allowed: length = 1 to 32"),
        ({"parameters": '{"width":4}'}, "width: unknown; allowed: length"),
        ({"parameters": '{"length": 4}'}, "canonical"),
        ({"parameters": "[]"}, "canonical"),
        ({"parameters": "{"}, "is not JSON"),
        ({"parameters": '{"length":NaN}'}, "is not JSON"),
        ({"parameters": "[" * 4000}, "is not JSON"),
        ({"parameters": '{"length":' + "9" * 5000 + "}"}, "characters; allowed: up to 4096"),
    ],
)
def test_what_is_no_question_of_ours_is_refused(change: dict[str, object], message: str) -> None:
    question = dataclasses.replace(tasks.ask("sort", 1), **change)
    with pytest.raises(TaskError, match=message):
        tasks.regenerate(question)
    with pytest.raises(TaskError, match=message):
        tasks.answer_of(question)


def test_a_recipe_names_tasks_with_parameters() -> None:
    assert questions.parse_spec("add") == questions.TaskSpec("add", "{}")
    assert questions.parse_spec("add:digits=3") == questions.TaskSpec("add", '{"digits":3}')
    for text in ("add:digits", "add:digits=x", "add:size=3", "subtraction"):
        with pytest.raises(TaskError):
            questions.parse_spec(text)


def test_every_task_has_its_turn_however_few_questions_a_round_asks() -> None:
    specs = [questions.TaskSpec(name) for name in ("add", "reverse", "sort", "largest", "count")]
    for count in (1, 2, 4, 7):
        asked = Counter(
            question.task for first in range(20) for question in questions.draw(specs, count, (first,), first=first)
        )
        assert set(asked.values()) == {20 * count // 5}


def test_held_out_questions_are_never_drawn_for_training() -> None:
    specs = [questions.parse_spec("increment"), questions.parse_spec("count")]
    training = {q.prompt for q in questions.draw(specs, 1000, (1, 2))}
    held_out = questions.draw(specs, 200, (3,), held_out=True)
    assert all(map(questions.is_held_out, held_out))
    assert not training & {q.prompt for q in held_out}
    assert {q.task for q in held_out} == {"increment", "count"}
    assert questions.draw(specs, 5, (1, 2)) == questions.draw(specs, 5, (1, 2)) != questions.draw(specs, 5, (1, 3))


def test_a_task_with_too_few_questions_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = questions.parse_spec("largest:length=1")
    monkeypatch.setattr(questions, "is_held_out", lambda question: False)
    with pytest.raises(TaskError, match="no held-out question in 1000; it has too few different ones"):
        questions.draw([spec], 1, (0,), held_out=True)


@pytest.mark.skipif(_HAS_GYM, reason="reasoning-gym is installed")
def test_reasoning_gym_says_what_to_install() -> None:
    with pytest.raises(MissingExtraError, match=r"pip install 'trainsys\[rl\]'"):
        tasks.find("reasoning_gym.leg_counting")


@_needs_gym
def test_reasoning_gym_makes_and_scores_its_questions_again() -> None:
    spec = questions.parse_spec("reasoning_gym.leg_counting:min_animals=2,max_animals=4")
    question = tasks.ask(spec.name, 5, tasks.parse(spec.parameters))
    assert tasks.regenerate(Question(*dataclasses.astuple(question)[:4], prompt="")) == question
    assert tasks.score(question, tasks.answer_of(question)) == 1 > tasks.score(question, "no")
    for wrong in (
        "reasoning_gym.no_such",
        "reasoning_gym.leg_counting:min_animals=-1",
        "reasoning_gym.leg_counting:x=1",
    ):
        with pytest.raises(TaskError):
            questions.parse_spec(wrong)
    with pytest.raises(TaskError, match="decided by the question"):
        questions.parse_spec("reasoning_gym.leg_counting:seed=1")
