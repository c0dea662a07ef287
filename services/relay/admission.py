"""Who is let in, and when: a bounded number is served at once, a bounded number waits a bounded time.

Its one invariant: whatever becomes of a request that has entered, its place is given back, once; the rate's tokens
and the places go to requests in the order in which they asked for them.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from time import monotonic
from typing import Final

from services.relay.errors import TooManyRequests

# When a place comes free nobody knows; answers end all the time.
_FULL_SECONDS: Final = 1.0


class _Rate:
    """A bucket that fills with `per_second` tokens up to one second's worth; 0: no limit."""

    def __init__(self, per_second: float) -> None:
        self._per_second = per_second
        self._most = max(1.0, per_second)
        self._tokens = self._most
        self._counted_at = monotonic()
        self._first_in_line = asyncio.Lock()

    def wait_seconds(self, tokens: int) -> float:
        """How long it takes until so many tokens are there, if nobody takes any."""
        if not self._per_second:
            return 0.0
        now = monotonic()
        self._tokens = min(self._most, self._tokens + (now - self._counted_at) * self._per_second)
        self._counted_at = now
        return max(0.0, (tokens - self._tokens) / self._per_second)

    async def take(self) -> None:
        """Takes a token, in turn; who is cancelled in the line has taken none."""
        if not self._per_second:
            return
        async with self._first_in_line:
            if wait_seconds := self.wait_seconds(1):
                await asyncio.sleep(wait_seconds)
            self._tokens -= 1


@dataclass(slots=True)
class _Room:
    """What the entries share. `before_rate`: those that have entered and have no token yet."""

    rate: _Rate
    places: asyncio.Semaphore
    queue_seconds: float
    entered: int = 0
    before_rate: int = 0
    in_flight: int = 0


class Entry:
    """One request, from `Admission.enter` to `leave`."""

    def __init__(self, room: _Room) -> None:
        self._room = room
        self._has_token = False
        self._has_left = False
        room.entered += 1
        room.before_rate += 1

    async def begin(self) -> None:
        """Waits until the rate allows this request; comes before everything else."""
        if not self._has_token:
            await self._room.rate.take()
            self._pass_rate()

    @asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """One of the places; raises TooManyRequests when none comes free in time."""
        room = self._room
        try:
            async with asyncio.timeout(room.queue_seconds):
                await room.places.acquire()
        except TimeoutError:
            raise TooManyRequests(retry_after_seconds=_FULL_SECONDS) from None
        room.in_flight += 1
        try:
            yield
        finally:
            room.in_flight -= 1
            room.places.release()

    def leave(self) -> None:
        """Makes room for another to enter; a second time it does nothing."""
        if not self._has_left:
            self._has_left = True
            self._room.entered -= 1
            self._pass_rate()

    def _pass_rate(self) -> None:
        if not self._has_token:
            self._has_token = True
            self._room.before_rate -= 1


class Admission:
    """The entrance of one relay."""

    def __init__(
        self, *, max_in_flight: int, max_queued: int, queue_seconds: float, requests_per_second: float
    ) -> None:
        self._max_entered = max_in_flight + max_queued
        self._room = _Room(_Rate(requests_per_second), asyncio.Semaphore(max_in_flight), queue_seconds)

    @property
    def in_flight(self) -> int:
        """How many have a place."""
        return self._room.in_flight

    @property
    def queued(self) -> int:
        """How many have entered and have no place: they wait for the rate, for their session, or for a place."""
        return self._room.entered - self._room.in_flight

    @asynccontextmanager
    async def admitted(self) -> AsyncIterator[None]:
        """One of the places, for a request that is no turn; raises TooManyRequests."""
        entry = self.enter()
        try:
            await entry.begin()
            async with entry.place():
                yield
        finally:
            entry.leave()

    def enter(self) -> Entry:
        """Lets a request in; raises TooManyRequests at once when too many have entered, or the rate is too far behind.

        What it then says is the time until the rate would serve this request without delay.
        """
        room = self._room
        if room.entered >= self._max_entered:
            raise TooManyRequests(retry_after_seconds=_FULL_SECONDS)
        wait_seconds = room.rate.wait_seconds(room.before_rate + 1)
        if wait_seconds > room.queue_seconds:
            raise TooManyRequests(retry_after_seconds=wait_seconds)
        return Entry(room)
