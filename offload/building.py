"""Shared libraries from the C and CUDA sources of this package, built at first use into the user's cache."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from offload.errors import KernelError

_SOURCES = Path(__file__).parent / "native"
_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one source becomes a library."""

    source: str
    """Name of the file in `offload/native`."""
    compilers: tuple[str, ...]
    """The first that is on the path is used."""
    flags: tuple[str, ...]
    remedy: str
    """What the user can do where there is none of them."""


HOST = Recipe(
    "adamw.c",
    ("cc", "gcc", "clang"),
    (
        *("-std=gnu11", "-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
        # Of the same bits; on a processor whose cores read memory slowly a fourth faster.
        *(("-mprefer-vector-width=512",) if platform.machine() in ("x86_64", "AMD64") else ()),
        *("-shared", "-fPIC", "-lm", "-lpthread"),
    ),
    "install a C compiler (Debian: apt install gcc), or choose kernel='torch', which is several times slower",
)

DIGEST = Recipe(
    "digest.c",
    ("cc", "gcc", "clang"),
    ("-std=gnu11", "-O3", "-march=native", "-shared", "-fPIC"),
    "install a C compiler (Debian: apt install gcc), or let torch take digests",
)

URING = Recipe(
    "uring.c",
    ("cc", "gcc", "clang"),
    ("-std=gnu11", "-O2", "-shared", "-fPIC"),
    "install a C compiler (Debian: apt install gcc), or choose io='threads'",
)


def cuda_recipe(capability: tuple[int, int]) -> Recipe:
    """Return the recipe for devices of a compute capability."""
    architecture = f"-arch=sm_{capability[0]}{capability[1]}"
    return Recipe(
        "adamw.cu",
        ("nvcc", "/usr/local/cuda/bin/nvcc"),
        ("-std=c++17", "-O3", architecture, "-fmad=false", "-shared", "-Xcompiler", "-fPIC"),
        "install the CUDA toolkit or put its nvcc on the path, or choose kernel='torch', which is slower",
    )


def library(recipe: Recipe, cache: Path | None = None) -> ctypes.CDLL:
    """Return the library, which is built if the cache does not have it for this source, compiler and machine.

    Several processes may do so at once: each builds under a name of its own and renames it.

    Raises:
        KernelError: there is no compiler, or it failed; what to do is in the message.
    """
    folder = cache or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "offload"
    source = _SOURCES / recipe.source
    compiler = next((found for name in recipe.compilers if (found := shutil.which(name))), None)
    if compiler is None:
        raise KernelError(f"{recipe.source}: none of {', '.join(recipe.compilers)} is on the path; {recipe.remedy}")
    key = "\0".join([compiler, *recipe.flags, platform.machine(), _processor()])
    digest = hashlib.sha256(source.read_bytes() + key.encode()).hexdigest()[:20]
    target = folder / f"{source.stem}-{digest}.so"
    if not target.exists():
        _build([compiler, *recipe.flags], source, target, recipe.remedy)
    try:
        return ctypes.CDLL(str(target))
    except OSError as error:
        raise KernelError(f"{target}: {error}; remove the file to build it again, or {recipe.remedy}") from error


def _build(command: list[str], source: Path, target: Path, remedy: str) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".building-") as folder:
            made = Path(folder) / target.name
            done = subprocess.run(
                [command[0], "-o", str(made), str(source), *command[1:]],
                capture_output=True,
                text=True,
                timeout=_TIMEOUT_S,
                check=False,
            )
            if done.returncode:
                raise KernelError(f"{source.name}: {command[0]} failed; {remedy}\n{done.stderr.strip()}")
            made.replace(target)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelError(f"{source.name}: cannot build {target}: {error}; {remedy}") from error


def _processor() -> str:
    """Return the processor's features: a library for this one may not run on another that shares the cache."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
