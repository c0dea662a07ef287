"""What the relay does beside its requests, at regular times.

Its one invariant: an outage of the database only delays it.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from time import monotonic

import structlog

from shared.errors import Unavailable

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class Chore:
    """Something to do every so many seconds."""

    name: str
    every_seconds: float
    do: Callable[[], Awaitable[object]]
    due: float = 0.0


async def keep(chores: Sequence[Chore]) -> None:
    """For ever."""
    while True:
        now = monotonic()
        for chore in chores:
            if chore.due <= now:
                chore.due = now + chore.every_seconds
                await _do(chore)
        soonest = min(chore.due for chore in chores)
        await asyncio.sleep(max(0.0, soonest - monotonic()))


async def _do(chore: Chore) -> None:
    try:
        await chore.do()
    except Unavailable as error:
        log.warning("chore_delayed", chore=chore.name, reason=error.code)
    except Exception:  # the others must go on
        log.exception("chore_failed", chore=chore.name)
