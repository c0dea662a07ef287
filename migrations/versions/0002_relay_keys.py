"""the relay's keys

Revision 0002.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "relay_api_keys",
        sa.Column("id", sa.Text(collation="C"), nullable=False),
        sa.Column("user_id", sa.Text(collation="C"), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("key_hash", sa.LargeBinary(), nullable=False),
        sa.Column("prefix", sa.Text(), nullable=False),
        sa.Column("is_active", sa.Boolean(), server_default=sa.text("true"), nullable=False),
        sa.Column("created_at", postgresql.TIMESTAMP(timezone=True), nullable=False),
        sa.Column("expires_at", postgresql.TIMESTAMP(timezone=True), nullable=True),
        sa.CheckConstraint("octet_length(key_hash) = 32", name="relay_api_keys_key_hash_check"),
        sa.CheckConstraint("length(user_id) BETWEEN 1 AND 255", name="relay_api_keys_user_id_check"),
        sa.CheckConstraint("length(name) BETWEEN 1 AND 100", name="relay_api_keys_name_check"),
        sa.PrimaryKeyConstraint("id", name="relay_api_keys_pkey"),
        sa.UniqueConstraint("key_hash", name="relay_api_keys_key_hash_key"),
    )


def downgrade() -> None:
    op.drop_table("relay_api_keys")
