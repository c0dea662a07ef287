"""the relay's accounts

Revision 0003.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

# Whoever changes an account, by hand as well, tells all relays. The channel bears the schema's name, so that several
# installations in one database do not wake each other.
NOTIFY = """
CREATE FUNCTION relay_notify() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_notify('relay_' || TG_TABLE_SCHEMA, TG_TABLE_NAME);
    RETURN NULL;
END $$
"""
TRIGGER = """
CREATE TRIGGER relay_accounts_notify AFTER INSERT OR UPDATE OR DELETE OR TRUNCATE ON relay_accounts
FOR EACH STATEMENT EXECUTE FUNCTION relay_notify()
"""


def upgrade() -> None:
    op.create_table(
        "relay_accounts",
        sa.Column("id", sa.Text(collation="C"), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("provider", sa.Text(), nullable=False),
        sa.Column("base_url", sa.Text(), server_default="", nullable=False),
        sa.Column("secrets", sa.LargeBinary(), nullable=True),
        sa.Column("secrets_key_id", sa.Text(), nullable=True),
        sa.Column("proxy_shown", sa.Text(), nullable=True),
        sa.Column("models", postgresql.JSONB(astext_type=sa.Text()), server_default=sa.text("'[]'"), nullable=False),
        sa.Column("priority", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("weight", sa.Float(), server_default=sa.text("1"), nullable=False),
        sa.Column("max_concurrency", sa.Integer(), nullable=True),
        sa.Column("enabled", sa.Boolean(), server_default=sa.text("true"), nullable=False),
        sa.Column("disabled_reason", sa.Text(), nullable=True),
        sa.Column("cooldown_until", postgresql.TIMESTAMP(timezone=True), nullable=True),
        sa.Column("cooldown_reason", sa.Text(), nullable=True),
        sa.Column("failures_in_row", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("probe_until", postgresql.TIMESTAMP(timezone=True), nullable=True),
        sa.Column("last_error", sa.Text(), nullable=True),
        sa.Column("created_at", postgresql.TIMESTAMP(timezone=True), nullable=False),
        sa.Column("updated_at", postgresql.TIMESTAMP(timezone=True), nullable=False),
        sa.CheckConstraint("provider IN ('anthropic', 'demo')", name="relay_accounts_provider_check"),
        sa.CheckConstraint("(secrets IS NULL) = (secrets_key_id IS NULL)", name="relay_accounts_secrets_check"),
        sa.CheckConstraint("failures_in_row >= 0", name="relay_accounts_failures_in_row_check"),
        sa.CheckConstraint("length(id) BETWEEN 1 AND 100", name="relay_accounts_id_check"),
        sa.CheckConstraint("length(name) BETWEEN 1 AND 100", name="relay_accounts_name_check"),
        sa.CheckConstraint("max_concurrency > 0", name="relay_accounts_max_concurrency_check"),
        sa.CheckConstraint("weight > 0", name="relay_accounts_weight_check"),
        sa.PrimaryKeyConstraint("id", name="relay_accounts_pkey"),
    )
    op.create_table(
        "relay_idempotency",
        sa.Column("user_id", sa.Text(collation="C"), nullable=False),
        sa.Column("key", sa.Text(collation="C"), nullable=False),
        sa.Column("request_hash", sa.LargeBinary(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("token", sa.Text(collation="C"), nullable=False),
        sa.Column("lease_expires_at", postgresql.TIMESTAMP(timezone=True), nullable=False),
        sa.Column("session_id", sa.Text(collation="C"), nullable=True),
        sa.Column("turn_id", sa.Text(collation="C"), nullable=True),
        sa.Column("headers", postgresql.JSONB(astext_type=sa.Text()), nullable=True),
        sa.Column("answer", sa.LargeBinary(), nullable=True),
        sa.Column("created_at", postgresql.TIMESTAMP(timezone=True), nullable=False),
        sa.CheckConstraint("(status = 'completed') = (answer IS NOT NULL)", name="relay_idempotency_answer_check"),
        sa.CheckConstraint("status IN ('running', 'completed', 'failed')", name="relay_idempotency_status_check"),
        sa.PrimaryKeyConstraint("user_id", "key", name="relay_idempotency_pkey"),
    )
    op.create_index("relay_idempotency_by_created_at_idx", "relay_idempotency", ["created_at"], unique=False)
    op.create_table(
        "relay_marks",
        sa.Column("name", sa.Text(collation="C"), nullable=False),
        sa.Column("made_at", postgresql.TIMESTAMP(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("name", name="relay_marks_pkey"),
    )
    op.create_table(
        "relay_slots",
        sa.Column("kind", sa.Text(collation="C"), nullable=False),
        sa.Column("owner_id", sa.Text(collation="C"), nullable=False),
        sa.Column("slot", sa.Integer(), nullable=False),
        sa.Column("relay_id", sa.Text(collation="C"), nullable=True),
        sa.Column("expires_at", postgresql.TIMESTAMP(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("kind", "owner_id", "slot", name="relay_slots_pkey"),
    )
    op.create_index("relay_slots_by_relay_idx", "relay_slots", ["relay_id"], unique=False)
    op.create_table(
        "relay_account_use",
        sa.Column("account_id", sa.Text(collation="C"), nullable=False),
        sa.Column("relay_id", sa.Text(collation="C"), nullable=False),
        sa.Column("in_flight", sa.Integer(), nullable=False),
        sa.Column("requests", sa.BigInteger(), nullable=False),
        sa.Column("failures", sa.BigInteger(), nullable=False),
        sa.Column("last_used_at", postgresql.TIMESTAMP(timezone=True), nullable=True),
        sa.Column("updated_at", postgresql.TIMESTAMP(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["account_id"], ["relay_accounts.id"], name="relay_account_use_account_fkey", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("account_id", "relay_id", name="relay_account_use_pkey"),
    )
    op.create_table(
        "relay_affinities",
        sa.Column("user_id", sa.Text(collation="C"), nullable=False),
        sa.Column("session_id", sa.Text(collation="C"), nullable=False),
        sa.Column("account_id", sa.Text(collation="C"), nullable=False),
        sa.Column("used_at", postgresql.TIMESTAMP(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["account_id"], ["relay_accounts.id"], name="relay_affinities_account_fkey", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("user_id", "session_id", name="relay_affinities_pkey"),
    )
    op.create_index("relay_affinities_by_account_idx", "relay_affinities", ["account_id"], unique=False)
    op.create_index("relay_affinities_by_used_at_idx", "relay_affinities", ["used_at"], unique=False)
    op.execute(NOTIFY)
    op.execute(TRIGGER)


def downgrade() -> None:
    op.drop_index("relay_affinities_by_used_at_idx", table_name="relay_affinities")
    op.drop_index("relay_affinities_by_account_idx", table_name="relay_affinities")
    op.drop_table("relay_affinities")
    op.drop_table("relay_account_use")
    op.drop_index("relay_slots_by_relay_idx", table_name="relay_slots")
    op.drop_table("relay_slots")
    op.drop_table("relay_marks")
    op.drop_index("relay_idempotency_by_created_at_idx", table_name="relay_idempotency")
    op.drop_table("relay_idempotency")
    op.drop_table("relay_accounts")
    op.execute("DROP FUNCTION relay_notify")
