"""conversations

Revision 0008.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

# Whoever shows a conversation, or runs it, in whatever relay, hears of what is new in it.
NOTIFY = """
CREATE FUNCTION relay_notify_conversation() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_notify('relay_' || TG_TABLE_SCHEMA, 'conversation ' || NEW.id);
    RETURN NULL;
END $$
"""
TRIGGER = """
CREATE TRIGGER relay_conversations_notify
AFTER UPDATE OF next_seq, wants_run, wants_pause, run_id, sandbox_status, execution_status ON relay_conversations
FOR EACH ROW EXECUTE FUNCTION relay_notify_conversation()
"""

_MOMENT = postgresql.TIMESTAMP(timezone=True)


def upgrade() -> None:
    op.create_table(
        "relay_conversations",
        sa.Column("id", sa.Text(collation="C"), nullable=False),
        sa.Column("user_id", sa.Text(collation="C"), nullable=False),
        sa.Column("api", sa.Text(collation="C"), nullable=False),
        sa.Column("session_id", sa.Text(collation="C"), nullable=False),
        sa.Column("key_id", sa.Text(collation="C"), nullable=False),
        sa.Column("sandbox_id", sa.Text(collation="C"), nullable=False),
        sa.Column("runtime_nonce", sa.LargeBinary(), nullable=False),
        sa.Column("runtime_key_hash", sa.LargeBinary(), nullable=False),
        sa.Column("title", sa.Text(), nullable=True),
        sa.Column("llm_model", sa.Text(), nullable=True),
        sa.Column("instructions", sa.Text(), nullable=True),
        sa.Column("selected_repository", sa.Text(), nullable=True),
        sa.Column("selected_branch", sa.Text(), nullable=True),
        sa.Column("git_provider", sa.Text(), nullable=True),
        sa.Column("trigger", sa.Text(), nullable=True),
        sa.Column("pr_number", postgresql.JSONB(), server_default=sa.text("'[]'"), nullable=False),
        sa.Column("parent_id", sa.Text(collation="C"), nullable=True),
        sa.Column("sandbox_status", sa.Text(collation="C"), nullable=False),
        sa.Column("execution_status", sa.Text(collation="C"), nullable=False),
        sa.Column("run_id", sa.Text(collation="C"), nullable=True),
        sa.Column("run_expires_at", _MOMENT, nullable=True),
        sa.Column("wants_run", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("wants_pause", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("next_seq", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("logged_version", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("logged_seq", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("logged_count", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("created_at", _MOMENT, nullable=False),
        sa.Column("updated_at", _MOMENT, nullable=False),
        sa.CheckConstraint("id ~ '^[0-9a-f]{32}$'", name="relay_conversations_id_check"),
        sa.CheckConstraint("api IN ('V0', 'V1')", name="relay_conversations_api_check"),
        sa.CheckConstraint(
            "sandbox_status IN ('STARTING', 'RUNNING', 'PAUSED', 'ERROR')",
            name="relay_conversations_sandbox_status_check",
        ),
        sa.CheckConstraint(
            "execution_status IN ('idle', 'running', 'paused', 'waiting_for_confirmation', 'finished', 'error',"
            " 'stuck')",
            name="relay_conversations_execution_status_check",
        ),
        sa.CheckConstraint(
            "(run_id IS NULL) = (run_expires_at IS NULL)"
            " AND (run_id IS NULL OR execution_status IN ('running', 'stuck'))",
            name="relay_conversations_run_check",
        ),
        sa.PrimaryKeyConstraint("id", name="relay_conversations_pkey"),
        sa.UniqueConstraint("user_id", "session_id", name="relay_conversations_session_key"),
        sa.UniqueConstraint("runtime_key_hash", name="relay_conversations_runtime_key_hash_key"),
        sa.ForeignKeyConstraint(
            ["parent_id"], ["relay_conversations.id"], name="relay_conversations_parent_fkey", ondelete="SET NULL"
        ),
    )
    op.create_index("relay_conversations_by_created_at_idx", "relay_conversations", ["user_id", "created_at", "id"])
    op.create_index("relay_conversations_by_sandbox_idx", "relay_conversations", ["user_id", "sandbox_id"])
    op.create_index("relay_conversations_by_parent_idx", "relay_conversations", ["parent_id"])
    op.create_index(
        "relay_conversations_by_run_idx",
        "relay_conversations",
        ["run_expires_at"],
        postgresql_where=sa.text("run_id IS NOT NULL"),
    )
    op.create_index(
        "relay_conversations_starting_idx",
        "relay_conversations",
        ["created_at"],
        postgresql_where=sa.text("sandbox_status = 'STARTING'"),
    )
    op.execute(NOTIFY)
    op.execute(TRIGGER)

    op.create_table(
        "relay_conversation_events",
        sa.Column("conversation_id", sa.Text(collation="C"), nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("id", sa.Text(collation="C"), nullable=False),
        sa.Column("kind", sa.Text(collation="C"), nullable=False),
        sa.Column("source", sa.Text(collation="C"), nullable=False),
        sa.Column("payload", postgresql.JSON(), nullable=False),
        sa.Column("is_pending", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("superseded_at", _MOMENT, nullable=True),
        sa.Column("created_at", _MOMENT, nullable=False),
        sa.CheckConstraint(
            "kind IN ('message', 'state', 'error', 'other')", name="relay_conversation_events_kind_check"
        ),
        sa.CheckConstraint("source IN ('agent', 'user', 'environment')", name="relay_conversation_events_source_check"),
        sa.CheckConstraint("kind = 'message' OR NOT is_pending", name="relay_conversation_events_is_pending_check"),
        sa.PrimaryKeyConstraint("conversation_id", "seq", name="relay_conversation_events_pkey"),
        sa.UniqueConstraint("conversation_id", "id", name="relay_conversation_events_id_key"),
        sa.ForeignKeyConstraint(
            ["conversation_id"],
            ["relay_conversations.id"],
            name="relay_conversation_events_conversation_fkey",
            ondelete="CASCADE",
        ),
    )
    op.create_index(
        "relay_conversation_events_pending_idx",
        "relay_conversation_events",
        ["conversation_id", "seq"],
        postgresql_where=sa.text("is_pending"),
    )

    op.create_table(
        "relay_start_tasks",
        sa.Column("id", sa.Text(collation="C"), nullable=False),
        sa.Column("user_id", sa.Text(collation="C"), nullable=False),
        sa.Column("status", sa.Text(collation="C"), nullable=False),
        sa.Column("detail", sa.Text(), nullable=True),
        sa.Column("app_conversation_id", sa.Text(collation="C"), nullable=True),
        sa.Column("conversation_id", sa.Text(collation="C"), nullable=False),
        sa.Column("sandbox_id", sa.Text(collation="C"), nullable=True),
        sa.Column("agent_server_url", sa.Text(), nullable=True),
        sa.Column("request", postgresql.JSON(), nullable=False),
        sa.Column("expires_at", _MOMENT, nullable=False),
        sa.Column("created_at", _MOMENT, nullable=False),
        sa.Column("updated_at", _MOMENT, nullable=False),
        sa.CheckConstraint(
            "status IN ('WORKING', 'WAITING_FOR_SANDBOX', 'PREPARING_REPOSITORY', 'RUNNING_SETUP_SCRIPT',"
            " 'STARTING_CONVERSATION', 'READY', 'ERROR')",
            name="relay_start_tasks_status_check",
        ),
        sa.CheckConstraint(
            "(status = 'READY') = (app_conversation_id IS NOT NULL)", name="relay_start_tasks_ready_check"
        ),
        sa.PrimaryKeyConstraint("id", name="relay_start_tasks_pkey"),
    )
    op.create_index("relay_start_tasks_by_created_at_idx", "relay_start_tasks", ["user_id", "created_at", "id"])
    op.create_index("relay_start_tasks_by_updated_at_idx", "relay_start_tasks", ["user_id", "updated_at", "id"])
    op.create_index(
        "relay_start_tasks_open_idx",
        "relay_start_tasks",
        ["expires_at"],
        postgresql_where=sa.text("status NOT IN ('READY', 'ERROR')"),
    )

    op.create_table(
        "relay_feedback",
        sa.Column("id", sa.Text(collation="C"), nullable=False),
        sa.Column("conversation_id", sa.Text(collation="C"), nullable=False),
        sa.Column("body", postgresql.JSON(), nullable=False),
        sa.Column("created_at", _MOMENT, nullable=False),
        sa.PrimaryKeyConstraint("id", name="relay_feedback_pkey"),
        sa.ForeignKeyConstraint(
            ["conversation_id"],
            ["relay_conversations.id"],
            name="relay_feedback_conversation_fkey",
            ondelete="CASCADE",
        ),
    )
    op.create_index("relay_feedback_by_conversation_idx", "relay_feedback", ["conversation_id"])


def downgrade() -> None:
    op.drop_table("relay_feedback")
    op.drop_table("relay_start_tasks")
    op.drop_table("relay_conversation_events")
    op.drop_table("relay_conversations")
    op.execute("DROP FUNCTION relay_notify_conversation()")
