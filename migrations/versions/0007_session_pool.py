"""the session pool

Revision 0007.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

# Relays know the pool's sessions and their accounts; a session's next turn with the same account is no news to them.
TRIGGERS = (
    """
CREATE TRIGGER relay_session_pool_notify AFTER INSERT OR DELETE OR TRUNCATE ON relay_session_pool
FOR EACH STATEMENT EXECUTE FUNCTION relay_notify()
""",
    """
CREATE TRIGGER relay_session_pool_account_notify AFTER UPDATE ON relay_session_pool
FOR EACH ROW WHEN (OLD.account_id IS DISTINCT FROM NEW.account_id) EXECUTE FUNCTION relay_notify()
""",
    """
CREATE TRIGGER relay_session_pool_current_notify AFTER UPDATE OF user_id, session_id ON relay_session_pool_current
FOR EACH STATEMENT EXECUTE FUNCTION relay_notify()
""",
)


def upgrade() -> None:
    op.create_table(
        "relay_session_pool",
        sa.Column("user_id", sa.Text(collation="C"), nullable=False),
        sa.Column("session_id", sa.Text(collation="C"), nullable=False),
        sa.Column("position", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("account_id", sa.Text(collation="C"), nullable=True),
        sa.Column("model", sa.Text(), nullable=True),
        sa.Column("cache_read_share", sa.Float(), nullable=True),
        sa.Column("collected_at", postgresql.TIMESTAMP(timezone=True), nullable=False),
        sa.Column("last_used_at", postgresql.TIMESTAMP(timezone=True), nullable=False),
        sa.CheckConstraint("cache_read_share BETWEEN 0 AND 1", name="relay_session_pool_cache_read_share_check"),
        sa.ForeignKeyConstraint(
            ["account_id"], ["relay_accounts.id"], name="relay_session_pool_account_fkey", ondelete="SET NULL"
        ),
        sa.PrimaryKeyConstraint("user_id", "session_id", name="relay_session_pool_pkey"),
        sa.UniqueConstraint("position", name="relay_session_pool_position_key"),
    )
    op.create_table(
        "relay_session_pool_current",
        sa.Column("id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("user_id", sa.Text(collation="C"), nullable=True),
        sa.Column("session_id", sa.Text(collation="C"), nullable=True),
        sa.Column("switched_at", postgresql.TIMESTAMP(timezone=True), nullable=True),
        sa.CheckConstraint("id = 1", name="relay_session_pool_current_id_check"),
        sa.ForeignKeyConstraint(
            ["user_id", "session_id"],
            ["relay_session_pool.user_id", "relay_session_pool.session_id"],
            name="relay_session_pool_current_session_fkey",
            ondelete="SET NULL",
        ),
        sa.PrimaryKeyConstraint("id", name="relay_session_pool_current_pkey"),
    )
    for trigger in TRIGGERS:
        op.execute(trigger)


def downgrade() -> None:
    op.drop_table("relay_session_pool_current")
    op.drop_table("relay_session_pool")
