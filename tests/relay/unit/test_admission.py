"""The entrance: bounds, order, the rate, and that nothing is lost whoever is cancelled wherever."""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from time import monotonic
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from services.relay.admission import Admission, Entry
from services.relay.errors import TooManyRequests


def admission(
    *, max_in_flight: int = 1, max_queued: int = 10, queue_seconds: float = 30, requests_per_second: float = 0
) -> Admission:
    return Admission(
        max_in_flight=max_in_flight,
        max_queued=max_queued,
        queue_seconds=queue_seconds,
        requests_per_second=requests_per_second,
    )


@dataclass
class Visit:
    """A request that enters at once and stays in its place until it is told to end."""

    entry: Entry
    on_place: Callable[[], None] = lambda: None
    may_end: asyncio.Event = field(default_factory=asyncio.Event)
    has_place: bool = False

    def __post_init__(self) -> None:
        self.task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        try:
            await self.entry.begin()
            async with self.entry.place():
                self.has_place = True
                self.on_place()
                try:
                    await self.may_end.wait()
                finally:
                    self.has_place = False
        finally:
            self.entry.leave()


async def settled() -> None:
    """Lets everything happen that needs no time to pass."""
    for _ in range(20):
        await asyncio.sleep(0)


async def all_places_are_free(door: Admission, max_in_flight: int) -> bool:
    """Whether as many as there should be places get one at once."""
    visits = [Visit(door.enter()) for _ in range(max_in_flight)]
    await settled()
    free = all(visit.has_place for visit in visits)
    for visit in visits:
        visit.may_end.set()
    await asyncio.gather(*(visit.task for visit in visits), return_exceptions=True)
    return free and (door.in_flight, door.queued) == (0, 0)


# ── bounds ──────────────────────────────────────────────────────────────────────────────────────


async def test_so_many_are_served_so_many_wait_and_the_rest_is_refused_at_once() -> None:
    door = admission(max_in_flight=3, max_queued=2)
    visits = [Visit(door.enter()) for _ in range(5)]
    await settled()
    assert (door.in_flight, door.queued) == (3, 2)
    began = monotonic()
    for _ in range(100):
        with pytest.raises(TooManyRequests) as raised:
            door.enter()
        assert raised.value.headers() == {"retry-after": "1"}
    assert monotonic() - began < 1
    visits[0].may_end.set()
    await settled()
    assert (door.in_flight, door.queued) == (3, 1)
    visits.append(Visit(door.enter()))
    await settled()
    assert (door.in_flight, door.queued) == (3, 2)
    for visit in visits:
        visit.may_end.set()
    await asyncio.gather(*(visit.task for visit in visits))
    assert (door.in_flight, door.queued) == (0, 0)


async def test_nobody_waits_where_nobody_may() -> None:
    door = admission(max_in_flight=2, max_queued=0)
    visits = [Visit(door.enter()) for _ in range(2)]
    await settled()
    with pytest.raises(TooManyRequests):
        door.enter()
    for visit in visits:
        visit.may_end.set()
    await asyncio.gather(*(visit.task for visit in visits))
    assert await all_places_are_free(door, 2)


async def test_who_waits_too_long_for_a_place_is_refused_and_the_line_moves_up() -> None:
    door = admission(queue_seconds=0.1)
    first, second = Visit(door.enter()), Visit(door.enter())
    began = monotonic()
    with pytest.raises(TooManyRequests) as raised:
        await second.task
    assert monotonic() - began > 0.09
    assert raised.value.headers() == {"retry-after": "1"}
    assert (door.in_flight, door.queued) == (1, 0)
    third = Visit(door.enter())
    await settled()
    first.may_end.set()
    await settled()
    assert third.has_place
    third.may_end.set()
    await third.task
    assert await all_places_are_free(door, 1)


async def test_a_fault_in_its_place_is_passed_on_and_the_place_given_back() -> None:
    door = admission()
    for fault in (ValueError, TimeoutError):
        entry = door.enter()
        with pytest.raises(fault):
            async with entry.place():
                raise fault
        entry.leave()
        assert await all_places_are_free(door, 1)


async def test_leaving_twice_is_leaving_once() -> None:
    door = admission(max_in_flight=1, max_queued=1)
    first, second = door.enter(), door.enter()
    for _ in range(3):
        first.leave()
    assert door.queued == 1
    third = door.enter()
    with pytest.raises(TooManyRequests):
        door.enter()
    for entry in (second, third):
        entry.leave()
    assert door.queued == 0


# ── order ───────────────────────────────────────────────────────────────────────────────────────


