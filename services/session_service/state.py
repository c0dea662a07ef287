"""What the routes of one app share."""

import asyncio
from dataclasses import dataclass, field

from services.session_service.gathering import Gathering
from services.session_service.idempotency import Running
from services.session_service.known import KnownSessions
from services.session_service.metrics import Metrics
from services.session_service.settings import SessionServiceSettings
from services.session_service.stats import Cached
from services.session_service.waiting import Lines
from shared.database import Database
from shared.errors import NotInitialized
from shared.service import Lifecycle


@dataclass(slots=True)
class State:
    """`ready` is set once the database was reached and its schema found."""

    settings: SessionServiceSettings
    lifecycle: Lifecycle
    database: Database
    metrics: Metrics
    stats: Cached
    gathering: Gathering
    known: KnownSessions
    lines: Lines = field(default_factory=Lines)
    running: Running = field(default_factory=Running)
    ready: asyncio.Event = field(default_factory=asyncio.Event)

    def require_ready(self) -> Database:
        if not self.ready.is_set():
            raise NotInitialized(retry_after_seconds=1)
        return self.database
