"""Where numbers go: JSON lines always, the console, Weights & Biases. The only module that names metrics.

A record is a flat dict of `section/name` keys; `train/loss` is in nats per token, times end in `_s`, sizes in `_bytes`.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from checkpoint import SaveStats
from trainsys.config import RunConfig
from trainsys.errors import MissingExtraError
from trainsys.step import StepStats

if TYPE_CHECKING:
    from offload.tracing import StepRecord
    from trainsys.rl.learner import Accuracy, RoundStats
    from trainsys.rl.sharing import SharingStats

Record = Mapping[str, float]


class Sink(Protocol):
    """Takes records; `close` is idempotent."""

    def write(self, step: int, record: Record) -> None:
        """Take the record of `step`."""

    def say(self, text: str) -> None:
        """Take a line for a person."""

    def close(self) -> None:
        """Flush and release."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How the loop gets on: what a record says beside the step's own figures."""

    tokens_seen: int
    """Tokens trained on since step 1, all ranks."""
    tokens_per_s: float
    mfu: float
    """Model FLOP utilisation, 0 to 1 (above 1 where the peak was stated, or measured again and again, too low)."""
    eta_s: float
    data_wait_s: float
    """Seconds this rank waited for its batch."""
    memory_bytes: int


def train_record(stats: StepStats, pace: Pace) -> Record:
    """Return the record of one optimizer step."""
    return {
        "train/loss": stats.loss,
        "train/auxiliary_loss": stats.auxiliary_loss,
        "train/learning_rate": stats.learning_rate,
        "train/gradient_norm": stats.gradient_norm,
        "train/loss_scale": stats.loss_scale,
        "train/update_applied": float(stats.applied),
        "train/tokens": pace.tokens_seen,
        "time/step_s": stats.step_s,
        "time/data_wait_s": pace.data_wait_s,
        **{f"time/{phase}_s": seconds for phase, seconds in stats.phase_s.items()},
        "time/eta_s": pace.eta_s,
        "speed/tokens_per_s": pace.tokens_per_s,
        "speed/mfu": pace.mfu,
        "memory/peak_bytes": pace.memory_bytes,
    }


def validation_record(loss: float, tokens: int, seconds: float) -> Record:
    """Return the record of one evaluation."""
    return {"validation/loss": loss, "validation/tokens": tokens, "time/validation_s": seconds}


def checkpoint_record(step: int, stats: SaveStats) -> Record:
    """Return the record of one save that has become durable: what it cost the loop, and how long it took."""
    return {
        "checkpoint/step": step,
        "checkpoint/blocked_s": stats.blocked_s,
        "checkpoint/staged_s": stats.staged_s,
        "checkpoint/durable_s": stats.durable_s,
        "checkpoint/pressure_s": stats.pressure_s,
        "checkpoint/rank_bytes": stats.nbytes,
    }


def offload_record(step: StepRecord) -> Record:
    """Return what offload did since the last record: bytes moved and held, and what compute waited for."""
    return {
        "offload/stall_s": sum(step.stalls_s.values()),
        "offload/moved_bytes": sum(step.moved_bytes.values()),
        "offload/held_bytes": sum(step.held_bytes.values()),
        "memory/peak_host_bytes": step.peaks["rss_bytes"],
    }


def warm_start_record(loss: float, lr: float, gradient_norm: float) -> Record:
    """Return the record of one supervised step before reinforcement learning; the loss in nats per token."""
    return {"rl/warm_start_loss": loss, "train/learning_rate": lr, "train/gradient_norm": gradient_norm}


def round_record(
    stats: RoundStats, *, lr: float, cumulative_reward: float, generated_tokens: int, sampling_s: float
) -> Record:
    """Return the record of one round; `generated_tokens` since the first, `sampling_s` of this one."""
    return {
        "rl/reward": stats.reward,
        "rl/cumulative_reward": cumulative_reward,
        "rl/signal_rate": stats.signal_rate,
        **{f"rl/reward.{task}": reward for task, reward in stats.reward_of.items()},
        "rl/groups": stats.num_groups,
        "rl/trained_groups": stats.num_trained,
        "rl/external_groups": stats.num_external,
        "rl/loss": stats.loss,
        "rl/clipped": stats.clipped,
        "rl/kl_to_start": stats.kl_to_start,
        "rl/importance": stats.importance,
        "rl/completion_tokens": stats.mean_tokens,
        "rl/finished": stats.finished,
        "rl/updates": stats.updates,
        "rl/trained_tokens": stats.num_tokens,
        "rl/generated_tokens": generated_tokens,
        "train/learning_rate": lr,
        "train/gradient_norm": stats.gradient_norm,
        "time/sample_s": sampling_s,
        "speed/generated_tokens_per_s": stats.generated_tokens / max(sampling_s, 1e-9),
    }


