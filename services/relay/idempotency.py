"""Requests with an Idempotency-Key: which try of one runs, and the answer that it came to.

Its one invariant: of the tries of one key at most one holds it, and only that one writes to its record. A try holds
the key by a lease that runs by the database's clock, so that the try of a relay that was killed is taken over.
"""

import asyncio
import hashlib
import json
import re
from collections import deque
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from time import monotonic
from typing import Any, Final

import sqlalchemy as sa
import structlog
from sqlalchemy import and_, bindparam, case, func, literal_column, or_, select
from sqlalchemy.dialects.postgresql import JSONB, insert
from sqlalchemy.sql import ClauseElement
from sqlalchemy.sql.elements import ColumnElement
from uuid_utils import uuid7

from services.relay.errors import InvalidRequest
from services.relay.schema import relay_idempotency as table
from shared.database import Database, Row
from shared.errors import DatabaseUnavailable, IdempotencyInProgress, IdempotencyKeyReused

log = structlog.get_logger(__name__)

HEADER: Final = "idempotency-key"
LEASE_SECONDS: Final = 30.0
_RENEWALS_IN_A_LEASE: Final = 3
_AWAY_SECONDS: Final = 1.0
_LONGEST_WRITE_SECONDS: Final = 5.0
_BUSY_SECONDS: Final = 1.0
_LOOKS: Final = 5
_MOST_TURNS: Final = 20
_BATCH: Final = 200
_VISIBLE_ASCII: Final = re.compile(r"[\x21-\x7e]{1,255}")

_RUNNING: Final = "running"
_COMPLETED: Final = "completed"
_FAILED: Final = "failed"

_NOW: Final[ColumnElement[datetime]] = func.statement_timestamp()
_LIFETIME: Final[ColumnElement[Any]] = literal_column("interval '24 hours'")
_SECOND: Final[ColumnElement[Any]] = literal_column("interval '1 second'")
_lease_end = _NOW + bindparam("lease_seconds", type_=sa.Float) * _SECOND

_this = and_(table.c.user_id == bindparam("user_id"), table.c.key == bindparam("key"))
_held = and_(_this, table.c.token == bindparam("token"), table.c.status == _RUNNING)
_is_old = table.c.created_at <= _NOW - _LIFETIME
_is_free = or_(table.c.status != _RUNNING, table.c.lease_expires_at <= _NOW)
_new = insert(table).values(
    user_id=bindparam("user_id"),
    key=bindparam("key"),
    request_hash=bindparam("request_hash", type_=sa.LargeBinary),
    status=_RUNNING,
    token=bindparam("token"),
    lease_expires_at=_lease_end,
    created_at=_NOW,
)
# Of an earlier try of the same request it keeps where that one's messages are; of a record past its day, nothing.
TAKE = _new.on_conflict_do_update(
    index_elements=["user_id", "key"],
    set_={
        "request_hash": _new.excluded.request_hash,
        "status": _RUNNING,
        "token": _new.excluded.token,
        "lease_expires_at": _new.excluded.lease_expires_at,
        "created_at": _NOW,
        "headers": sa.null(),
        "answer": sa.null(),
        **{name: case((_is_old, sa.null()), else_=table.c[name]) for name in ("session_id", "turn_id")},
    },
    where=and_(
        _is_free,
        or_(_is_old, and_(table.c.request_hash == _new.excluded.request_hash, table.c.status != _COMPLETED)),
    ),
).returning(table.c.session_id, table.c.turn_id)
GET = select(table.c.request_hash, table.c.status, table.c.headers, table.c.answer).where(_this, ~_is_old)
# A lease that ran out while the database was away goes on, as long as nobody has taken the key over.
RENEW = sa.update(table).where(_held).values(lease_expires_at=_lease_end).returning(table.c.token)
OPENING = (
    sa.update(table)
    .where(_held)
    .values(
        session_id=bindparam("session_id", type_=sa.Text),
        turn_id=bindparam("turn_id", type_=sa.Text),
        lease_expires_at=_lease_end,
    )
    .returning(table.c.token)
)
COMPLETED = (
    sa.update(table)
    .where(_held)
    .values(
        status=_COMPLETED,
        headers=bindparam("headers", type_=JSONB),
        answer=bindparam("answer", type_=sa.LargeBinary),
    )
    .returning(table.c.token)
)
FAILED = sa.update(table).where(_held).values(status=_FAILED)
SWEEP = (
    sa.delete(table)
    .where(
        sa.tuple_(table.c.user_id, table.c.key).in_(
            select(table.c.user_id, table.c.key)
            .where(_is_old, _is_free)
            .order_by(table.c.created_at)
            .limit(_BATCH)
            .with_for_update(skip_locked=True)
        )
    )
    .returning(table.c.user_id)
)


