"""Opening a turn: what the client says is stored, the session is the turn's, and its context is made, at once.

Its one invariant: a turn is opened by one statement, on the very state of the session that its context was made of.
"""

import secrets
from contextlib import suppress
from dataclasses import replace
from typing import Any

import sqlalchemy as sa
from sqlalchemy import bindparam, insert, literal_column, or_, select
from uuid_utils import uuid7

from services.session_service import context, creation, drafts, messages, sessions
from services.session_service.known import Known, KnownSessions
from services.session_service.leases import close_overdue
from services.session_service.recent import Recent, Stretch
from services.session_service.rewind import supersede_after
from services.session_service.schema import OPEN, session_messages
from services.session_service.schema import session_turns as table
from services.session_service.schema import sessions as _session
from services.session_service.sessions import NOW, SECOND, Detail, IfVersion
from services.session_service.turns import MOVED, moved
from shared import wire
from shared.canonical import speaker
from shared.database import Conn, Violation, Writer
from shared.errors import ContextTooSmall, SessionNotFound, ValidationFailed

_turn_id = bindparam("turn_id", type_=sa.Text)
_lease_seconds = bindparam("lease_seconds", type_=sa.Integer)
_taken = {
    "latest_turn_id": _turn_id,
    "lease_expires_at": NOW + _lease_seconds * SECOND,
    "window_start_seq": bindparam("window_start_seq", type_=sa.Integer),
}
_RETURNED = (*sessions.COLUMNS, _session.c.last_seq, _session.c.lease_expires_at)


def _opening(taken: sa.CTE) -> sa.Select[Any]:
    """Stores the messages and the turn of a session that was `taken` for them; gives the session."""
    values = {
        "user_id": taken.c.user_id,
        "session_id": taken.c.session_id,
        "turn_id": _turn_id,
        "status": OPEN,
        "lease_token": bindparam("lease_token", type_=sa.Text),
        "lease_seconds": _lease_seconds,
        "lease_expires_at": taken.c.lease_expires_at,
        "opened_at": NOW,
    }
    values["input_from_seq"], values["input_to_seq"] = messages.span(taken.c.last_seq - messages.COUNT)
    opened = insert(table).from_select([*values], select(*values.values())).cte("opened")
    return select(*taken.c).add_cte(messages.storing(taken, _turn_id).cte("stored"), opened)


# Whatever a context is made of moves the session's version when it changes. A session that is not as it was when the
# context was made is not taken, and nothing is stored.
OPEN_TURN = _opening(
    sa.update(_session)
    .where(
        sessions.mine,
        _session.c.version == bindparam("version", type_=sa.BigInteger),
        _session.c.created_at == bindparam("created_at", type_=sa.TIMESTAMP(timezone=True)),
        # Each write has a time of its own; a version may come again, where the database has lost its newest writes.
        _session.c.updated_at == bindparam("updated_at", type_=sa.TIMESTAMP(timezone=True)),
        or_(sessions.IS_HELD, sessions.active),
    )
    .values(**messages.COUNTED, **MOVED, **_taken)
    .returning(*_RETURNED)
    .cte("taken")
)
# Of a session that is made with its first turn.
OPEN_FIRST = _opening(
    creation.NEW.values(
        message_count=messages.COUNT,
        last_seq=messages.COUNT,
        total_tokens=bindparam("tokens", type_=sa.BigInteger),
        total_cost=bindparam("cost", type_=sa.Numeric),
        version=moved(literal_column("1")),
        **_taken,
    )
    .returning(*_RETURNED)
    .cte("taken")
)
LAST_VISIBLE_ROLE = (
    select(session_messages.c.role)
    .where(messages.mine, session_messages.c.superseded_at.is_(None))
    .order_by(session_messages.c.seq.desc())
    .limit(1)
)


async def open_turn(
    writer: Writer,
    user_id: str,
    session_id: str,
    request: wire.OpenTurn,
    *,
    default_max_tokens: int,
    known: KnownSessions,
    if_match: IfVersion | None = None,
) -> wire.TurnOpened:
    """Finds or makes the session, takes back what the request rewinds, stores its messages, opens the turn.

    All of it at once. Raises TurnInProgress where another turn is open; waiting is waiting.py's.
    """
    key = user_id, session_id
    opening = _Opening(user_id, session_id, request, default_max_tokens, known.get(key), if_match)
    try:
        opened = await writer.write(opening.at_once)
    except (_NotAtOnce, ContextTooSmall, ValidationFailed, Violation):
        known.forget(key)
        # What is wrong, or whether it still is, is found out with the session locked.
        opened = await writer.transact(opening.step_by_step)
    if opening.left is not None:
        known.put(opening.left)
    return opened


class _NotAtOnce(Exception):
    """The session has to be changed first, or has just changed."""


