"""Erasing a user: everything of theirs, in batches that hold no lock for long.

Its one invariant: what was counted as deleted is gone; called again after an interruption it goes on.
"""

from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy import bindparam, delete, func, literal_column, select
from sqlalchemy.sql.dml import ReturningDelete
from sqlalchemy.sql.elements import ColumnElement

from services.session_service import counting, sessions
from services.session_service.schema import (
    idempotency_records,
    session_memories,
    session_messages,
    session_turns,
)
from services.session_service.schema import sessions as table
from shared.database import Conn, Database

_BATCH: Final = 5_000

_users: sa.BindParameter[str] = bindparam("user_id")
SESSION_IDS = select(table.c.session_id).where(table.c.user_id == _users).order_by(table.c.session_id).limit(_BATCH)


_place: ColumnElement[Any] = literal_column("ctid")


def _some_of(rows: sa.Table, told: str, *mine: ColumnElement[bool]) -> ReturningDelete[Any]:
    """Deletes a batch by the rows' physical places: whatever the planner expects, it need not compare them."""
    places = select(_place).select_from(rows).where(*mine).limit(_BATCH).scalar_subquery()
    return delete(rows).where(_place == func.any(func.array(places))).returning(rows.c[told])


def _of_session(rows: sa.Table, told: str) -> ReturningDelete[Any]:
    return _some_of(rows, told, rows.c.user_id == _users, rows.c.session_id == bindparam("session_id"))


PARTS: dict[str, ReturningDelete[Any]] = {
    "messages": _of_session(session_messages, "seq"),
    "memories": _of_session(session_memories, "memory_id"),
    "turns": _of_session(session_turns, "turn_id"),
}
SESSION = delete(table).where(sessions.mine).returning(table.c.session_id)
RECORDS = _some_of(idempotency_records, "scope", idempotency_records.c.user_id == _users)


async def erase(database: Database, user_id: str) -> dict[str, int]:
    """Deletes all of a user's sessions, with their parts, and gives how many of each."""
    deleted = {"sessions": 0, "messages": 0, "memories": 0, "turns": 0}
    is_forgotten = False
    while not is_forgotten:
        while session_ids := await database.rows(SESSION_IDS, user_id=user_id):
            for (session_id,) in session_ids:
                for name, count in (await _erase_session(database, user_id, session_id)).items():
                    deleted[name] += count
        while await database.rows(RECORDS, user_id=user_id):
            continue
        is_forgotten = await database.transact(lambda conn: counting.forget_user(conn, user_id))
    return deleted


async def _erase_session(database: Database, user_id: str, session_id: str) -> dict[str, int]:
    key = {"user_id": user_id, "session_id": session_id}
    deleted = dict.fromkeys(PARTS, 0)
    # The bulk goes first, batch by batch; what came meanwhile goes with the session, which lets nothing more in.
    for name, statement in PARTS.items():
        while rows := await database.rows(statement, **key):
            deleted[name] += len(rows)

    async def work(conn: Conn) -> dict[str, int]:
        rest = {}
        await conn.rows(sessions.LOCK, **key)
        for name, statement in PARTS.items():
            rest[name] = 0
            while rows := await conn.rows(statement, **key):
                rest[name] += len(rows)
        await counting.forget_session(conn, key)
        rest["sessions"] = len(await conn.rows(SESSION, **key))
        return rest

    for name, count in (await database.transact(work)).items():
        deleted[name] = deleted.get(name, 0) + count
    return deleted
