"""Work for whatever speaks the Claude Messages protocol: the test upstream itself, a pass-through, the relay.

Where the plan names a `store`, session_service there is asked afterwards whether every turn was stored.
"""

import itertools
import uuid
from collections.abc import Iterator
from time import monotonic
from typing import Any

import psutil

from benchmarks.load import WrongAnswer
from benchmarks.load.http import Answer, Connections, request
from benchmarks.load.store import equal, need

_SENT_AT = b'"sent_at":'


_TURNS_A_SESSION = 10
_DELTA_CHARACTERS = 12
_OTHER_EVENTS = 6


class _Chat:
    """Each worker talks in sessions of its own, one after the other, and nobody else sends what it says."""

    def __init__(self, plan: dict[str, Any]) -> None:
        self.plan = plan
        self.extra: dict[str, Any] = {}
        self._run = uuid.uuid4().hex[:12]
        self._numbers = itertools.count()
        self._turns: dict[str, int] = {}
        self._session_of: dict[int, str] = {}
        self._store = plan.get("store")

    def _session(self, worker: int) -> str:
        """A new one after some turns, so that contexts stay as long as they are in the middle of a conversation."""
        session_id = self._session_of.get(worker)
        if session_id is None or self._turns[session_id] == _TURNS_A_SESSION:
            session_id = self._session_of[worker] = f"{self._run}-{len(self._turns)}"
            self._turns[session_id] = 0
        self._turns[session_id] += 1
        return session_id

    def request(self, worker: int, *, stream: bool) -> tuple[bytes, str]:
        """A request, and the text that its answer must hold."""
        text = f"message {next(self._numbers)} of {self._run}"
        if events := self.plan.get("events"):
            # Upstream says it again, in pieces of 12 characters, with 30 of its own around it.
            text = text.ljust((events - _OTHER_EVENTS) * _DELTA_CHARACTERS - 30 - 4, ".")
        body: dict[str, Any] = {
            "model": self.plan.get("model", "test-model"),
            "max_tokens": 1000,
            "messages": [{"role": "user", "content": text}],
        }
        if stream:
            body["stream"] = True
        if self._store:
            body["metadata"] = {"session_id": self._session(worker)}
        headers = {"x-api-key": self.plan["api_key"], "anthropic-version": "2023-06-01"}
        return request("POST", "/v1/messages", body, headers), text

    async def prepare(self, connections: Connections) -> None:
        """Nothing."""

    def check(self, answer: Answer, said: bytes, text: str) -> None:
        if answer.status != 200 or text.encode() not in said:
            raise WrongAnswer(f"no {text!r} in status {answer.status} {answer.body[:500]!r}")

    async def verify(self, connections: Connections) -> None:
        if not self._store:
            return
        stored = Connections(self._store)
        step = max(1, len(self._turns) // 200)
        for session_id, turns in itertools.islice(self._turns.items(), 0, None, step):
            path = f"/api/v1/sessions/{session_id}?user_id={self.plan['user_id']}"
            session = need(await stored.ask(request("GET", path)))
            equal("message_count", session["message_count"], 2 * turns)
        stored.close()


class Plain(_Chat):
    """Whole answers."""

    async def step(self, connections: Connections, worker: int) -> None:
        raw, text = self.request(worker, stream=False)
        answer = await connections.ask(raw)
        self.check(answer, answer.body, text)
        if self._store:
            equal("x-session-persisted", answer.headers.get(b"x-session-persisted"), b"yes")


class Stream(_Chat):
    """Streams; where their events tell when upstream sent them, with the time that each took from there.

    The clock is the machine's monotonic one, which all processes share.
    """

    def __init__(self, plan: dict[str, Any]) -> None:
        super().__init__(plan)
        self._first_text_ms: list[float] = []
        self._event_delay_ms: list[float] = []
        self._events = 0
        self._begun = 0
        self._all_begun_at = 0.0
        self.extra = {"first_text_ms": self._first_text_ms, "event_delay_ms": self._event_delay_ms}

    async def step(self, connections: Connections, worker: int) -> None:
        raw, text = self.request(worker, stream=True)
        asked_at = monotonic()
        answer = await connections.ask(raw, self._on_first)
        said = b"".join(self._texts(answer, asked_at))
        self.check(answer, said, text)

    def _on_first(self) -> None:
        """Once all of the streams have begun: the memory of the watched process; later events are those that count."""
        self._begun += 1
        if self._begun == self.plan.get("count"):
            self._all_begun_at = monotonic()
            if "watched_pid" in self.plan:
                self.extra["memory_bytes"] = psutil.Process(self.plan["watched_pid"]).memory_full_info().uss

    def _texts(self, answer: Answer, asked_at: float) -> Iterator[bytes]:
        """The texts of a stream's deltas; its last event must be the right one.

        Only deltas are timed: what comes before the first one a relay may hold until it knows that there is an
        answer, and what comes after the last one until it has stored it.
        """
        last, rest = b"", b""
        is_first = True
        for came_at, piece in answer.pieces:
            *events, rest = (rest + piece).split(b"\n\n")
            for last in events:
                self._events += 1
                if not last.startswith(b"event: content_block_delta"):
                    continue
                if is_first:
                    self._first_text_ms.append((came_at - asked_at) * 1000)
                    is_first = False
                if _SENT_AT in last and came_at >= self._all_begun_at:
                    sent_at = float(last.partition(_SENT_AT)[2].partition(b",")[0])
                    self._event_delay_ms.append((came_at - sent_at) * 1000)
                yield last.partition(b'"text":"')[2].partition(b'"')[0]
        if not last.startswith(b"event: message_stop"):
            raise WrongAnswer(f"the stream ends with {last!r}")

    async def verify(self, connections: Connections) -> None:
        await super().verify(connections)
        self.extra["events"] = self._events