class _Opening:
    """`left` is the session as the turn has left it, once it is opened; good for as long as that is committed."""

    def __init__(
        self,
        user_id: str,
        session_id: str,
        request: wire.OpenTurn,
        default_max_tokens: int,
        known: Known | None,
        if_match: IfVersion | None,
    ) -> None:
        self.left: Known | None = None
        self._known = known
        self._key = {"user_id": user_id, "session_id": session_id}
        self._request = request
        self._if_match = if_match
        self._budget = context.Budget.of(request.context, default_max_tokens)
        self._drafts = [drafts.draft(message) for message in request.messages]
        self._turn_id = request.turn_id or str(uuid7())
        self._lease_token = secrets.token_urlsafe(24)

    async def at_once(self, conn: Conn) -> wire.TurnOpened:
        """As nearly every turn is opened: the session is known or only read, until one statement writes all."""
        opened = await self._as_known(conn)
        if opened is None:
            opened = await self._as_read(conn)
        if opened is None:
            raise _NotAtOnce
        return opened

    async def _as_known(self, conn: Conn) -> wire.TurnOpened | None:
        known, self._known = self._known, None  # only once: it may have to be done again because it was wrong
        if known is None or not self._may_take(known.found):
            return None
        with suppress(ContextTooSmall, ValidationFailed):
            return await self._open(conn, known.found, known.stretch, is_held=False)
        return None

    async def _as_read(self, conn: Conn) -> wire.TurnOpened | None:
        try:
            found = await sessions.look(conn, **self._key)
        except SessionNotFound:
            return await self._open_first(conn)
        return await self._open(conn, found, is_held=False) if self._may_take(found) else None

    def _may_take(self, found: Detail) -> bool:
        options, rewind_to_seq = self._request.create_session, self._request.rewind_to_seq
        return (
            found.session.is_active
            and not found.has_open_turn
            and rewind_to_seq in {None, found.last_seq}
            and (options is None or options.if_exists != "error")
            and (self._if_match is None or self._if_match.fits(found.session))
        )

    async def step_by_step(self, conn: Conn) -> wire.TurnOpened:
        options, rewind_to_seq = self._request.create_session, self._request.rewind_to_seq
        locked = await creation.find_or_create(conn, **self._key, options=options, if_match=self._if_match)
        await close_overdue(conn, locked)
        if rewind_to_seq is not None:
            await supersede_after(conn, locked, rewind_to_seq, "rewind_to_seq")
        opened = await self._open(conn, await sessions.look(conn, **self._key), is_held=True)
        assert opened is not None  # noqa: S101 - the session is locked, so it is as it was
        return opened

    async def _open(
        self, conn: Conn, found: Detail, stretch: Stretch | None = None, *, is_held: bool
    ) -> wire.TurnOpened | None:
        if not self._drafts:
            await self._require_user_last(conn)
        recent = await Recent.read(conn, found, self._budget.limits, self._drafts, stretch)
        session = found.session
        state = {"version": session.version, "created_at": session.created_at, "updated_at": session.updated_at}
        return await self._store(OPEN_TURN, recent, self._budget, **state, is_held=is_held)

    async def _open_first(self, conn: Conn) -> wire.TurnOpened | None:
        options = self._request.create_session
        if options is None or self._if_match is not None or self._request.rewind_to_seq or not self._drafts:
            return None
        recent = await Recent.read(conn, sessions.unmade(**self._key), self._budget.limits, self._drafts)
        budget = replace(self._budget, memories=False)  # it can have none
        return await self._store(OPEN_FIRST, recent, budget, **creation.values(options))

    async def _require_user_last(self, conn: Conn) -> None:
        role = await conn.value(LAST_VISIBLE_ROLE, **self._key)
        if role is None or speaker(role) != "user":
            raise ValidationFailed.at("body", "messages", msg="May be empty only when the last message is the user's")

    async def _store(
        self, statement: sa.Select[Any], recent: Recent, budget: context.Budget, **state: Any
    ) -> wire.TurnOpened | None:
        built, window_start_seq = await context.build(recent, budget, moves=True)
        row = await recent.conn.row(
            statement,
            **self._key,
            **state,
            **drafts.parameters(self._drafts),
            window_start_seq=window_start_seq,
            turn_id=self._turn_id,
            lease_token=self._lease_token,
            lease_seconds=self._request.lease_seconds,
        )
        if row is None:
            return None
        values = dict(row.items())
        last_seq = values.pop("last_seq")
        lease_expires_at = values.pop("lease_expires_at")
        session = sessions.from_values(values)
        if stretch := recent.from_window(window_start_seq):
            found = replace(
                recent.found,
                session=session,
                last_seq=last_seq,
                window_start_seq=window_start_seq,
                latest_turn_id=self._turn_id,
                lease_left_seconds=self._request.lease_seconds,
            )
            self.left = Known(found, stretch)
        return wire.TurnOpened.model_construct(
            turn_id=self._turn_id,
            lease_token=self._lease_token,
            lease_expires_at=lease_expires_at,
            session=session,
            messages=drafts.stored(self._drafts, session.user_id, session.session_id, last_seq, session.last_activity),
            context=built,
        )
