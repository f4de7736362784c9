"""A test that wants to be alone is, and is not passed by those that came later."""

from __future__ import annotations

import threading
import uuid
from types import SimpleNamespace
from typing import Any

from tests.workers import turn


def test_who_wants_to_be_alone_waits_for_all_before_it_and_holds_up_all_after_it() -> None:
    config: Any = SimpleNamespace(workerinput={"testrunuid": uuid.uuid4().hex})
    order: list[str] = []
    leave = {name: threading.Event() for name in ("first", "second", "alone", "late")}
    inside = {name: threading.Event() for name in leave}

    def run(name: str) -> None:
        with turn(config, is_alone=name == "alone"):
            order.append(name)
            inside[name].set()
            assert leave[name].wait(30)

    threads = [threading.Thread(target=run, args=(name,)) for name in leave]
    for thread, name in zip(threads[:2], leave, strict=False):
        thread.start()
        assert inside[name].wait(30), "two that do not mind each other are inside at once"
    threads[2].start()
    assert not inside["alone"].wait(0.2)
    threads[3].start()
    leave["first"].set()
    assert not inside["late"].wait(0.2), "it came after who waits"
    assert not inside["alone"].is_set(), "the second is still there"
    leave["second"].set()
    assert inside["alone"].wait(30)
    assert not inside["late"].wait(0.2)
    leave["alone"].set()
    assert inside["late"].wait(30)
    leave["late"].set()
    for thread in threads:
        thread.join()
    assert order == ["first", "second", "alone", "late"]


def test_in_one_process_nobody_waits() -> None:
    config: Any = SimpleNamespace()
    with turn(config, is_alone=True), turn(config, is_alone=True):
        pass
