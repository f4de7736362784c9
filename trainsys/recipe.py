"""Recipes and overrides to one RunConfig, with the source of every value.

A recipe is a sparse TOML file; several compose left to right, then `--section.key=value` overrides apply:
defaults < files in order < command line. A `config.json` that a run wrote is a recipe too.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from trainsys.config import RunConfig
from trainsys.errors import ConfigError, MissingExtraError

COMMAND_LINE = "command line"
DEFAULT = "default"

Tree = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Resolved:
    """A validated configuration and where each value came from."""

    config: RunConfig
    sources: Mapping[str, str]
    """Dotted key -> file name, "command line" or "default"; one entry per leaf of `config`."""


def shipped() -> dict[str, str]:
    """Return the recipes in this package: name -> first comment line."""
    found = {}
    for entry in sorted(resources.files("trainsys.recipes").iterdir(), key=lambda entry: entry.name):
        if entry.name.endswith(".toml"):
            first = entry.read_text(encoding="utf-8").partition("\n")[0]
            found[entry.name.removesuffix(".toml")] = first.lstrip("# ").strip()
    return found


def load(recipes: Sequence[str], overrides: Sequence[str] = ()) -> Resolved:
    """Return the configuration that `recipes` (names or paths) and `overrides` (`--key=value`) describe.

    Raises:
        ConfigError: every unknown key, wrong type, bad choice, missing key and unreadable file, all at once.
    """
    merged: Tree = {}
    sources: dict[str, str] = {}
    problems: list[str] = []
    for recipe in recipes:
        source, tree = _read_recipe(recipe)
        problems += _unknown_keys(tree, source)
        _merge(merged, tree, source, sources)
    tree, override_problems = _parse_overrides(overrides)
    problems += override_problems
    _merge(merged, tree, COMMAND_LINE, sources)
    last = _source_of(recipes[-1]) if recipes else COMMAND_LINE
    config = _validate(_known(merged), sources, last, problems)
    return Resolved(config=config, sources={key: sources.get(key, DEFAULT) for key, _ in leaves(to_tree(config))})


def to_tree(config: RunConfig) -> Tree:
    """Return `config` as nested dicts of JSON values."""
    return dataclasses.asdict(config)


def from_tree(tree: Mapping[str, Any], source: str = "config") -> RunConfig:
    """Return the configuration of a tree that `to_tree` made.

    Raises:
        ConfigError: as `load`.
    """
    return _validate(_known(tree), {}, source, _unknown_keys(tree, source))


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of every value in `tree` that is not itself a section."""
    for key, value in tree.items():
        dotted = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from leaves(value, f"{dotted}.")
        else:
            yield dotted, value


@functools.cache  # to evaluate annotations takes 10 ms, and loading a recipe asks some ten times
def schema(section: type[Any] = RunConfig, prefix: str = "") -> Mapping[str, Any]:
    """Return dotted key -> annotated type of every leaf that a recipe may set."""
    hints = typing.get_type_hints(section)
    keys: dict[str, Any] = {}
    for field in dataclasses.fields(section):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            keys |= schema(hint, f"{prefix}{field.name}.")
        else:
            keys[f"{prefix}{field.name}"] = hint
    return types.MappingProxyType(keys)


def _source_of(recipe: str) -> str:
    """Return how messages call a recipe."""
    path = Path(recipe)
    return path.name if path.suffix in (".toml", ".json") else f"{recipe}.toml"


