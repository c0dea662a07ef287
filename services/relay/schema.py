"""The relay's tables: MetaData and Tables, nothing else.

Its one invariant: every constraint has a name. Tables carry no schema here; it is put in when statements are
compiled (settings: DB_SCHEMA).
"""

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Date,
    Float,
    ForeignKeyConstraint,
    Identity,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Numeric,
    PrimaryKeyConstraint,
    Table,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB, TIMESTAMP

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
    Column("description", Text, nullable=False, server_default=""),
    Column("collect_session", Boolean, nullable=False, server_default=text("false")),
    # Limits; null: none.
    Column("token_limit", BigInteger),
    Column("concurrency_limit", Integer),
    Column("rate_limit_window", Integer),
    Column("rate_limit_requests", Integer),
    Column("daily_cost_limit", Numeric(18, 6)),
    Column("total_cost_limit", Numeric(18, 6)),
    # "all" or a list of messages, chat, conversations; allowed_models empty: all models.
    Column("permissions", JSONB, nullable=False, server_default=text("'\"all\"'")),
    Column("allowed_models", JSONB, nullable=False, server_default=text("'[]'")),
    Column("tags", JSONB, nullable=False, server_default=text("'[]'")),
    Column("updated_at", TIMESTAMP(timezone=True)),
    Column("deleted_at", TIMESTAMP(timezone=True)),
    PrimaryKeyConstraint("id", name="relay_api_keys_pkey"),
    UniqueConstraint("key_hash", name="relay_api_keys_key_hash_key"),
    CheckConstraint("octet_length(key_hash) = 32", name="relay_api_keys_key_hash_check"),
    CheckConstraint("length(user_id) BETWEEN 1 AND 255", name="relay_api_keys_user_id_check"),
    CheckConstraint("length(name) BETWEEN 1 AND 100", name="relay_api_keys_name_check"),
    CheckConstraint(
        "least(token_limit, concurrency_limit, rate_limit_window, rate_limit_requests, daily_cost_limit,"
        " total_cost_limit) >= 0",
        name="relay_api_keys_limits_check",
    ),
)

# What a key has used, and what its running requests may still use. It changes with every request; the key itself
# does not, and so whoever listens for changes of keys hears nothing of it.
relay_key_use = Table(
    "relay_key_use",
    metadata,
    Column("key_id", Text(collation="C"), nullable=False),
    Column("requests", BigInteger, nullable=False, server_default=text("0")),
    Column("tokens", BigInteger, nullable=False, server_default=text("0")),
    Column("cost", Numeric(18, 6), nullable=False, server_default=text("0")),
    # The UTC day that the next three are of.
    Column("day", Date),
    Column("day_requests", BigInteger, nullable=False, server_default=text("0")),
    Column("day_tokens", BigInteger, nullable=False, server_default=text("0")),
    Column("day_cost", Numeric(18, 6), nullable=False, server_default=text("0")),
    Column("window_started_at", TIMESTAMP(timezone=True)),
    Column("window_requests", BigInteger, nullable=False, server_default=text("0")),
    Column("window_tokens", BigInteger, nullable=False, server_default=text("0")),
    Column("in_flight", Integer, nullable=False, server_default=text("0")),
    Column("reserved_tokens", BigInteger, nullable=False, server_default=text("0")),
    Column("reserved_cost", Numeric(18, 6), nullable=False, server_default=text("0")),
    Column("last_used_at", TIMESTAMP(timezone=True)),
    PrimaryKeyConstraint("key_id", name="relay_key_use_pkey"),
    ForeignKeyConstraint(["key_id"], ["relay_api_keys.id"], name="relay_key_use_key_fkey", ondelete="CASCADE"),
    CheckConstraint("least(in_flight, reserved_tokens, reserved_cost) >= 0", name="relay_key_use_reserved_check"),
)

