"""A node and its peers: what is shared arrives, and nobody waits for anybody."""

from __future__ import annotations

import itertools
import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from tests.test_trainsys.rollouts import group, message, row
from trainsys.rl.rollout import Completion, Group
from trainsys.rl.selection import Quota
from trainsys.rl.sharing import Exchange, Identity, Pace
from trainsys.rl.signing import Signer
from trainsys.rl.stores import Mailbox, Store
from trainsys.rl.validation import Rejection, Rules, Validator

_QUOTA = Quota(num_local=4, num_external=4, per_peer=4)
_QUICK = Pace(poll_interval_s=0.002, deadline_s=10)


@pytest.fixture
def mailbox() -> Mailbox:
    return Mailbox(keep_s=600, budget_bytes=2**20)


def _exchange(
    store: Store, node: str, pace: Pace = _QUICK, rules: Rules | None = None, signer: Signer | None = None
) -> Exchange:
    return Exchange(store, Validator(node, rules or Rules()), Identity(node=node, model="tiny", signer=signer), pace)


def _taken(exchange: Exchange, now_round: int = 0) -> list[Group]:
    chosen = exchange.take([], _QUOTA, now_round=now_round, generator=random.Random(0))
    return [candidate.group for candidate in chosen.external]


def _until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not done():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.001)


def test_what_one_node_shares_another_takes_once(mailbox: Mailbox) -> None:
    anna, bert = _exchange(mailbox, "anna"), _exchange(mailbox, "bert")
    anna.share([group(1), group(2)])
    anna.publish_waiting()
    for exchange in (anna, bert):
        exchange.poll()
        exchange.poll()
    assert _taken(anna) == []
    assert sorted(_taken(bert), key=lambda g: g.question.seed) == [group(1), group(2)]
    assert _taken(bert) == []
    assert bert.stats().accepted == 2
    assert bert.stats().rejected == {}


def test_own_groups_are_published_whether_or_not_they_are_trained_on(mailbox: Mailbox) -> None:
    anna = _exchange(mailbox, "anna")
    silent = [group(seed, right=0) for seed in range(3)]
    anna.take(silent, Quota(num_local=0, num_external=0), now_round=0, generator=random.Random(0))
    anna.share(silent)
    anna.publish_waiting()
    assert len(mailbox.names()) == anna.stats().published == 1


def test_nodes_in_the_background_hear_each_other(mailbox: Mailbox) -> None:
    with _exchange(mailbox, "anna").start() as anna, _exchange(mailbox, "bert").start() as bert:
        anna.share([group(1)])
        bert.share([group(2, node="bert")])
        _until(lambda: anna.stats().waiting == bert.stats().waiting == 1)
        assert _taken(bert) == [group(1)]
        assert _taken(anna) == [group(2, node="bert")]


class _Hanging:
    """A store whose calls do not return until it is closed."""

    def __init__(self) -> None:
        self.released = threading.Event()
        self.calls = 0

    def publish(self, name: str, message: bytes) -> None:
        self.calls += 1
        self.released.wait(60)

    def names(self) -> list[str]:
        self.calls += 1
        self.released.wait(60)
        return []

    def fetch(self, name: str, limit: int) -> bytes | None:
        raise AssertionError("nothing was listed")

    def close(self) -> None:
        self.released.set()


def test_a_store_that_hangs_delays_no_round() -> None:
    # The reference implementation waits for every peer for 600 s, and then raises.
    store = _Hanging()
    with _exchange(store, "anna", Pace(poll_interval_s=0.001, deadline_s=0.005)).start() as anna:
        began = time.perf_counter()
        for now_round in range(50):
            anna.share([group(now_round)])
            assert _taken(anna, now_round) == []
        assert time.perf_counter() - began < 5
        _until(lambda: anna.stats().store_failures > 8)
    assert store.calls <= 8  # calls that hang are left behind, but not more and more of them


class _Failing(Mailbox):
    """A mailbox that is out of reach until it is repaired."""

    broken = True

    def publish(self, name: str, message: bytes) -> None:
        if self.broken:
            raise ConnectionError("out of reach")
        super().publish(name, message)

    def names(self) -> list[str]:
        if self.broken:
            raise ConnectionError("out of reach")
        return super().names()


def test_what_a_store_did_not_take_is_published_when_it_is_back(caplog: pytest.LogCaptureFixture) -> None:
    store = _Failing(keep_s=600, budget_bytes=2**20)
    with _exchange(store, "anna").start() as anna:
        anna.share([group(1)])
        _until(lambda: anna.stats().store_failures > 3)
        assert anna.stats().published == 0
        store.broken = False
        _until(lambda: anna.stats().published == 1)
    assert "out of reach" in caplog.text


