"""Clients that keep a journal: what they sent, what they were told, and whose text they saw.

Its one invariant: an entry is `told` only once a whole, successful answer was in the client's hands.
"""

import asyncio
import contextlib
import json
import random
import re
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import quote

import httpx

from tests.fire.report import Report
from tests.fire.world import MODEL, Json, new_marker

NO_LEAK = "no text of one user reaches another"
ANSWERED = "who tries again is answered in the end"
HONEST = "an outage is told as one (409, 429, 503, 504, 529; a cut connection), never as a fault"
READ_BACK = "what was acknowledged can be read at once"

MARKER = re.compile(r"mk[0-9a-f]{16}km")
AWAY = {409, 429, 503, 504, 529}
LONGEST_SECONDS = 150.0

T = TypeVar("T")


class Refused(Exception):
    """An answer that no outage explains."""


@dataclass
class User:
    """`key` is the user's API key at the relay."""

    id: str
    marker: str = field(default_factory=new_marker)
    key: str = ""


@dataclass
class Entry:
    """One message that was sent, or an answer to one. `seq` and `message_id` are as the client was told."""

    session_id: str
    role: str
    text: str
    is_told: bool = False
    seq: int | None = None
    message_id: str | None = None


@dataclass
class Doors:
    """Where clients knock: several addresses are tried in turn."""

    stores: list[str]
    relays: list[str]
    store_headers: dict[str, str]


class Client:
    """One client: one session of one user. `turn` is what it does over and over."""

    def __init__(
        self, http: httpx.AsyncClient, doors: Doors, user: User, session_id: str, report: Report, seed: str
    ) -> None:
        self.http = http
        self.doors = doors
        self.user = user
        self.session_id = session_id
        self.report = report
        self.random = random.Random(f"{seed} {user.id} {session_id}")
        self.journal: list[Entry] = []
        self.done = 0
        self._tries = self.random.randrange(10)

    async def prepare(self) -> None:
        """Before anything breaks."""

    async def turn(self, number: int) -> None:
        raise NotImplementedError

    async def run(self, over: asyncio.Event) -> None:
        number = 0
        while not over.is_set():
            await self.turn(number)
            number += 1
            if self.random.random() < 0.15:
                await self.read_back()
            await asyncio.sleep(self.random.uniform(0, 0.05))

    # ── calls ───────────────────────────────────────────────────────────────────────────────────

    def look(self, body: str, where: str) -> None:
        """Whose text is this?"""
        foreign = set(MARKER.findall(body)) - {self.user.marker}
        self.report.check(NO_LEAK, not foreign, f"{where}: {self.user.id} saw {sorted(foreign)}")

    async def insist(self, what: str, attempt: Callable[[], Awaitable[T | None]]) -> T | None:
        """Tries until it gives something; None, and a violation, when that takes too long."""
        deadline = time.monotonic() + LONGEST_SECONDS
        wait_seconds = 0.05
        self.report.trial(ANSWERED)
        while time.monotonic() < deadline:
            try:
                got = await attempt()
            except Refused:
                return None  # another try would be told the same
            except (httpx.HTTPError, OSError):
                got = None
            if got is not None:
                return got
            self._tries += 1
            await asyncio.sleep(self.random.uniform(0.5, 1) * wait_seconds)
            wait_seconds = min(wait_seconds * 1.7, 1.0)
        self.report.violation(ANSWERED, f"{self.user.id} {self.session_id}: {what}")
        return None

    def is_fine(self, answer: httpx.Response, what: str) -> bool:
        """Whether it succeeded. Raises Refused, and reports, when it says neither that nor that something is away."""
        self.look(answer.text, what)
        if answer.status_code == 200:
            return True
        held = answer.status_code in AWAY
        if not self.report.check(HONEST, held, f"{what}: {answer.status_code} {answer.text[:300]}"):
            raise Refused(what)
        return False

    async def store(self, method: str, path: str, **request: Any) -> httpx.Response:
        base = self.doors.stores[self._tries % len(self.doors.stores)]
        headers = {**self.doors.store_headers, **request.pop("headers", {})}
        params = {"user_id": self.user.id, **request.pop("params", {})}
        return await self.http.request(method, f"{base}/api/v1{path}", params=params, headers=headers, **request)

    @property
    def path(self) -> str:
        return f"/sessions/{quote(self.session_id, safe='')}"

    async def told(self, what: str, method: str, path: str, **request: Any) -> Json | None:
        """The body of a call of the store, tried until it succeeds."""

        async def attempt() -> Json | None:
            answer = await self.store(method, path, **request)
            return dict(answer.json()) if self.is_fine(answer, f"{method} {path}") else None

        return await self.insist(what, attempt)

    def text(self, number: int, kind: str) -> str:
        return f"{self.user.marker} {kind} {self.session_id} no {number} of {id(self)};"

    # ── reading ─────────────────────────────────────────────────────────────────────────────────

    async def read_back(self) -> None:
        """One look at what is there, while things break; whatever it shows is this user's."""
        paths = {
            f"{self.path}/messages": {"order": "desc", "page_size": 50},
            f"{self.path}/context": {},
            "/sessions": {},
            "/sessions/search": {"q": self.session_id},
        }
        path = self.random.choice(list(paths))
        known = [entry for entry in self.journal if entry.is_told][-1:]
        try:
            answer = await self.store("GET", path, params=paths[path])
        except (httpx.HTTPError, OSError):
            return
        if answer.status_code == 404 and not known:
            return
        with contextlib.suppress(Refused):
            self._compare(path, answer, known)

    def _compare(self, path: str, answer: httpx.Response, known: list[Entry]) -> None:
        if self.is_fine(answer, f"GET {path}") and path.endswith("/messages"):
            texts = {each["content"] for each in answer.json()["messages"]}
            for entry in known:
                # What relay has acknowledged may still be on its way to the store, safe in the spool.
                if entry.seq is not None and entry.seq > answer.json()["total"] - 50:
                    self.report.check(READ_BACK, entry.text in texts, f"{self.session_id}: {entry}")


