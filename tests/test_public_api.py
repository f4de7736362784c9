"""What a package exports: small, sorted, there, and said in a docstring."""

from __future__ import annotations

import importlib
import inspect
import types
from collections.abc import Sequence

import pytest

from tests.sources import PACKAGES

MAX_NAMES = 32
"""Of one package; more is a sign that it exports its insides."""


def faults(module: types.ModuleType) -> list[str]:
    """Return what is wrong with the exports of a package."""
    name = module.__name__
    exported: Sequence[str] | None = getattr(module, "__all__", None)
    if exported is None:
        return [f"{name} has no __all__"]
    found = []
    if not module.__doc__ or module.__doc__.startswith("Placeholder"):
        found.append(f"{name} does not say what it is")
    if list(exported) != sorted(exported, key=_order):
        found.append(f"{name}.__all__ is not sorted: {sorted(exported, key=_order)}")
    if not 0 < len(exported) <= MAX_NAMES:
        found.append(f"{name} exports {len(exported)} names, 1 to {MAX_NAMES} are")
    for export in exported:
        if export.startswith("_"):
            found.append(f"{name}.{export} is private")
        elif not hasattr(module, export):
            found.append(f"{name}.{export} is not there")
        elif not _documented(getattr(module, export)):
            found.append(f"{name}.{export} has no docstring")
    return found


def _order(name: str) -> tuple[int, str]:
    """Constants, classes, functions: the order that ruff (RUF022) writes."""
    return (0 if name.isupper() else 1 if name[0].isupper() else 2), name


def _documented(thing: object) -> bool:
    if not (inspect.isclass(thing) or callable(thing) or inspect.ismodule(thing)):
        return True  # a constant is documented where it is defined
    doc = (vars(thing).get("__doc__") if inspect.isclass(thing) else thing.__doc__) or ""
    generated = f"{getattr(thing, '__name__', '')}("  # what @dataclass writes where there is none
    return bool(doc.strip()) and not doc.startswith(generated)


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_exports_a_small_documented_sorted_list(package: str) -> None:
    assert not faults(importlib.import_module(package))


def _documented_function() -> None:
    """Do nothing."""


def _bare_function() -> None:
    pass


@pytest.mark.parametrize(
    ("exported", "message"),
    [
        (None, "p has no __all__"),
        (["b", "a"], "p.__all__ is not sorted: ['a', 'b']"),
        (["a", "B"], "p.__all__ is not sorted: ['B', 'a']"),
        (["bare"], "p.bare has no docstring"),
        (["gone"], "p.gone is not there"),
        (["_hidden"], "p._hidden is private"),
        ([], "p exports 0 names, 1 to 32 are"),
    ],
)
def test_a_fault_is_found(exported: list[str] | None, message: str) -> None:
    assert faults(_module(exported)) == [message]


def test_a_good_list_has_no_fault() -> None:
    assert not faults(_module(["B", "a", "b"]))


def test_a_placeholder_says_nothing() -> None:
    module = _module(["a"])
    module.__doc__ = "Placeholder docstring."
    assert faults(module) == ["p does not say what it is"]


def _module(exported: list[str] | None) -> types.ModuleType:
    module = types.ModuleType("p", "A package.")
    members = {
        "a": _documented_function,
        "b": _documented_function,
        "B": 3,
        "bare": _bare_function,
        "_hidden": 1,
    }
    vars(module).update(members)
    if exported is not None:
        vars(module)["__all__"] = exported
    return module
