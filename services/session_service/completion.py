"""Completing a turn: the answer is stored and the turn closed, once.

Its one invariant: only the holder of the lease of the turn opened last can write the answer, and the same
completion again changes nothing.
"""

import hashlib
from contextlib import suppress
from decimal import Decimal
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy import bindparam, func, literal_column, or_, select
from sqlalchemy.dialects.postgresql import JSONB

from services.session_service import drafts, messages, sessions, turns
from services.session_service.known import KnownSessions
from services.session_service.rewind import supersede
from services.session_service.schema import session_messages
from services.session_service.schema import session_turns as table
from services.session_service.schema import sessions as _session
from services.session_service.sessions import NOW, Detail
from shared import wire
from shared.database import Conn, Violation, Writer
from shared.errors import LeaseLost, TurnClosed, TurnNotFound
from shared.json import dumps_sorted

# Claude's names of the token counts in a usage object; other numbers in there are no tokens.
TOKEN_COUNTS = ("input_tokens", "output_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")

_TOLD: Final = ("lease_token", "status", "stop_reason", "model", "usage", "cost_usd", "upstream", "error")

_jsonb = JSONB(none_as_null=True)
# Every statement that writes to a turn takes its session's row first. What the row had to wait for may have changed
# it and the turn: Postgres then judges the conditions of both again, on what is there now.
_held = (
    select(_session.c.user_id, _session.c.session_id, _session.c.last_seq)
    .where(
        sessions.mine,
        _session.c.latest_turn_id == bindparam("turn_id", type_=sa.Text),
        or_(sessions.IS_HELD, sessions.expired.is_not(sa.true())),
    )
    .with_for_update(key_share=True)
    .cte("held")
)
_first_seq, _last_seq = messages.span(_held.c.last_seq)
_closed = (
    sa.update(table)
    .where(
        turns.THIS,
        table.c.session_id == _held.c.session_id,
        table.c.completion_hash.is_(None),
        # By their digests: how long that takes says nothing of the token.
        func.sha256(func.convert_to(table.c.lease_token, literal_column("'UTF8'")))
        == func.sha256(func.convert_to(bindparam("lease_token", type_=sa.Text), literal_column("'UTF8'"))),
    )
    .values(
        status=bindparam("status", type_=sa.Text),
        closed_at=NOW,
        output_from_seq=_first_seq,
        output_to_seq=_last_seq,
        stop_reason=bindparam("stop_reason", type_=sa.Text),
        model=bindparam("model", type_=sa.Text),
        usage=bindparam("usage", type_=_jsonb),
        cost_usd=bindparam("cost_usd", type_=sa.Numeric),
        upstream=bindparam("upstream", type_=_jsonb),
        error=bindparam("error", type_=_jsonb),
        completion_hash=bindparam("completion_hash", type_=sa.LargeBinary),
    )
    .returning(*turns.COLUMNS)
    .cte("closed")
)
_advanced = (
    sa.update(_session)
    .where(sessions.mine, _session.c.session_id == _closed.c.session_id)
    .values(**messages.COUNTED, **turns.MOVED, lease_expires_at=sa.null())
    .returning(*sessions.COLUMNS, _session.c.last_seq)
    .cte("advanced")
)
_turn = {f"turn_{column.name}": column for column in _closed.c}
COMPLETE = (
    select(*_advanced.c, *(column.label(name) for name, column in _turn.items()))
    .select_from(_advanced.join(_closed, sa.true()))
    .add_cte(messages.storing(_advanced, bindparam("turn_id", type_=sa.Text)).cte("stored"))
)
OUTPUT = (
    select(*messages.COLUMNS)
    .where(
        messages.mine,
        session_messages.c.seq.between(bindparam("from_seq", type_=sa.Integer), bindparam("to_seq", type_=sa.Integer)),
    )
    .order_by(session_messages.c.seq)
)


async def complete(
    writer: Writer, user_id: str, session_id: str, turn_id: str, answer: wire.CompleteTurn, *, known: KnownSessions
) -> wire.TurnCompleted:
    """Stores the answer and closes the turn, in one transaction; the same call again gives the same answer.

    A lease that has run out may still complete until another turn was opened. Raises LeaseLost after that or
    for a wrong token, TurnClosed for a second, different completion.
    """
    completion = _Completion(user_id, session_id, turn_id, answer)
    if answer.status != "refused":
        with suppress(_NotAtOnce, Violation):
            completed = await writer.write(completion.at_once)
            completion.make_known(known, completed)
            return completed
    known.forget((user_id, session_id))
    return await writer.transact(completion.step_by_step)


