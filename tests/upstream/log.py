"""What the test upstream has received, and how each answer went.

Its one invariant: an entry's `outcome` is `running` until the answer is over, and then never changes.
"""

import base64
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from tests.upstream.wire import Exchange


@dataclass(slots=True)
class Entry:
    """One received request. Times are seconds since the epoch."""

    number: int
    connection: int
    method: str
    path: str
    query: str
    headers: list[tuple[str, str]]
    body: bytes
    json: Any
    received_at: float = field(default_factory=time.time)
    step: str = ""
    status: int | None = None
    events_sent: int = 0
    bytes_sent: int = 0
    outcome: str = "running"  # finished, cut, disconnected
    ended_at: float | None = None

    def end(self, outcome: str, bytes_sent: int, at: float | None = None) -> None:
        if self.outcome == "running":
            self.outcome, self.bytes_sent, self.ended_at = outcome, bytes_sent, at or time.time()

    def wire(self) -> dict[str, Any]:
        return {
            "number": self.number,
            "connection": self.connection,
            "method": self.method,
            "path": self.path,
            "query": self.query,
            "headers": self.headers,
            "body_base64": base64.b64encode(self.body).decode(),
            "json": self.json,
            "received_at": self.received_at,
            "step": self.step,
            "status": self.status,
            "events_sent": self.events_sent,
            "bytes_sent": self.bytes_sent,
            "outcome": self.outcome,
            "ended_at": self.ended_at,
        }


class Log:
    """The last `limit` requests, oldest first."""

    def __init__(self, limit: int) -> None:
        self.entries: deque[Entry] = deque(maxlen=limit)
        self.count = 0

    def add(self, exchange: Exchange, parsed: Any) -> Entry:
        self.count += 1
        entry = Entry(
            number=self.count,
            connection=exchange.connection.number,
            method=exchange.method,
            path=exchange.path,
            query=exchange.query,
            headers=exchange.raw_headers,
            body=bytes(exchange.body),
            json=parsed,
        )
        self.entries.append(entry)
        return entry
