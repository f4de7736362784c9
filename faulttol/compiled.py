"""The recorder's part in C++ (`native/recorder.cpp`), which collectives on the CPU pass without Python.

It needs a C++ compiler and half a minute, once an installation of torch: `build()`, or `python -m faulttol build`.
`load()` takes what was built and builds nothing, so that no rank waits for a compiler. Without it the recorder records
the same from Python, at a higher price: a caller in C++, such as the reducer of DistributedDataParallel, finds the
interpreter cold.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from faulttol.errors import RecorderError
from faulttol.operations import ENDS_AT_WAIT, OPERATORS
from faulttol.ring import KIND_NUMBERS, Layout, Ring

_SOURCE = Path(__file__).parent / "native" / "recorder.cpp"
_COMPILERS = ("c++", "g++", "clang++")
_FLAGS = ("-std=c++20", "-O2", "-fPIC", "-shared")
_TIMEOUT_S = 600.0
_REMEDY = "install a C++ compiler (Debian: apt install g++), or install(native=False), which records from Python"
_OPERATORS = tuple(each for each in OPERATORS if each.kind not in ENDS_AT_WAIT | {"monitored_barrier"})
"""Those whose gloo work has a future that tells its end."""
KINDS = frozenset(each.kind for each in _OPERATORS)
"""Kinds that are recorded here where they are of the CPU."""


class _Layout(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint64) for name in Layout._fields)


class _Operation(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        *((name, ctypes.c_int32) for name in ("kind", "tensors", "group", "peer", "device")),
    )


def build() -> Path:
    """Build the library unless it is there for this torch and compiler; return its path.

    Several processes may do so at once: each builds under a name of its own and renames it.

    Raises: RecorderError when there is no compiler or it failed; what to do is in the message.
    """
    path = built()
    if path is not None:
        return path
    path = library_path()
    compiler = next((found for name in _COMPILERS if (found := shutil.which(name))), None)
    if compiler is None:
        raise RecorderError(f"{_SOURCE.name}: none of {', '.join(_COMPILERS)} is on the path; {_REMEDY}")
    torch_folder = Path(torch.__file__).parent
    include = torch_folder / "include"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".building-") as folder:
            made = Path(folder) / path.name
            command = [compiler, *_FLAGS, f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
            for each in (include, include / "torch" / "csrc" / "api" / "include"):
                command += ["-isystem", str(each)]
            command += [str(_SOURCE), "-o", str(made), f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-ltorch", "-lc10"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
            if done.returncode:
                raise RecorderError(f"{_SOURCE.name}: {compiler} failed; {_REMEDY}\n{done.stderr.strip()}")
            made.replace(path)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RecorderError(f"{_SOURCE.name}: cannot build {path}: {error}; {_REMEDY}") from error
    return path


def built() -> Path | None:
    """Return the library if it was built for this torch, where this user may see it, else None."""
    try:
        path = library_path()
        return path if path.exists() else None
    except (RecorderError, OSError):
        return None


def load() -> Library | None:
    """Return what was `built`, or None.

    Raises: RecorderError when it cannot be loaded.
    """
    path = built()
    return None if path is None else Library(path)


class Library:
    """The functions of the library; see there."""

    def __init__(self, path: Path) -> None:
        try:
            functions = ctypes.PyDLL(str(path))  # all of them are short, and none waits for Python's lock
        except OSError as error:
            raise RecorderError(f"{path}: {error}; remove the file and build it again, or {_REMEDY}") from error

        def function(name: str, result: Any, *arguments: Any) -> Any:
            found = getattr(functions, f"faulttol_{name}")
            found.restype, found.argtypes = result, arguments
            return found

        who, pointer, number, long = ctypes.c_uint64, ctypes.c_void_p, ctypes.c_int, ctypes.c_uint64
        self.error = function("error", ctypes.c_char_p)
        self.open = function("open", who, ctypes.c_char_p, pointer, pointer, number)
        self.close = function("close", None, who)
        self.switch_off = function("switch_off", None, who)
        self.place = function("place", None, who, number, number)
        self.claim = function("claim", long, who)
        self.know = function("know", pointer, who, number, number, long, pointer, number)
        self.forget = function("forget", None, who, pointer)
        self.count = function("count", long, pointer)
        self.num_open = function("num_open", ctypes.c_int64, who)
        numbers = (ctypes.c_double, ctypes.c_double)
        self.mark = function("mark", None, who, number, number, number, long, *numbers, number)


class Compiled:
    """Records collectives of the CPU into a ring, from C++, until `close()`."""

    def __init__(self, library: Library, ring: Ring) -> None:
        """Raises: RecorderError when the library cannot write this ring, or this torch does not take its kernels."""
        self._library = library
        places = [
            _Operation(
                each.name.encode(),
                KIND_NUMBERS[each.kind],
                *(-1 if place is None else place for place in (each.tensors, each.group, each.peer, each.device)),
            )
            for each in _OPERATORS
        ]
        operations = (_Operation * len(places))(*places)
        self._number = library.open(
            str(ring.path).encode(), ctypes.byref(_Layout(*ring.layout)), ctypes.byref(operations), len(places)
        )
        if not self._number:
            raise RecorderError(f"{_SOURCE.name}: {library.error().decode()}; {_REMEDY}")
        ring.share(self._claim)
        self.mark: Callable[..., None] = functools.partial(library.mark, self._number)
        """Takes (kind, step, phase, tokens + 1 or 0, loss, gradient norm, which of the two are there)."""
        self.place: Callable[[int, int], None] = functools.partial(library.place, self._number)
        """Takes (step, phase): where what begins from now on is."""

    @property
    def num_open(self) -> int:
        """How many operations that began here go on."""
        return int(self._library.num_open(self._number))

    def know(
        self, names: tuple[int, int], ranks: Sequence[int], num_collectives: int
    ) -> tuple[Callable[[], int], Callable[[], None]] | None:
        """Tell of the group and dtype of the call that this thread is in, if it came from the library.

        Returns: what counts one more collective of the group, and what forgets the group, to be called when its
        object is gone; None for any other call.
        """
        of_group = (ctypes.c_int64 * len(ranks))(*ranks)
        counter = self._library.know(self._number, *names, num_collectives, ctypes.byref(of_group), len(ranks))
        if counter is None:
            return None
        return functools.partial(self._library.count, counter), functools.partial(
            self._library.forget, self._number, counter
        )

    def switch_off(self) -> None:
        """Record nothing any more, without taking anything back."""
        self._library.switch_off(self._number)

    def close(self) -> None:
        """Take the kernels out of torch; what goes on still writes its end. Idempotent; later calls do nothing."""
        self._library.close(self._number)

    def _claim(self) -> int:
        index = int(self._library.claim(self._number))
        if not index:
            raise RecorderError("the recorder was closed meanwhile")
        return index


def library_path() -> Path:
    """Return where the library is for this torch, or will be once it is built, in the user's cache.

    Raises: RecorderError for a user without a home.
    """
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "faulttol"
    except RuntimeError as error:
        raise RecorderError(f"no folder to build {_SOURCE.name} in: {error} Set XDG_CACHE_HOME") from error
    abi = str(torch.compiled_with_cxx11_abi())
    # Hosts that share a home may have another C library, which would not load what is newer than itself.
    host = (platform.machine(), *platform.libc_ver())
    parts = (torch.__version__, str(torch.version.git_version), abi, *host, *_FLAGS)
    digest = hashlib.sha256(_SOURCE.read_bytes() + "\0".join(parts).encode()).hexdigest()[:20]
    return folder / f"recorder-{digest}.so"
