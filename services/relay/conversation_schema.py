"""The tables of conversations: MetaData is schema.py's.

Its one invariant: what a conversation was told and what became of it is one numbered row of its events, and the
number is taken under the lock of the conversation's row, so that who has seen number n has seen all before it.
"""

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    PrimaryKeyConstraint,
    Table,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.dialects.postgresql import JSON, JSONB, TIMESTAMP

from services.relay.schema import metadata

relay_conversations = Table(
    "relay_conversations",
    metadata,
    Column("id", Text(collation="C"), nullable=False),
    Column("user_id", Text(collation="C"), nullable=False),
    # The API that made it: V0 or V1.
    Column("api", Text(collation="C"), nullable=False),
    # The stored session, and the API key whose limits its runs count against.
    Column("session_id", Text(collation="C"), nullable=False),
    Column("key_id", Text(collation="C"), nullable=False),
    Column("sandbox_id", Text(collation="C"), nullable=False),
    # What the runtime key is derived from, with a secret that is not in the database; and the key's keyed hash.
    Column("runtime_nonce", LargeBinary, nullable=False),
    Column("runtime_key_hash", LargeBinary, nullable=False),
    Column("title", Text),
    Column("llm_model", Text),
    Column("instructions", Text),
    Column("selected_repository", Text),
    Column("selected_branch", Text),
    Column("git_provider", Text),
    Column("trigger", Text),
    Column("pr_number", JSONB, nullable=False, server_default=text("'[]'")),
    Column("parent_id", Text(collation="C")),
    Column("sandbox_status", Text(collation="C"), nullable=False),
    Column("execution_status", Text(collation="C"), nullable=False),
    # The run that goes on, the time until which its relay holds it, and what was asked of it meanwhile.
    Column("run_id", Text(collation="C")),
    Column("run_expires_at", TIMESTAMP(timezone=True)),
    Column("wants_run", Boolean, nullable=False, server_default=text("false")),
    Column("wants_pause", Boolean, nullable=False, server_default=text("false")),
    # The number of the next event.
    Column("next_seq", BigInteger, nullable=False, server_default=text("0")),
    # How far the session's messages are among the events: its version, the last seq, the visible ones.
    Column("logged_version", BigInteger, nullable=False, server_default=text("0")),
    Column("logged_seq", Integer, nullable=False, server_default=text("0")),
    Column("logged_count", Integer, nullable=False, server_default=text("0")),
    Column("created_at", TIMESTAMP(timezone=True), nullable=False),
    Column("updated_at", TIMESTAMP(timezone=True), nullable=False),
    PrimaryKeyConstraint("id", name="relay_conversations_pkey"),
    UniqueConstraint("user_id", "session_id", name="relay_conversations_session_key"),
    UniqueConstraint("runtime_key_hash", name="relay_conversations_runtime_key_hash_key"),
    ForeignKeyConstraint(
        ["parent_id"], ["relay_conversations.id"], name="relay_conversations_parent_fkey", ondelete="SET NULL"
    ),
    CheckConstraint("id ~ '^[0-9a-f]{32}$'", name="relay_conversations_id_check"),
    CheckConstraint("api IN ('V0', 'V1')", name="relay_conversations_api_check"),
    CheckConstraint(
        "sandbox_status IN ('STARTING', 'RUNNING', 'PAUSED', 'ERROR')", name="relay_conversations_sandbox_status_check"
    ),
    CheckConstraint(
        "execution_status IN ('idle', 'running', 'paused', 'waiting_for_confirmation', 'finished', 'error', 'stuck')",
        name="relay_conversations_execution_status_check",
    ),
    CheckConstraint(
        "(run_id IS NULL) = (run_expires_at IS NULL) AND (run_id IS NULL OR execution_status IN ('running', 'stuck'))",
        name="relay_conversations_run_check",
    ),
    Index("relay_conversations_by_created_at_idx", "user_id", "created_at", "id"),
    Index("relay_conversations_by_sandbox_idx", "user_id", "sandbox_id"),
    Index("relay_conversations_by_parent_idx", "parent_id"),
    Index("relay_conversations_starting_idx", "created_at", postgresql_where=text("sandbox_status = 'STARTING'")),
    Index("relay_conversations_by_run_idx", "run_expires_at", postgresql_where=text("run_id IS NOT NULL")),
)

