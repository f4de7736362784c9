"""Running the entry function in a rank, and telling how it ended; both launchers use it."""

from __future__ import annotations

import importlib
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from faulttol import Heartbeat
from faulttol.recovery import Member
from launch.context import RankContext
from launch.rankenv import RankEnv

Entry = Callable[[RankContext, Any], Any]


@dataclass(frozen=True, slots=True)
class Returned:
    """The entry returned `value`, a JSON value."""

    value: Any


@dataclass(frozen=True, slots=True)
class Raised:
    """The entry raised, or could not be imported, or returned what JSON cannot hold."""

    traceback: str
    messages: tuple[str, ...]
    """`Type: text` of the error and of those it came from, outermost first."""
    at_s: float
    """`time.time()` of its machine."""

    @property
    def summary(self) -> str:
        return self.messages[0]


Outcome = Returned | Raised


def execute(
    entry: str,
    payload: Any,
    *,
    heartbeat_path: Path,
    heartbeat_interval_s: float,
    stop: threading.Event,
    joined: Callable[[], object] = lambda: None,
    member: Member | None = None,
) -> Outcome:
    """Import `entry`, call it in this process with its context, and tell how it ended; raises nothing.

    The rank's place is read from the environment. The heartbeat begins once the entry is imported: that is
    when the rank has joined. `joined` is called then, and may block. With `member` the job outlives its ranks.
    """
    try:
        function = _load(entry)
        env = RankEnv.from_environ(os.environ)
        with (
            Heartbeat(heartbeat_path, heartbeat_interval_s) as heartbeat,
            RankContext(env, heartbeat, stop, member) as context,
        ):
            joined()
            return Returned(_as_json(function(context, payload)))
    except BaseException as error:  # noqa: BLE001 - carried to the launcher, SystemExit included
        return raised(error)


def _load(entry: str) -> Entry:
    module, _, name = entry.partition(":")
    function = getattr(importlib.import_module(module), name)
    if not callable(function):
        raise TypeError(f"{entry}: a {type(function).__name__}, not a function")
    return function  # type: ignore[no-any-return]


def _as_json(value: Any) -> Any:
    """`value` as every launcher will see it: after a trip through JSON."""
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError) as error:
        raise TypeError(f"the entry returned what JSON cannot hold: {error}") from error


def raised(error: BaseException) -> Raised:
    """`error` as a value; its traceback without our own frames above the entry."""
    chain = [f"{type(link).__name__}: {link}" for link in _chain(error)]
    frames = error.__traceback__
    while frames is not None and frames.tb_next is not None and _is_ours(frames):
        frames = frames.tb_next
    text = "".join(traceback.format_exception(type(error), error, frames))
    return Raised(traceback=text, messages=tuple(chain), at_s=time.time())


def described(error: BaseException) -> tuple[tuple[str, ...], str]:
    """(messages, traceback) of an error, as `raised` has them."""
    outcome = raised(error)
    return outcome.messages, outcome.traceback


def to_json(outcome: Outcome) -> dict[str, Any]:
    if isinstance(outcome, Returned):
        return {"kind": "returned", "value": outcome.value}
    return {
        "kind": "raised",
        "traceback": outcome.traceback,
        "messages": list(outcome.messages),
        "at_s": outcome.at_s,
    }


def from_json(fields: Mapping[str, Any]) -> Outcome:
    if fields["kind"] == "returned":
        return Returned(fields["value"])
    return Raised(fields["traceback"], tuple(fields["messages"]), fields["at_s"])


def extend_path(entries: list[str]) -> None:
    """Add to the module search path what the launcher's has and this process's has not."""
    sys.path.extend(entry for entry in entries if entry not in sys.path)


def _is_ours(frames: TracebackType) -> bool:
    return Path(frames.tb_frame.f_code.co_filename).parent == Path(__file__).parent


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        yield link
        seen.add(id(link))
        link = link.__cause__ or link.__context__