def accuracy_record(accuracy: Accuracy, seconds: float) -> Record:
    """Return the record of one evaluation on held-out questions, by task."""
    record = {"time/validation_s": seconds}
    for name, by_task in (("rl/accuracy", accuracy.greedy), ("rl/sampled_accuracy", accuracy.sampled)):
        record[name] = sum(by_task.values()) / len(by_task)
        record |= {f"{name}.{task}": value for task, value in by_task.items()}
    return record


def sharing_record(stats: SharingStats, *, ages: Sequence[int], sources: Mapping[str, int]) -> Record:
    """Return the figures of a node among its peers: since its start, and of this round's external groups.

    `ages` are in rounds, one a group; `sources` count them by node.
    """
    return {
        "sharing/published": stats.published,
        "sharing/accepted": stats.accepted,
        "sharing/rejected": sum(stats.rejected.values()),
        **{f"sharing/rejected.{reason}": count for reason, count in stats.rejected.items()},
        "sharing/unpublished": stats.unpublished,
        "sharing/store_failures": stats.store_failures,
        "sharing/banned": len(stats.banned),
        "sharing/waiting": stats.waiting,
        "sharing/peers": stats.peers,
        "sharing/taken": stats.taken,
        "sharing/too_old": stats.too_old,
        "sharing/without_signal": stats.without_signal,
        "sharing/unfit": stats.unfit,
        "sharing/namesakes": stats.namesakes,
        **({"sharing/age_rounds": sum(ages) / len(ages)} if ages else {}),
        **{f"sharing/from.{node}": count for node, count in sources.items()},
    }


class JsonLines:
    """One JSON object a line; on resume, records behind the resumed step are dropped first."""

    def __init__(self, path: Path, *, after_step: int) -> None:
        if path.exists():
            kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _belongs(line, after_step)]
            temporary = path.with_suffix(".tmp")
            temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
            os.replace(temporary, path)
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def write(self, step: int, record: Record) -> None:
        # JSON has no infinity (the gradient norm of an fp16 step that overflowed).
        values = {key: value if math.isfinite(value) else None for key, value in record.items()}
        self._file.write(json.dumps({"step": step, "time": round(time.time(), 3), **values}) + "\n")

    def say(self, text: str) -> None:
        return

    def close(self) -> None:
        self._file.close()


def _belongs(line: str, after_step: int) -> bool:
    """Return whether `line` is a whole record of a step that the run still has."""
    try:
        return int(json.loads(line)["step"]) <= after_step
    except (json.JSONDecodeError, KeyError, TypeError):
        return False  # cut off when the run was killed


