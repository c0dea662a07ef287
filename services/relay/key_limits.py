"""What a key may use, kept to by all relays together.

Its one invariant: whether a request of a limited key is let in is decided by one statement on one row, which counts
what was used and what the requests that run may still use. A reservation ends with its request, or runs out with its
relay: then another relay gives it back.

A request is let in while what was used, with what others have reserved, is below the limit; so a limit is exceeded at
most by what was in flight. Windows begin with the first request after the last one has ended; days are UTC.
"""

import asyncio
import math
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any, Final

import structlog
from uuid_utils import uuid7

from services.relay.errors import KeyLimitReached, TooManyRequests, UnknownKey
from services.relay.key_use import CONCURRENCY, FREE, GIVE_BACK, MAKE, RENEW, RESERVE, SETTLE, USE, WHY
from services.relay.keys import Key
from shared.database import Database, Row
from shared.errors import DatabaseUnavailable

log = structlog.get_logger(__name__)

RENEW_SECONDS: Final = 10
GIVE_BACK_SECONDS: Final = 5
_DAY_SECONDS: Final = 86_400.0
_BUSY_SECONDS: Final = 1.0
_AGAIN_SECONDS: Final = 1.0
_TOGETHER_SECONDS: Final = 0.1
_SETTLE_SECONDS: Final = 2.0
_TRIES: Final = 5
_PAUSES_SECONDS: Final = (0.02, 0.05, 0.1, 0.2, 0.3)


@dataclass(slots=True)
class Used:
    """What requests have used."""

    requests: int = 0
    tokens: int = 0
    cost: Decimal = Decimal(0)

    def add(self, other: "Used") -> None:
        self.requests += other.requests
        self.tokens += other.tokens
        self.cost += other.cost


@dataclass(frozen=True, slots=True)
class Reached:
    """The limit that a request has met, and when it is worth coming back."""

    limit: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Reservation:
    """A request that was let in; `id` is None for a key without limits."""

    key: Key
    id: str | None


