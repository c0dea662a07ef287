"""session_service's tables. user_id leads every key, so that one user's rows can never join another's.

Its one invariant: every constraint has a name, because errors.py turns names into answers.
Tables carry no schema here; it is put in when statements are compiled (settings: DB_SCHEMA).
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
    MetaData,
    Numeric,
    PrimaryKeyConstraint,
    Table,
    Text,
    UniqueConstraint,
    literal_column,
    text,
)
from sqlalchemy.dialects.postgresql import JSON, JSONB, TIMESTAMP, TSVECTOR
from sqlalchemy.sql.elements import ColumnElement

metadata = MetaData(naming_convention={"ix": "%(table_name)s_%(column_0_N_name)s_idx", "pk": "%(table_name)s_pkey"})

# Constants are written into the SQL, not bound: partial indexes serve only what the planner can see.
ACTIVE: ColumnElement[str] = literal_column("'active'")
OPEN: ColumnElement[str] = literal_column("'open'")


def _id(name: str, *, nullable: bool = False) -> Column[str]:
    # Byte order: an id has no language, and comparing it should cost nothing.
    return Column(name, Text(collation="C"), nullable=nullable)


def _time(name: str, *, nullable: bool = False) -> Column[object]:
    return Column(name, TIMESTAMP(timezone=True), nullable=nullable)


def _count(name: str, default: int = 0) -> Column[int]:
    return Column(name, Integer, nullable=False, server_default=text(str(default)))


def _cost(name: str, *, nullable: bool = False) -> Column[object]:
    default = None if nullable else text("0")
    return Column(name, Numeric(18, 6), nullable=nullable, server_default=default)


def _one_of(name: str, column: str, values: str) -> CheckConstraint:
    listed = ", ".join(f"'{value}'" for value in values.split())
    return CheckConstraint(f"{column} IN ({listed})", name=name)


sessions = Table(
    "sessions",
    metadata,
    _id("user_id"),
    _id("session_id"),
    Column("title", Text),
    Column("status", Text, nullable=False, server_default="active"),
    Column("ended_reason", Text),
    Column("metadata", JSONB, nullable=False, server_default=text("'{}'")),
    Column("conversation_data", JSONB, nullable=False, server_default=text("'{}'")),
    Column("session_summary", Text, nullable=False, server_default=""),
    Column("summary_to_seq", Integer),
    # Who wrote the summary; null where nobody has said.
    Column("summary_model", Text),
    _count("message_count"),
    _count("last_seq"),
    Column("total_tokens", BigInteger, nullable=False, server_default=text("0")),
    _cost("total_cost"),
    # The part of the totals that superseded messages spent.
    Column("superseded_tokens", BigInteger, nullable=False, server_default=text("0")),
    _cost("superseded_cost"),
    Column("version", BigInteger, nullable=False, server_default=text("1")),
    _count("generation", 1),
    # The first seq of this generation; what lies before was superseded by a restart.
    _count("first_seq", 1),
    _count("window_start_seq", 1),
    Column("idle_timeout_seconds", Integer),
    _id("parent_session_id", nullable=True),
    Column("parent_seq", Integer),
    # The turn opened last holds the session until it is closed or its lease has run out.
    _id("latest_turn_id", nullable=True),
    _time("lease_expires_at", nullable=True),
    # How far the search index has come: every write moves `version`, so what lags behind it has news.
    Column("indexed_version", BigInteger, nullable=False, server_default=text("0")),
    _count("indexed_seq"),
    _time("indexed_at", nullable=True),
    # How often messages were taken back; who counts messages sees by it that what it read still holds.
    _count("rewinds"),
    # Hash of the hashes of the visible conversation up to chain_seq, by which a client's array is known again.
    _count("chain_count"),
    _count("chain_seq"),
    Column("chain_hash", LargeBinary, nullable=False, server_default=text("''")),
    # What of this session is in session_totals and usage_buckets.
    Column("counted", Boolean, nullable=False, server_default=text("false")),
    Column("counted_active", Boolean, nullable=False, server_default=text("false")),
    _count("counted_messages"),
    Column("counted_tokens", BigInteger, nullable=False, server_default=text("0")),
    _cost("counted_cost"),
    _time("counted_to", nullable=True),
    _time("created_at"),
    _time("updated_at"),
    _time("last_activity"),
    _time("expires_at", nullable=True),
    PrimaryKeyConstraint("user_id", "session_id", name="sessions_pkey"),
    Index("sessions_to_index_idx", "user_id", "session_id", postgresql_where=text("indexed_version < version")),
    CheckConstraint("length(user_id) BETWEEN 1 AND 255", name="sessions_user_id_check"),
    CheckConstraint("length(session_id) BETWEEN 1 AND 255", name="sessions_session_id_check"),
    _one_of("sessions_status_check", "status", "active completed archived ended"),
    _one_of("sessions_ended_reason_check", "ended_reason", "user expired"),
    CheckConstraint(
        "message_count BETWEEN 0 AND last_seq"
        " AND superseded_tokens BETWEEN 0 AND total_tokens AND superseded_cost BETWEEN 0 AND total_cost",
        name="sessions_counters_check",
    ),
    Index("sessions_by_last_activity_idx", "user_id", "last_activity", "session_id"),
    Index("sessions_by_created_at_idx", "user_id", "created_at", "session_id"),
    Index("sessions_expiry_idx", "expires_at", postgresql_where=text("status = 'active'")),
    Index("sessions_lease_idx", "lease_expires_at", postgresql_where=text("lease_expires_at IS NOT NULL")),
)

session_messages = Table(
    "session_messages",
    metadata,
    _id("user_id"),
    _id("session_id"),
    Column("seq", Integer, nullable=False),
    _id("message_id"),
    _id("turn_id", nullable=True),
    Column("role", Text, nullable=False),
    Column("message_type", Text, nullable=False),
    Column("content", Text, nullable=False),
    # json, not jsonb: blocks and native come back with their keys in the order in which they were sent.
    Column("content_blocks", JSON),
    Column("native", JSON),
    Column("metadata", JSONB, nullable=False, server_default=text("'{}'")),
    _count("tokens_used"),
    _cost("cost_usd"),
    # Tokens that the message takes in a context: its share of a turn's reported usage, else an estimate.
    Column("context_tokens", Integer, nullable=False),
    Column("context_tokens_reported", Boolean, nullable=False),
    # A message of the user's own, no tool's result: a window may begin here.
    Column("begins_window", Boolean, nullable=False),
    Column("canonical_hash", LargeBinary, nullable=False),
    _time("created_at"),
    _time("superseded_at", nullable=True),
    PrimaryKeyConstraint("user_id", "session_id", "seq", name="session_messages_pkey"),
    UniqueConstraint("user_id", "message_id", name="session_messages_message_id_key"),
    ForeignKeyConstraint(
        ["user_id", "session_id"],
        ["sessions.user_id", "sessions.session_id"],
        name="session_messages_session_fkey",
        ondelete="CASCADE",
    ),
    CheckConstraint("seq >= 1", name="session_messages_seq_check"),
    # Usage over time reads ranges of creation; block ranges cost appends next to nothing.
    Index("session_messages_created_at_idx", "created_at", postgresql_using="brin"),
    Index(
        "session_messages_system_idx",
        "user_id",
        "session_id",
        "seq",
        postgresql_where=text("role = 'system' AND superseded_at IS NULL"),
    ),
    CheckConstraint("tokens_used >= 0", name="session_messages_tokens_used_check"),
    CheckConstraint("cost_usd >= 0", name="session_messages_cost_usd_check"),
    _one_of("session_messages_role_check", "role", "user assistant system tool_call tool_result tool"),
    _one_of(
        "session_messages_message_type_check",
        "message_type",
        "chat system tool_call tool_result notification",
    ),
)

session_turns = Table(
    "session_turns",
    metadata,
    _id("user_id"),
    _id("session_id"),
    _id("turn_id"),
    Column("status", Text, nullable=False),
    _id("lease_token"),
    Column("lease_seconds", Integer, nullable=False),
    _time("lease_expires_at"),
    _time("opened_at"),
    _time("closed_at", nullable=True),
    Column("input_from_seq", Integer),
    Column("input_to_seq", Integer),
    Column("output_from_seq", Integer),
    Column("output_to_seq", Integer),
    Column("stop_reason", Text),
    Column("model", Text),
    Column("usage", JSONB),
    _cost("cost_usd", nullable=True),
    Column("upstream", JSONB),
    Column("error", JSONB),
    Column("completion_hash", LargeBinary),
    PrimaryKeyConstraint("user_id", "session_id", "turn_id", name="session_turns_pkey"),
    ForeignKeyConstraint(
        ["user_id", "session_id"],
        ["sessions.user_id", "sessions.session_id"],
        name="session_turns_session_fkey",
        ondelete="CASCADE",
    ),
    _one_of("session_turns_status_check", "status", "open completed interrupted failed refused expired"),
    CheckConstraint("(status = 'open') = (closed_at IS NULL)", name="session_turns_closed_at_check"),
    Index("session_turns_by_opened_at_idx", "user_id", "session_id", "opened_at", "turn_id"),
    Index("session_turns_by_turn_id_idx", "user_id", "turn_id"),
    Index(
        "session_turns_open_key",
        "user_id",
        "session_id",
        unique=True,
        postgresql_where=text("status = 'open'"),
    ),
)

session_memories = Table(
    "session_memories",
    metadata,
    _id("user_id"),
    _id("session_id"),
    _id("memory_id"),
    Column("memory_type", Text, nullable=False),
    Column("content", Text, nullable=False),
    Column("metadata", JSONB, nullable=False, server_default=text("'{}'")),
    _time("created_at"),
    _time("updated_at"),
    PrimaryKeyConstraint("user_id", "session_id", "memory_id", name="session_memories_pkey"),
    ForeignKeyConstraint(
        ["user_id", "session_id"],
        ["sessions.user_id", "sessions.session_id"],
        name="session_memories_session_fkey",
        ondelete="CASCADE",
    ),
    _one_of("session_memories_memory_type_check", "memory_type", "preference conversation entity summary custom"),
    Index("session_memories_by_session_idx", "user_id", "session_id", "created_at", "memory_id"),
    Index("session_memories_by_user_idx", "user_id", "created_at", "memory_id"),
)

# Words of titles (seq 0, no memory_id), messages (seq) and memories (memory_id), as search.py asks for them.
session_search = Table(
    "session_search",
    metadata,
    _id("user_id"),
    _id("session_id"),
    _count("seq"),
    Column("memory_id", Text(collation="C"), nullable=False, server_default=""),
    Column("words", TSVECTOR, nullable=False),
    # Past the places that a tsvector can tell apart, so that phrases cannot be judged by it.
    Column("is_long", Boolean, nullable=False),
    PrimaryKeyConstraint("user_id", "session_id", "seq", "memory_id", name="session_search_pkey"),
    ForeignKeyConstraint(
        ["user_id", "session_id"],
        ["sessions.user_id", "sessions.session_id"],
        name="session_search_session_fkey",
        ondelete="CASCADE",
    ),
    # New words wait in a list, which a search reads through, and enter the index together: a frequent word's list of
    # texts is then written once for many texts, not once for each. By whom it is done nobody waits for.
    Index(
        "session_search_words_idx",
        "words",
        postgresql_using="gin",
        postgresql_with={"fastupdate": "on", "gin_pending_list_limit": "512"},
    ),
)

# Sums over a user's sessions, and under the user '' over all; moved beside the request path, by differences.
session_totals = Table(
    "session_totals",
    metadata,
    _id("user_id"),
    Column("sessions", BigInteger, nullable=False),
    Column("active", BigInteger, nullable=False),
    Column("messages", BigInteger, nullable=False),
    Column("tokens", BigInteger, nullable=False),
    _cost("cost"),
    PrimaryKeyConstraint("user_id", name="session_totals_pkey"),
)

# Visible messages by UTC hour, day and month, of each user and, under the user '', of all.
usage_buckets = Table(
    "usage_buckets",
    metadata,
    _id("user_id"),
    Column("bucket", Text, nullable=False),
    _time("start"),
    Column("messages", BigInteger, nullable=False),
    Column("tokens", BigInteger, nullable=False),
    _cost("cost"),
    Column("active_sessions", BigInteger, nullable=False),
    PrimaryKeyConstraint("user_id", "bucket", "start", name="usage_buckets_pkey"),
    _one_of("usage_buckets_bucket_check", "bucket", "hour day month"),
)

# Answers of requests with an Idempotency-Key; a row commits with the write that it answers for.
idempotency_records = Table(
    "idempotency_records",
    metadata,
    _id("user_id"),
    _id("scope"),
    _id("idempotency_key"),
    Column("body_hash", LargeBinary, nullable=False),
    Column("answer", Text),
    _time("created_at"),
    PrimaryKeyConstraint("user_id", "scope", "idempotency_key", name="idempotency_records_pkey"),
    Index("idempotency_records_created_at_idx", "created_at"),
)
