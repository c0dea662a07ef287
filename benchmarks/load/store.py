"""Work for session_service, and for what stands beside it as a yardstick with the same paths."""

import itertools
import uuid
from typing import Any
from urllib.parse import quote

from benchmarks.load import WrongAnswer
from benchmarks.load.http import Answer, Connections, request

TEXT = "The quick brown fox jumps over the lazy dog. 我们使用这个服务来保存对话记录。 " * 3
API = "/api/v1/sessions"


def need(answer: Answer, status: int = 200) -> Any:
    if answer.status != status:
        raise WrongAnswer(f"status {answer.status} instead of {status}: {answer.body[:500]!r}")
    return answer.json()


def equal(what: str, found: object, expected: object) -> None:
    if found != expected:
        raise WrongAnswer(f"{what} is {found!r} instead of {expected!r}")


class _Work:
    """One kind of work: made ready, done step by step, and checked against what is stored."""

    def __init__(self, plan: dict[str, Any]) -> None:
        self.plan = plan
        self.user_id: str = plan.get("user_id") or f"user-{uuid.uuid4().hex}"
        self.extra: dict[str, Any] = {}

    async def prepare(self, connections: Connections) -> None:
        """Before the clock runs."""

    async def step(self, connections: Connections, worker: int) -> None:
        raise NotImplementedError

    async def verify(self, connections: Connections) -> None:
        """After the clock has stopped."""

    def path(self, session_id: str, below: str = "", **query: str | int) -> str:
        asked = {"user_id": self.user_id, **query}
        return f"{API}/{session_id}{below}?" + "&".join(f"{name}={quote(str(value))}" for name, value in asked.items())


class Appends(_Work):
    """Appends of `workers` to as many sessions as the plan says (their number by default)."""

    def __init__(self, plan: dict[str, Any]) -> None:
        super().__init__(plan)
        self._sessions: int = plan.get("sessions", plan["workers"])
        body = {"role": "user", "content": TEXT, "tokens_used": 5}
        self._requests = [request("POST", self.path(f"s{n}", "/messages"), body) for n in range(self._sessions)]
        self._stored = [0] * self._sessions

    async def prepare(self, connections: Connections) -> None:
        for number in range(self._sessions):
            body = {"user_id": self.user_id, "session_id": f"s{number}"}
            need(await connections.ask(request("POST", API, body)))

    async def step(self, connections: Connections, worker: int) -> None:
        place = worker % self._sessions
        answer = await connections.ask(self._requests[place])
        if answer.status != 200 or b'"seq":' not in answer.body or b'"tokens_used":5' not in answer.body:
            raise WrongAnswer(f"{answer.status} {answer.body[:500]!r}")
        self._stored[place] += 1

    async def verify(self, connections: Connections) -> None:
        for number, stored in enumerate(self._stored):
            session = need(await connections.ask(request("GET", self.path(f"s{number}"))))
            equal("message_count", session["message_count"], stored)
            equal("total_tokens", session["total_tokens"], 5 * stored)
            first = max(0, stored - 500)
            path = self.path(f"s{number}", "/messages", after_seq=first, limit=500)
            listed = need(await connections.ask(request("GET", path)))["messages"]
            equal("seqs", [each["seq"] for each in listed], list(range(first + 1, stored + 1)))
            equal("texts", {each["content"] for each in listed} - {TEXT}, set())


