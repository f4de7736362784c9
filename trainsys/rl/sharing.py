"""A node's exchange with its peers: its groups go out, theirs come in, and training waits for neither.

Two threads do all that may take long: one publishes what the node shared, one lists, fetches and validates what others
did. A call to the store that does not return within its deadline is left behind. Training only hands groups over
(`share`) and takes what has arrived (`take`): a slow, dead or late peer, or a store out of reach, costs it nothing but
the groups that do not come.
"""

from __future__ import annotations

import itertools
import logging
import random
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

from trainsys.rl import schema
from trainsys.rl.bounds import Bounds, is_node_name
from trainsys.rl.errors import SharingError
from trainsys.rl.rollout import Group
from trainsys.rl.selection import Candidate, Quota, Selection, num_missing, select
from trainsys.rl.signing import Signer
from trainsys.rl.stores import Clock, Store
from trainsys.rl.validation import Rejection, Validator

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Identity:
    """Who shares."""

    node: str
    """Name of this node; with a signer, the signer's."""
    model: str
    """For people who look at rollouts."""
    tokenizer: bytes = b""
    """Digest of the tokenizer, to share token ids and log-probabilities; empty shares text alone."""
    signer: Signer | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Pace:
    """How much the background does at a time."""

    poll_interval_s: float = 1.0
    """Between two looks at the store; above 0."""
    deadline_s: float = 30.0
    """Longest time one call of the store may take before it is left behind; above 0."""
    messages_per_poll: int = 64
    """Messages fetched per look, one of each peer in turn, the newest first; the peers in another order each time."""
    poll_cpu_s: float = 0.5
    """CPU time of a look after which it ends, and others' messages wait for the next: the largest take as long."""
    pool_per_peer: int = 64
    """Groups of one peer that wait to be chosen; the oldest make room."""
    outbox: int = 64
    """Messages that wait to be published; the oldest make room."""


_MOST_TRIES = 3
"""Polls in which a message may fail to be read, or be gone though it was listed, before it is left alone."""
_MOST_FAILURES = 3
"""In one poll; then the store itself is taken to be ill until the next."""
_REST = 3.0
"""Time between looks, over the CPU time of the last: whatever peers send, reading it takes a quarter of a core at most.

Counted is what the polling thread and the threads of its calls compute, not what a store's library does in threads of
its own: receiving bytes, decrypting them.
"""
_MOST_OWN = 4096
"""Own names kept in mind to know them from a namesake's."""


@dataclass(frozen=True, slots=True)
class SharingStats:
    """What the exchange did since it was opened."""

    published: int
    accepted: int
    rejected: Mapping[str, int]
    """Of messages and rows, by reason."""
    unpublished: int
    """Messages given up because the store did not take them in time."""
    store_failures: int
    banned: tuple[str, ...]
    waiting: int
    """Groups in the pool."""
    peers: int
    """Other nodes that had messages in the store at the last look."""
    taken: int
    """Groups of others that rounds were given."""
    too_old: int
    without_signal: int
    unfit: int
    """Groups of others that were dropped instead, as `Selection` says."""
    namesakes: int
    """Messages in this node's name that it has not written: another node is called the same."""


