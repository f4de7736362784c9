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


def _steps(
    memory: _Allocator, room: Room, count: int, *, layers: int, each: int, loss: int, made: int, size: int
) -> list[int]:
    """Run steps on an allocator; return how many pieces of `size` were lent in each backward."""
    lent, counts = 0, []
    for _ in range(count):
        for _ in range(layers):
            memory.take(each)
        memory.take(-size * lent)  # the last gate of a forward
        room.give_back(size * lent)
        room.measure()
        lent = 0
        memory.take(loss)
        memory.take(-loss)
        for _ in range(layers):
            memory.take(made)  # what backward makes for itself
            room.look()
            if room.borrow(size):
                memory.take(size)
                lent += 1
            memory.take(-made - each)
        counts.append(lent)
    memory.take(-size * lent)
    room.give_back(size * lent)
    return counts


def test_steps_have_the_peak_that_they_had_without_it_and_room_is_used() -> None:
    random.seed(1)
    for _ in range(300):
        layers, each, size, loss = (random.randint(1, most) for most in (20, 10, 15, 200))
        made = random.randint(0, loss)
        memory = _Allocator()
        memory.take(50)
        counts = _steps(memory, Room(memory.told), 6, layers=layers, each=each, loss=loss, made=made, size=size)
        assert memory.peak == 50 + layers * each + loss
        assert counts[0] == 0  # nothing is known yet
        assert counts[2:] == [counts[2]] * 4
        assert counts[2] <= loss * 3 // 4 // size + 1
        if made + size * layers <= loss // 2:
            assert counts[2] == layers


def test_lent_memory_makes_no_room_for_more_and_less_is_lent_where_the_peak_rose() -> None:
    memory = _Allocator()
    room, lent, most = Room(memory.told), 0, []
    for step in range(8):
        memory.take(100)
        memory.take(-10 * lent)
        room.give_back(10 * lent)
        room.measure()
        lent = 0
        memory.take(80)
        memory.take(-80)
        room.look()
        while room.borrow(10):
            memory.take(10)
            lent += 1
        if step:
            memory.take(40)  # which no look sees; a quarter of 80 is spared
            memory.take(-40)
        memory.take(-100)
        most.append(lent)
    assert most == [0, 6, *[4] * 6]
    assert memory.peak == 200


def test_a_peak_that_is_counted_anew_counts() -> None:
    memory = _Allocator()
    room = Room(memory.told)
    memory.take(1000)
    memory.take(-1000)
    step = {"layers": 1, "each": 100, "made": 0, "size": 60}
    assert _steps(memory, room, 3, loss=20, **step) == [0, 1, 1]  # of the 900 that somebody once needed
    memory.peak = memory.now
    assert _steps(memory, room, 3, loss=20, **step)[1:] == [0, 0]
    assert _steps(memory, room, 3, loss=120, **step)[1:] == [1, 1]
