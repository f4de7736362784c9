"""Recipes and overrides: what loads, where each value comes from, and the exact words for each mistake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trainsys import ConfigError, recipe

MINIMAL = 'name = "r"\nsteps = 10\n'


def write(folder: Path, text: str, name: str = "mine.toml") -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def message(recipes: list[str], overrides: list[str] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        recipe.load(recipes, overrides or [])
    return str(caught.value)


@pytest.mark.parametrize("name", sorted(recipe.shipped()))
def test_every_shipped_recipe_loads_and_says_what_it_is(name: str) -> None:
    resolved = recipe.load([name])
    assert resolved.config.name == name
    assert len(recipe.shipped()[name]) > 20
    assert recipe.shipped()[name].endswith(".")  # a whole sentence: `trainsys recipes` prints no more than this line


def test_files_compose_left_to_right_and_the_command_line_wins(tmp_path: Path) -> None:
    first = write(tmp_path, MINIMAL + "[optim]\nlr = 1e-3\nbeta1 = 0.8\n", "first.toml")
    second = write(tmp_path, "steps = 20\n[optim]\nlr = 2e-3\n", "second.toml")
    resolved = recipe.load([first, second], ["--optim.lr=3e-3"])
    assert (resolved.config.steps, resolved.config.optim.lr, resolved.config.optim.beta1) == (20, 3e-3, 0.8)
    assert resolved.sources["steps"] == "second.toml"
    assert resolved.sources["optim.lr"] == "command line"
    assert resolved.sources["optim.beta1"] == "first.toml"
    assert resolved.sources["optim.beta2"] == "default"


def test_the_config_of_a_run_is_a_recipe_that_repeats_it(tmp_path: Path) -> None:
    config = recipe.load(["tiny"], ["--seed=7", "--metrics.wandb.tags=['a', 'b']"]).config
    path = write(tmp_path, json.dumps({"config": recipe.to_tree(config), "run_id": "x"}), "config.json")
    assert recipe.load([path]).config == config
    assert recipe.from_tree(recipe.to_tree(config)) == config


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("--name=123", "123"),
        ("--data.path=s3://bucket/*.txt", "s3://bucket/*.txt"),
        ("--launch.kind=local", "local"),
        ("--engine.zero_stage=3", 3),
        ("--optim.lr=1", 1.0),
        ("--engine.compile=true", True),
        ("--data.path=a=b", "a=b"),
    ],
)
def test_an_override_is_read_as_its_setting_s_type(override: str, value: object) -> None:
    key = override.removeprefix("--").partition("=")[0]
    leaves = dict(recipe.leaves(recipe.to_tree(recipe.load(["tiny"], [override]).config)))
    assert leaves[key] == value
    assert type(leaves[key]) is type(value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            MINIMAL + "[parallel]\ntenssor = 2\n",
            "mine.toml: parallel.tenssor: unknown key; did you mean 'parallel.tensor'?",
        ),
        (MINIMAL + "[paralel]\ntensor = 2\n", "mine.toml: paralel: unknown key; did you mean 'parallel'?"),
        (MINIMAL + "zzz = 1\n", "mine.toml: zzz: unknown key; `trainsys config tiny` lists every key"),
        ('name = "r"\nsteps = "fifty"\n', "mine.toml: steps: 'fifty' is not an integer"),
        ('name = "r"\nsteps = 1.5\n', "mine.toml: steps: 1.5 is not an integer"),
        (MINIMAL + "[engine]\ncompile = 1\n", "mine.toml: engine.compile: 1 is not true or false"),
        ("name = 3\nsteps = 10\n", "mine.toml: name: 3 is not a text"),
        ('name = "r"\n', "mine.toml: steps: missing; give an integer"),
        (
            MINIMAL + '[engine]\nprecision = "fp8"\n',
            "mine.toml: engine.precision: 'fp8' is not a choice; allowed: 'auto', 'fp32', 'bf16', 'fp16'",
        ),
        (
            MINIMAL + "[engine]\nzero_stage = 4\n",
            "mine.toml: engine.zero_stage: 4 is not a choice; allowed: 0, 1, 2, 3",
        ),
        (
            MINIMAL + "[metrics.wandb]\ntags = [1]\n",
            "mine.toml: metrics.wandb.tags: 1 is not a list of texts",
        ),
        (
            MINIMAL + "optim = 3\n",
            "mine.toml: optim: is a section; set one of its keys, e.g. 'optim.kind'",
        ),
        (
            MINIMAL + "steps = 11\n",
            "mine.toml: duplicate key: Cannot overwrite a value (at line 3, column 11)",
        ),
        (MINIMAL + "seed =\n", "mine.toml: Invalid value (at line 3, column 7)"),
        (
            MINIMAL + "[optim]\nlr = 'x'\nbeta3 = 1\n[engine]\nzer = 1\n",
            "mine.toml: engine.zer: unknown key; `trainsys config tiny` lists every key\n"
            "mine.toml: optim.beta3: unknown key; did you mean 'optim.beta2'?\n"
            "mine.toml: optim.lr: 'x' is not a number",
        ),
    ],
)
def test_a_mistake_in_a_recipe_gets_one_line(tmp_path: Path, text: str, expected: str) -> None:
    assert message([write(tmp_path, text)]) == expected


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["--stepz=5"], "command line: stepz: unknown key; did you mean 'steps'?"),
        (["--steps=abc"], "command line: steps: 'abc' is not an integer"),
        (["--steps=5", "--steps=6"], "command line: steps: given twice; keep one"),
        (["--steps"], "command line: --steps: not an override; write --section.key=value"),
        (["--resum"], "command line: --resum: not an override; write --section.key=value or --resume"),
        (
            ["--parallel=2"],
            "command line: parallel: is a section; set one of its keys, e.g. 'parallel.pipeline'",
        ),
        (
            ["--launch.kind=slurm"],
            "command line: launch.kind: 'slurm' is not a choice; allowed: 'local', 'ray'",
        ),
    ],
)
def test_a_mistake_on_the_command_line_gets_one_line(overrides: list[str], expected: str) -> None:
    assert message(["tiny"], overrides) == expected


def test_a_recipe_that_is_not_there_is_named_with_a_guess(tmp_path: Path) -> None:
    assert message(["tinny"]).startswith("tinny: no such recipe; did you mean 'tiny'?")
    assert message([str(tmp_path / "no.toml")]) == f"{tmp_path / 'no.toml'}: cannot be read: No such file or directory"
    assert message([str(tmp_path)]).endswith("(a file must end in .toml or .json)")


def test_an_unreadable_recipe_is_named(tmp_path: Path) -> None:
    binary = tmp_path / "b.toml"
    binary.write_bytes(b"\xff\xfe\x00")
    assert message([str(binary)]) == f"{binary}: cannot be read: not UTF-8 text"
    assert message([write(tmp_path, "{", "c.json")]).startswith("c.json: line 1: not JSON")
    assert message([write(tmp_path, "{}", "d.json")]).startswith("d.json: config: missing")


def test_the_settings_of_engines_that_are_wrong_in_deepspeed_do_not_exist() -> None:
    """ZenFlow, SuperOffload, Ulysses by configuration and a raw DeepSpeed dict each train wrongly, or not at all."""
    for key in ("zenflow", "super_offload", "sequence_parallel_size", "deepspeed_config", "gradient_cliping"):
        assert f"engine.{key}: unknown key" in message(["tiny"], [f"--engine.{key}=1"])
