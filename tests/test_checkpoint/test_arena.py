"""Slots: page-aligned, never in two hands, handed out again before fresh ones."""

from __future__ import annotations

import mmap
import threading

import pytest

from checkpoint.arena import SLOT_BYTES, Arena, free_memory_bytes
from checkpoint.errors import SaveFailed
from tests.test_checkpoint.worlds import wait_until


def test_slots_do_not_overlap_and_start_on_pages():
    with Arena(4) as arena:
        slots = [arena.try_take() for _ in range(4)]
        assert arena.try_take() is None
        assert sorted(slot.offset for slot in slots) == [i * SLOT_BYTES for i in range(4)]
        assert all(slot.address % mmap.PAGESIZE == 0 and slot.memory.nbytes == SLOT_BYTES for slot in slots)
        for slot in slots:
            slot.memory[:] = bytes([slot.index + 1]) * SLOT_BYTES
        assert all(set(slot.memory[::4096]) == {slot.index + 1} for slot in slots)


def test_a_memory_file_holds_what_is_written_to_the_slots():
    with Arena(2, is_file=True) as arena:
        slots = [arena.try_take() for _ in range(2)]
        slots[1].memory[:3] = b"abc"
        with mmap.mmap(arena.descriptor, 2 * SLOT_BYTES, prot=mmap.PROT_READ) as mapped:
            assert mapped[slots[1].offset : slots[1].offset + 3] == b"abc"


def test_a_used_slot_is_taken_before_a_fresh_one():
    with Arena(100) as arena:
        for _ in range(10):
            pair = [arena.try_take(), arena.try_take()]
            for slot in pair:
                arena.give_back(slot)
        assert arena.touched_bytes == 2 * SLOT_BYTES
        assert arena.num_free == 100


def test_no_more_than_allowed_are_handed_out():
    with Arena(3, 1) as arena:
        assert arena.try_take() is not None
        assert arena.try_take() is None
        arena.allow(99)
        assert arena.num_free == 2
        arena.allow(1)
        assert arena.num_free == 2


def test_who_waits_gets_the_slot_that_comes_back():
    with Arena(1) as arena:
        slot = arena.try_take()
        got = []
        thread = threading.Thread(target=lambda: got.append(arena.take(lambda: False)))
        thread.start()
        arena.give_back(slot)
        thread.join(20)
        assert got == [slot]


def test_who_gives_up_gets_nothing():
    with Arena(1) as arena:
        arena.try_take()
        over, looked, got = threading.Event(), threading.Event(), []

        def given_up() -> bool:
            looked.set()
            return over.is_set()

        thread = threading.Thread(target=lambda: got.append(arena.take(given_up)))
        thread.start()
        assert looked.wait(20)
        over.set()
        wait_until(lambda: arena.wake() or not thread.is_alive())
        assert got == [None]


def test_memory_that_cannot_be_had_is_told_with_the_remedy():
    with pytest.raises(SaveFailed, match=r"staging memory cannot be had: .*; set staging_bytes to less"):
        Arena(1 << 38)
    with pytest.raises(ValueError, match="at least one slot"):
        Arena(0)


def test_closing_twice_is_closing():
    arena = Arena(1)
    arena.try_take()
    arena.close()
    arena.close()


def test_free_memory_is_what_the_system_says():
    assert 0 < free_memory_bytes() < 1 << 50