class Exchange:
    """See the module. `share` and `take` are the training thread's; `close` ends the threads."""

    def __init__(
        self,
        store: Store,
        validator: Validator,
        identity: Identity,
        pace: Pace,
        *,
        clock: Clock = time.time,
        generator: random.Random | None = None,
    ) -> None:
        """`generator` decides whom a look reads first; without one, nobody can know beforehand."""
        self._generator = generator or random.Random()
        self._store = store
        self._validator = validator
        self._identity = identity
        self._pace = pace
        self._clock = clock
        self._sequence = 0
        self._round = 0
        self._own: OrderedDict[str, None] = OrderedDict()
        """Names of what it shared, the newest."""
        self._outbox: deque[tuple[str, bytes]] = deque()
        self._pool: OrderedDict[bytes, Candidate] = OrderedDict()
        self._contents: dict[bytes, bytes] = {}
        self._known: OrderedDict[str, None] = OrderedDict()
        self._failed: Counter[str] = Counter()
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._validating = threading.Lock()
        self._wake = threading.Event()
        self._closed = threading.Event()
        self._publishing, self._polling = _Calls(pace.deadline_s), _Calls(pace.deadline_s)
        self._threads: list[threading.Thread] = []
        self.on_rejection: Callable[[Rejection], None] = lambda rejection: None
        """Called for each rejection, on the polling thread."""

    def start(self) -> Exchange:
        """Begin to publish and poll in the background."""
        for target in (self._publish_always, self._poll_always):
            thread = threading.Thread(target=target, name=f"{self._identity.node}-{target.__name__}", daemon=True)
            thread.start()
            self._threads.append(thread)
        return self

    def __enter__(self) -> Exchange:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Publish what is waiting, for at most one deadline, end the threads and close the store."""
        if self._closed.is_set():
            return
        self._closed.set()
        self._wake.set()
        for thread in self._threads:
            thread.join(self._pace.deadline_s)
        self._store.close()

    def share(self, groups: Sequence[Group]) -> None:
        """Hand over groups of this node to be published; returns at once."""
        if not groups:
            return
        created_ms = int(self._clock() * 1000)
        rows = []
        for group in groups:
            # Grows across restarts too, without asking the store what was there before.
            self._sequence = max(self._sequence + 1, created_ms)
            row = schema.row_of(
                group,
                sequence=self._sequence,
                model=self._identity.model,
                created_ms=created_ms,
                tokenizer=self._identity.tokenizer,
            )
            rows.append(self._identity.signer.sign(row) if self._identity.signer else row)
        message = schema.encode(rows)
        name = schema.name_of(message, node=rows[0].node, sequence=self._sequence)
        with self._lock:
            self._own[name] = None
            while len(self._own) > _MOST_OWN:
                self._own.popitem(last=False)
            self._outbox.append((name, message))
            while len(self._outbox) > self._pace.outbox:
                self._outbox.popleft()
                self._counts["unpublished"] += 1
        self._wake.set()

    def num_missing(self, quota: Quota, *, now_round: int) -> int:
        """Return how many of a round's places for others' groups nothing has come for yet."""
        with self._lock:
            return num_missing(list(self._pool.values()), quota, now_round=now_round)

    def take(
        self,
        local: Sequence[Group],
        quota: Quota,
        *,
        now_round: int,
        generator: random.Random,
        fits: Callable[[Group], bool] = lambda group: True,
    ) -> Selection:
        """Choose what round `now_round` trains on, of `local` and of what has arrived; returns at once."""
        with self._lock:
            candidates = list(self._pool.values())
            self._round = now_round
        chosen = select(local, candidates, quota, now_round=now_round, generator=generator, fits=fits)
        keep = {candidate.rollout_id for candidate in chosen.kept}
        with self._lock:
            self._counts["taken"] += len(chosen.external)
            for dropped in ("too_old", "without_signal", "unfit"):
                self._counts[dropped] += getattr(chosen, dropped)
            for candidate in candidates:
                if candidate.rollout_id not in keep:
                    self._forget(candidate.rollout_id)
        return chosen

    def stats(self) -> SharingStats:
        """Return the counts so far."""
        with self._lock:
            return SharingStats(
                published=self._counts["published"],
                accepted=self._counts["accepted"],
                rejected=dict(self._validator.rejections),
                unpublished=self._counts["unpublished"],
                store_failures=self._counts["store failures"],
                banned=tuple(self._validator.banned),
                waiting=len(self._pool),
                peers=self._counts["peers"],
                taken=self._counts["taken"],
                too_old=self._counts["too_old"],
                without_signal=self._counts["without_signal"],
                unfit=self._counts["unfit"],
                namesakes=self._counts["namesakes"],
            )

    def state(self) -> dict[str, Any]:
        """Return this node's place in the store as JSON values: its count, what it saw, whom it banned.

        What is still waiting counts as not seen: whoever takes the place up fetches it again.
        """
        with self._validating:
            with self._lock:
                waiting = {*self._contents, *self._contents.values()}
            validator = self._validator.state(without=waiting)
            return {"sequence": self._sequence, "round": self._round, "validator": validator}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take up the place that `state` returned; before `start`."""
        self._sequence, self._round = state["sequence"], state["round"]
        self._validator.load_state(state["validator"])

    def publish_waiting(self) -> None:
        """Publish what was shared; the background's step, here for who runs nodes in turn."""
        while True:
            with self._lock:
                if not self._outbox:
                    return
                name, message = self._outbox[0]
            self._publishing.within_deadline(lambda: self._store.publish(name, message))  # noqa: B023  runs before it changes
            with self._lock:
                if self._outbox and self._outbox[0][0] == name:
                    self._outbox.popleft()
                self._counts["published"] += 1

    def poll(self) -> None:
        """Fetch and validate what peers published; the background's step, here for who runs nodes in turn."""
        listed = self._polling.within_deadline(self._store.names)
        self._remember_names(listed)
        self._look_around(listed)
        limit = self._pace.messages_per_poll
        news = (name for name in listed if name not in self._known and self._validator.wants(name))
        failures: list[Exception] = []
        until_s = self._computed_s() + self._pace.poll_cpu_s
        for name in _in_turn(news, self._generator)[:limit]:
            try:
                message = self._polling.within_deadline(lambda: self._store.fetch(name, Bounds().message_bytes))  # noqa: B023
            except Exception as error:  # noqa: BLE001  one that cannot be read must not hide those behind it
                failures.append(error)
                self._note_failed(name)
                if len(failures) >= _MOST_FAILURES:
                    break
                continue
            if message is None:  # gone for good, or its node is just moving it
                self._note_failed(name)
            else:
                self._known[name] = None
                self._admit(name, message)
            if self._computed_s() >= until_s:
                break
        if failures:
            raise failures[-1]

    def _note_failed(self, name: str) -> None:
        self._failed[name] += 1
        if self._failed[name] >= _MOST_TRIES:
            self._known[name] = None

    def _computed_s(self) -> float:
        """Return the CPU time of this thread, which polls, and of the calls that it made."""
        return time.thread_time() + self._polling.cpu_s

    def _admit(self, name: str, message: bytes) -> None:
        with self._validating:
            accepted, rejected = self._validator.check(name, message)
        for rejection in rejected:
            log.debug("rejected of %s: %s", rejection.node, rejection.detail)
            self.on_rejection(rejection)
        with self._lock:
            self._counts["accepted"] += len(accepted)
            for found in accepted:
                self._pool[found.rollout_id] = Candidate(found.group, found.rollout_id, self._round)
                self._contents[found.rollout_id] = found.content
            for node in {found.group.node for found in accepted}:
                of_peer = [key for key, waiting in self._pool.items() if waiting.group.node == node]
                for key in of_peer[: max(0, len(of_peer) - self._pace.pool_per_peer)]:
                    self._forget(key)

    def _forget(self, rollout_id: bytes) -> None:
        """Take a group out of the pool, with the lock held."""
        self._pool.pop(rollout_id, None)
        self._contents.pop(rollout_id, None)

    def _remember_names(self, listed: Sequence[str]) -> None:
        """Forget names that the store does not list any more."""
        current = set(listed)
        self._known = OrderedDict((name, None) for name in self._known if name in current)
        self._failed = Counter({name: count for name, count in self._failed.items() if name in current})

    def _look_around(self, listed: Iterable[str]) -> None:
        """Count the peers there are, and what another node has written in this one's name."""
        me = self._identity.node
        nodes = set(filter(is_node_name, {name.partition(".")[0] for name in listed})) - {me}
        with self._lock:
            unknown = [name for name in listed if name.startswith(f"{me}.") and name not in self._own]
            # What is older than the oldest own message in mind may be of this node before it was started again.
            since = next(iter(self._own), "~")
            namesakes = sum(name >= since for name in unknown if schema.parse_name(name))
            is_news = namesakes > 0 == self._counts["namesakes"]
            self._counts["namesakes"] = max(self._counts["namesakes"], namesakes)
            self._counts["peers"] = len(nodes)
        if is_news:
            log.warning("%s: another node shares under this name, and neither hears the other; rename one", me)

    def _publish_always(self) -> None:
        while not self._closed.is_set():
            self._wake.wait(self._pace.poll_interval_s)  # what could not be published is tried again
            self._wake.clear()
            self._attempt(self.publish_waiting)
        self._attempt(self.publish_waiting)

    def _poll_always(self) -> None:
        pause_s = self._pace.poll_interval_s
        while not self._closed.wait(pause_s):
            began_s = self._computed_s()
            self._attempt(self.poll)
            pause_s = max(self._pace.poll_interval_s, _REST * (self._computed_s() - began_s))

    def _attempt(self, step: Callable[[], None]) -> None:
        try:
            step()
        except Exception as error:  # noqa: BLE001  a store raises whatever its medium does; training goes on alone
            with self._lock:
                self._counts["store failures"] += 1
            log.warning("%s: the store failed, and is asked again: %r", self._identity.node, error)


