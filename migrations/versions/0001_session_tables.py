"""session tables

Revision 0001.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:

    op.create_table(
        "idempotency_records",
        sa.Column("user_id", sa.Text(collation="C"), nullable=False),
        sa.Column("scope", sa.Text(collation="C"), nullable=False),
        sa.Column("idempotency_key", sa.Text(collation="C"), nullable=False),
        sa.Column("body_hash", sa.LargeBinary(), nullable=False),
        sa.Column("answer", sa.Text(), nullable=True),
        sa.Column("created_at", postgresql.TIMESTAMP(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("user_id", "scope", "idempotency_key", name="idempotency_records_pkey"),
    )
    op.create_index("idempotency_records_created_at_idx", "idempotency_records", ["created_at"], unique=False)
    op.create_table(
        "session_totals",
        sa.Column("user_id", sa.Text(collation="C"), nullable=False),
        sa.Column("sessions", sa.BigInteger(), nullable=False),
        sa.Column("active", sa.BigInteger(), nullable=False),
        sa.Column("messages", sa.BigInteger(), nullable=False),
        sa.Column("tokens", sa.BigInteger(), nullable=False),
        sa.Column("cost", sa.Numeric(precision=18, scale=6), server_default=sa.text("0"), nullable=False),
        sa.PrimaryKeyConstraint("user_id", name="session_totals_pkey"),
    )
    op.create_table(
        "sessions",
        sa.Column("user_id", sa.Text(collation="C"), nullable=False),
        sa.Column("session_id", sa.Text(collation="C"), nullable=False),
        sa.Column("title", sa.Text(), nullable=True),
        sa.Column("status", sa.Text(), server_default="active", nullable=False),
        sa.Column("ended_reason", sa.Text(), nullable=True),
        sa.Column("metadata", postgresql.JSONB(astext_type=sa.Text()), server_default=sa.text("'{}'"), nullable=False),
        sa.Column(
            "conversation_data", postgresql.JSONB(astext_type=sa.Text()), server_default=sa.text("'{}'"), nullable=False
        ),
        sa.Column("session_summary", sa.Text(), server_default="", nullable=False),
        sa.Column("summary_to_seq", sa.Integer(), nullable=True),
        sa.Column("message_count", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("last_seq", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("total_tokens", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("total_cost", sa.Numeric(precision=18, scale=6), server_default=sa.text("0"), nullable=False),
        sa.Column("superseded_tokens", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("superseded_cost", sa.Numeric(precision=18, scale=6), server_default=sa.text("0"), nullable=False),
        sa.Column("version", sa.BigInteger(), server_default=sa.text("1"), nullable=False),
        sa.Column("generation", sa.Integer(), server_default=sa.text("1"), nullable=False),
        sa.Column("first_seq", sa.Integer(), server_default=sa.text("1"), nullable=False),
        sa.Column("window_start_seq", sa.Integer(), server_default=sa.text("1"), nullable=False),
        sa.Column("idle_timeout_seconds", sa.Integer(), nullable=True),
        sa.Column("parent_session_id", sa.Text(collation="C"), nullable=True),
        sa.Column("parent_seq", sa.Integer(), nullable=True),
        sa.Column("latest_turn_id", sa.Text(collation="C"), nullable=True),
        sa.Column("lease_expires_at", postgresql.TIMESTAMP(timezone=True), nullable=True),
        sa.Column("indexed_version", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("indexed_seq", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("indexed_at", postgresql.TIMESTAMP(timezone=True), nullable=True),
        sa.Column("rewinds", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("chain_count", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("chain_seq", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("chain_hash", sa.LargeBinary(), server_default=sa.text("''"), nullable=False),
        sa.Column("counted", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("counted_active", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("counted_messages", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("counted_tokens", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("counted_cost", sa.Numeric(precision=18, scale=6), server_default=sa.text("0"), nullable=False),
        sa.Column("counted_to", postgresql.TIMESTAMP(timezone=True), nullable=True),
        sa.Column("created_at", postgresql.TIMESTAMP(timezone=True), nullable=False),
        sa.Column("updated_at", postgresql.TIMESTAMP(timezone=True), nullable=False),
        sa.Column("last_activity", postgresql.TIMESTAMP(timezone=True), nullable=False),
        sa.Column("expires_at", postgresql.TIMESTAMP(timezone=True), nullable=True),
        sa.CheckConstraint("ended_reason IN ('user', 'expired')", name="sessions_ended_reason_check"),
        sa.CheckConstraint("status IN ('active', 'completed', 'archived', 'ended')", name="sessions_status_check"),
        sa.CheckConstraint("length(session_id) BETWEEN 1 AND 255", name="sessions_session_id_check"),
        sa.CheckConstraint("length(user_id) BETWEEN 1 AND 255", name="sessions_user_id_check"),
        sa.CheckConstraint(
            "message_count BETWEEN 0 AND last_seq AND superseded_tokens BETWEEN 0 AND total_tokens AND superseded_cost BETWEEN 0 AND total_cost",
            name="sessions_counters_check",
        ),
        sa.PrimaryKeyConstraint("user_id", "session_id", name="sessions_pkey"),
    )
    op.create_index("sessions_by_created_at_idx", "sessions", ["user_id", "created_at", "session_id"], unique=False)
    op.create_index(
        "sessions_by_last_activity_idx", "sessions", ["user_id", "last_activity", "session_id"], unique=False
    )
    op.create_index(
        "sessions_expiry_idx", "sessions", ["expires_at"], unique=False, postgresql_where=sa.text("status = 'active'")
    )
    op.create_index(
        "sessions_lease_idx",
        "sessions",
        ["lease_expires_at"],
        unique=False,
        postgresql_where=sa.text("lease_expires_at IS NOT NULL"),
    )
    op.create_index(
        "sessions_to_index_idx",
        "sessions",
        ["user_id", "session_id"],
        unique=False,
        postgresql_where=sa.text("indexed_version < version"),
    )
    op.create_table(
        "usage_buckets",
        sa.Column("user_id", sa.Text(collation="C"), nullable=False),
        sa.Column("bucket", sa.Text(), nullable=False),
        sa.Column("start", postgresql.TIMESTAMP(timezone=True), nullable=False),
        sa.Column("messages", sa.BigInteger(), nullable=False),
        sa.Column("tokens", sa.BigInteger(), nullable=False),
        sa.Column("cost", sa.Numeric(precision=18, scale=6), server_default=sa.text("0"), nullable=False),
        sa.Column("active_sessions", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("bucket IN ('hour', 'day', 'month')", name="usage_buckets_bucket_check"),
        sa.PrimaryKeyConstraint("user_id", "bucket", "start", name="usage_buckets_pkey"),
    )
    op.create_table(
        "session_memories",
        sa.Column("user_id", sa.Text(collation="C"), nullable=False),
        sa.Column("session_id", sa.Text(collation="C"), nullable=False),
        sa.Column("memory_id", sa.Text(collation="C"), nullable=False),
        sa.Column("memory_type", sa.Text(), nullable=False),
        sa.Column("content", sa.Text(), nullable=False),
        sa.Column("metadata", postgresql.JSONB(astext_type=sa.Text()), server_default=sa.text("'{}'"), nullable=False),
        sa.Column("created_at", postgresql.TIMESTAMP(timezone=True), nullable=False),
        sa.Column("updated_at", postgresql.TIMESTAMP(timezone=True), nullable=False),
        sa.CheckConstraint(
            "memory_type IN ('preference', 'conversation', 'entity', 'summary', 'custom')",
            name="session_memories_memory_type_check",
        ),
        sa.ForeignKeyConstraint(
            ["user_id", "session_id"],
            ["sessions.user_id", "sessions.session_id"],
            name="session_memories_session_fkey",
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("user_id", "session_id", "memory_id", name="session_memories_pkey"),
    )
    op.create_index(
        "session_memories_by_session_idx",
        "session_memories",
        ["user_id", "session_id", "created_at", "memory_id"],
        unique=False,
    )
    op.create_index(
        "session_memories_by_user_idx", "session_memories", ["user_id", "created_at", "memory_id"], unique=False
    )
    op.create_table(
        "session_messages",
        sa.Column("user_id", sa.Text(collation="C"), nullable=False),
        sa.Column("session_id", sa.Text(collation="C"), nullable=False),
        sa.Column("seq", sa.Integer(), nullable=False),
        sa.Column("message_id", sa.Text(collation="C"), nullable=False),
        sa.Column("turn_id", sa.Text(collation="C"), nullable=True),
        sa.Column("role", sa.Text(), nullable=False),
        sa.Column("message_type", sa.Text(), nullable=False),
        sa.Column("content", sa.Text(), nullable=False),
        sa.Column("content_blocks", postgresql.JSON(astext_type=sa.Text()), nullable=True),
        sa.Column("native", postgresql.JSON(astext_type=sa.Text()), nullable=True),
        sa.Column("metadata", postgresql.JSONB(astext_type=sa.Text()), server_default=sa.text("'{}'"), nullable=False),
        sa.Column("tokens_used", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("cost_usd", sa.Numeric(precision=18, scale=6), server_default=sa.text("0"), nullable=False),
        sa.Column("context_tokens", sa.Integer(), nullable=False),
        sa.Column("context_tokens_reported", sa.Boolean(), nullable=False),
        sa.Column("begins_window", sa.Boolean(), nullable=False),
        sa.Column("canonical_hash", sa.LargeBinary(), nullable=False),
        sa.Column("created_at", postgresql.TIMESTAMP(timezone=True), nullable=False),
        sa.Column("superseded_at", postgresql.TIMESTAMP(timezone=True), nullable=True),
        sa.CheckConstraint(
            "message_type IN ('chat', 'system', 'tool_call', 'tool_result', 'notification')",
            name="session_messages_message_type_check",
        ),
        sa.CheckConstraint(
            "role IN ('user', 'assistant', 'system', 'tool_call', 'tool_result', 'tool')",
            name="session_messages_role_check",
        ),
        sa.CheckConstraint("cost_usd >= 0", name="session_messages_cost_usd_check"),
        sa.CheckConstraint("seq >= 1", name="session_messages_seq_check"),
        sa.CheckConstraint("tokens_used >= 0", name="session_messages_tokens_used_check"),
        sa.ForeignKeyConstraint(
            ["user_id", "session_id"],
            ["sessions.user_id", "sessions.session_id"],
            name="session_messages_session_fkey",
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("user_id", "session_id", "seq", name="session_messages_pkey"),
        sa.UniqueConstraint("user_id", "message_id", name="session_messages_message_id_key"),
    )
    op.create_index(
        "session_messages_created_at_idx", "session_messages", ["created_at"], unique=False, postgresql_using="brin"
    )
    op.create_index(
        "session_messages_system_idx",
        "session_messages",
        ["user_id", "session_id", "seq"],
        unique=False,
        postgresql_where=sa.text("role = 'system' AND superseded_at IS NULL"),
    )
    op.create_table(
        "session_search",
        sa.Column("user_id", sa.Text(collation="C"), nullable=False),
        sa.Column("session_id", sa.Text(collation="C"), nullable=False),
        sa.Column("seq", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("memory_id", sa.Text(collation="C"), server_default="", nullable=False),
        sa.Column("words", postgresql.TSVECTOR(), nullable=False),
        sa.Column("is_long", sa.Boolean(), nullable=False),
        sa.ForeignKeyConstraint(
            ["user_id", "session_id"],
            ["sessions.user_id", "sessions.session_id"],
            name="session_search_session_fkey",
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("user_id", "session_id", "seq", "memory_id", name="session_search_pkey"),
    )
    op.create_index(
        "session_search_words_idx",
        "session_search",
        ["words"],
        unique=False,
        postgresql_using="gin",
        postgresql_with={"fastupdate": "off"},
    )
    op.create_table(
        "session_turns",
        sa.Column("user_id", sa.Text(collation="C"), nullable=False),
        sa.Column("session_id", sa.Text(collation="C"), nullable=False),
        sa.Column("turn_id", sa.Text(collation="C"), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("lease_token", sa.Text(collation="C"), nullable=False),
        sa.Column("lease_seconds", sa.Integer(), nullable=False),
        sa.Column("lease_expires_at", postgresql.TIMESTAMP(timezone=True), nullable=False),
        sa.Column("opened_at", postgresql.TIMESTAMP(timezone=True), nullable=False),
        sa.Column("closed_at", postgresql.TIMESTAMP(timezone=True), nullable=True),
        sa.Column("input_from_seq", sa.Integer(), nullable=True),
        sa.Column("input_to_seq", sa.Integer(), nullable=True),
        sa.Column("output_from_seq", sa.Integer(), nullable=True),
        sa.Column("output_to_seq", sa.Integer(), nullable=True),
        sa.Column("stop_reason", sa.Text(), nullable=True),
        sa.Column("model", sa.Text(), nullable=True),
        sa.Column("usage", postgresql.JSONB(astext_type=sa.Text()), nullable=True),
        sa.Column("cost_usd", sa.Numeric(precision=18, scale=6), nullable=True),
        sa.Column("upstream", postgresql.JSONB(astext_type=sa.Text()), nullable=True),
        sa.Column("error", postgresql.JSONB(astext_type=sa.Text()), nullable=True),
        sa.Column("completion_hash", sa.LargeBinary(), nullable=True),
        sa.CheckConstraint("(status = 'open') = (closed_at IS NULL)", name="session_turns_closed_at_check"),
        sa.CheckConstraint(
            "status IN ('open', 'completed', 'interrupted', 'failed', 'refused', 'expired')",
            name="session_turns_status_check",
        ),
        sa.ForeignKeyConstraint(
            ["user_id", "session_id"],
            ["sessions.user_id", "sessions.session_id"],
            name="session_turns_session_fkey",
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("user_id", "session_id", "turn_id", name="session_turns_pkey"),
    )
    op.create_index(
        "session_turns_by_opened_at_idx",
        "session_turns",
        ["user_id", "session_id", "opened_at", "turn_id"],
        unique=False,
    )
    op.create_index(
        "session_turns_open_key",
        "session_turns",
        ["user_id", "session_id"],
        unique=True,
        postgresql_where=sa.text("status = 'open'"),
    )


def downgrade() -> None:

    op.drop_index("session_turns_open_key", table_name="session_turns", postgresql_where=sa.text("status = 'open'"))
    op.drop_index("session_turns_by_opened_at_idx", table_name="session_turns")
    op.drop_table("session_turns")
    op.drop_index(
        "session_search_words_idx",
        table_name="session_search",
        postgresql_using="gin",
        postgresql_with={"fastupdate": "off"},
    )
    op.drop_table("session_search")
    op.drop_index(
        "session_messages_system_idx",
        table_name="session_messages",
        postgresql_where=sa.text("role = 'system' AND superseded_at IS NULL"),
    )
    op.drop_index("session_messages_created_at_idx", table_name="session_messages", postgresql_using="brin")
    op.drop_table("session_messages")
    op.drop_index("session_memories_by_user_idx", table_name="session_memories")
    op.drop_index("session_memories_by_session_idx", table_name="session_memories")
    op.drop_table("session_memories")
    op.drop_table("usage_buckets")
    op.drop_index("sessions_to_index_idx", table_name="sessions", postgresql_where=sa.text("indexed_version < version"))
    op.drop_index("sessions_lease_idx", table_name="sessions", postgresql_where=sa.text("lease_expires_at IS NOT NULL"))
    op.drop_index("sessions_expiry_idx", table_name="sessions", postgresql_where=sa.text("status = 'active'"))
    op.drop_index("sessions_by_last_activity_idx", table_name="sessions")
    op.drop_index("sessions_by_created_at_idx", table_name="sessions")
    op.drop_table("sessions")
    op.drop_table("session_totals")
    op.drop_index("idempotency_records_created_at_idx", table_name="idempotency_records")
    op.drop_table("idempotency_records")
