"""Completing a turn: the answer is stored and the turn closed, once.

Its one invariant: only the holder of the lease of the turn opened last can write the answer, and the same
completion again changes nothing.
"""

import hashlib
from decimal import Decimal
from typing import Any

import sqlalchemy as sa
from sqlalchemy import bindparam, select
from sqlalchemy.dialects.postgresql import JSONB

from services.session_service import messages, sessions, turns
from services.session_service.rewind import supersede
from services.session_service.schema import session_messages
from services.session_service.schema import session_turns as table
from services.session_service.schema import sessions as _session
from services.session_service.sessions import NOW, TOUCHED, Detail
from shared import wire
from shared.database import Conn, Writer
from shared.errors import LeaseLost, TurnClosed, TurnNotFound
from shared.json import dumps

# Claude's names of the token counts in a usage object; other numbers in there are no tokens.
TOKEN_COUNTS = ("input_tokens", "output_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")

_jsonb = JSONB(none_as_null=True)
_closed = (
    sa.update(table)
    .where(turns.THIS)
    .values(
        status=bindparam("status", type_=sa.Text),
        closed_at=NOW,
        output_from_seq=bindparam("output_from_seq", type_=sa.Integer),
        output_to_seq=bindparam("output_to_seq", type_=sa.Integer),
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
CLOSE = (
    sa.update(_session)
    .where(sessions.mine, _session.c.session_id == _closed.c.session_id)
    .values(**TOUCHED, lease_expires_at=sa.null())
    .returning(*sessions.COLUMNS, *(column.label(f"turn_{column.name}") for column in _closed.c))
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
    writer: Writer, user_id: str, session_id: str, turn_id: str, answer: wire.CompleteTurn
) -> wire.TurnCompleted:
    """Stores the answer and closes the turn, in one transaction; the same call again gives the same answer.

    A lease that has run out may still complete until another turn was opened. Raises LeaseLost after that or
    for a wrong token, TurnClosed for a second, different completion.
    """
    completion_hash = hashlib.sha256(dumps(answer.model_dump(mode="json"))).digest()
    drafts = _drafts(answer)

    async def work(conn: Conn) -> wire.TurnCompleted:
        locked = await sessions.lock(conn, user_id, session_id)
        row = await turns.held(conn, locked, turn_id, answer.lease_token)
        if row["completion_hash"] is not None:
            if row["completion_hash"] != completion_hash:
                raise TurnClosed
            return await _completed(conn, locked, turns.from_row(row))
        if locked.latest_turn_id != turn_id:
            raise LeaseLost
        if answer.status == "refused" and row["input_from_seq"] is not None:
            await supersede(conn, locked, from_seq=row["input_from_seq"], to_seq=row["input_to_seq"])
        stored = await messages.append_drafts(conn, user_id, session_id, drafts, turn_id=turn_id) or []
        fields = ("status", "stop_reason", "model", "usage", "cost_usd", "upstream", "error")
        closed = await conn.row(
            CLOSE,
            **locked.key,
            turn_id=turn_id,
            output_from_seq=stored[0].seq if stored else None,
            output_to_seq=stored[-1].seq if stored else None,
            completion_hash=completion_hash,
            **{name: getattr(answer, name) for name in fields},
        )
        if closed is None:
            raise TurnNotFound  # its user is being erased
        values = dict(closed.items())
        turn = wire.Turn.model_construct(**{name: values.pop(f"turn_{name}") for name in wire.Turn.model_fields})
        return wire.TurnCompleted.model_construct(turn=turn, messages=stored, session=sessions.from_values(values))

    return await writer.transact(work)


def _drafts(answer: wire.CompleteTurn) -> list[messages.Draft]:
    """The answer's messages; its last assistant message gets the call's figures where it has none of its own."""
    last = max((place for place, each in enumerate(answer.messages) if each.role == "assistant"), default=-1)
    counts = {name: _count(answer.usage, name) for name in TOKEN_COUNTS}
    outputs = sum(each.role == "assistant" for each in answer.messages)
    # With one assistant message, all output tokens are its share; of several nobody tells the shares.
    reported = counts["output_tokens"] if outputs == 1 else 0
    return [
        messages.draft(
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
