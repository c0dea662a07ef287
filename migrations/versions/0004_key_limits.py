"""limits of keys

Revision 0004.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

LIMITS = (
    "least(token_limit, concurrency_limit, rate_limit_window, rate_limit_requests, daily_cost_limit,"
    " total_cost_limit) >= 0"
)
# Whoever changes a key, by hand as well, tells all relays.
TRIGGER = """
CREATE TRIGGER relay_api_keys_notify AFTER INSERT OR UPDATE OR DELETE OR TRUNCATE ON relay_api_keys
FOR EACH STATEMENT EXECUTE FUNCTION relay_notify()
"""


def upgrade() -> None:
    op.create_table(
        "relay_key_reservations",
        sa.Column("id", sa.Text(collation="C"), nullable=False),
        sa.Column("key_id", sa.Text(collation="C"), nullable=False),
        sa.Column("tokens", sa.BigInteger(), nullable=False),
        sa.Column("cost", sa.Numeric(precision=18, scale=6), nullable=False),
        sa.Column("expires_at", postgresql.TIMESTAMP(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["key_id"], ["relay_api_keys.id"], name="relay_key_reservations_key_fkey", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name="relay_key_reservations_pkey"),
    )
    op.create_index("relay_key_reservations_by_expires_at_idx", "relay_key_reservations", ["expires_at"], unique=False)
    op.create_index("relay_key_reservations_by_key_idx", "relay_key_reservations", ["key_id"], unique=False)
    op.create_table(
        "relay_key_use",
        sa.Column("key_id", sa.Text(collation="C"), nullable=False),
        sa.Column("requests", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("tokens", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("cost", sa.Numeric(precision=18, scale=6), server_default=sa.text("0"), nullable=False),
        sa.Column("day", sa.Date(), nullable=True),
        sa.Column("day_requests", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("day_tokens", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("day_cost", sa.Numeric(precision=18, scale=6), server_default=sa.text("0"), nullable=False),
        sa.Column("window_started_at", postgresql.TIMESTAMP(timezone=True), nullable=True),
        sa.Column("window_requests", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("window_tokens", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("in_flight", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("reserved_tokens", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("reserved_cost", sa.Numeric(precision=18, scale=6), server_default=sa.text("0"), nullable=False),
        sa.Column("last_used_at", postgresql.TIMESTAMP(timezone=True), nullable=True),
        sa.CheckConstraint(
            "least(in_flight, reserved_tokens, reserved_cost) >= 0", name="relay_key_use_reserved_check"
        ),
        sa.ForeignKeyConstraint(["key_id"], ["relay_api_keys.id"], name="relay_key_use_key_fkey", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("key_id", name="relay_key_use_pkey"),
    )
    op.add_column("relay_api_keys", sa.Column("description", sa.Text(), server_default="", nullable=False))
    op.add_column(
        "relay_api_keys", sa.Column("collect_session", sa.Boolean(), server_default=sa.text("false"), nullable=False)
    )
    op.add_column("relay_api_keys", sa.Column("token_limit", sa.BigInteger(), nullable=True))
    op.add_column("relay_api_keys", sa.Column("concurrency_limit", sa.Integer(), nullable=True))
    op.add_column("relay_api_keys", sa.Column("rate_limit_window", sa.Integer(), nullable=True))
    op.add_column("relay_api_keys", sa.Column("rate_limit_requests", sa.Integer(), nullable=True))
    op.add_column("relay_api_keys", sa.Column("daily_cost_limit", sa.Numeric(precision=18, scale=6), nullable=True))
    op.add_column("relay_api_keys", sa.Column("total_cost_limit", sa.Numeric(precision=18, scale=6), nullable=True))
    op.add_column(
        "relay_api_keys",
        sa.Column(
            "permissions", postgresql.JSONB(astext_type=sa.Text()), server_default=sa.text("'\"all\"'"), nullable=False
        ),
    )
    op.add_column(
        "relay_api_keys",
        sa.Column(
            "allowed_models", postgresql.JSONB(astext_type=sa.Text()), server_default=sa.text("'[]'"), nullable=False
        ),
    )
    op.add_column(
        "relay_api_keys",
        sa.Column("tags", postgresql.JSONB(astext_type=sa.Text()), server_default=sa.text("'[]'"), nullable=False),
    )
    op.add_column("relay_api_keys", sa.Column("updated_at", postgresql.TIMESTAMP(timezone=True), nullable=True))
    op.add_column("relay_api_keys", sa.Column("deleted_at", postgresql.TIMESTAMP(timezone=True), nullable=True))
    op.create_check_constraint("relay_api_keys_limits_check", "relay_api_keys", LIMITS)
    op.execute(TRIGGER)


def downgrade() -> None:
    op.execute("DROP TRIGGER relay_api_keys_notify ON relay_api_keys")
    op.drop_constraint("relay_api_keys_limits_check", "relay_api_keys", type_="check")
    op.drop_column("relay_api_keys", "deleted_at")
    op.drop_column("relay_api_keys", "updated_at")
    op.drop_column("relay_api_keys", "tags")
    op.drop_column("relay_api_keys", "allowed_models")
    op.drop_column("relay_api_keys", "permissions")
    op.drop_column("relay_api_keys", "total_cost_limit")
    op.drop_column("relay_api_keys", "daily_cost_limit")
    op.drop_column("relay_api_keys", "rate_limit_requests")
    op.drop_column("relay_api_keys", "rate_limit_window")
    op.drop_column("relay_api_keys", "concurrency_limit")
    op.drop_column("relay_api_keys", "token_limit")
    op.drop_column("relay_api_keys", "collect_session")
    op.drop_column("relay_api_keys", "description")
    op.drop_table("relay_key_use")
    op.drop_index("relay_key_reservations_by_key_idx", table_name="relay_key_reservations")
    op.drop_index("relay_key_reservations_by_expires_at_idx", table_name="relay_key_reservations")
    op.drop_table("relay_key_reservations")
