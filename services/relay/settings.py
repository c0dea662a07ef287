"""The relay's settings, read from the environment once, in main."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, SecretStr, model_validator
from pydantic_settings import NoDecode

from shared.settings import PostgresAddress, SharedSettings, split_csv

_REQUIRED_SECRETS = ("relay_admin_token", "relay_key_pepper", "relay_encryption_keys", "session_service_tokens")


class RelaySettings(SharedSettings):
    """Times are seconds unless the name says otherwise; sizes are bytes."""

    relay_host: str = "127.0.0.1"
    listen_database_url: PostgresAddress = Field(
        SecretStr(""), description="For LISTEN where DATABASE_URL leads through a pooler; empty: DATABASE_URL"
    )
    relay_port: int = Field(8000, ge=0, le=65535)

    session_service_url: str = Field("http://127.0.0.1:8205", description="Where it is when there is no Consul")
    session_service_tokens: Annotated[tuple[SecretStr, ...], NoDecode, BeforeValidator(split_csv)] = ()
    relay_store_timeout_seconds: float = Field(30, gt=0, description="Longest call of session_service")
    relay_complete_timeout_seconds: float = Field(5, gt=0, description="After that a completion goes to the spool")

    relay_upstream_url: str = Field("", description="Speaks the Claude Messages protocol; ends before /v1")
    relay_upstream_api_key: SecretStr = SecretStr("")
    relay_max_attempts: int = Field(3, ge=1, le=20, description="Calls of upstream for one request")
    relay_retry_wait_seconds: float = Field(10, ge=0, description="Longest wait for an account to become available")
    relay_deadline_seconds: float = Field(600, gt=0, description="All attempts together, up to the answer's beginning")
    relay_connect_timeout_seconds: float = Field(10, gt=0)
    relay_stream_silence_seconds: float = Field(120, gt=0, description="Longest silence of a stream")
    relay_plain_timeout_seconds: float = Field(600, gt=0, description="Longest wait for a plain answer")
    relay_demo_delay_ms: float = Field(15, ge=0, description="Pause of the demo account before each piece")
    relay_default_max_tokens: int = Field(4096, ge=1)

    relay_chat_model: str = Field("", description="Model of /api/chat; empty: the first that the accounts serve")
    relay_anonymous_chat: bool | None = Field(
        None, description="Chat and conversations without a key, as the user 'anonymous'; empty: in dev and test only"
    )
    relay_cors_origins: Annotated[tuple[str, ...], NoDecode, BeforeValidator(split_csv)] = Field(
        (), description="Origins of web pages that may call, * for all; empty: those on this machine in dev and test"
    )

    relay_public_url: str = Field("", description="Where clients reach this relay; empty: where their request came to")
    relay_max_running_conversations: int = Field(5, ge=1, description="Conversations of a user that run at once")
    relay_start_wait_seconds: float = Field(120, gt=0, description="How long a conversation's start waits for a place")
    relay_stuck_seconds: float = Field(300, gt=0, description="A run without a byte from upstream for so long is stuck")

    relay_admin_token: SecretStr = SecretStr("")
    relay_key_pepper: SecretStr = SecretStr("")
    relay_encryption_keys: Annotated[tuple[SecretStr, ...], NoDecode, BeforeValidator(split_csv)] = Field(
        (), description="For accounts' secrets: id:base64 of 32 bytes, the current one first"
    )

    relay_on_disconnect: Literal["cancel", "drain"] = "cancel"
    relay_ping_seconds: float = Field(15, gt=0, description="Silence of a stream after which a ping is sent")
    relay_stalled_client_seconds: float = Field(60, gt=0, description="A client that reads nothing for so long is gone")
    relay_max_body_bytes: int = Field(32 * 2**20, ge=1024)
    relay_max_in_flight: int = Field(1000, ge=1, description="Requests served at once")
    relay_max_queued: int = Field(1000, ge=0, description="Requests that may wait beside them")
    relay_queue_seconds: float = Field(30, gt=0, description="Longest wait for the rate, and for a place")
    relay_requests_per_second: float = Field(200, ge=0, description="More wait for their turn; 0: no limit")
    relay_max_pool_size: int = Field(20, ge=1, description="Sessions in the session pool")
    relay_max_sessions: int = Field(10_000, ge=1, description="Active sessions of the whole store")

    relay_summaries: bool = Field(True, description="Summarise by itself what a session's context has to leave out")
    relay_summary_model: str = Field(
        "", max_length=255, description="Writes the summaries; empty: the turn's own model"
    )

    relay_session_idle_seconds: int = Field(1800, ge=1, le=31_536_000)
    relay_expired_sessions: Literal["restart", "resume"] = "restart"
    relay_session_wait_seconds: float = Field(60, ge=0, le=60, description="How long a request waits for its session")
    relay_lease_seconds: int = Field(60, ge=5, le=3600, description="How long a turn of a dead relay holds its session")

    @property
    def serves_anonymous_chat(self) -> bool:
        return self.is_development if self.relay_anonymous_chat is None else self.relay_anonymous_chat

    @model_validator(mode="after")
    def _secrets_outside_development(self) -> "RelaySettings":
        missing = [name.upper() for name in _REQUIRED_SECRETS if not _is_set(getattr(self, name))]
        if missing and not self.is_development:
            raise ValueError(f"{', '.join(missing)}: required outside dev and test")
        return self

    @model_validator(mode="after")
    def _upstream_is_whole(self) -> "RelaySettings":
        if bool(self.relay_upstream_url) != _is_set(self.relay_upstream_api_key):
            raise ValueError("RELAY_UPSTREAM_URL and RELAY_UPSTREAM_API_KEY: set both, or none")
        return self


def _is_set(secret: SecretStr | tuple[SecretStr, ...]) -> bool:
    return bool(secret.get_secret_value() if isinstance(secret, SecretStr) else secret)
