"""Other libraries' pickles, read without running what they say.

A pickle may name any function and have it called. Here only names that the caller lists are looked up, and
instances of classes become `Record`s of their attributes, so that nothing of the other library is imported or run.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

import torch

from checkpoint.errors import CorruptCheckpoint, UntrustedPickle

_REMEDY = "if you trust who wrote it, trust_pickle=True (--trust-pickle) reads it all the same"


class Record:
    """Stands for an instance of another library's class: what it was called with, and its attributes."""

    args: tuple[Any, ...]
    state: Any

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {"state": state})


def load_metadata(data: IO[bytes], source: str, classes: Iterable[str], *, trust: bool) -> Any:
    """Return what a bare pickle holds.

    Args:
        data: the pickle.
        source: what messages call it.
        classes: full names of the classes whose instances become Records.
        trust: whether names that are not listed are looked up, and so may run.

    Raises:
        UntrustedPickle: it names something that is not listed. CorruptCheckpoint: it is no pickle.
    """
    try:
        return _Restricted(data, source, classes, trust).load()
    except UntrustedPickle:
        raise
    except Exception as error:  # a damaged pickle may raise anything
        raise CorruptCheckpoint(f"{source}: cannot be read as a pickle ({type(error).__name__}: {error})") from error


def load_torch(data: Path | IO[bytes], source: str, classes: Mapping[str, Any], *, trust: bool) -> Any:
    """Return what torch.save wrote, its tensors on the CPU; those of a file are mapped, not read, where possible.

    Args:
        data: a path, or an open file.
        source: what messages call it.
        classes: full names, and what stands for them: called with their arguments, or made and given their state.
        trust: whether other names are looked up, and so may run.

    Raises:
        UntrustedPickle, CorruptCheckpoint: as `load_metadata`.
    """
    mapped = isinstance(data, Path) and zipfile.is_zipfile(data)
    try:
        with torch.serialization.safe_globals([(stand_in, name) for name, stand_in in classes.items()]):
            return torch.load(data, map_location="cpu", mmap=mapped or None, weights_only=not trust)
    except pickle.UnpicklingError as error:
        refused = _refused(str(error))
        if refused is None:
            raise CorruptCheckpoint(f"{source}: is not a file that torch.save wrote, or was damaged") from error
        raise UntrustedPickle(f"{source}: {refused}; {_REMEDY}") from error
    except (RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        raise CorruptCheckpoint(f"{source}: cannot be read ({type(error).__name__}: {error})") from error


def record_class(name: str) -> type[Record]:
    """Return a new class of Records, whose name tells what they stand for."""
    return type(name.rpartition(".")[2], (Record,), {})


class _Restricted(pickle.Unpickler):
    def __init__(self, data: IO[bytes], source: str, classes: Iterable[str], trust: bool) -> None:
        super().__init__(data)
        self._source = source
        self._trust = trust
        self._known: dict[str, Any] = {name: record_class(name) for name in classes}
        self._known |= {"torch.Size": tuple, "collections.OrderedDict": OrderedDict}

    def find_class(self, module: str, name: str, /) -> Any:
        full = f"{module}.{name}"
        if full in self._known:
            return self._known[full]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if self._trust:
            return super().find_class(module, name)
        raise UntrustedPickle(f"{self._source}: needs {full}, which may run code; {_REMEDY}")


def _refused(message: str) -> str | None:
    """Return what torch refused to do, out of its message; None if it could not make sense of the bytes."""
    found = re.search(r"(?:unsupported|Unsupported global:) GLOBAL ([\w.]+)", message)
    if found:
        return f"needs {found[1]}, which may run code"
    return "calls what may run code" if re.search(r"Trying to|Can only", message) else None
