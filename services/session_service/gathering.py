"""Appends that come at the same time are stored together: one statement and one commit for many of them.

Its one invariant: what could be stored together is stored as if each had come alone, in the order of arrival of its
session; whatever could not be (a session that is held, a message id that is taken) is left to be stored alone.
"""

import asyncio
from dataclasses import dataclass, field
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy import ARRAY, and_, bindparam, func, insert, select

from services.session_service.drafts import ARRAYS, JSON_ARRAYS, Draft
from services.session_service.schema import session_messages as table
from services.session_service.schema import sessions as _session
from services.session_service.sessions import TOUCHED, active, lease_is_over
from shared import wire
from shared.database import Database
from shared.errors import DatabaseUnavailable

LANES: Final = 2
"""Statements at once: while one is written to disk, the next is being put together."""
_MOST: Final = 64
_LARGE_TOKENS: Final = 4_000
"""From this size on a message is stored alone: nobody else should wait for it."""

_KEYS: Final[dict[str, sa.types.TypeEngine[Any]]] = {"user_id": sa.Text(), "session_id": sa.Text()}
_COLUMNS: Final = _KEYS | ARRAYS
_new = select(
    func.unnest(*(bindparam(f"{name}_array", type_=ARRAY(kind)) for name, kind in _COLUMNS.items()))
    .table_valued(*_COLUMNS, with_ordinality="place", name="given")
    .render_derived()
).cte("new")
_wanted = (
    select(
        _new.c.user_id,
        _new.c.session_id,
        func.count().label("count"),
        func.sum(sa.cast(_new.c.tokens_used, sa.Integer)).label("tokens"),
        func.sum(sa.cast(_new.c.cost_usd, sa.Numeric)).label("cost"),
    )
    .group_by(_new.c.user_id, _new.c.session_id)
    .cte("wanted")
)


def _of(other: Any) -> sa.ColumnElement[bool]:
    return and_(_session.c.user_id == other.c.user_id, _session.c.session_id == other.c.session_id)


# A session that someone holds is passed over: a lane that waits for it would hold up all the others.
_free = (
    select(_session.c.user_id, _session.c.session_id)
    .select_from(_session.join(_wanted, _of(_wanted)))
    .where(active, lease_is_over)
    .with_for_update(of=_session, key_share=True, skip_locked=True)
    .cte("free")
)
_advanced = (
    sa.update(_session)
    .where(_of(_free), _of(_wanted), active, lease_is_over)
    .values(
        message_count=_session.c.message_count + _wanted.c.count,
        last_seq=_session.c.last_seq + _wanted.c.count,
        total_tokens=_session.c.total_tokens + _wanted.c.tokens,
        total_cost=_session.c.total_cost + _wanted.c.cost,
        **TOUCHED | {"version": _session.c.version + _wanted.c.count},
    )
    .returning(
        _session.c.user_id, _session.c.session_id, _session.c.last_seq, _session.c.last_activity, _wanted.c.count
    )
    .cte("advanced")
)
_place = func.row_number().over(partition_by=(_new.c.user_id, _new.c.session_id), order_by=_new.c.place)
APPEND_TOGETHER = (
    insert(table)
    .from_select(
        [*_COLUMNS, "created_at", "seq"],
        select(
            *(_new.c[name].cast(JSON_ARRAYS[name]) if name in JSON_ARRAYS else _new.c[name] for name in _COLUMNS),
            _advanced.c.last_activity,
            _advanced.c.last_seq - _advanced.c.count + _place,
        ).select_from(
            _new.join(
                _advanced,
                and_(_new.c.user_id == _advanced.c.user_id, _new.c.session_id == _advanced.c.session_id),
            )
        ),
    )
    .returning(table.c.user_id, table.c.message_id, table.c.seq, table.c.created_at)
)

Key = tuple[str, str]


@dataclass(slots=True, eq=False)
class _Waiting:
    key: Key
    draft: Draft
    stored: "asyncio.Future[wire.Message | None]" = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


class Gathering:
    """The appends of this process."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._waiting: list[_Waiting] = []
        self._busy: set[Key] = set()
        self._lanes: set[asyncio.Task[None]] = set()

    async def append(self, user_id: str, session_id: str, draft: Draft) -> wire.Message | None:
        """The message stored, or None where it has to be tried alone. Raises DatabaseUnavailable."""
        if draft.context_tokens > _LARGE_TOKENS:
            return None
        waiting = _Waiting((user_id, session_id), draft)
        self._waiting.append(waiting)
        self._begin()
        return await waiting.stored

    def _begin(self) -> None:
        """Gives a free lane what waits. A session is on one lane at a time, so that its order is kept."""
        if len(self._lanes) >= LANES:
            return
        taken: list[_Waiting] = []
        left: list[_Waiting] = []
        for each in self._waiting:
            (left if each.key in self._busy or len(taken) == _MOST else taken).append(each)
        if not taken:
            return
        self._waiting = left
        keys = {each.key for each in taken}
        self._busy |= keys
        lane = asyncio.create_task(self._store(taken))
        self._lanes.add(lane)
        lane.add_done_callback(lambda done: self._ended(done, keys))

    def _ended(self, lane: "asyncio.Task[None]", keys: set[Key]) -> None:
        self._lanes.discard(lane)
        self._busy -= keys
        self._begin()

    async def _store(self, taken: list[_Waiting]) -> None:
        try:
            messages = await self._together(taken)
        except DatabaseUnavailable as error:
            for each in taken:
                if not each.stored.done():
                    each.stored.set_exception(error)
            return
        except Exception:  # each of them meets it alone, where it is told
            messages = [None] * len(taken)
        for each, message in zip(taken, messages, strict=True):
            if not each.stored.done():  # its client may have gone
                each.stored.set_result(message)

    async def _together(self, taken: list[_Waiting]) -> "list[wire.Message | None]":
        rows = await self._database.rows(
            APPEND_TOGETHER,
            user_id_array=[each.key[0] for each in taken],
            session_id_array=[each.key[1] for each in taken],
            **{f"{name}_array": [each.draft.parameter(name) for each in taken] for name in ARRAYS},
        )
        found = {(row["user_id"], row["message_id"]): row for row in rows}
        messages: list[wire.Message | None] = []
        for each in taken:
            row = found.get((each.key[0], each.draft.message_id))
            messages.append(each.draft.stored(*each.key, row["seq"], row["created_at"]) if row else None)
        return messages
