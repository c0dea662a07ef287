"""The tables of attachments: MetaData is schema.py's.

Its one invariant: a content that is here is some attachment's, and a user's equal contents are one row.
"""

from sqlalchemy import (
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
)
from sqlalchemy.dialects.postgresql import TIMESTAMP

from services.relay.schema import metadata

# What files hold, once for each user and content.
relay_blobs = Table(
    "relay_blobs",
    metadata,
    Column("user_id", Text(collation="C"), nullable=False),
    Column("sha256", LargeBinary, nullable=False),
    Column("size_bytes", Integer, nullable=False),
    Column("content", LargeBinary, nullable=False),
    PrimaryKeyConstraint("user_id", "sha256", name="relay_blobs_pkey"),
    CheckConstraint("octet_length(sha256) = 32", name="relay_blobs_sha256_check"),
    CheckConstraint("octet_length(content) = size_bytes", name="relay_blobs_size_bytes_check"),
)

# The files of sessions, by their paths. A path can be longer than what an index takes, its hash cannot.
relay_attachments = Table(
    "relay_attachments",
    metadata,
    Column("user_id", Text(collation="C"), nullable=False),
    Column("session_id", Text(collation="C"), nullable=False),
    Column("path_sha256", LargeBinary, nullable=False),
    Column("path", Text(collation="C"), nullable=False),
    Column("sha256", LargeBinary, nullable=False),
    Column("size_bytes", Integer, nullable=False),
    # Whether all of it is UTF-8 without U+0000, so that a model can read it.
    Column("is_text", Boolean, nullable=False),
    # What the client said that it is; null: nothing, or no media type.
    Column("content_type", Text),
    Column("created_at", TIMESTAMP(timezone=True), nullable=False),
    Column("updated_at", TIMESTAMP(timezone=True), nullable=False),
    PrimaryKeyConstraint("user_id", "session_id", "path_sha256", name="relay_attachments_pkey"),
    ForeignKeyConstraint(
        ["user_id", "sha256"], ["relay_blobs.user_id", "relay_blobs.sha256"], name="relay_attachments_blob_fkey"
    ),
    CheckConstraint("octet_length(path_sha256) = 32", name="relay_attachments_path_sha256_check"),
    CheckConstraint("starts_with(path, '/workspace/')", name="relay_attachments_path_check"),
    CheckConstraint("size_bytes >= 0", name="relay_attachments_size_bytes_check"),
    Index("relay_attachments_by_blob_idx", "user_id", "sha256"),
)
