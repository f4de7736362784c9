"""Sinks, throughput and phases, without a run around them."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch

from trainsys import meter, metrics
from trainsys.metrics import JsonLines, Metrics, Pace, Plain, Rich, train_record
from trainsys.step import StepStats

STATS = StepStats(
    loss=2.5,
    auxiliary_loss=0.0,
    num_targets=100,
    learning_rate=1e-3,
    gradient_norm=0.5,
    loss_scale=1.0,
    applied=True,
    step_s=0.25,
    phase_s={"forward": 0.1},
)
PACE = Pace(tokens_seen=1000, tokens_per_s=400.0, mfu=0.25, eta_s=3700.0, data_wait_s=0.0, memory_bytes=2**30)


def test_resuming_drops_records_behind_the_resumed_step_and_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = JsonLines(path, after_step=0)
    for step in (1, 2, 3):
        first.write(step, {"train/loss": float(step)})
    first.close()
    with path.open("a") as file:
        file.write('{"step": 4, "train/lo')
    second = JsonLines(path, after_step=2)
    second.write(3, {"train/loss": 30.0})
    second.close()
    assert [(entry["step"], entry["train/loss"]) for entry in metrics.read(path)] == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_reading_leaves_out_a_line_that_a_kill_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"step": 1}) + '\n{"step": 2')
    assert metrics.read(path) == [{"step": 1}]


def test_a_pipe_gets_one_plain_line_a_step() -> None:
    stream = io.StringIO()
    sink = Plain(200, stream)
    sink.write(7, train_record(STATS, PACE))
    sink.write(7, metrics.validation_record(2.0, 100, 0.5))
    sink.write(7, {"checkpoint/blocked_s": 0.1})
    assert stream.getvalue() == (
        "step   7/200  loss 2.5000  400 tokens/s  grad 0.50  lr 1.00e-03  MFU 25%  ETA 1:01:40\n"
        "step   7/200  validation loss 2.0000\n"
    )


def test_a_terminal_gets_a_live_line() -> None:
    stream = io.StringIO()
    sink = Rich(200, stream)
    sink.write(7, train_record(STATS, PACE))
    sink.say("hello [not markup]")
    sink.close()
    assert "7/200" in stream.getvalue()
    assert "loss 2.5000" in stream.getvalue()
    assert "hello [not markup]" in stream.getvalue()


def test_every_sink_is_closed_even_where_one_fails() -> None:
    closed = []

    class Sink:
        def __init__(self, name: str) -> None:
            self.name = name

        def write(self, step: int, record: metrics.Record) -> None:
            raise NotImplementedError

        def say(self, text: str) -> None:
            raise NotImplementedError

        def close(self) -> None:
            closed.append(self.name)
            if self.name == "a":
                raise OSError("disk")

    both = Metrics([Sink("a"), Sink("b")])
    with pytest.raises(OSError, match="disk"):
        both.close()
    both.close()
    assert closed == ["a", "b"]


def test_throughput_is_tokens_over_time_without_what_was_no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 2.0, 13.0])
    monkeypatch.setattr(meter.time, "perf_counter", lambda: next(clock))
    speed = meter.Throughput(total_steps=10)
    speed.mark(0)
    assert speed.tokens_per_s == 0.0
    speed.mark(100)
    speed.mark(100)
    assert speed.tokens_per_s == pytest.approx(100.0)
    assert speed.eta_s(2) == pytest.approx(8.0)
    speed.skip(10.0)
    speed.mark(100)
    assert speed.tokens_per_s == pytest.approx(100.0)


def test_the_peak_says_where_it_comes_from() -> None:
    cpu = torch.device("cpu")
    assert meter.peak_of(cpu, torch.float32, 1e12) == meter.Peak(1e12, "recipe")
    measured = meter.peak_of(cpu, torch.float32, 0.0)
    assert measured.how == "measured"
    assert measured.flops_per_s > 1e8


def test_phases_add_up_until_they_are_taken() -> None:
    phases = meter.Phases(torch.device("cpu"))
    for _ in range(2):
        with phases("forward"):
            torch.ones(10).sum()
    taken = phases.take()
    assert taken.keys() == {"forward"}
    assert taken["forward"] > 0
    assert phases.take() == {}
