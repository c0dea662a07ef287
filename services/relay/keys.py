"""API keys: whose sessions a caller works on.

Its one invariant: of a key only its keyed hash is ever stored, held or compared.

Looking a key up costs no round trip while it was looked up less than CACHE_SECONDS ago, so an edit of the table
takes effect within that time. When the database is away, a key that was good at the last look stays good.
"""

import asyncio
import hashlib
import hmac
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from time import monotonic
from typing import Final

from sqlalchemy import bindparam, func, or_, select
from sqlalchemy.dialects.postgresql import insert
from uuid_utils import uuid7

from services.relay.errors import UnknownKey
from services.relay.schema import relay_api_keys as table
from shared.database import Conn
from shared.errors import DatabaseUnavailable

CACHE_SECONDS: Final = 1.0
_CACHED_KEYS: Final = 10_000
_PREFIX_CHARACTERS: Final = 11
KEY_PREFIX: Final = "cr_"

_is_valid = table.c.is_active & or_(table.c.expires_at.is_(None), table.c.expires_at > func.statement_timestamp())
FIND = select(table.c.id, table.c.user_id).where(table.c.key_hash == bindparam("key_hash"), _is_valid)
ADD = (
    insert(table)
    .values(
        id=bindparam("id"),
        user_id=bindparam("user_id"),
        name=bindparam("name"),
        key_hash=bindparam("key_hash"),
        prefix=bindparam("prefix"),
        created_at=func.statement_timestamp(),
    )
    .on_conflict_do_nothing(constraint="relay_api_keys_key_hash_key")
)


@dataclass(frozen=True, slots=True)
class Key:
    """A caller that was let in."""

    id: str
    user_id: str


@dataclass(frozen=True, slots=True)
class _Seen:
    key: Key | None
    at: float


def presented(headers: Mapping[str, str]) -> str | None:
    """The key that a request shows, in `x-api-key` or as a bearer token."""
    if key := headers.get("x-api-key", "").strip():
        return key
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() or None if scheme.lower() == "bearer" else None


class Keys:
    """The keys in the database, those seen lately at hand."""

    def __init__(self, conn: Conn, pepper: str) -> None:
        self._conn = conn
        self._pepper = pepper.encode()
        self._seen: OrderedDict[bytes, _Seen] = OrderedDict()
        self._looking: dict[bytes, asyncio.Task[Key | None]] = {}

    async def authenticate(self, secret: str | None) -> Key:
        """The key's id and user; raises UnknownKey for a missing, unknown, revoked or expired one."""
        if not secret:
            raise UnknownKey
        digest = self._digest(secret)
        seen = self._seen.get(digest)
        key = seen.key if seen and monotonic() - seen.at < CACHE_SECONDS else await self._look_up(digest, seen)
        if key is None:
            raise UnknownKey
        return key

    async def add(self, secret: str, *, user_id: str, name: str) -> None:
        """Stores the key's hash; does nothing when it is stored already, whatever became of it since."""
        await self._conn.rows(
            ADD,
            id=str(uuid7()),
            user_id=user_id,
            name=name,
            key_hash=self._digest(secret),
            prefix=secret[:_PREFIX_CHARACTERS],
        )

    def _digest(self, secret: str) -> bytes:
        return hmac.digest(self._pepper, secret.encode("utf-8", "surrogateescape"), hashlib.sha256)

    async def _look_up(self, digest: bytes, seen: _Seen | None) -> Key | None:
        """One query for all who ask for the same key at the same time."""
        looking = self._looking.get(digest)
        if looking is None:
            looking = self._looking[digest] = asyncio.create_task(self._find(digest))
            looking.add_done_callback(lambda _: self._looking.pop(digest, None))
        try:
            return await asyncio.shield(looking)
        except DatabaseUnavailable:
            if seen is not None and seen.key is not None:
                return seen.key
            raise

    async def _find(self, digest: bytes) -> Key | None:
        at = monotonic()
        row = await self._conn.row(FIND, key_hash=digest)
        key = None if row is None else Key(row["id"], row["user_id"])
        self._seen[digest] = _Seen(key, at)
        self._seen.move_to_end(digest)
        if len(self._seen) > _CACHED_KEYS:
            self._seen.popitem(last=False)
        return key
