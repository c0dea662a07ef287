"""What the routes of one app share."""

from dataclasses import dataclass

from services.relay.account_use import AccountUse
from services.relay.admission import Admission
from services.relay.affinity import Affinity
from services.relay.attachments import Uploads
from services.relay.attempts import Asking
from services.relay.callers import Callers
from services.relay.conversing import Conversing
from services.relay.development import Secrets
from services.relay.idempotency import Idempotency
from services.relay.key_limits import KeyLimits
from services.relay.metrics import Metrics
from services.relay.models import Models
from services.relay.pool import Pool
from services.relay.sealing import Sealer
from services.relay.session_limit import SessionLimit
from services.relay.session_pool import SessionPool
from services.relay.settings import RelaySettings
from services.relay.slots import Slots
from services.relay.spool import Spool
from services.relay.summaries import Summaries
from services.relay.turns import Turns
from services.relay.ways import Ways
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
    callers: Callers
    key_limits: KeyLimits
    asking: Asking
    sealer: Sealer
    ways: Ways
    account_use: AccountUse
    models: Models
    spool: Spool
    admission: Admission
    session_limit: SessionLimit
    session_pool: SessionPool
    summaries: Summaries
    slots: Slots
    affinity: Affinity
    idempotency: Idempotency
    uploads: Uploads
    turns: Turns
    conversing: Conversing
    is_ready: bool = False

    @property
    def pool(self) -> Pool:
        return self.asking.pool

    def require_ready(self) -> None:
        if not self.is_ready:
            raise NotInitialized("The relay is starting", retry_after_seconds=1)
