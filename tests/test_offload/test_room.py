"""Memory that is lent under backward does not raise a step's peak."""

from __future__ import annotations

import random

from offload.room import Room


class _Allocator:
    """Counts bytes as torch's allocator does."""

    def __init__(self) -> None:
        self.now = self.peak = 0

    def take(self, num_bytes: int) -> None:
        self.now += num_bytes
        self.peak = max(self.peak, self.now)

    def told(self) -> tuple[int, int]:
        return self.now, self.peak


def test_steps_have_the_peak_that_they_had_without_it_and_room_is_used() -> None:
    random.seed(1)
    for _ in range(200):
        weights, layers, logits = random.randint(1, 50), random.randint(1, 20), random.randint(1, 100)
        each, size = random.randint(1, 10), random.randint(1, 15)
        memory, lent = _Allocator(), 0
        room, counts = Room(memory.told), []
        memory.take(weights)
        for _ in range(4):
            for _ in range(layers):
                memory.take(each)
            memory.take(-size * lent)  # the last gate of a forward
            room.give_back(size * lent)
            room.measure()
            lent = 0
            memory.take(logits)
            memory.take(-logits)
            for _ in range(layers):
                memory.take(-each)
                if room.borrow(size):
                    memory.take(size)
                    lent += 1
            counts.append(lent)
        assert memory.peak == weights + layers * each + logits
        assert counts[0] == 0  # nothing is known yet
        assert set(counts[1:]) == {min(layers, logits // size)}


def test_nothing_is_lent_beyond_what_is_allocated_at_the_time() -> None:
    memory = _Allocator()
    room = Room(memory.told)
    memory.take(100)
    memory.take(-60)
    room.measure()
    assert not room.borrow(61)
    memory.take(50)  # somebody else
    assert not room.borrow(11)
    assert room.borrow(10)
    memory.take(-50)
    assert not room.borrow(51)  # ten are lent
    assert room.borrow(50)
    room.give_back(60)
    assert room.borrow(60)
