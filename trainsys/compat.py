"""Third-party behaviour that is changed rather than configured, each change tied to the versions it was made for."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from trainsys.errors import TrainsysError

_DEEPSPEED = "0.19."
_SHM_OP = "deepspeed_shm_comm"


def quiet_deepspeed(deepspeed: Any) -> None:
    """Keep DeepSpeed from compiling at start, and from warning about its own calls.

    When a process group starts on CPU it compiles a shared-memory collective: only inference uses it, it needs a C++
    compiler and about a minute, and a build that is killed leaves a lock on which every later run hangs. Call after
    importing `deepspeed`, before its first process group.

    Raises:
        TrainsysError: another version of DeepSpeed is installed than the one this was made for.
    """
    if not deepspeed.__version__.startswith(_DEEPSPEED):
        raise TrainsysError(
            f"deepspeed {deepspeed.__version__} is installed; its adapter was made for {_DEEPSPEED}x: "
            "pip install 'trainsys[train]'"
        )
    deepspeed.ops.__compatible_ops__[_SHM_OP] = False
    # It calls collectives under names that torch 2.13 has renamed.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)


@contextlib.contextmanager
def compiled_when_called(compiler: Any) -> Iterator[None]:
    """Let what DeepSpeed's `runtime.compiler` decorates inside the block be compiled when it is first called.

    DeepSpeed imports its Muon to look at any optimizer, and as that is decorated, torch imports all of its compiler: a
    second at the start of every rank, for functions that only DeepSpeed's own Muon calls.
    """
    compile_now = compiler.compile
    compiler.compile = lambda: lambda function: _compiled_late(compile_now(), function)
    try:
        yield
    finally:
        compiler.compile = compile_now


def _compiled_late(
    compile_now: Callable[[Callable[..., Any]], Callable[..., Any]], function: Callable[..., Any]
) -> Callable[..., Any]:
    compiled = functools.cache(lambda: compile_now(function))

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return compiled()(*args, **kwargs)

    return call
