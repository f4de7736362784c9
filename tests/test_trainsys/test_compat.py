"""What is changed of third parties, in ranks that have not changed it before."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import torch

from tests.ranks import run_ranks
from trainsys.deepspeed_setup import import_deepspeed


def _compile_recorded(rank: int, world_size: int) -> dict[str, Any]:
    """Import DeepSpeed anew with a compiler that is watched; what was compiled before and after calls."""
    for name in [name for name in sys.modules if name.startswith("deepspeed.runtime.zero.muon")]:
        del sys.modules[name]
    compiled: list[str] = []
    real: Any = torch.compile

    def watched(function: Any, **options: Any) -> Any:
        compiled.append(function.__name__)
        return real(function, backend="eager", **options)

    torch.compile = watched
    import_deepspeed("cpu")
    muon = importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    found: dict[str, Any] = {"by importing": list(compiled)}
    gradient, momentum = torch.randn(4, 4, dtype=torch.float64), torch.zeros(4, 4, dtype=torch.float64)
    found["update"] = muon.muon_update(gradient, momentum).shape
    found["update"] = muon.muon_update(gradient, momentum).shape
    found["by calling"] = list(compiled)
    found["inductor"] = "torch._inductor.compile_fx" in sys.modules
    return found


def test_deepspeed_s_muon_is_compiled_when_it_is_called_and_not_when_it_is_imported() -> None:
    """Compiling imports all of torch's compiler, a second of a rank's start; the muon of recipes is another one."""
    (found,) = run_ranks(_compile_recorded, 1)
    assert found["by importing"] == []
    assert found["by calling"].count("muon_update") == 1
    assert found["update"] == (4, 4)
    assert not found["inductor"]
