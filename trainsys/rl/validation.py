"""What of other nodes' rollouts may be trained on: everything a peer says is checked or made anew, in bounded time.

The order, cheap checks first:

    name        it is a message's name, of a peer that is allowed and not banned
    size        no more bytes than allowed
    bytes       their hash is the one in the name
    format      one uncompressed Arrow batch of our schema, within bounds, row ids right (`schema.decode`)
    sender      the row is by the node the name says; where signatures are required, its key signed it
    duplicate   neither this row nor its question and texts were seen before, whoever sent them
    task        it is one that we ask, in our version, with our parameters
    prompt      the question made here is the one the sender asked           } a lie is a strike:
    reward      the rewards scored here are the ones the sender claims       } at `strikes` the peer is banned
    tokens      token ids, where they are in our tokenizer, spell the text   }

Age, quota and signal are for `trainsys.rl.selection`. Only content that its sender signed can be a strike where
signatures are required; where they are not, a peer can be made to look bad by another that uses its name.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from trainsys.errors import TrainsysError
from trainsys.rl import questions, schema, signing, tasks
from trainsys.rl.bounds import Bounds
from trainsys.rl.rollout import Completion, Group, Question
from trainsys.rl.schema import FormatError, Row

log = logging.getLogger(__name__)

_STRIKES = frozenset({"prompt", "reward", "tokens"})
_REWARD_TOLERANCE = 1e-6  # a claim travels as float32
_MAX_PEERS = 10_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Rules:
    """Whom to believe how much."""

    bounds: Bounds = field(default_factory=Bounds)
    strikes: int = 3
    """Lies until a peer is banned; 1 or more."""
    require_signatures: bool = False
    """Only rows signed by the key that names their node."""
    peers: frozenset[str] = frozenset()
    """Only these nodes; empty allows all."""
    asked: frozenset[tuple[str, str]] = frozenset()
    """(task, parameters) of the questions that are wanted; empty takes any of the built-in tasks, whose parameters are
    bounded. Others' are not: with those of a peer's choice a question may take for ever to make."""
    remembered: int = 16_384
    """Rows kept in mind to tell a duplicate; the oldest are forgotten, by when they are too old to be offered."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """How this node reads token ids of peers with the same tokenizer."""

    digest: bytes
    """Of the tokenizer."""
    spells: Callable[[Completion], bool]
    """Whether a completion's token ids are in the vocabulary and decode to its text; of any ids, in bounded time."""


@dataclass(frozen=True, slots=True)
class Accepted:
    """A group of a peer that passed every check; its rewards are this node's."""

    group: Group
    rollout_id: bytes
    content: bytes
    """Digest of the group without who sent it."""
    created_ms: int
    """By the sender's clock: for reports."""


@dataclass(frozen=True, slots=True)
class Rejection:
    """What was not believed, and why."""

    node: str
    """Whom it names, truthfully or not; empty where it names nobody."""
    reason: str
    """One word: a stage of the order above, or a FormatError's."""
    detail: str


class _Refused(Exception):
    """A check that failed."""

    def __init__(self, reason: str, detail: str) -> None:
        self.reason = reason
        self.detail = detail
        super().__init__(reason)


