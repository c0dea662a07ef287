"""The relay's tables: MetaData and Tables, nothing else.

Its one invariant: every constraint has a name. Tables carry no schema here; it is put in when statements are
compiled (settings: DB_SCHEMA).
"""

from sqlalchemy import (
    Boolean,
    CheckConstraint,
    Column,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    Table,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.dialects.postgresql import TIMESTAMP

metadata = MetaData(naming_convention={"ix": "%(table_name)s_%(column_0_N_name)s_idx", "pk": "%(table_name)s_pkey"})

relay_api_keys = Table(
    "relay_api_keys",
    metadata,
    Column("id", Text(collation="C"), nullable=False),
    # Whose sessions the key works on.
    Column("user_id", Text(collation="C"), nullable=False),
    Column("name", Text, nullable=False),
    # HMAC-SHA256 of the key under the pepper; the key itself is nowhere.
    Column("key_hash", LargeBinary, nullable=False),
    # The key's first characters, for people.
    Column("prefix", Text, nullable=False),
    Column("is_active", Boolean, nullable=False, server_default=text("true")),
    Column("created_at", TIMESTAMP(timezone=True), nullable=False),
    Column("expires_at", TIMESTAMP(timezone=True)),
    PrimaryKeyConstraint("id", name="relay_api_keys_pkey"),
    UniqueConstraint("key_hash", name="relay_api_keys_key_hash_key"),
    CheckConstraint("octet_length(key_hash) = 32", name="relay_api_keys_key_hash_check"),
    CheckConstraint("length(user_id) BETWEEN 1 AND 255", name="relay_api_keys_user_id_check"),
    CheckConstraint("length(name) BETWEEN 1 AND 100", name="relay_api_keys_name_check"),
)