class Appender(Client):
    """Appends; a try is repeated with the same message_id, or the same Idempotency-Key."""

    async def prepare(self) -> None:
        body = {"user_id": self.user.id, "session_id": self.session_id, "if_exists": "return"}
        await self.told("create", "POST", "/sessions", json=body)

    async def turn(self, number: int) -> None:
        entry = Entry(self.session_id, "user", self.text(number, "note"))
        self.journal.append(entry)
        body: Json = {"role": "user", "content": entry.text, "tokens_used": 3, "cost_usd": 0.000001}
        headers = {}
        if number % 2:
            body["message_id"] = str(uuid.uuid4())
        else:
            headers["idempotency-key"] = str(uuid.uuid4())
        told = await self.told("append", "POST", f"{self.path}/messages", json=body, headers=headers)
        if told is not None:
            self.report.check(READ_BACK, told["content"] == entry.text, f"told {told} of {entry}")
            entry.seq, entry.message_id, entry.is_told = told["seq"], told["message_id"], True
            self.done += 1


class Turner(Client):
    """Opens turns at the store and completes them, as a relay does."""

    async def turn(self, number: int) -> None:
        question = Entry(self.session_id, "user", self.text(number, "ask"))
        answer = Entry(self.session_id, "assistant", self.text(number, "say"))
        self.journal += [question, answer]
        body: Json = {
            "messages": [{"role": "user", "content": question.text}],
            "create_session": {"if_exists": "return"},
            "lease_seconds": 5,
        }
        headers = {"idempotency-key": str(uuid.uuid4())}
        opened = await self.told("open", "POST", f"{self.path}/turns", json=body, headers=headers)
        if opened is None:
            return
        self._note(question, opened["messages"][0])
        closing = {
            "lease_token": opened["lease_token"],
            "status": "completed",
            "messages": [{"role": "assistant", "content": answer.text}],
            "usage": {"input_tokens": 5, "output_tokens": 2},
            "cost_usd": 0.000002,
        }
        closed = await self.told("complete", "POST", f"{self.path}/turns/{opened['turn_id']}/complete", json=closing)
        if closed is not None:
            self._note(answer, closed["messages"][0])
            self.done += 1

    def _note(self, entry: Entry, told: Json) -> None:
        self.report.check(READ_BACK, told["content"] == entry.text, f"told {told} of {entry}")
        entry.seq, entry.message_id, entry.is_told = told["seq"], told["message_id"], True


class Talker(Client):
    """Talks to the relay, plain or streamed, sending only what is new or everything again."""

    streams = False
    sends_everything = False
    history: list[Json]

    async def prepare(self) -> None:
        self.history = []

    async def turn(self, number: int) -> None:
        question = Entry(self.session_id, "user", self.text(number, "ask"))
        answer = Entry(self.session_id, "assistant", "")
        self.journal += [question, answer]
        new = {"role": "user", "content": question.text}
        messages = [*self.history, new] if self.sends_everything else [new]
        body = {"model": MODEL, "max_tokens": 100, "messages": messages, "stream": self.streams}
        headers = {"idempotency-key": str(uuid.uuid4())}
        said = await self.insist("message", lambda: self.ask(body, headers))
        if said is None:
            return
        self.report.check(READ_BACK, question.text in said, f"{question.text!r} was answered {said!r}")
        answer.text, answer.is_told, question.is_told = said, True, True
        self.history += [new, {"role": "assistant", "content": said}]
        self.done += 1

    async def ask(self, body: Json, headers: dict[str, str]) -> str | None:
        """The answer's text; None when there was no whole one."""
        base = self.doors.relays[self._tries % len(self.doors.relays)]
        sent = {"x-api-key": self.user.key, "x-session-id": self.session_id, **headers}
        async with self.http.stream("POST", f"{base}/v1/messages", json=body, headers=sent) as answer:
            await answer.aread()
        if not self.is_fine(answer, "POST /v1/messages"):
            return None
        return _streamed(answer.text) if self.streams else _plain(answer.json())


def _plain(message: Json) -> str:
    return "".join(block["text"] for block in message["content"])


def _streamed(stream: str) -> str | None:
    """The text of a stream that came to its end, else None."""
    said, is_whole = "", False
    for part in stream.split("\n\n"):
        lines = dict(line.split(": ", 1) for line in part.splitlines() if ": " in line)
        try:
            data = json.loads(lines.get("data", "{}"))
        except ValueError:
            return None
        if data.get("type") == "content_block_delta":
            said += data["delta"]["text"]
        elif data.get("type") == "error":
            return None
        is_whole = is_whole or data.get("type") == "message_stop"
    return said if is_whole else None