def read(path: Path) -> list[dict[str, Any]]:
    """Return the records of a `metrics.jsonl`, without a last line that a kill cut off."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if _belongs(line, sys.maxsize)]


class Plain:
    """A line a record, for pipes and log files."""

    def __init__(self, total_steps: int, stream: TextIO) -> None:
        self._total = total_steps
        self._stream = stream

    def write(self, step: int, record: Record) -> None:
        line = _progress_line(step, self._total, record)
        if line:
            self.say(line)

    def say(self, text: str) -> None:
        self._stream.write(text + "\n")
        self._stream.flush()

    def close(self) -> None:
        return


class Rich:
    """One live progress line with the rest scrolling above it."""

    def __init__(self, total_steps: int, stream: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[numbers]}"),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            # The ranks' terminal is their launcher's, which passes these bytes on.
            console=Console(file=stream, force_terminal=True),
            refresh_per_second=2,
        )
        self._task = self._progress.add_task("train", total=total_steps, numbers="")
        self._progress.start()

    def write(self, step: int, record: Record) -> None:
        if "train/loss" in record:
            self._progress.update(self._task, completed=step, numbers=_numbers(record))
        elif "rl/reward" in record or "rl/warm_start_loss" in record:
            self._progress.update(self._task, completed=step, numbers=_rl_numbers(record))
        elif "validation/loss" in record:
            self.say(f"step {step}: validation loss {record['validation/loss']:.4f}")
        elif "rl/accuracy" in record:
            self.say(f"step {step}: {_accuracies(record)}")

    def say(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        self._progress.stop()


def _numbers(record: Record) -> str:
    return f"loss {record['train/loss']:.4f}  {record['speed/tokens_per_s']:,.0f} tokens/s"


def _progress_line(step: int, total: int, record: Record) -> str:
    if "train/loss" in record:
        rate = record["speed/tokens_per_s"]
        eta = _clock(record["time/eta_s"]) if rate else "…"
        return (
            f"step {step:>{len(str(total))}}/{total}  {_numbers(record)}  "
            f"grad {record['train/gradient_norm']:.2f}  lr {record['train/learning_rate']:.2e}  "
            f"MFU {record['speed/mfu']:.0%}  ETA {eta}"
        )
    place = f"step {step:>{len(str(total))}}/{total}"
    if "validation/loss" in record:
        return f"{place}  validation loss {record['validation/loss']:.4f}"
    if "rl/accuracy" in record:
        return f"{place}  {_accuracies(record)}"
    if "rl/reward" in record or "rl/warm_start_loss" in record:
        return f"{place}  {_rl_numbers(record)}  ETA {_clock(record['time/eta_s'])}"
    return ""


def _rl_numbers(record: Record) -> str:
    if "rl/warm_start_loss" in record:
        return f"supervised loss {record['rl/warm_start_loss']:.4f}"
    return (
        f"reward {record['rl/reward']:.3f}  signal {record['rl/signal_rate']:.0%}  "
        f"{record['speed/generated_tokens_per_s']:,.0f} tokens/s drawn"
    )


def _accuracies(record: Record) -> str:
    prefix = "rl/accuracy."
    tasks = ", ".join(f"{key.removeprefix(prefix)} {v:.0%}" for key, v in record.items() if key.startswith(prefix))
    sampled = record["rl/sampled_accuracy"]
    return f"held-out accuracy {record['rl/accuracy']:.1%} ({tasks}), sampled {sampled:.1%}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Wandb:
    """A Weights & Biases run of the same id as ours, so that a resumed run continues its curves."""

    def __init__(self, config: RunConfig, folder: Path, run_id: str, tree: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise MissingExtraError("metrics.wandb", "wandb") from error
        settings = config.metrics.wandb
        assert settings.mode != "off", "without Weights & Biases there is no such sink"
        self._run: Any = wandb.init(
            project=settings.project,
            entity=settings.entity or None,
            name=folder.name,
            id=run_id,
            resume="allow",
            mode=settings.mode,
            tags=list(settings.tags),
            dir=str(folder),
            config=dict(tree),
            settings=wandb.Settings(console="off", silent=True),
        )

    def write(self, step: int, record: Record) -> None:
        self._run.log(dict(record), step=step)

    def say(self, text: str) -> None:
        return

    def close(self) -> None:
        self._run.finish()


class Metrics:
    """All sinks of a run as one; on every rank but 0 it has none."""

    def __init__(self, sinks: list[Sink], admit: Callable[[], object] | None = None) -> None:
        self._sinks = sinks
        self._admit = admit

    def write(self, step: int, record: Record) -> None:
        """Hand `record` to every sink, if this process may still write."""
        if self._admit is not None:
            self._admit()
        for sink in self._sinks:
            sink.write(step, record)

    def say(self, text: str) -> None:
        """Show a line to whoever watches."""
        for sink in self._sinks:
            sink.say(text)

    def close(self) -> None:
        """Close every sink, even where one fails; the first failure is raised."""
        failures: list[Exception] = []
        for sink in self._sinks:
            try:
                sink.close()
            except Exception as error:  # noqa: BLE001  carried to the caller below
                failures.append(error)
        self._sinks = []
        if failures:
            raise failures[0]


def open_metrics(
    config: RunConfig,
    folder: Path,
    run_id: str,
    tree: Mapping[str, Any],
    *,
    after_step: int,
    stream: TextIO,
    admit: Callable[[], object] | None = None,
) -> Metrics:
    """Return the sinks that `config.metrics` asks for; call on rank 0.

    `admit` is called before each record and raises where this process may write none any more.
    """
    sinks: list[Sink] = [JsonLines(folder / "metrics.jsonl", after_step=after_step)]
    console = config.metrics.console
    if console == "auto":
        console = "rich" if stream.isatty() else "plain"
    if console == "rich":
        sinks.append(Rich(config.steps, stream))
    elif console == "plain":
        sinks.append(Plain(config.steps, stream))
    if config.metrics.wandb.mode != "off":
        sinks.append(Wandb(config, folder, run_id, tree))
    return Metrics(sinks, admit)
