"""What processes of tests import, so that the fork server pays for it once: it is 3 s of CPU for a rank with DeepSpeed.

Named to the server by `tests.ranks`. Who needs less is forked with more than it needs, which costs 30 ms.
"""

from __future__ import annotations

import contextlib
import gc
import importlib

MODULES = (
    "trainsys.cli",
    "trainsys.session",
    "trainsys.trainer",
    "trainsys.engine",
    "trainsys.native",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    # Every optimizer of torch imports the first, every one in DeepSpeed's engine the second with the whole compiler.
    "torch._dynamo",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "transformers.models.llama.modeling_llama",
)


def preload() -> None:
    """Import everything; what cannot be imported fails in the test that needs it."""
    with contextlib.suppress(Exception):
        importlib.import_module("trainsys.deepspeed_setup").import_deepspeed("cpu")
    for name in MODULES:
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    # What is here stays: a process that collects garbage need not copy it.
    gc.collect()
    gc.freeze()


preload()