@dataclass(frozen=True, slots=True)
class Replay:
    """The answer that the key was given before: `message` is the JSON of the Claude message."""

    headers: dict[str, str]
    message: bytes
    status: int = 200


@dataclass(frozen=True, slots=True)
class Earlier:
    """The turn of the try whose place is taken; it may never have been opened.

    Then it has taken no place either: `before` are the turns of the tries before it, the latest first.
    """

    session_id: str
    turn_id: str
    before: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Try:
    """The right to run a request. `earlier` is the turn that the try before this one was about to open."""

    user_id: str
    key: str
    token: str
    earlier: Earlier | None

    @property
    def held(self) -> dict[str, str]:
        return {"user_id": self.user_id, "key": self.key, "token": self.token}


def header_of(headers: Mapping[str, str]) -> str | None:
    """The key that a request brings; raises InvalidRequest for one that is none. Names are in lower case."""
    key = headers.get(HEADER)
    if key is not None and not _VISIBLE_ASCII.fullmatch(key):
        raise InvalidRequest.at("Idempotency-Key", "must be 1 to 255 visible ASCII characters")
    return key


def request_hash(body: dict[str, Any], session: str) -> bytes:
    """Of the body as a JSON value, so that its writing does not count, and of what names the session."""
    text = json.dumps([session, body], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).digest()


