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
from services.session_service.leases import close_overdue
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
    if_match: IfVersion | None = None,
) -> wire.TurnOpened:
    """Finds or makes the session, takes back what the request rewinds, stores its messages, opens the turn.

    All of it at once. Raises TurnInProgress where another turn is open; waiting is waiting.py's.
    """
    opening = _Opening(user_id, session_id, request, default_max_tokens, if_match)
    # What is wrong, or whether it still is, is found out with the session locked.
    with suppress(_NotAtOnce, ContextTooSmall, ValidationFailed, Violation):
        return await writer.write(opening.at_once)
    return await writer.transact(opening.step_by_step)


class _NotAtOnce(Exception):
    """The session has to be changed first, or has just changed."""


class _Opening:
    def __init__(
        self,
        user_id: str,
        session_id: str,
        request: wire.OpenTurn,
        default_max_tokens: int,
        if_match: IfVersion | None,
    ) -> None:
        self._key = {"user_id": user_id, "session_id": session_id}
        self._request = request
        self._if_match = if_match
        self._budget = context.Budget.of(request.context, default_max_tokens)
        self._drafts = [drafts.draft(message) for message in request.messages]
        self._turn_id = request.turn_id or str(uuid7())
        self._lease_token = secrets.token_urlsafe(24)

    async def at_once(self, conn: Conn) -> wire.TurnOpened:
        """As nearly every turn is opened: the session is only read, until one statement writes all."""
        try:
            found = await sessions.look(conn, **self._key)
        except SessionNotFound:
            opened = await self._open_first(conn)
        else:
            opened = await self._open(conn, found, is_held=False) if self._may_take(found) else None
        if opened is None:
            raise _NotAtOnce
        return opened

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

    async def _open(self, conn: Conn, found: Detail, *, is_held: bool) -> wire.TurnOpened | None:
        if not self._drafts:
            await self._require_user_last(conn)
        built, window_start_seq = await context.build(conn, found, self._budget, moves=True, ahead=self._drafts)
        state = {"version": found.session.version, "created_at": found.session.created_at, "is_held": is_held}
        return await self._store(conn, OPEN_TURN, built, window_start_seq=window_start_seq, **state)

    async def _open_first(self, conn: Conn) -> wire.TurnOpened | None:
        options = self._request.create_session
        if options is None or self._if_match is not None or self._request.rewind_to_seq or not self._drafts:
            return None
        unmade = sessions.unmade(**self._key)
        budget = replace(self._budget, memories=False)  # it can have none
        built, window_start_seq = await context.build(conn, unmade, budget, moves=True, ahead=self._drafts)
        state = creation.values(options)
        return await self._store(conn, OPEN_FIRST, built, window_start_seq=window_start_seq, **state)

    async def _require_user_last(self, conn: Conn) -> None:
        role = await conn.value(LAST_VISIBLE_ROLE, **self._key)
        if role is None or speaker(role) != "user":
            raise ValidationFailed.at("body", "messages", msg="May be empty only when the last message is the user's")

    async def _store(
        self, conn: Conn, statement: sa.Select[Any], built: wire.Context, **state: Any
    ) -> wire.TurnOpened | None:
        row = await conn.row(
            statement,
            **self._key,
            **state,
            **drafts.parameters(self._drafts),
            turn_id=self._turn_id,
            lease_token=self._lease_token,
            lease_seconds=self._request.lease_seconds,
        )
        if row is None:
            return None
        values = dict(row.items())
        place = (values["user_id"], values["session_id"], values.pop("last_seq"), values["last_activity"])
        return wire.TurnOpened.model_construct(
            turn_id=self._turn_id,
            lease_token=self._lease_token,
            lease_expires_at=values.pop("lease_expires_at"),
            session=sessions.from_values(values),
            messages=drafts.stored(self._drafts, *place),
            context=built,
        )