class Turns(_Work):
    """Opens a turn and completes it, in sessions that are `prefilled`: each worker in one of its own."""

    prefilled = 60
    max_messages = 25
    """A window over it goes back to 60 %: contexts have 15 to 25 messages, 20 on the average."""

    def __init__(self, plan: dict[str, Any]) -> None:
        super().__init__(plan)
        self._turns = [0] * plan["workers"]
        self._numbers = itertools.count()
        self._context_messages = 0

    async def prepare(self, connections: Connections) -> None:
        for number in range(self.plan["workers"]):
            await prefill(connections, self, f"s{number}", self.prefilled)

    async def step(self, connections: Connections, worker: int) -> None:
        text = f"question {next(self._numbers)}: {TEXT}"
        opening = {"messages": [{"role": "user", "content": text}], "context": {"max_messages": self.max_messages}}
        path = self.path(f"s{worker}", "/turns")
        opened = need(await connections.ask(request("POST", path, opening)))
        context = opened["context"]["messages"]
        equal("the context's last message", context[-1]["content"], text)
        self._context_messages += len(context)
        answer = {
            "lease_token": opened["lease_token"],
            "status": "completed",
            "messages": [{"role": "assistant", "content": [{"type": "text", "text": TEXT}]}],
            "usage": {"input_tokens": 10, "output_tokens": 20},
            "stop_reason": "end_turn",
            "model": "test-model",
        }
        path = self.path(f"s{worker}", f"/turns/{opened['turn_id']}/complete")
        completed = need(await connections.ask(request("POST", path, answer)))
        equal("the turn's status", completed["turn"]["status"], "completed")
        self._turns[worker] += 1

    async def verify(self, connections: Connections) -> None:
        for number, turns in enumerate(self._turns):
            session = need(await connections.ask(request("GET", self.path(f"s{number}"))))
            equal("message_count", session["message_count"], self.prefilled + 2 * turns)
            equal("total_tokens", session["total_tokens"], 30 * turns)
        self.extra["context_messages"] = self._context_messages / max(1, sum(self._turns))


async def prefill(connections: Connections, work: _Work, session_id: str, messages: int) -> None:
    """A new session with so many messages, of both sides in turn."""
    for first in range(0, messages, 500):
        roles = ["assistant" if number % 2 else "user" for number in range(first, min(messages, first + 500))]
        batch = {"messages": [{"role": role, "content": TEXT} for role in roles], "create_session": {}}
        need(await connections.ask(request("POST", work.path(session_id, "/messages/batch"), batch)))


class Prefill(_Work):
    """No work but the making of a session of `messages` messages, for others to read."""

    async def prepare(self, connections: Connections) -> None:
        await prefill(connections, self, self.plan["session_id"], self.plan["messages"])

    async def step(self, connections: Connections, worker: int) -> None:
        need(await connections.ask(request("GET", self.path(self.plan["session_id"]))))


class Contexts(_Work):
    """Reads the context of the last 20 messages of an existing session."""

    async def step(self, connections: Connections, worker: int) -> None:
        path = self.path(self.plan["session_id"], "/context", max_messages=20)
        context = need(await connections.ask(request("GET", path)))
        included = sum(last - first + 1 for first, last in context["receipt"]["included"])
        equal("the number of messages", included, 20)
        equal("the newest one's seq", context["receipt"]["included"][-1][1], self.plan["messages"])


class Creates(_Work):
    """Makes sessions with ids of its own."""

    def __init__(self, plan: dict[str, Any]) -> None:
        super().__init__(plan)
        self._ids: list[str] = []

    async def step(self, connections: Connections, worker: int) -> None:
        session_id = f"c{len(self._ids)}"
        self._ids.append(session_id)
        body = {"user_id": self.user_id, "session_id": session_id, "title": "A title", "metadata": {"a": 1}}
        made = need(await connections.ask(request("POST", API, body)))
        equal("session_id", made["session_id"], session_id)

    async def verify(self, connections: Connections) -> None:
        for session_id in self._ids[:: max(1, len(self._ids) // 100)]:
            session = need(await connections.ask(request("GET", self.path(session_id))))
            equal("the session", (session["session_id"], session["metadata"]), (session_id, {"a": 1}))


class Gets(_Work):
    """Reads an existing session's 20 messages."""

    async def step(self, connections: Connections, worker: int) -> None:
        path = self.path(self.plan["session_id"], "/messages", page_size=20)
        listed = need(await connections.ask(request("GET", path)))
        equal("the number of messages", (len(listed["messages"]), listed["total"]), (20, 20))