class Validator:
    """Judges messages, and remembers rows, lies and bans. Not thread-safe; `check` raises nothing."""

    def __init__(self, me: str, rules: Rules, tokens: Tokens | None = None) -> None:
        self._me = me
        self._rules = rules
        self._tokens = tokens
        self._seen: OrderedDict[bytes, None] = OrderedDict()
        self._strikes: OrderedDict[str, int] = OrderedDict()
        self.rejections: Counter[str] = Counter()
        """Of messages and rows so far, by reason."""

    @property
    def banned(self) -> list[str]:
        """Peers that are not listened to any more."""
        return sorted(node for node, count in self._strikes.items() if count >= self._rules.strikes)

    @property
    def largest_bytes(self) -> int:
        """Size of the largest message that is looked into."""
        return self._rules.bounds.message_bytes

    def wants(self, name: str) -> bool:
        """Return whether a message of that name is worth fetching: the first checks, without its bytes."""
        parsed = schema.parse_name(name)
        return parsed is not None and self._is_peer(parsed.node)

    def check(self, name: str, message: bytes) -> tuple[list[Accepted], list[Rejection]]:
        """Return the groups of a message that may be trained on, and what was rejected of it."""
        parsed = schema.parse_name(name)
        node = parsed.node if parsed else ""
        accepted: list[Accepted] = []
        rejected: list[Rejection] = []
        try:
            if parsed is None or not self._is_peer(node):
                raise _Refused("name", f"{name[:100]!r} is no message of a peer we listen to")
            rows = self._rows(parsed, message)
        except _Refused as refused:
            rejected.append(Rejection(node, refused.reason, refused.detail))
            rows = []
        for row in rows:
            try:
                accepted.append(self._judged(node, row))
            except _Refused as refused:
                rejected.append(self._rejected(row.node, refused))
            except Exception as error:  # a task's own defect must not end the training of whoever has it
                log.exception("%s: a row of %s could not be judged", name, node)
                rejected.append(Rejection(node, "internal", repr(error)[:200]))
        self.rejections.update(rejection.reason for rejection in rejected)
        return accepted, rejected

    def state(self, *, without: Collection[bytes] = ()) -> dict[str, Any]:
        """Return strikes and the rows in mind, but some of their digests, as JSON values."""
        seen = b"".join(digest for digest in self._seen if digest not in without)
        return {"strikes": dict(self._strikes), "seen": seen.hex()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take up what `state` returned."""
        self._strikes = OrderedDict(state["strikes"])
        seen, size = bytes.fromhex(state["seen"]), schema.DIGEST_BYTES
        self._seen = OrderedDict((seen[start : start + size], None) for start in range(0, len(seen), size))

    def _is_peer(self, node: str) -> bool:
        allowed = not self._rules.peers or node in self._rules.peers
        return allowed and node != self._me and self._strikes.get(node, 0) < self._rules.strikes

    def _rows(self, name: schema.Name, message: bytes) -> list[Row]:
        bounds = self._rules.bounds
        if len(message) > bounds.message_bytes:
            raise _Refused("size", f"over {bounds.message_bytes} bytes")
        if hashlib.blake2b(message, digest_size=schema.DIGEST_BYTES).digest() != name.digest:
            raise _Refused("bytes", "not the bytes that the name promises")
        try:
            return schema.decode(message, bounds)
        except FormatError as error:
            raise _Refused(error.reason, str(error)) from error

    def _judged(self, node: str, row: Row) -> Accepted:
        """Return a row as a group with our rewards, or raise _Refused."""
        if row.node != node:
            raise _Refused("sender", f"a row of {row.node} in a message of {node}")
        if self._rules.require_signatures and not signing.is_signed(row):
            raise _Refused("signature", "not signed by the key that names its node")
        # Judged once, whatever comes of it: a lie that is sent again is no second lie.
        rollout_id, content = row.digest, row.content_digest
        if rollout_id in self._seen or content in self._seen:
            raise _Refused("duplicate", "this group was here before")
        self._remember(rollout_id)
        question = row.question
        if not self._is_asked(question):
            raise _Refused("task", f"{question.task}, {question.parameters[:80]}: not asked here")
        try:
            made = tasks.regenerate(question)
            scores = {text: tasks.score(made, text) for text in {completion.text for completion in row.completions}}
        except TrainsysError as error:
            raise _Refused("task", str(error)[:200]) from error
        if questions.is_held_out(made):
            raise _Refused("task", f"{question.task}, seed {question.seed}: held out, which nobody trains on")
        if made.prompt != question.prompt:
            raise _Refused("prompt", f"{question.task}, seed {question.seed}: not the question that is made here")
        rewards = tuple(scores[completion.text] for completion in row.completions)
        for claimed, reward in zip(row.claimed_rewards, rewards, strict=True):
            if not math.isclose(claimed, reward, abs_tol=_REWARD_TOLERANCE, rel_tol=_REWARD_TOLERANCE):
                raise _Refused("reward", f"{claimed:g} claimed, {reward:g} scored here")
        group = Group(made, self._completions(row), rewards, row.node, row.policy_version)
        self._remember(content)  # only now: else a liar could keep others' true rows out
        return Accepted(group, rollout_id, content, row.created_ms)

    def _is_asked(self, question: Question) -> bool:
        asked = self._rules.asked
        return (question.task, question.parameters) in asked if asked else question.task in tasks.BUILT_IN

    def _completions(self, row: Row) -> tuple[Completion, ...]:
        """Return the completions with their tokens where those are ours, else as text alone."""
        tokens = self._tokens
        if tokens is None or row.tokenizer != tokens.digest:
            return schema.as_text(row.completions)
        if not all(tokens.spells(completion) for completion in row.completions if completion.token_ids):
            raise _Refused("tokens", "token ids that do not spell their text")
        return row.completions

    def _remember(self, digest: bytes) -> None:
        self._seen[digest] = None
        while len(self._seen) > self._rules.remembered:
            self._seen.popitem(last=False)

    def _rejected(self, node: str, refused: _Refused) -> Rejection:
        if refused.reason in _STRIKES:
            self._strikes[node] = self._strikes.get(node, 0) + 1
            self._strikes.move_to_end(node)
            if self._strikes[node] == self._rules.strikes:
                log.warning("peer %s is banned after %d lies: %s", node, self._rules.strikes, refused.detail)
            while len(self._strikes) > _MAX_PEERS:
                self._strikes.popitem(last=False)
        return Rejection(node, refused.reason, refused.detail)