class KeyLimits:
    """The limits of all keys, as far as this relay's requests go."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._held: set[str] = set()
        self._waiting: dict[str, int] = {}
        self._unsaved: dict[str, Used] = {}
        self._settling: set[asyncio.Task[None]] = set()
        self._saving = asyncio.Lock()
        self._news = asyncio.Event()

    async def reserve(self, key: Key, tokens: int, cost: Decimal) -> Reservation:
        """Lets a request in that may use so much; raises KeyLimitReached, and DatabaseUnavailable for a limited key.

        Costs nothing for a key without limits. Where only `concurrencyLimit` is reached, a few requests wait a moment:
        a client that hung up may be back before what it left has been put away.
        """
        if not key.is_limited:
            return Reservation(key, None)
        wanted = {"key_id": key.id, "reserved_tokens": tokens, "reserved_cost": cost, **_limits(key)}
        reached = await self._take(wanted)
        if isinstance(reached, Reached) and reached.limit == CONCURRENCY and self._begin_waiting(key):
            try:
                for pause_seconds in _PAUSES_SECONDS:
                    await asyncio.sleep(pause_seconds)
                    reached = await self._take(wanted)
                    if not isinstance(reached, Reached):
                        break
            finally:
                self._end_waiting(key)
        if isinstance(reached, Reached):
            raise KeyLimitReached.of(reached.limit, retry_after_seconds=reached.seconds)
        self._held.add(reached)
        return Reservation(key, reached)

    async def _take(self, wanted: dict[str, Any]) -> "str | Reached":
        """The reservation, or why there is none. Raises UnknownKey for a key whose row is gone."""
        reservation_id = str(uuid7())
        for _ in range(_TRIES):
            if await self._database.row(RESERVE, id=reservation_id, **wanted) is not None:
                return reservation_id
            why = await self._database.row(WHY, **wanted)
            if why is None:  # the key's first request, or what was known of its use was deleted
                await self._database.rows(MAKE, key_id=wanted["key_id"])
            elif reached := _reached(why):
                return reached
        if why is None:
            raise UnknownKey
        raise TooManyRequests(retry_after_seconds=_BUSY_SECONDS)

    def _begin_waiting(self, key: Key) -> bool:
        """Whether one more request of this key may wait: as many as may run."""
        waiting = self._waiting.get(key.id, 0)
        if waiting >= (key.concurrency_limit or 0):
            return False
        self._waiting[key.id] = waiting + 1
        return True

    def _end_waiting(self, key: Key) -> None:
        self._waiting[key.id] -= 1
        if not self._waiting[key.id]:
            del self._waiting[key.id]

    async def settle(self, reservation: Reservation, used: Used) -> None:
        """Puts what was used in place of what was reserved; for a key without limits beside the request.

        Raises nothing, and waits for a slow database a moment only: the answer is not held back for this.
        """
        if reservation.id is None:
            self._save_later(reservation.key.id, used)
            return
        self._held.discard(reservation.id)
        settling = asyncio.create_task(self._settle(reservation.id, reservation.key.id, used))
        self._settling.add(settling)
        settling.add_done_callback(self._settling.discard)
        await asyncio.wait({settling}, timeout=_SETTLE_SECONDS)

    async def _settle(self, reservation_id: str, key_id: str, used: Used) -> None:
        added = {"requests": used.requests, "tokens": used.tokens, "cost": used.cost}
        try:
            await self._database.rows(SETTLE, id=reservation_id, key_id=key_id, **added)
        except DatabaseUnavailable:
            log.warning("key_use_delayed", key=key_id)  # the reservation runs out by itself
            self._save_later(key_id, used)
        except Exception:  # no reason to fail a request that was answered
            log.exception("key_use_not_saved", key=key_id)

    def _save_later(self, key_id: str, used: Used) -> None:
        self._unsaved.setdefault(key_id, Used()).add(used)
        self._news.set()

    async def keep_saving(self) -> None:
        """Writes what keys without limits have used, for ever: at once, and what comes soon after that together."""
        while True:
            await self._news.wait()
            self._news.clear()
            try:
                await self.save()
                await asyncio.sleep(_TOGETHER_SECONDS)  # one commit for what many requests have used
            except DatabaseUnavailable:
                await asyncio.sleep(_AGAIN_SECONDS)
                self._news.set()
            except Exception:  # what others have used must be written all the same
                log.exception("key_use_not_saved")
                self._news.set()

    async def save(self) -> None:
        """Writes what there is; what others are writing is written too on return. Raises DatabaseUnavailable."""
        if self._settling:
            await asyncio.wait(set(self._settling))
        async with self._saving:
            while self._unsaved:
                key_id, used = self._unsaved.popitem()
                try:
                    await self._add(key_id, used)
                except (DatabaseUnavailable, asyncio.CancelledError):
                    self._unsaved.setdefault(key_id, Used()).add(used)
                    raise

    async def renew(self) -> None:
        """Keeps the reservations of this relay's running requests."""
        if self._held:
            await self._database.rows(RENEW, ids=list(self._held))

    async def give_back(self) -> None:
        """Ends the reservations of relays that are gone."""
        for row in await self._database.rows(GIVE_BACK):
            log.info("reservations_given_back", key=row["key_id"], count=row["count"])

    async def _add(self, key_id: str, used: Used) -> None:
        """Adds to a key's use; to that of one who is no row, or no longer, there is nothing to add."""
        added = {"key_id": key_id, "requests": used.requests, "tokens": used.tokens, "cost": used.cost}
        if await self._database.row(USE, **added) is None:
            await self._database.rows(MAKE, key_id=key_id)
            await self._database.rows(USE, **added)


def _limits(key: Key) -> dict[str, Any]:
    """A limit of 0 is none."""
    return {
        "concurrency_limit": key.concurrency_limit or None,
        "rate_limit_window": key.rate_limit_window or None,
        "rate_limit_requests": (key.rate_limit_window and key.rate_limit_requests) or None,
        "token_limit": key.token_limit or None,
        "daily_cost_limit": key.daily_cost_limit or None,
        "total_cost_limit": key.total_cost_limit or None,
    }


def _reached(row: Row) -> Reached | None:
    """None when there is room again by now."""
    limit = next((name for name in FREE if not row[name]), None)
    if limit is None:
        return None
    window_left: float | None = row["window_left"]
    seconds = _BUSY_SECONDS
    if limit == CONCURRENCY or not row.get(f"{limit}_spent", True):
        pass  # what runs may end soon, or come to less than it has reserved
    elif limit == "dailyCostLimit":
        now = datetime.now(UTC)
        tomorrow = now.replace(hour=0, minute=0, second=0, microsecond=0) + timedelta(days=1)
        seconds = (tomorrow - now).total_seconds()
    elif limit == "totalCostLimit" or (limit == "tokenLimit" and window_left is None):
        seconds = _DAY_SECONDS
    else:
        seconds = window_left or _BUSY_SECONDS
    return Reached(limit, math.ceil(seconds))
