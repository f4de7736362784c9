"""State dicts of other libraries taken apart: their tensors by number, the rest as plain values; and back.

`checkpoint.objects` keeps None, bool, int, float, str, bytes, list, tuple and dict. What else is common in state
dicts becomes `{"~": kind, "value": ...}`: tensors, sizes, dtypes, devices, ordered dicts, sets, and instances of
classes that the caller allows. Nothing is pickled unless the caller says so, and nothing is unpickled unless the
caller says that too.
"""

from __future__ import annotations

import enum
import importlib
import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from checkpoint.errors import CorruptCheckpoint, InvalidState, UntrustedPickle

_TAG = "~"
_PLAIN = (bool, int, float, str, bytes)


class Packer:
    """Takes values apart; collects their tensors."""

    def __init__(self, classes: Iterable[str] = (), *, allow_pickle: bool = False) -> None:
        """`classes` are the full names of classes whose instances are kept by their attributes, enums by value."""
        self.tensors: list[torch.Tensor] = []
        """Found so far; a packed value refers to them by their place here."""
        self.names: list[str] = []
        """Where each was found."""
        self.pickled: list[str] = []
        """Where something had to be pickled."""
        self._classes = frozenset(classes)
        self._allow_pickle = allow_pickle

    def pack(self, value: Any, source: str) -> Any:
        """Return the value as `checkpoint.objects` keeps it.

        Raises InvalidState, naming the place of what only pickle would keep, unless that is allowed.
        """
        if isinstance(value, torch.Tensor):
            self.tensors.append(value)
            self.names.append(source)
            return {_TAG: "tensor", "value": len(self.tensors) - 1}
        kind = type(value)
        if value is None or kind in _PLAIN:
            return value
        if kind is list or kind is tuple:
            return kind(self.pack(v, f"{source}[{i}]") for i, v in enumerate(value))
        if kind is dict and _TAG not in value:
            return {k: self.pack(v, f"{source}[{k!r}]") for k, v in value.items()}
        if kind is dict or kind is OrderedDict:
            name = "dict" if kind is dict else "ordered"
            return {_TAG: name, "value": [(k, self.pack(v, f"{source}[{k!r}]")) for k, v in value.items()]}
        if kind is set or kind is frozenset:
            return {_TAG: kind.__name__, "value": [self.pack(v, source) for v in sorted(value, key=repr)]}
        for name, (cls, _, down) in _SIMPLE.items():
            if kind is cls:
                return {_TAG: name, "value": down(value)}
        return self._instance(value, source)

    def _instance(self, value: Any, source: str) -> Any:
        name = f"{type(value).__module__}.{type(value).__qualname__}"
        if name in self._classes:
            if isinstance(value, enum.Enum):
                return {_TAG: "enum", "class": name, "value": value.value}
            return {_TAG: "object", "class": name, "value": self.pack(dict(vars(value)), source)}
        if not self._allow_pickle:
            raise InvalidState(
                f"{source}: is a {name}, which can only be pickled; leave it out, make it of plain values and "
                "tensors, or allow pickle for those who will trust this checkpoint"
            )
        self.pickled.append(source)
        try:
            return {_TAG: "pickle", "value": pickle.dumps(value)}
        except (pickle.PicklingError, TypeError, AttributeError) as error:
            raise InvalidState(f"{source}: is a {name}, which cannot be pickled either ({error})") from error


class Unpacker:
    """Puts values together again."""

    def __init__(
        self, tensors: Callable[[int], torch.Tensor], classes: Iterable[str] = (), *, trust_pickle: bool = False
    ) -> None:
        """`tensors` gives a tensor by its place in `Packer.tensors`; `classes` are the only ones ever imported."""
        self._tensors = tensors
        self._classes = frozenset(classes)
        self._trust_pickle = trust_pickle

    def unpack(self, value: Any, source: str) -> Any:
        """Return the value that `Packer.pack` took apart. Raises CorruptCheckpoint, UntrustedPickle."""
        if isinstance(value, list | tuple):
            return type(value)(self.unpack(v, source) for v in value)
        if not isinstance(value, dict):
            return value
        if _TAG not in value:
            return {k: self.unpack(v, f"{source}[{k!r}]") for k, v in value.items()}
        try:
            return self._tagged(value[_TAG], value["value"], value, source)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise CorruptCheckpoint(f"{source}: holds a malformed {value[_TAG]!r} ({error})") from error

    def _tagged(self, kind: str, inner: Any, value: Mapping[str, Any], source: str) -> Any:
        if kind == "tensor":
            return self._tensors(inner)
        if kind in ("dict", "ordered"):
            pairs = [(k, self.unpack(v, f"{source}[{k!r}]")) for k, v in inner]
            return dict(pairs) if kind == "dict" else OrderedDict(pairs)
        if kind in ("set", "frozenset"):
            items = [self.unpack(v, source) for v in inner]
            return set(items) if kind == "set" else frozenset(items)
        if kind in _SIMPLE:
            return _SIMPLE[kind][1](inner)
        if kind in ("enum", "object"):
            return self._instance(kind, inner, value["class"], source)
        if kind == "pickle":
            if not self._trust_pickle:
                raise UntrustedPickle(f"{source}: was pickled, and unpickling runs code; trust_pickle=True does it")
            return pickle.loads(inner)
        raise CorruptCheckpoint(f"{source}: holds a value of unknown kind {kind!r}")

    def _instance(self, kind: str, inner: Any, name: str, source: str) -> Any:
        if name not in self._classes:
            raise UntrustedPickle(f"{source}: is a {name}, which is not among the classes that are allowed here")
        module, _, cls_name = name.rpartition(".")
        cls = getattr(importlib.import_module(module), cls_name)
        if kind == "enum":
            return cls(inner)
        instance = cls.__new__(cls)
        vars(instance).update(self.unpack(inner, source))
        return instance


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"torch.{name} is no dtype")
    return found


_SIMPLE: dict[str, tuple[type, Callable[[Any], Any], Callable[[Any], Any]]] = {
    "size": (torch.Size, torch.Size, list),
    "dtype": (torch.dtype, _dtype, lambda d: str(d).removeprefix("torch.")),
    "device": (torch.device, torch.device, str),
    "complex": (complex, lambda pair: complex(*pair), lambda c: [c.real, c.imag]),
}
"""Kind -> its class, how it is made of a plain value, and how a plain value is made of it."""