def test_a_store_that_is_gone_for_long_costs_old_messages_and_no_memory() -> None:
    store = _Failing(keep_s=600, budget_bytes=2**20)
    anna = _exchange(store, "anna", Pace(outbox=3))
    for seed in range(10):
        anna.share([group(seed)])
    assert anna.stats().unpublished == 7
    store.broken = False
    anna.publish_waiting()
    assert len(store.names()) == 3


def test_a_peer_that_floods_crowds_out_nobody(mailbox: Mailbox) -> None:
    loud, quiet = _exchange(mailbox, "loud"), _exchange(mailbox, "quiet")
    quiet.share([group(1000, node="quiet")])
    quiet.publish_waiting()
    for seed in range(30):
        loud.share([group(seed, node="loud")])
        loud.publish_waiting()
    anna = _exchange(mailbox, "anna", Pace(messages_per_poll=8, pool_per_peer=4))
    anna.poll()
    assert {found.node for found in _taken(anna)} == {"loud", "quiet"}
    anna.poll()
    assert anna.stats().waiting <= 4 + 1


def test_a_look_ends_when_it_has_computed_for_long_and_the_rest_waits(mailbox: Mailbox) -> None:
    for seed in range(3):
        mailbox.publish(*message(row(seed, node=f"n{seed}")))
    anna = _exchange(mailbox, "anna", Pace(poll_cpu_s=0.0))
    for looks in range(1, 4):
        anna.poll()
        assert anna.stats().accepted == looks


def _heard(exchange: Exchange) -> set[str]:
    return {candidate.group.node for candidate in exchange._pool.values()}


def test_peers_that_publish_before_every_look_leave_a_quiet_one_its_turn(mailbox: Mailbox) -> None:
    # Each look ends after one message, and every other peer has a new one each time, under a new name or the old.
    for renamed in (False, True):
        mailbox.publish(*message(row(99, node="quiet")))
        validator = Validator("anna", Rules())
        pace, identity = Pace(poll_cpu_s=0.0), Identity(node="anna", model="")
        anna = Exchange(mailbox, validator, identity, pace, generator=random.Random(0))
        for look in range(100):
            for loud in ("aa", "zz"):
                node = f"{loud}{look}" if renamed else loud
                mailbox.publish(*message(row(1000 + look, node=node, sequence=1 + look)))
            anna.poll()
            if "quiet" in _heard(anna):
                break
        assert "quiet" in _heard(anna), f"not in {look + 1} looks"


class _Computing(Mailbox):
    """Computes where it is called, as a store that decrypts would."""

    def fetch(self, name: str, limit: int) -> bytes | None:
        until_s = time.thread_time() + 0.02
        while time.thread_time() < until_s:
            pass
        return super().fetch(name, limit)


def test_what_a_call_of_the_store_computes_counts_to_the_look() -> None:
    store = _Computing(keep_s=600, budget_bytes=2**20)
    anna = _exchange(store, "anna", Pace(poll_cpu_s=0.02))
    for seed in range(3):
        store.publish(*message(row(seed, node=f"n{seed}")))
    anna.poll()
    assert anna.stats().accepted == 1


def test_messages_as_large_as_allowed_cost_little_and_larger_ones_are_not_read() -> None:
    box = Mailbox(keep_s=600, budget_bytes=2**26)
    most = (Completion("x" * 8000, 8001, True),) * 64
    for node, count in (("large", 12), ("larger", 18)):
        rows = [row(seed, node=node, sequence=seed) for seed in range(count)]
        box.publish(*message(*(replace(sent, completions=most, claimed_rewards=(0.0,) * 64) for sent in rows)))
    anna = _exchange(box, "anna")
    began_s = time.thread_time()
    anna.poll()
    assert time.thread_time() - began_s < 5  # 0.2 s on an idle machine
    assert anna.stats().rejected["size"] == 1
    assert anna.stats().accepted > 5
    assert _taken(anna) == [], "all of its completions are equally wrong"


def test_a_poisoned_message_among_others_costs_only_itself(mailbox: Mailbox) -> None:
    name, encoded = message(row(1))
    mailbox.publish(name, encoded[:-7])
    mailbox.publish("../../etc/passwd", b"x")
    mailbox.publish("x" * 5000, b"x")
    mailbox.publish(*message(row(2, node="bert")))
    anna = _exchange(mailbox, "carl")
    rejected: list[Rejection] = []
    anna.on_rejection = rejected.append
    anna.poll()
    assert _taken(anna) == [group(2, node="bert")]
    assert [rejection.reason for rejection in rejected] == ["bytes"]


