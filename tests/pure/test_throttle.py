"""Limits: the long-run rate, how large a burst may be, and that nobody waits for ever."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from itertools import count

from hypothesis import given, settings
from hypothesis import strategies as st

from xtool.backends.throttle import NO_LIMIT, Line, Throttle


class World:
    """A clock, and timers that find it at the time they are due."""

    def __init__(self) -> None:
        self.now = 50.0
        self.timers: list[tuple[float, int, World.Timer]] = []
        self.serial = count()

    class Timer:
        def __init__(self, callback: Callable[[], None]) -> None:
            self.callback: Callable[[], None] | None = callback

        def cancel(self) -> None:
            self.callback = None

    def clock(self) -> float:
        return self.now

    def call_later(self, seconds: float, callback: Callable[[], None]) -> Timer:
        timer = World.Timer(callback)
        heapq.heappush(self.timers, (self.now + seconds, next(self.serial), timer))
        return timer

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        while self.timers and self.timers[0][0] <= end:
            due, _, timer = heapq.heappop(self.timers)
            self.now = max(self.now, due)
            if timer.callback is not None:
                timer.callback()
        self.now = end


@settings(deadline=None, max_examples=50)
@given(
    st.integers(1000, 10**9),
    st.sampled_from([0, 50, 1000]),
    st.lists(st.integers(512, 1 << 20), min_size=1, max_size=20),
)
def test_the_long_run_rate_and_the_burst(rate: int, ops: int, sizes: list[int]) -> None:
    """From any moment to any later one no more goes through than the rate, one burst and one request; and no
    less than the rate while there is always more to do."""
    world = World()
    throttle = Throttle(world.clock, rate, ops, burst=0.1)
    done: list[tuple[float, int]] = []
    for number in range(200):
        world.now += throttle.wait()
        size = sizes[number % len(sizes)]
        throttle.charge(size, 1)
        done.append((world.now, size))
    largest = max(sizes)
    for first in range(0, 200, 10):
        moved = 0
        for number, (when, size) in enumerate(done[first:], 1):
            moved += size
            passed = when - done[first][0]
            assert moved <= 1.001 * rate * (passed + 0.1) + largest + 1
            assert not ops or number <= 1.001 * ops * (passed + 0.1) + 2
    passed = done[-1][0] - done[0][0]
    needed = max(sum(size for _, size in done) / rate, 200 / ops if ops else 0)
    assert passed <= 1.001 * needed


def test_after_a_pause_there_is_one_burst_and_not_more() -> None:
    world = World()
    throttle = Throttle(world.clock, 1_000_000, burst=0.1)
    assert throttle.room() == (100_000, NO_LIMIT)
    throttle.charge(600_000, 1)
    assert throttle.room()[0] == 0 and abs(throttle.wait() - 0.5) < 1e-6
    world.now += 1000
    assert throttle.wait() == 0 and abs(throttle.room()[0] - 100_000) <= 1


def test_no_limits() -> None:
    throttle = Throttle(World().clock)
    throttle.charge(1 << 40, 1000)
    assert not throttle and throttle.wait() == 0 and throttle.room() == (NO_LIMIT, NO_LIMIT)


def test_other_limits_keep_the_debt() -> None:
    world = World()
    throttle = Throttle(world.clock, 1_000_000, burst=0.0)
    throttle.charge(1_000_000, 1)
    throttle.set(2_000_000)
    assert abs(throttle.wait() - 0.5) < 1e-6
    throttle.set(2_000_000, 10)
    assert abs(throttle.wait() - 0.5) < 1e-6
    throttle.set(0, 10)
    assert throttle.wait() == 0
    throttle.set(1_000_000)
    assert throttle.wait() == 0  # what was there before no limit was is forgotten


class Party:
    """Always has more to do."""

    def __init__(self, world: World, throttle: Throttle, line: Line, size: int) -> None:
        self.world, self.throttle, self.line, self.size = world, throttle, line, size
        self.turns: list[float] = []

    def turn(self) -> None:
        self.turns.append(self.world.now)
        self.throttle.charge(self.size, 1)
        self.line.join(self, self.turn)


def test_nobody_in_the_line_is_passed_over() -> None:
    """Those who ask for much and those who ask for little have as many turns."""
    world = World()
    throttle = Throttle(world.clock, 1_000_000, burst=0.1)
    line = Line(throttle, world.call_later)
    parties = [Party(world, throttle, line, size) for size in (4096, 1 << 20, 512, 65536)]
    for party in parties:
        line.join(party, party.turn)
        line.join(party, party.turn)  # keeps its place
    world.run(100)
    turns = [len(party.turns) for party in parties]
    assert max(turns) - min(turns) <= 1 and min(turns) > 50
    assert abs(sum(p.size * len(p.turns) for p in parties) - 100 * 1_000_000) < 2 * (1 << 20)
    line.leave(parties[1])
    before = len(parties[1].turns)
    world.run(10)
    assert len(parties[1].turns) == before and len(parties[0].turns) > turns[0]


def test_a_limit_that_is_lifted_is_felt_at_once() -> None:
    world = World()
    throttle = Throttle(world.clock, 1000)
    line = Line(throttle, world.call_later)
    party = Party(world, throttle, line, 1 << 20)
    line.join(party, party.turn)
    world.run(1)
    assert len(party.turns) == 1 and line.busy  # and a wait of 17 minutes
    throttle.set(1 << 30)
    line.hurry()
    world.run(1.0)
    assert len(party.turns) > 500


def test_a_callback_that_leaves_takes_nobody_with_it() -> None:
    world = World()
    throttle = Throttle(world.clock, 0, 10)
    line = Line(throttle, world.call_later)
    seen: list[str] = []

    def first() -> None:
        seen.append("first")
        line.leave("second")

    line.join("first", first)
    line.join("second", lambda: seen.append("second"))
    line.join("third", lambda: seen.append("third"))
    world.run(1)
    assert seen == ["first", "third"] and not line.busy
