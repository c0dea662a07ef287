"""What the routes of one app share."""

from dataclasses import dataclass

from services.relay.accounts import Account
from services.relay.development import Secrets
from services.relay.keys import Keys
from services.relay.metrics import Metrics
from services.relay.settings import RelaySettings
from services.relay.spool import Spool
from services.relay.turns import Turns
from shared.database import Database
from shared.discovery import Instances
from shared.errors import NotInitialized
from shared.service import Lifecycle
from shared.session_client import SessionClient


@dataclass(slots=True)
class State:
    """`is_ready` once the database was reached and the relay's tables found."""

    settings: RelaySettings
    secrets: Secrets
    lifecycle: Lifecycle
    database: Database
    metrics: Metrics
    instances: Instances
    sessions: SessionClient
    keys: Keys
    accounts: list[Account]
    spool: Spool
    turns: Turns
    is_ready: bool = False

    def require_ready(self) -> None:
        if not self.is_ready:
            raise NotInitialized("The relay is starting", retry_after_seconds=1)
