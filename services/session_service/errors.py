"""What a violated constraint means to a caller: one table from constraint names to errors.

Its one invariant: a constraint that a request can run into is listed here; any other is a fault of ours.
"""

import structlog

from shared.database import Violation
from shared.errors import Internal, MessageExists, ServiceError, SessionExists, SessionNotFound, TurnExists

log = structlog.get_logger(__name__)

BY_CONSTRAINT: dict[str, type[ServiceError]] = {
    "sessions_pkey": SessionExists,
    "session_messages_message_id_key": MessageExists,
    "session_turns_pkey": TurnExists,
    # The session was erased between a statement's look and its write.
    "session_messages_session_fkey": SessionNotFound,
    "session_turns_session_fkey": SessionNotFound,
    "session_memories_session_fkey": SessionNotFound,
}


def error_of(violation: Violation) -> ServiceError:
    """What to tell the caller whose request violated a constraint."""
    known = BY_CONSTRAINT.get(violation.constraint)
    if known is None:
        log.error("constraint_violated", constraint=violation.constraint)
        return Internal()
    return known()