async def test_places_go_to_those_who_came_first() -> None:
    door = admission(max_in_flight=3, max_queued=100)
    served: list[int] = []

    async def come(number: int, entry: Entry) -> None:
        try:
            await entry.begin()
            async with entry.place():
                assert door.in_flight <= 3
                served.append(number)
                await asyncio.sleep(0.001)
        finally:
            entry.leave()

    tasks = [asyncio.create_task(come(number, door.enter())) for number in range(100)]
    await settled()
    for task in tasks[10:20]:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert served == [*range(10), *range(20, 100)]
    assert await all_places_are_free(door, 3)


async def test_a_newcomer_does_not_overtake_whom_a_place_was_given_to() -> None:
    door = admission()
    first, second = Visit(door.enter()), Visit(door.enter())
    await settled()
    first.may_end.set()
    while first.has_place:
        await asyncio.sleep(0)
    third = Visit(door.enter())  # while the second has yet to wake up
    await settled()
    assert (second.has_place, third.has_place) == (True, False)
    for visit in (second, third):
        visit.may_end.set()
    await asyncio.gather(second.task, third.task)


# ── the rate ────────────────────────────────────────────────────────────────────────────────────


async def test_three_hundred_at_once_all_get_through_in_order_and_no_faster_than_the_rate() -> None:
    door = admission(max_in_flight=1000, requests_per_second=200)
    began = monotonic()
    passed: list[tuple[int, float]] = []

    async def come(number: int, entry: Entry) -> None:
        await entry.begin()
        passed.append((number, monotonic() - began))
        entry.leave()

    await asyncio.gather(*(come(number, door.enter()) for number in range(300)))
    assert [number for number, _ in passed] == list(range(300))
    # A timer may wake a millisecond early.
    assert all(after >= (number - 199) / 200 - 0.002 for number, after in passed)
    assert passed[199][1] < 0.9  # one second's worth does not wait
    assert passed[299][1] < 5
    assert door.queued == 0


async def test_who_would_wait_too_long_for_the_rate_is_refused_at_once_and_told_how_long() -> None:
    door = admission(max_in_flight=100, queue_seconds=5, requests_per_second=1)
    entries = [door.enter() for _ in range(6)]  # at once, and after 1, 2, 3, 4, 5 seconds
    with pytest.raises(TooManyRequests) as raised:
        door.enter()
    assert 5 < (raised.value.retry_after_seconds or 0) <= 6
    assert door.queued == 6
    entries[3].leave()
    with suppress(TooManyRequests):
        entries.append(door.enter())
    assert len(entries) == 7
    for entry in entries:
        entry.leave()
    assert door.queued == 0


async def test_a_slow_rate_lets_one_through_at_once() -> None:
    door = admission(requests_per_second=0.5, queue_seconds=1)
    entry = door.enter()
    await asyncio.wait_for(entry.begin(), 0.5)
    entry.leave()
    with pytest.raises(TooManyRequests) as raised:
        door.enter()
    assert 1 < (raised.value.retry_after_seconds or 0) <= 2


async def test_no_rate_is_no_limit() -> None:
    door = admission(max_in_flight=10_000, requests_per_second=0)
    entries = [door.enter() for _ in range(5000)]
    await asyncio.wait_for(asyncio.gather(*(entry.begin() for entry in entries)), 10)
    for entry in entries:
        entry.leave()
    assert door.queued == 0


async def test_beginning_twice_takes_one_token() -> None:
    door = admission(max_in_flight=10, requests_per_second=2)
    first, second = door.enter(), door.enter()
    for _ in range(5):
        await asyncio.wait_for(first.begin(), 0.4)
    await asyncio.wait_for(second.begin(), 0.4)
    first.leave()
    second.leave()
    await asyncio.wait_for(second.begin(), 0.4)  # it has left, and waits for nothing


async def test_who_is_cancelled_before_its_turn_takes_no_token_and_holds_nobody_up() -> None:
    door = admission(max_in_flight=100, requests_per_second=10)
    for _ in range(10):
        entry = door.enter()
        await entry.begin()
        entry.leave()
    began = monotonic()
    visits = [Visit(door.enter()) for _ in range(42)]
    await settled()
    assert door.queued == 42
    for visit in visits[1:-1]:
        visit.task.cancel()
    await asyncio.sleep(0.01)
    visits[0].task.cancel()  # the one that sleeps until the next token
    await settled()
    assert door.queued == 1
    last = visits[-1]
    last.may_end.set()
    await asyncio.wait_for(last.task, 2)  # with forty tokens wasted, it would be four seconds
    assert monotonic() - began > 0.05
    assert (door.in_flight, door.queued) == (0, 0)


# ── cancellation ────────────────────────────────────────────────────────────────────────────────


async def test_cancelled_while_waiting_for_a_place() -> None:
    door = admission(max_in_flight=1)
    first, second, third = (Visit(door.enter()) for _ in range(3))
    await settled()
    second.task.cancel()
    await settled()
    assert (door.in_flight, door.queued) == (1, 1)
    first.may_end.set()
    await settled()
    assert third.has_place
    third.task.cancel()
    await settled()
    assert await all_places_are_free(door, 1)


