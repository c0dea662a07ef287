"""Who calls: the key that a request shows, looked up.

Its one invariant: a key that was changed, by whatever means, is seen so within a second.

Looking a key up costs no round trip while it is at hand. What is at hand is dropped when the table of keys notifies
of a change, and every second while notifications cannot be heard. When the database is away, or too slow to tell, a
key that was good at the last look stays good.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Final

from services.relay import keys
from services.relay.errors import UnknownKey
from services.relay.keys import Key
from shared.database import Conn
from shared.errors import DatabaseUnavailable

_AT_HAND: Final = 10_000
_PATIENCE_SECONDS: Final = 2.0


def presented(headers: Mapping[str, str]) -> str | None:
    """The key that a request shows, in `x-api-key` or as a bearer token."""
    if key := headers.get("x-api-key", "").strip():
        return key
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() or None if scheme.lower() == "bearer" else None


def shows_nothing(headers: Mapping[str, str]) -> bool:
    """Whether a request does not even try to show a key: one in a wrong form is a wrong one, not none."""
    return not any(headers.get(name, "").strip() for name in ("x-api-key", "authorization"))


class Callers:
    """The keys, those seen lately at hand."""

    def __init__(self, conn: Conn, pepper: str) -> None:
        self._conn = conn
        self._pepper = pepper
        self._known: OrderedDict[bytes, Key | None] = OrderedDict()
        self._stale: OrderedDict[bytes, Key | None] = OrderedDict()
        self._looking: dict[bytes, asyncio.Task[Key | None]] = {}

    async def authenticate(self, secret: str | None) -> Key:
        """The key; raises UnknownKey for a missing, unknown, revoked, deleted or expired one."""
        if not secret:
            raise UnknownKey
        digest = keys.digest(self._pepper, secret)
        if digest in self._known:
            self._known.move_to_end(digest)
            key = self._known[digest]
        else:
            key = await self._look_up(digest)
        if key is None or not key.is_active or key.deleted_at is not None or _is_over(key.expires_at):
            raise UnknownKey
        return key

    async def forget(self) -> None:
        """The table has changed: every key is looked up anew. What was known serves while the database is away."""
        self._stale.update(self._known)
        while len(self._stale) > _AT_HAND:
            self._stale.popitem(last=False)
        self._known.clear()
        self._looking.clear()  # what is on its way may have been read before the change

    async def _look_up(self, digest: bytes) -> Key | None:
        """One query for all who ask for the same key at the same time; who was known does not wait for it for long."""
        looking = self._looking.get(digest)
        if looking is None:
            looking = self._looking[digest] = asyncio.create_task(keys.find(self._conn, digest))
        stale = self._stale.get(digest)
        try:
            async with asyncio.timeout(_PATIENCE_SECONDS if stale else None):
                key = await asyncio.shield(looking)
        except TimeoutError:
            return stale
        except Exception as error:
            if self._looking.get(digest) is looking:
                del self._looking[digest]
            if isinstance(error, DatabaseUnavailable) and stale:
                return stale
            raise
        if self._looking.get(digest) is looking:
            del self._looking[digest]
            self._known[digest] = key
            self._stale.pop(digest, None)
            if len(self._known) > _AT_HAND:
                self._known.popitem(last=False)
        return key


def _is_over(moment: datetime | None) -> bool:
    return moment is not None and moment <= datetime.now(UTC)
