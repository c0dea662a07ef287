"""Settings that both services share; each service adds its own. Read once, in main, then handed down."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, SecretStr, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

DEVELOPMENT = frozenset({"dev", "test"})


def postgres_address(text: str) -> str:
    """The address as asyncpg reads it, without the driver that SQLAlchemy's form may name; raises ValueError."""
    scheme, separator, rest = text.partition("://")
    if not separator or scheme.partition("+")[0] not in {"postgresql", "postgres"}:
        raise ValueError("no address of the form postgresql://user:password@host:5432/database")
    return f"postgresql://{rest}"


def _address(value: SecretStr) -> SecretStr:
    return SecretStr(postgres_address(value.get_secret_value())) if value.get_secret_value() else value


PostgresAddress = Annotated[SecretStr, AfterValidator(_address)]


class SharedSettings(BaseSettings):
    """Settings from the environment; names are case-insensitive, an empty value counts as not set."""

    model_config = SettingsConfigDict(frozen=True, env_ignore_empty=True, extra="ignore", hide_input_in_errors=True)

    environment: str = "dev"
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    debug: bool = Field(default=False, description="Log everything, whatever LOG_LEVEL says")
    revision: str = Field("unknown", description="Revision shown in metrics and health")
    data_dir: Path | None = Field(None, description="Folder for local state; .data/ENVIRONMENT by default")

    database_url: PostgresAddress = Field(SecretStr(""), description="Empty: the embedded Postgres (dev and test only)")
    db_schema: str = Field("dev", pattern=r"^[a-z_][a-z0-9_]{0,62}$")
    database_pooler: Literal["none", "transaction"] = "none"
    database_pool_size: int = Field(16, ge=1, le=500)
    database_timeout_seconds: float = Field(10, gt=0, description="Longest run of one statement")
    database_connect_timeout_seconds: float = Field(3, gt=0)

    consul_host: str = ""
    consul_port: int = Field(8500, ge=1, le=65535)
    consul_token: SecretStr = SecretStr("")
    advertise_host: str = Field("", description="Address registered in Consul; empty: the listening host")

    body_timeout_seconds: float = Field(30, gt=0)
    header_timeout_seconds: float = Field(10, gt=0)
    graceful_stop_seconds: float = Field(30, ge=0)
    drain_seconds: float = Field(3, ge=0, description="A stopping service answers so long as before, for who watches")

    @property
    def is_development(self) -> bool:
        return self.environment in DEVELOPMENT

    @property
    def local_state(self) -> Path:
        return self.data_dir or Path(".data") / self.environment

    @model_validator(mode="after")
    def _embedded_database_is_for_development(self) -> "SharedSettings":
        if not self.database_url.get_secret_value() and not self.is_development:
            raise ValueError("DATABASE_URL is required outside dev and test")
        return self


def split_csv(value: object) -> object:
    """`a, b` from the environment as `("a", "b")`; anything else as it is."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value
