"""Many messages at once: all or nothing, in order, with consecutive seqs."""

import sqlalchemy as sa
from sqlalchemy import bindparam, func
from sqlalchemy.dialects.postgresql import JSONB

from services.session_service import messages, sessions
from services.session_service.creation import find_or_create
from services.session_service.drafts import draft
from services.session_service.leases import close_overdue
from services.session_service.schema import sessions as table
from services.session_service.sessions import NOW, IfVersion
from shared import wire
from shared.database import Conn, Writer
from shared.errors import SessionNotActive

REPLACE = (
    sa.update(table)
    .where(sessions.mine)
    .values(
        metadata=func.coalesce(bindparam("metadata", type_=JSONB), table.c.metadata),
        conversation_data=func.coalesce(bindparam("conversation_data", type_=JSONB), table.c.conversation_data),
        updated_at=NOW,
        version=table.c.version + 1,
    )
    .returning(*sessions.COLUMNS)
)


async def append_batch(
    writer: Writer, user_id: str, session_id: str, batch: wire.Batch, if_match: IfVersion | None = None
) -> wire.BatchStored:
    """Finds or makes the session, stores the messages and replaces its data, in one transaction.

    Raises VersionMismatch, SessionNotActive, TurnInProgress, or MessageExists for an id that is taken.
    """
    drafts = [draft(message) for message in batch.messages]

    async def work(conn: Conn) -> wire.BatchStored:
        locked = await find_or_create(conn, user_id, session_id, batch.create_session, if_match)
        await close_overdue(conn, locked)
        stored = await messages.append_drafts(conn, user_id, session_id, drafts)
        if stored is None:
            raise SessionNotActive  # its time ran out between the two statements
        if batch.metadata is None and batch.conversation_data is None:
            session = await sessions.get(conn, user_id, session_id)
        else:
            data = {"metadata": batch.metadata, "conversation_data": batch.conversation_data}
            session = sessions.from_row(await conn.row(REPLACE, **locked.key, **data))
        return wire.BatchStored.model_construct(messages=stored, session=session)

    return await writer.transact(work)