# What each running request of a limited key may use; runs out when its relay is gone.
relay_key_reservations = Table(
    "relay_key_reservations",
    metadata,
    Column("id", Text(collation="C"), nullable=False),
    Column("key_id", Text(collation="C"), nullable=False),
    Column("tokens", BigInteger, nullable=False),
    Column("cost", Numeric(18, 6), nullable=False),
    Column("expires_at", TIMESTAMP(timezone=True), nullable=False),
    PrimaryKeyConstraint("id", name="relay_key_reservations_pkey"),
    ForeignKeyConstraint(["key_id"], ["relay_api_keys.id"], name="relay_key_reservations_key_fkey", ondelete="CASCADE"),
    Index("relay_key_reservations_by_key_idx", "key_id"),
    Index("relay_key_reservations_by_expires_at_idx", "expires_at"),
)

relay_accounts = Table(
    "relay_accounts",
    metadata,
    Column("id", Text(collation="C"), nullable=False),
    Column("name", Text, nullable=False),
    Column("provider", Text, nullable=False),
    Column("base_url", Text, nullable=False, server_default=""),
    # The API key and the proxy's URL, sealed (sealing.py); secrets_key_id names the key that opens them.
    Column("secrets", LargeBinary),
    Column("secrets_key_id", Text),
    # The proxy's URL without its password.
    Column("proxy_shown", Text),
    # A list of names, or an object from the client's name to the upstream's; empty: all models.
    Column("models", JSONB, nullable=False, server_default=text("'[]'")),
    Column("priority", Integer, nullable=False, server_default=text("0")),
    Column("weight", Float, nullable=False, server_default=text("1")),
    Column("max_concurrency", Integer),
    Column("enabled", Boolean, nullable=False, server_default=text("true")),
    Column("disabled_reason", Text),
    Column("cooldown_until", TIMESTAMP(timezone=True)),
    Column("cooldown_reason", Text),
    # Failures since the last success; after a cooldown one request probes while there are any.
    Column("failures_in_row", Integer, nullable=False, server_default=text("0")),
    Column("probe_until", TIMESTAMP(timezone=True)),
    Column("last_error", Text),
    Column("created_at", TIMESTAMP(timezone=True), nullable=False),
    Column("updated_at", TIMESTAMP(timezone=True), nullable=False),
    PrimaryKeyConstraint("id", name="relay_accounts_pkey"),
    CheckConstraint("length(id) BETWEEN 1 AND 100", name="relay_accounts_id_check"),
    CheckConstraint("length(name) BETWEEN 1 AND 100", name="relay_accounts_name_check"),
    CheckConstraint("provider IN ('anthropic', 'demo')", name="relay_accounts_provider_check"),
    CheckConstraint("(secrets IS NULL) = (secrets_key_id IS NULL)", name="relay_accounts_secrets_check"),
    CheckConstraint("weight > 0", name="relay_accounts_weight_check"),
    CheckConstraint("max_concurrency > 0", name="relay_accounts_max_concurrency_check"),
    CheckConstraint("failures_in_row >= 0", name="relay_accounts_failures_in_row_check"),
)

# What each relay has to tell of the accounts that it uses; those that are gone are added up under the relay ''.
relay_account_use = Table(
    "relay_account_use",
    metadata,
    Column("account_id", Text(collation="C"), nullable=False),
    Column("relay_id", Text(collation="C"), nullable=False),
    Column("in_flight", Integer, nullable=False),
    Column("requests", BigInteger, nullable=False),
    Column("failures", BigInteger, nullable=False),
    Column("last_used_at", TIMESTAMP(timezone=True)),
    Column("updated_at", TIMESTAMP(timezone=True), nullable=False),
    PrimaryKeyConstraint("account_id", "relay_id", name="relay_account_use_pkey"),
    ForeignKeyConstraint(
        ["account_id"], ["relay_accounts.id"], name="relay_account_use_account_fkey", ondelete="CASCADE"
    ),
)

# Places to be taken by one relay at a time: slot 1 … n of an account, say. Free once expires_at has passed.
relay_slots = Table(
    "relay_slots",
    metadata,
    Column("kind", Text(collation="C"), nullable=False),
    Column("owner_id", Text(collation="C"), nullable=False),
    Column("slot", Integer, nullable=False),
    Column("relay_id", Text(collation="C")),
    Column("expires_at", TIMESTAMP(timezone=True), nullable=False),
    PrimaryKeyConstraint("kind", "owner_id", "slot", name="relay_slots_pkey"),
    Index("relay_slots_by_relay_idx", "relay_id"),
)