@pytest.mark.parametrize("steps", range(8))
async def test_cancelled_while_a_place_is_handed_over(steps: int) -> None:
    door = admission(max_in_flight=1)
    first, second, third = (Visit(door.enter()) for _ in range(3))
    await settled()
    first.may_end.set()
    for _ in range(steps):
        await asyncio.sleep(0)
    second.task.cancel()
    await settled()
    assert second.task.cancelled()
    assert third.has_place
    third.may_end.set()
    await third.task
    assert await all_places_are_free(door, 1)


async def test_a_place_that_is_handed_over_when_the_time_is_up_is_not_lost() -> None:
    for nudge in range(-10, 11):
        door = admission(max_in_flight=1, queue_seconds=0.01)
        first = Visit(door.enter())
        await settled()
        second = Visit(door.enter())
        asyncio.get_running_loop().call_later(0.01 + nudge / 10_000, first.may_end.set)
        asyncio.get_running_loop().call_later(0.05, second.may_end.set)
        await asyncio.wait([first.task, second.task])
        if error := second.task.exception():
            assert isinstance(error, TooManyRequests)
        assert await all_places_are_free(door, 1)


async def test_cancelled_before_it_ever_ran() -> None:
    door = admission(max_in_flight=1)
    entry = door.enter()
    visit = Visit(entry)
    visit.task.cancel()
    await settled()
    assert visit.task.cancelled()
    assert door.queued == 1
    entry.leave()  # its finally never ran, so this is for whoever has entered it
    assert await all_places_are_free(door, 1)


# ── any order of events ─────────────────────────────────────────────────────────────────────────

_numbers = st.integers(0, 7)
_event = st.one_of(
    st.sampled_from([("enter",), ("step",), ("settle",), ("pause",)]),
    st.tuples(st.sampled_from(["end", "cancel"]), _numbers),
    st.tuples(st.just("race"), _numbers, st.integers(0, 3), _numbers),
)


class Crowd:
    """Requests to which things happen; checks after each that all bounds hold."""

    def __init__(self, door: Admission, max_in_flight: int, max_entered: int) -> None:
        self._door = door
        self._max_in_flight = max_in_flight
        self._max_entered = max_entered
        self.visits: list[Visit] = []
        self.served: list[int] = []

    async def happen(self, *event: Any) -> None:
        match event:
            case ("enter",):
                with suppress(TooManyRequests):
                    self.visits.append(Visit(self._door.enter(), partial(self.served.append, len(self.visits))))
            case ("step",):
                await asyncio.sleep(0)
            case ("settle",):
                await settled()
            case ("pause",):
                await asyncio.sleep(0.001)
            case ("end", number):
                for visit in self.visits[number : number + 1]:
                    visit.may_end.set()
            case ("cancel", number):
                for visit in self.visits[number : number + 1]:
                    visit.task.cancel()
            case ("race", ending, steps, cancelled):
                await self.happen("end", ending)
                for _ in range(steps):
                    await self.happen("step")
                await self.happen("cancel", cancelled)
        inside = sum(visit.has_place for visit in self.visits)
        assert inside == self._door.in_flight <= self._max_in_flight
        assert 0 <= self._door.queued <= self._max_entered - inside

    async def go_home(self) -> None:
        """Everybody ends, was cancelled, or was refused."""
        for visit in self.visits:
            visit.may_end.set()
        if self.visits:
            _, late = await asyncio.wait([visit.task for visit in self.visits], timeout=10)
            assert not late
        for visit in self.visits:
            if not visit.task.cancelled():
                assert isinstance(visit.task.exception(), TooManyRequests | None)
            visit.entry.leave()  # for those that were cancelled before they ran


@settings(max_examples=400)
@given(
    events=st.lists(_event, max_size=40),
    max_in_flight=st.integers(1, 3),
    max_queued=st.integers(0, 5),
    queue_seconds=st.sampled_from([0.0005, 0.002, 30]),
    requests_per_second=st.sampled_from([0, 2000]),
)
@example([*[("enter",)] * 3, ("settle",), ("race", 0, 1, 1)], 1, 5, 30, 0)
async def test_whatever_happens_the_bounds_hold_and_everything_comes_back(
    events: list[tuple[Any, ...]],
    max_in_flight: int,
    max_queued: int,
    queue_seconds: float,
    requests_per_second: float,
) -> None:
    door = admission(
        max_in_flight=max_in_flight,
        max_queued=max_queued,
        queue_seconds=queue_seconds,
        requests_per_second=requests_per_second,
    )
    crowd = Crowd(door, max_in_flight, max_in_flight + max_queued)
    for event in events:
        await crowd.happen(*event)
    await crowd.go_home()
    assert crowd.served == sorted(crowd.served)
    assert (door.in_flight, door.queued) == (0, 0)
    assert await all_places_are_free(door, max_in_flight)