relay_conversation_events = Table(
    "relay_conversation_events",
    metadata,
    Column("conversation_id", Text(collation="C"), nullable=False),
    Column("seq", BigInteger, nullable=False),
    # Of a message: its message_id in the session.
    Column("id", Text(collation="C"), nullable=False),
    Column("kind", Text(collation="C"), nullable=False),
    Column("source", Text(collation="C"), nullable=False),
    Column("payload", JSON, nullable=False),
    # A message that waits for the session to be free.
    Column("is_pending", Boolean, nullable=False, server_default=text("false")),
    # A message that was taken back in the session.
    Column("superseded_at", TIMESTAMP(timezone=True)),
    Column("created_at", TIMESTAMP(timezone=True), nullable=False),
    PrimaryKeyConstraint("conversation_id", "seq", name="relay_conversation_events_pkey"),
    UniqueConstraint("conversation_id", "id", name="relay_conversation_events_id_key"),
    ForeignKeyConstraint(
        ["conversation_id"],
        ["relay_conversations.id"],
        name="relay_conversation_events_conversation_fkey",
        ondelete="CASCADE",
    ),
    CheckConstraint("kind IN ('message', 'state', 'error', 'other')", name="relay_conversation_events_kind_check"),
    CheckConstraint("source IN ('agent', 'user', 'environment')", name="relay_conversation_events_source_check"),
    CheckConstraint("kind = 'message' OR NOT is_pending", name="relay_conversation_events_is_pending_check"),
    Index("relay_conversation_events_pending_idx", "conversation_id", "seq", postgresql_where=text("is_pending")),
)

relay_start_tasks = Table(
    "relay_start_tasks",
    metadata,
    Column("id", Text(collation="C"), nullable=False),
    Column("user_id", Text(collation="C"), nullable=False),
    Column("status", Text(collation="C"), nullable=False),
    Column("detail", Text),
    # Named once it is ready; `conversation_id` is what it is going to be.
    Column("app_conversation_id", Text(collation="C")),
    Column("conversation_id", Text(collation="C"), nullable=False),
    Column("sandbox_id", Text(collation="C")),
    Column("agent_server_url", Text),
    Column("request", JSON, nullable=False),
    # The time until which its relay works on it.
    Column("expires_at", TIMESTAMP(timezone=True), nullable=False),
    Column("created_at", TIMESTAMP(timezone=True), nullable=False),
    Column("updated_at", TIMESTAMP(timezone=True), nullable=False),
    PrimaryKeyConstraint("id", name="relay_start_tasks_pkey"),
    CheckConstraint(
        "status IN ('WORKING', 'WAITING_FOR_SANDBOX', 'PREPARING_REPOSITORY', 'RUNNING_SETUP_SCRIPT',"
        " 'STARTING_CONVERSATION', 'READY', 'ERROR')",
        name="relay_start_tasks_status_check",
    ),
    CheckConstraint("(status = 'READY') = (app_conversation_id IS NOT NULL)", name="relay_start_tasks_ready_check"),
    Index("relay_start_tasks_by_created_at_idx", "user_id", "created_at", "id"),
    Index("relay_start_tasks_by_updated_at_idx", "user_id", "updated_at", "id"),
    Index("relay_start_tasks_open_idx", "expires_at", postgresql_where=text("status NOT IN ('READY', 'ERROR')")),
)

relay_feedback = Table(
    "relay_feedback",
    metadata,
    Column("id", Text(collation="C"), nullable=False),
    Column("conversation_id", Text(collation="C"), nullable=False),
    Column("body", JSON, nullable=False),
    Column("created_at", TIMESTAMP(timezone=True), nullable=False),
    PrimaryKeyConstraint("id", name="relay_feedback_pkey"),
    ForeignKeyConstraint(
        ["conversation_id"], ["relay_conversations.id"], name="relay_feedback_conversation_fkey", ondelete="CASCADE"
    ),
    Index("relay_feedback_by_conversation_idx", "conversation_id"),
)