class _NotAtOnce(Exception):
    """Something is in the way, or was done before."""


class _Completion:
    def __init__(self, user_id: str, session_id: str, turn_id: str, answer: wire.CompleteTurn) -> None:
        self._user_id = user_id
        self._session_id = session_id
        self._turn_id = turn_id
        self._answer = answer
        self._hash = hashlib.sha256(dumps_sorted(answer.model_dump())).digest()
        self._drafts = _drafts(answer)

    async def at_once(self, conn: Conn) -> wire.TurnCompleted:
        """As nearly every turn is completed: by one statement, which finds all as it should be or does nothing."""
        completed = await self._complete(conn, is_held=False)
        if completed is None:
            raise _NotAtOnce
        return completed

    def make_known(self, known: KnownSessions, completed: wire.TurnCompleted) -> None:
        """What is known of the session, as this completion has left it."""
        before = known.get((self._user_id, self._session_id))
        after = before and before.completed(completed.session, self._drafts)
        if after is not None:
            known.put(after)

    async def step_by_step(self, conn: Conn) -> wire.TurnCompleted:
        locked = await sessions.lock(conn, self._user_id, self._session_id)
        row = await turns.held(conn, locked, self._turn_id, self._answer.lease_token)
        if row["completion_hash"] is not None:
            if row["completion_hash"] != self._hash:
                raise TurnClosed
            return await _completed(conn, locked, turns.from_row(row))
        if locked.latest_turn_id != self._turn_id:
            raise LeaseLost
        if self._answer.status == "refused" and row["input_from_seq"] is not None:
            await supersede(conn, locked, from_seq=row["input_from_seq"], to_seq=row["input_to_seq"])
        completed = await self._complete(conn, is_held=True)
        if completed is None:
            raise TurnNotFound  # its user is being erased
        return completed

    async def _complete(self, conn: Conn, *, is_held: bool) -> wire.TurnCompleted | None:
        row = await conn.row(
            COMPLETE,
            user_id=self._user_id,
            session_id=self._session_id,
            **drafts.parameters(self._drafts),
            **{name: getattr(self._answer, name) for name in _TOLD},
            turn_id=self._turn_id,
            completion_hash=self._hash,
            is_held=is_held,
        )
        if row is None:
            return None
        values = dict(row.items())
        turn = wire.Turn.model_construct(**{name: values.pop(f"turn_{name}") for name in wire.Turn.model_fields})
        place = (values["user_id"], values["session_id"], values.pop("last_seq"), values["last_activity"])
        return wire.TurnCompleted.model_construct(
            turn=turn,
            messages=drafts.stored(self._drafts, *place),
            session=sessions.from_values(values),
        )


def _drafts(answer: wire.CompleteTurn) -> list[drafts.Draft]:
    """The answer's messages; its last assistant message gets the call's figures where it has none of its own."""
    last = max((place for place, each in enumerate(answer.messages) if each.role == "assistant"), default=-1)
    counts = {name: _count(answer.usage, name) for name in TOKEN_COUNTS}
    outputs = sum(each.role == "assistant" for each in answer.messages)
    # With one assistant message, all output tokens are its share; of several nobody tells the shares.
    reported = counts["output_tokens"] if outputs == 1 else 0
    return [
        drafts.draft(
            message,
            tokens_used=min(sum(counts.values()), 2**31 - 1) if place == last else 0,
            cost_usd=(answer.cost_usd or Decimal(0)) if place == last else Decimal(0),
            reported_tokens=(reported or None) if place == last else None,
        )
        for place, message in enumerate(answer.messages)
    ]


def _count(usage: dict[str, Any] | None, name: str) -> int:
    value = (usage or {}).get(name)
    return min(value, 2**31 - 1) if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


async def _completed(conn: Conn, locked: Detail, turn: wire.Turn) -> wire.TurnCompleted:
    rows = []
    if turn.output_from_seq is not None:
        rows = await conn.rows(OUTPUT, **locked.key, from_seq=turn.output_from_seq, to_seq=turn.output_to_seq)
    stored = [messages.from_row(row) for row in rows]
    return wire.TurnCompleted.model_construct(turn=turn, messages=stored, session=locked.session)