def _in_turn(names: Iterable[str], generator: random.Random) -> list[str]:
    """Return names so that every peer has its newest first before any has its second, the peers in random order.

    A look may end before all had their turn; no choice of names puts a peer before the others look after look.
    """
    of_node: dict[str, list[str]] = {}
    for name in sorted(names, reverse=True):
        of_node.setdefault(name.partition(".")[0], []).append(name)
    queues = list(of_node.values())
    generator.shuffle(queues)
    return [name for turn in itertools.zip_longest(*queues) for name in turn if name is not None]


class _Calls:
    """Runs calls that may hang; each in a thread of its own, which is left behind at the deadline."""

    _MOST_STUCK = 4

    def __init__(self, deadline_s: float) -> None:
        self._deadline_s = deadline_s
        self._stuck = threading.Semaphore(self._MOST_STUCK)
        self._counting = threading.Lock()
        self.cpu_s = 0.0
        """CPU time of the calls that have returned, in their threads."""

    def within_deadline(self, call: Callable[[], T]) -> T:
        """Return what `call` does, or raise what it does, or SharingError at the deadline or with too many left."""
        if not self._stuck.acquire(blocking=False):
            raise SharingError(f"{self._MOST_STUCK} calls of the store have not returned; no further one is made")
        results: list[T] = []
        errors: list[BaseException] = []

        def run() -> None:
            try:
                results.append(call())
            except BaseException as error:  # noqa: BLE001  carried to the caller
                errors.append(error)
            finally:
                with self._counting:
                    self.cpu_s += time.thread_time()
                self._stuck.release()

        thread = threading.Thread(target=run, name="store-call", daemon=True)
        thread.start()
        thread.join(self._deadline_s)
        if errors:
            raise errors[0]
        if not results:
            raise SharingError(f"the store has not returned within {self._deadline_s:g} s")
        return results[0]
