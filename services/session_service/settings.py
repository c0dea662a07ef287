"""session_service's settings, read from the environment once, in main."""

from typing import Annotated

from pydantic import BeforeValidator, Field, SecretStr, model_validator
from pydantic_settings import NoDecode, SettingsConfigDict

from shared.settings import SharedSettings, split_csv
from shared.values import Limits


class SessionServiceSettings(SharedSettings):
    model_config = SettingsConfigDict(env_nested_delimiter="__")

    service_host: str = "127.0.0.1"
    service_port: int = Field(8205, ge=0, le=65535)
    session_service_tokens: Annotated[tuple[SecretStr, ...], NoDecode, BeforeValidator(split_csv)] = ()
    limits: Limits = Limits()
    context_max_tokens: int = Field(100_000, ge=1)
    sweep_interval_seconds: float = Field(300, gt=0)
    news_interval_seconds: float = Field(0.5, ge=0, description="Search index and sums; 0: not by this instance")
    known_sessions: int = Field(500, ge=0, description="Their next turn need not read them; 0: none")
    # The sums of many sessions are a moment old when they are read; together it must not be more than 5 s.
    stats_cache_seconds: float = Field(4, ge=0, le=5)

    @model_validator(mode="after")
    def _tokens_outside_development(self) -> "SessionServiceSettings":
        if not self.session_service_tokens and not self.is_development:
            raise ValueError("SESSION_SERVICE_TOKENS is required outside dev and test")
        return self
