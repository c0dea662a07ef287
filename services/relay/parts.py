"""What a turn works with, what it is asked, and what it gives back.

Its one invariant: nothing here acts; a turn does.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from services.relay.admission import Admission
from services.relay.affinity import Affinity
from services.relay.attempts import Asking
from services.relay.event_log import EventLog
from services.relay.idempotency import Idempotency
from services.relay.key_limits import KeyLimits
from services.relay.keys import Key
from services.relay.lines import Lines
from services.relay.metrics import Metrics
from services.relay.pipe import Pipe
from services.relay.session_limit import SessionLimit
from services.relay.session_pool import SessionPool
from services.relay.settings import RelaySettings
from services.relay.sides import Sides
from services.relay.spool import Spool
from services.relay.summaries import Summaries
from shared.errors import ServiceError
from shared.session_client import SessionClient


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks, and what the request brings besides its body; names in `headers` are looked up in lower case."""

    key: Key
    headers: Mapping[str, str]
    query: str
    request_id: str


@dataclass(frozen=True, slots=True)
class Reply:
    """What the client gets: bytes, a stream of them, or an error to be told in its protocol's words."""

    status: int
    headers: dict[str, str]
    content: bytes | Pipe = b""
    error: ServiceError | None = None


@dataclass(frozen=True, slots=True)
class Parts:
    """What every turn works with."""

    settings: RelaySettings
    sessions: SessionClient
    asking: Asking
    affinity: Affinity
    spool: Spool
    metrics: Metrics
    admission: Admission
    session_limit: SessionLimit
    idempotency: Idempotency
    key_limits: KeyLimits
    session_pool: SessionPool
    summaries: Summaries
    sides: Sides
    event_log: EventLog
    lines: Lines = field(default_factory=Lines)