# Which account a session was served by last.
relay_affinities = Table(
    "relay_affinities",
    metadata,
    Column("user_id", Text(collation="C"), nullable=False),
    Column("session_id", Text(collation="C"), nullable=False),
    Column("account_id", Text(collation="C"), nullable=False),
    Column("used_at", TIMESTAMP(timezone=True), nullable=False),
    PrimaryKeyConstraint("user_id", "session_id", name="relay_affinities_pkey"),
    ForeignKeyConstraint(
        ["account_id"], ["relay_accounts.id"], name="relay_affinities_account_fkey", ondelete="CASCADE"
    ),
    Index("relay_affinities_by_account_idx", "account_id"),
    Index("relay_affinities_by_used_at_idx", "used_at"),
)

# The sessions of the session pool. Those that share an id belong to different users.
relay_session_pool = Table(
    "relay_session_pool",
    metadata,
    Column("user_id", Text(collation="C"), nullable=False),
    Column("session_id", Text(collation="C"), nullable=False),
    # The order of collection.
    Column("position", BigInteger, Identity(always=True), nullable=False),
    # Those of the session's last turn.
    Column("account_id", Text(collation="C")),
    Column("model", Text),
    Column("cache_read_share", Float),
    Column("collected_at", TIMESTAMP(timezone=True), nullable=False),
    Column("last_used_at", TIMESTAMP(timezone=True), nullable=False),
    PrimaryKeyConstraint("user_id", "session_id", name="relay_session_pool_pkey"),
    UniqueConstraint("position", name="relay_session_pool_position_key"),
    ForeignKeyConstraint(
        ["account_id"], ["relay_accounts.id"], name="relay_session_pool_account_fkey", ondelete="SET NULL"
    ),
    CheckConstraint("cache_read_share BETWEEN 0 AND 1", name="relay_session_pool_cache_read_share_check"),
)

# One row: which of them is the current one. Whoever collects or switches holds it.
relay_session_pool_current = Table(
    "relay_session_pool_current",
    metadata,
    Column("id", Integer, autoincrement=False, nullable=False),
    Column("user_id", Text(collation="C")),
    Column("session_id", Text(collation="C")),
    Column("switched_at", TIMESTAMP(timezone=True)),
    PrimaryKeyConstraint("id", name="relay_session_pool_current_pkey"),
    CheckConstraint("id = 1", name="relay_session_pool_current_id_check"),
    ForeignKeyConstraint(
        ["user_id", "session_id"],
        ["relay_session_pool.user_id", "relay_session_pool.session_id"],
        name="relay_session_pool_current_session_fkey",
        ondelete="SET NULL",
    ),
)

# Requests with an Idempotency-Key: running while a relay's lease lasts, then what became of them.
relay_idempotency = Table(
    "relay_idempotency",
    metadata,
    Column("user_id", Text(collation="C"), nullable=False),
    Column("key", Text(collation="C"), nullable=False),
    Column("request_hash", LargeBinary, nullable=False),
    Column("status", Text, nullable=False),
    # Whose try it is; a try that was taken over can no longer end it.
    Column("token", Text(collation="C"), nullable=False),
    Column("lease_expires_at", TIMESTAMP(timezone=True), nullable=False),
    Column("session_id", Text(collation="C")),
    Column("turn_id", Text(collation="C")),
    Column("headers", JSONB),
    Column("answer", LargeBinary),
    Column("created_at", TIMESTAMP(timezone=True), nullable=False),
    PrimaryKeyConstraint("user_id", "key", name="relay_idempotency_pkey"),
    CheckConstraint("status IN ('running', 'completed', 'failed')", name="relay_idempotency_status_check"),
    CheckConstraint("(status = 'completed') = (answer IS NOT NULL)", name="relay_idempotency_answer_check"),
    Index("relay_idempotency_by_created_at_idx", "created_at"),
)

# What is done once for ever, like making the demo account at first start.
relay_marks = Table(
    "relay_marks",
    metadata,
    Column("name", Text(collation="C"), nullable=False),
    Column("made_at", TIMESTAMP(timezone=True), nullable=False),
    PrimaryKeyConstraint("name", name="relay_marks_pkey"),
)
