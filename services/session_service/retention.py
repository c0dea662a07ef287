"""The sweeper: ends what has expired, closes turns whose lease has run out.

Its one invariant: any number of instances may sweep at once; each row is swept by one of them, once.
"""

import asyncio
from typing import Final

import sqlalchemy as sa
import structlog
from prometheus_client import Counter
from sqlalchemy import and_, func, literal_column, select, tuple_

from services.session_service import idempotency
from services.session_service.schema import OPEN, session_turns
from services.session_service.schema import sessions as table
from services.session_service.sessions import BY_EXPIRY, ENDED, NOW, expired
from shared.database import Database
from shared.errors import Unavailable

log = structlog.get_logger(__name__)

BATCH: Final = 500

_key = (table.c.user_id, table.c.session_id)
_due = select(*_key).where(expired).order_by(table.c.expires_at).limit(BATCH).with_for_update(skip_locked=True)
EXPIRE_SESSIONS = (
    sa.update(table)
    .where(tuple_(*_key).in_(_due))
    .values(status=ENDED, ended_reason=BY_EXPIRY, updated_at=NOW, version=table.c.version + 1)
    .returning(table.c.session_id)
)

_overdue = (
    select(*_key)
    .where(table.c.lease_expires_at <= NOW)
    .order_by(table.c.lease_expires_at)
    .limit(BATCH)
    .with_for_update(skip_locked=True)
)
_released = (
    sa.update(table)
    .where(tuple_(*_key).in_(_overdue))
    .values(lease_expires_at=sa.null(), updated_at=NOW, version=table.c.version + 1)
    .returning(*_key)
    .cte("released")
)
_closed = (
    sa.update(session_turns)
    .where(
        and_(
            session_turns.c.user_id == _released.c.user_id,
            session_turns.c.session_id == _released.c.session_id,
            session_turns.c.status == OPEN,
        )
    )
    .values(status=literal_column("'expired'"), closed_at=NOW)
    .returning(session_turns.c.turn_id)
    .cte("closed")
)
EXPIRE_TURNS = select(
    select(func.count()).select_from(_released).scalar_subquery().label("released"),
    select(func.count()).select_from(_closed).scalar_subquery().label("closed"),
)


async def sweep(database: Database) -> tuple[int, int]:
    """Sessions ended and turns closed; batch by batch, until nothing is due."""
    turns = 0
    while (row := await database.row(EXPIRE_TURNS)) is not None:
        turns += row["closed"]
        if row["released"] < BATCH:
            break
    ended = 0
    while rows := await database.rows(EXPIRE_SESSIONS):
        ended += len(rows)
        if len(rows) < BATCH:
            break
    return ended, turns


async def keep_sweeping(database: Database, *, interval_seconds: float, expired_total: Counter) -> None:
    """Sweeps for ever; an outage of the database only delays it."""
    while True:
        await asyncio.sleep(interval_seconds)
        try:
            ended, turns = await sweep(database)
            await idempotency.forget(database)
        except Unavailable:
            log.warning("sweep_failed", reason="database_unavailable")
            continue
        except Exception:  # whatever it is, the next round must come
            log.exception("sweep_failed")
            continue
        expired_total.inc(ended)
        if ended or turns:
            log.info("swept", sessions_ended=ended, turns_closed=turns)
