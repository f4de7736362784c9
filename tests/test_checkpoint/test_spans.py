"""What a save did, when, and on which thread."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from checkpoint import Checkpointer
from checkpoint.spans import Span, Trace


def test_a_save_can_be_looked_at_as_a_chrome_trace(tmp_path: Path):
    with Checkpointer(tmp_path / "ck") as ck:
        handle = ck.save(1, {"w": torch.zeros(3_000_000)})
        ck.fence()
        handle.result(20)
        handle.trace(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    spans = [e for e in events if e["ph"] == "X"]
    assert {"write", "sync", "commit"} <= {e["name"] for e in spans}
    for name in ("copy", "hash", "write"):  # what the fence did not hurry is copied and hashed by turns
        assert sum(e["args"]["nbytes"] for e in spans if name in e["name"].split()) == 12_000_000
    named = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["ph"] == "M"}
    assert all(named[e["pid"], e["tid"]].startswith(("checkpoint", "MainThread")) for e in spans)
    assert min(e["ts"] for e in spans) == 0
    assert all(e["dur"] >= 0 for e in spans)


def test_without_a_fence_that_hurries_the_copier_hashes(tmp_path: Path):
    with Checkpointer(tmp_path / "ck") as ck:
        handle = ck.save(1, {"w": torch.zeros(100)})
        handle.result(20)
        handle.trace(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = [e["name"] for e in events if e["ph"] == "X"]
    assert "copy and hash" in names
    assert not {"copy", "hash"} & set(names)


def test_what_raises_is_recorded_too():
    trace = Trace()
    with pytest.raises(KeyError), trace.span("write", 7):
        raise KeyError
    (span,) = trace.spans
    assert (span.name, span.nbytes) == ("write", 7)


def test_seconds_of_a_name_add_up():
    trace = Trace()
    for begin_s in (1.0, 5.0):
        trace.add(Span("copy", begin_s, begin_s + 2, "t", 1, 0))
    assert trace.seconds("copy") == 4
    assert trace.seconds("hash") == 0