def test_a_node_that_comes_back_has_its_place(mailbox: Mailbox) -> None:
    clock = itertools.count(1000).__next__
    anna = Exchange(mailbox, Validator("anna", Rules()), Identity(node="anna", model=""), _QUICK, clock=clock)
    bert = _exchange(mailbox, "bert")
    bert.share([group(1, node="bert")])
    bert.publish_waiting()
    anna.poll()
    anna.share([group(2)])
    anna.publish_waiting()
    state = json.loads(json.dumps(anna.state()))

    back = Exchange(mailbox, Validator("anna", Rules()), Identity(node="anna", model=""), _QUICK, clock=lambda: 0.0)
    back.load_state(state)
    back.poll()
    assert [found.question.seed for found in _taken(back)] == [1]  # it was still waiting
    again = Exchange(mailbox, Validator("anna", Rules()), Identity(node="anna", model=""), _QUICK)
    again.load_state(back.state())
    again.poll()
    assert _taken(again) == []  # it was taken before
    back.share([group(3)])
    back.publish_waiting()
    own = sorted(name for name in mailbox.names() if name.startswith("anna."))
    assert len(own) == 2  # its count goes on, though its clock went back
    bert.poll()
    assert sorted(found.question.seed for found in _taken(bert)) == [2, 3]


class _OneUnreadable(Mailbox):
    """Lists a message that sorts first and cannot be fetched."""

    def names(self) -> list[str]:
        return ["z.9223372036854775807." + "0" * 64, *super().names()]

    def fetch(self, name: str, limit: int) -> bytes | None:
        if name.startswith("z."):
            raise PermissionError(name)
        return super().fetch(name, limit)


def test_a_message_that_cannot_be_read_hides_none_behind_it() -> None:
    store = _OneUnreadable(keep_s=60, budget_bytes=2**20)
    anna, bert = _exchange(store, "anna"), _exchange(store, "bert")
    bert.share([group(1, node="bert")])
    bert.publish_waiting()
    for _ in range(3):
        with pytest.raises(PermissionError):
            anna.poll()
    anna.poll()  # it is left alone by now
    assert [found.question.seed for found in _taken(anna)] == [1]


class _Moving(Mailbox):
    """Lists messages that it does not find for a number of times, as while a node moves them to another folder."""

    def __init__(self, missing: int) -> None:
        super().__init__(keep_s=60, budget_bytes=2**20)
        self.missing, self.fetches = missing, 0

    def fetch(self, name: str, limit: int) -> bytes | None:
        self.fetches += 1
        return super().fetch(name, limit) if self.fetches > self.missing else None


def test_a_message_that_was_being_moved_is_read_at_the_next_look_and_one_never_there_is_left_alone() -> None:
    moved, never = _Moving(1), _Moving(99)
    for store in (moved, never):
        store.publish(*message(row(1, node="bert")))
        anna = _exchange(store, "anna")
        for _ in range(6):
            anna.poll()
        assert anna.stats().accepted == (store is moved)
    assert (moved.fetches, never.fetches) == (2, 3)


def test_a_node_hears_that_another_has_its_name(mailbox: Mailbox, caplog: pytest.LogCaptureFixture) -> None:
    clock = itertools.count(1000).__next__

    def named(node: str) -> Exchange:
        return Exchange(mailbox, Validator(node, Rules()), Identity(node=node, model=""), _QUICK, clock=clock)

    before = named("anna")
    before.share([group(1)])
    before.publish_waiting()
    anna, other = named("anna"), named("anna")  # the first was started again, with its own old message in the store
    anna.share([group(2)])
    anna.publish_waiting()
    anna.poll()
    assert anna.stats().namesakes == 0
    other.share([group(3)])
    other.publish_waiting()
    for _ in range(2):
        anna.poll()
    assert anna.stats().namesakes == 1
    assert anna.stats().peers == 0
    assert caplog.text.count("another node shares under this name") == 1


def test_signed_nodes_hear_only_signed_nodes(mailbox: Mailbox) -> None:
    signers = [Signer(letter * 32) for letter in (b"a", b"b")]
    rules = Rules(require_signatures=True)
    signed = [_exchange(mailbox, signer.node, rules=rules, signer=signer) for signer in signers]
    plain = _exchange(mailbox, "plain")
    for seed, exchange in enumerate([*signed, plain]):
        exchange.share([group(seed, node="plain")])
        exchange.publish_waiting()
    signed[0].poll()
    assert [found.node for found in _taken(signed[0])] == [signers[1].node]
    assert signed[0].stats().rejected == {"signature": 1}


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    _until(lambda: not any(thread.name.startswith(("anna", "bert", "store")) for thread in threading.enumerate()))
