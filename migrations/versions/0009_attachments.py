"""attachments

Revision 0009.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "relay_blobs",
        sa.Column("user_id", sa.Text(collation="C"), nullable=False),
        sa.Column("sha256", sa.LargeBinary(), nullable=False),
        sa.Column("size_bytes", sa.Integer(), nullable=False),
        sa.Column("content", sa.LargeBinary(), nullable=False),
        sa.CheckConstraint("octet_length(content) = size_bytes", name="relay_blobs_size_bytes_check"),
        sa.CheckConstraint("octet_length(sha256) = 32", name="relay_blobs_sha256_check"),
        sa.PrimaryKeyConstraint("user_id", "sha256", name="relay_blobs_pkey"),
    )
    op.create_table(
        "relay_attachments",
        sa.Column("user_id", sa.Text(collation="C"), nullable=False),
        sa.Column("session_id", sa.Text(collation="C"), nullable=False),
        sa.Column("path_sha256", sa.LargeBinary(), nullable=False),
        sa.Column("path", sa.Text(collation="C"), nullable=False),
        sa.Column("sha256", sa.LargeBinary(), nullable=False),
        sa.Column("size_bytes", sa.Integer(), nullable=False),
        sa.Column("is_text", sa.Boolean(), nullable=False),
        sa.Column("content_type", sa.Text(), nullable=True),
        sa.Column("created_at", postgresql.TIMESTAMP(timezone=True), nullable=False),
        sa.Column("updated_at", postgresql.TIMESTAMP(timezone=True), nullable=False),
        sa.CheckConstraint("octet_length(path_sha256) = 32", name="relay_attachments_path_sha256_check"),
        sa.CheckConstraint("size_bytes >= 0", name="relay_attachments_size_bytes_check"),
        sa.CheckConstraint("starts_with(path, '/workspace/')", name="relay_attachments_path_check"),
        sa.ForeignKeyConstraint(
            ["user_id", "sha256"], ["relay_blobs.user_id", "relay_blobs.sha256"], name="relay_attachments_blob_fkey"
        ),
        sa.PrimaryKeyConstraint("user_id", "session_id", "path_sha256", name="relay_attachments_pkey"),
    )
    op.create_index("relay_attachments_by_blob_idx", "relay_attachments", ["user_id", "sha256"])


def downgrade() -> None:
    op.drop_table("relay_attachments")
    op.drop_table("relay_blobs")