def _read_recipe(recipe: str) -> tuple[str, Tree]:
    """Return (name for messages, tree) of a shipped recipe's name or a path to TOML or a run's config.json."""
    path = Path(recipe)
    if path.suffix not in (".toml", ".json"):
        names = shipped()
        if "=" in recipe:
            raise ConfigError([f"{COMMAND_LINE}: {recipe}: neither a recipe nor an override; write --{recipe}"])
        if recipe not in names:
            near = difflib.get_close_matches(recipe, names, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"shipped: {', '.join(names)}"
            raise ConfigError([f"{recipe}: no such recipe; {hint} (a file must end in .toml or .json)"])
        text = (resources.files("trainsys.recipes") / f"{recipe}.toml").read_text(encoding="utf-8")
        return f"{recipe}.toml", _parse_toml(f"{recipe}.toml", text)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError([f"{recipe}: cannot be read: {reason}"]) from error
    if path.suffix == ".toml":
        return path.name, _parse_toml(path.name, text)
    try:
        tree = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError([f"{path.name}: line {error.lineno}: not JSON: {error.msg}"]) from error
    if not isinstance(tree, dict) or not isinstance(tree.get("config"), dict):
        raise ConfigError([f"{path.name}: config: missing; a JSON recipe is the config.json of a run"])
    return path.name, tree["config"]


def _parse_toml(source: str, text: str) -> Tree:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        message = str(error)
        if "overwrite" in message or "declare" in message:
            message = f"duplicate key: {message}"
        raise ConfigError([f"{source}: {message}"]) from error


def _merge(into: Tree, tree: Mapping[str, Any], source: str, sources: dict[str, str], prefix: str = "") -> None:
    """Lay `tree` over `into`, noting `source` for every leaf it sets."""
    for key, value in tree.items():
        dotted = f"{prefix}{key}"
        if isinstance(value, Mapping):
            section = into.setdefault(key, {})
            if isinstance(section, dict):
                _merge(section, value, source, sources, f"{dotted}.")
                continue
        into[key] = value
        sources[dotted] = source


def _unknown_keys(tree: Mapping[str, Any], source: str) -> list[str]:
    keys = schema()
    sections = {key.rpartition(".")[0] for key in keys} | {""}
    problems = []

    def visit(node: Mapping[str, Any], prefix: str) -> None:
        for key, value in node.items():
            dotted = f"{prefix}{key}"
            if dotted in keys:
                continue
            if not key or dotted not in sections:
                problems.append(f"{source}: {dotted}: {_unknown(dotted, [*keys, *sections])}")
            elif isinstance(value, Mapping):
                visit(value, f"{dotted}.")
            else:
                problems.append(f"{source}: {dotted}: is a section; set one of its keys, e.g. '{_first(keys, dotted)}'")

    visit(tree, "")
    return problems


def _known(tree: Mapping[str, Any], prefix: str = "") -> Tree:
    """Return `tree` without unknown keys, so that the rest can be checked as well."""
    keys = schema()
    kept: Tree = {}
    for key, value in tree.items():
        dotted = f"{prefix}{key}"
        if dotted in keys:
            kept[key] = value
        elif isinstance(value, Mapping) and any(known.startswith(f"{dotted}.") for known in keys):
            kept[key] = _known(value, f"{dotted}.")
    return kept


def _unknown(key: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(key, [k for k in known if k], n=1, cutoff=0.8)
    return f"unknown key; did you mean '{near[0]}'?" if near else "unknown key; `trainsys config tiny` lists every key"


def _first(keys: Mapping[str, Any], section: str) -> str:
    return next(key for key in keys if key.startswith(f"{section}."))


def _parse_overrides(overrides: Sequence[str]) -> tuple[Tree, list[str]]:
    """Return the tree that `--section.key=value` arguments describe, and what is wrong with them."""
    keys = schema()
    tree: Tree = {}
    problems: list[str] = []
    seen: set[str] = set()
    for argument in overrides:
        key, equals, text = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or not equals:
            meant = " or --resume" if difflib.get_close_matches(argument, ["--resume"], cutoff=0.7) else ""
            problems.append(f"{COMMAND_LINE}: {argument}: not an override; write --section.key=value{meant}")
        elif key in seen:
            problems.append(f"{COMMAND_LINE}: {key}: given twice; keep one")
        elif key not in keys:
            problems += _unknown_keys(_nest(key, None), COMMAND_LINE)
        else:
            try:
                _graft(tree, key, _parse_value(text, keys[key]))
            except tomllib.TOMLDecodeError:
                problems.append(f"{COMMAND_LINE}: {key}: {text!r} is not {_describe(keys[key])}")
        seen.add(key)
    return tree, problems


def _parse_value(text: str, hint: Any) -> Any:
    """Return `text` as TOML, or as it stands where the key holds text (so that quotes are not needed)."""
    choices = typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ()
    if hint is str or (choices and all(isinstance(choice, str) for choice in choices)):
        return text
    return tomllib.loads(f"value = {text}")["value"]


def _nest(key: str, value: Any) -> Tree:
    tree: Tree = {}
    _graft(tree, key, value)
    return tree


def _graft(tree: Tree, key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
    tree[last] = value


def _validate(tree: Tree, sources: Mapping[str, str], default_source: str, problems: Sequence[str]) -> RunConfig:
    """Return `tree` as a RunConfig if it is one and there are no other `problems`."""
    try:
        from pydantic import ValidationError
    except ImportError as error:
        raise MissingExtraError("reading a recipe", "train") from error
    try:
        # JSON mode: strict about values, yet builds the nested dataclasses from plain tables.
        config: RunConfig = _adapter().validate_json(json.dumps(tree, default=str))
    except ValidationError as error:
        keys, found = schema(), list(problems)
        for item in error.errors():
            key = ".".join(part for part in item["loc"] if isinstance(part, str))
            found.append(f"{sources.get(key, default_source)}: {key}: {_translate(item, keys.get(key))}")
        raise ConfigError(found) from error
    if problems:
        raise ConfigError(problems)
    return config


@functools.cache  # 50 ms to make, 0.1 ms to use
def _adapter() -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(RunConfig)


def _translate(item: Any, hint: Any) -> str:
    if item["type"] in ("missing", "missing_argument"):
        return f"missing; give {_describe(hint)}"
    if item["type"] == "literal_error":
        return f"{item['input']!r} is not a choice; allowed: {', '.join(map(repr, typing.get_args(hint)))}"
    if hint is None:
        return str(item["msg"])
    return f"{item['input']!r} is not {_describe(hint)}"


def _describe(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return f"one of {', '.join(map(repr, typing.get_args(hint)))}"
    if isinstance(hint, types.GenericAlias):
        return "a list of texts"
    return {int: "an integer", float: "a number", bool: "true or false", str: "a text"}.get(hint, "a section")
