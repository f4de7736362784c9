"""State dicts of other libraries, taken apart and put together again."""

from __future__ import annotations

import enum
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint import CorruptCheckpoint, InvalidState, objects
from checkpoint.errors import UntrustedPickle
from checkpoint.tree import Packer, Unpacker


class Stage(enum.IntEnum):
    """An enum of another library."""

    ONE = 1


@dataclass
class Fragment:
    """A class of another library."""

    numel: int
    inner: Any


class Other:
    """A class that nobody allowed."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Other)

    __hash__ = None  # type: ignore[assignment]


ALLOWED = tuple(f"{__name__}.{cls.__name__}" for cls in (Stage, Fragment))

VALUES: list[Any] = [
    None,
    {"a": [1, (2.5, b"x"), {"~": "a tag of its own"}], 3: True},
    OrderedDict([("b", 1), ("a", OrderedDict())]),
    {"size": torch.Size([2, 0]), "dtype": torch.bfloat16, "device": torch.device("cuda", 1), "z": complex(1, -2)},
    [{1, 2}, frozenset({"a"}), float("inf")],
    [Stage.ONE, Fragment(3, (Stage.ONE, Fragment(4, None)))],
]


def there_and_back(
    value: Any, *, classes: tuple[str, ...] = ALLOWED, pickled: bool = False, trusted: bool = False
) -> Any:
    """What comes back of a value that went through a file."""
    packer = Packer(classes, allow_pickle=pickled)
    text = objects.encode(packer.pack(value, "value"), "test")
    tensors = [tensor.clone() for tensor in packer.tensors]
    return Unpacker(tensors.__getitem__, ALLOWED, trust_pickle=trusted).unpack(objects.decode(text, "test"), "value")


@pytest.mark.parametrize("value", VALUES, ids=range(len(VALUES)))
def test_a_value_comes_back_equal_and_of_its_type(value: Any):
    found = there_and_back(value)
    assert found == value
    assert repr(found) == repr(value)
    assert type(found) is type(value)


def test_tensors_come_back_from_where_they_were_put():
    value = {"w": torch.arange(3), "inner": [OrderedDict(m=torch.ones(2)), Fragment(1, torch.zeros(1))]}
    packer = Packer(ALLOWED)
    packer.pack(value, "state")
    assert packer.names == ["state['w']", "state['inner'][0]['m']", "state['inner'][1]['inner']"]
    found = there_and_back(value)
    assert torch.equal(found["w"], value["w"])
    assert torch.equal(found["inner"][0]["m"], torch.ones(2))
    assert torch.equal(found["inner"][1].inner, torch.zeros(1))


def test_what_only_pickle_keeps_is_refused_by_its_place():
    with pytest.raises(
        InvalidState, match=r"^value\['a'\]\[0\]: is a tests\.test_checkpoint\.test_tree\.Other, which can"
    ):
        there_and_back({"a": [Other()]})


def test_what_cannot_even_be_pickled_is_refused():
    with pytest.raises(InvalidState, match="which cannot be pickled either"):
        there_and_back(lambda: 0, pickled=True)


def test_a_pickle_is_kept_and_read_only_when_both_sides_say_so():
    packer = Packer(allow_pickle=True)
    packer.pack({"a": Path("x"), "b": 1}, "state")
    assert packer.pickled == ["state['a']"]
    with pytest.raises(UntrustedPickle, match=r"value\['a'\]: was pickled"):
        there_and_back({"a": Path("x")}, pickled=True)
    assert there_and_back({"a": Path("x")}, pickled=True, trusted=True) == {"a": Path("x")}


@pytest.mark.parametrize(
    ("value", "error"),
    [
        ({"~": "nothing known", "value": 1}, CorruptCheckpoint),
        ({"~": "size"}, CorruptCheckpoint),
        ({"~": "dtype", "value": "load"}, CorruptCheckpoint),
        ({"~": "tensor", "value": 7}, CorruptCheckpoint),
        ({"~": "ordered", "value": [1]}, CorruptCheckpoint),
        ({"~": ["a"], "value": 1}, CorruptCheckpoint),
        ({"~": "object", "class": "os.system", "value": {}}, UntrustedPickle),
        ({"~": "enum", "class": "subprocess.Popen", "value": ["true"]}, UntrustedPickle),
        ({"~": "pickle", "value": b"cos\nsystem\n."}, UntrustedPickle),
    ],
)
def test_a_hostile_tree_is_refused(value: Any, error: type[Exception]):
    with pytest.raises(error):
        Unpacker([].__getitem__, ALLOWED).unpack(value, "value")