class Idempotency:
    """The records in the database. Every call raises DatabaseUnavailable unless it says otherwise."""

    def __init__(self, database: Database, *, lease_seconds: float = LEASE_SECONDS) -> None:
        self._database = database
        self._lease_seconds = lease_seconds
        # Given up while the database was away, and when the lease of each is over anyway.
        self._to_release: deque[tuple[Try, float]] = deque()
        self._releasing: asyncio.Task[None] | None = None

    async def begin(self, user_id: str, key: str, request_hash: bytes) -> Replay | Try:
        """The stored answer, or the right to run the request: of any number of callers at once, for one of them.

        Raises IdempotencyKeyReused for another request, IdempotencyInProgress while this one runs.
        """
        for _ in range(_LOOKS):
            a_try = Try(user_id, key, str(uuid7()), None)
            try:
                taken = await self._database.row(
                    TAKE, **a_try.held, request_hash=request_hash, lease_seconds=self._lease_seconds
                )
            except DatabaseUnavailable:
                self._release_later(a_try)  # perhaps it was taken, and only the answer is lost
                raise
            if taken is not None:
                return replace(a_try, earlier=_earlier(taken))
            record = await self._database.row(GET, user_id=user_id, key=key)
            if record is None:
                continue  # it went past its day meanwhile
            if record["request_hash"] != request_hash:
                raise IdempotencyKeyReused
            if record["status"] == _COMPLETED:
                return Replay(record["headers"], record["answer"])
            if record["status"] == _RUNNING:
                break
        raise IdempotencyInProgress(retry_after_seconds=_BUSY_SECONDS)

    @asynccontextmanager
    async def kept(self, a_try: Try) -> AsyncIterator[None]:
        """Renews the lease while inside; an outage of the database only delays it, and nothing of it raises."""
        renewing = asyncio.create_task(self._keep_renewing(a_try))
        try:
            yield
        finally:
            renewing.cancel()

    async def opening(self, a_try: Try, session_id: str, turn_id: str) -> None:
        """Remembers the turn that is about to be opened; raises IdempotencyInProgress when another has taken over."""
        held = await self._database.row(
            OPENING,
            **a_try.held,
            session_id=session_id,
            turn_id=" ".join([turn_id, *_tried(a_try)][:_MOST_TURNS]),
            lease_seconds=self._lease_seconds,
        )
        if held is None:
            raise IdempotencyInProgress(retry_after_seconds=_BUSY_SECONDS)

    async def completed(self, a_try: Try, headers: dict[str, str], message: bytes) -> bool:
        """Whether the answer is on record now. Not so when the try was taken over or the database is away.

        Raises nothing then: the answer stands, and a later try finds it by the turn. The try is over in any case.
        """
        try:
            held = await self._written(COMPLETED, **a_try.held, headers=headers, answer=message)
        except DatabaseUnavailable:
            log.warning("idempotent_answer_not_recorded", reason="database_unavailable")
            self._release_later(a_try)
            return False
        if held is None:
            log.warning("idempotent_answer_not_recorded", reason="taken_over")
        return held is not None

    async def failed(self, a_try: Try) -> None:
        """Lets the next request with the key run at once; when the database is away, as soon as it is back."""
        try:
            await self._written(FAILED, **a_try.held)
        except DatabaseUnavailable:
            log.warning("idempotency_key_not_released", reason="database_unavailable")
            self._release_later(a_try)

    async def sweep(self) -> int:
        """Deletes records past their day, batch by batch; gives their number. Any number of relays may, at once."""
        deleted = 0
        while rows := await self._database.rows(SWEEP):
            deleted += len(rows)
        return deleted

    async def _written(self, statement: ClauseElement, **values: Any) -> Row | None:
        """What the statement gives; a client waits for it, so that a frozen database counts as away before its time."""
        writing = asyncio.create_task(self._database.row(statement, **values))
        try:
            await asyncio.wait({writing}, timeout=_LONGEST_WRITE_SECONDS)
            if not writing.done():
                raise DatabaseUnavailable
            return writing.result()
        finally:
            writing.cancel()

    def _release_later(self, a_try: Try) -> None:
        self._to_release.append((a_try, monotonic() + self._lease_seconds))
        if self._releasing is None or self._releasing.done():
            self._releasing = asyncio.create_task(self._keep_releasing())

    async def _keep_releasing(self) -> None:
        """Until there is nothing left to release."""
        while self._to_release:
            await asyncio.sleep(_AWAY_SECONDS)
            try:
                while self._to_release:
                    a_try, until = self._to_release[0]
                    if monotonic() < until:
                        await self._database.rows(FAILED, **a_try.held)
                    self._to_release.popleft()
            except DatabaseUnavailable:
                continue

    async def _keep_renewing(self, a_try: Try) -> None:
        usual_seconds = wait_seconds = self._lease_seconds / _RENEWALS_IN_A_LEASE
        while True:
            await asyncio.sleep(wait_seconds)
            try:
                held = await self._database.row(RENEW, **a_try.held, lease_seconds=self._lease_seconds)
            except DatabaseUnavailable:
                # To be there before whoever asks with the same key once the database is back.
                wait_seconds = min(_AWAY_SECONDS, usual_seconds)
                continue
            if held is None:
                return  # ended, or another's: `completed` will say so
            wait_seconds = usual_seconds


def _tried(a_try: Try) -> list[str]:
    """The turns that this try may have to take the place of, until its own is known to be open."""
    return [] if a_try.earlier is None else [a_try.earlier.turn_id, *a_try.earlier.before]


def _earlier(row: Row) -> Earlier | None:
    if row["turn_id"] is None:
        return None
    turn_id, *before = row["turn_id"].split()
    return Earlier(row["session_id"], turn_id, tuple(before))
