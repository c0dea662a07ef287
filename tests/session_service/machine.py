"""What the state machine calls, and how it compares what it sees with the model.

Its one invariant: what is compared is seen from outside; the database is touched only to let a lease run out.
"""

import asyncio
import copy
from dataclasses import dataclass, field
from typing import Any, ClassVar

import httpx
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine

from shared.canonical import message_hash
from tests.session_service.calls import Db, Json, fine, new_user_id, refused
from tests.session_service.model import MILLION, Message, Refusal, Session, Turn

STATUS_OF = {"validation_error": 400, None: 200}

texts = st.builds(
    Message,
    seq=st.just(0),
    role=st.sampled_from(["user", "user", "assistant"]),
    content=st.sampled_from(["hello", "what is 2 + 2?", "你好，世界", "four", "x" * 400]),
    tokens=st.sampled_from([0, 1, 7, 1000]),
    cost_micro_usd=st.sampled_from([0, 1, 250_000]),
)
OUTCOMES = ["completed", "completed", "interrupted", "failed", "refused"]
places = st.sampled_from([0.0, 0.0, 0.0, 0.3, 0.5, 0.7, 1.0, 1.0])
ways = st.sampled_from(["error", "return", "restart", "resume"])


@dataclass
class Reach:
    """How the machine reaches the service, and what it leaves for a look at the sums in the end."""

    http: httpx.Client
    runner: asyncio.Runner
    db: Db
    expected: dict[str, tuple[int, int, int, int, float]] = field(default_factory=dict)

    def sql(self, query: str, *values: object) -> list[Any]:
        return self.runner.run(self.db.fetch(query, *values))


class Compared(RuleBasedStateMachine):
    """A user's sessions, as they are at the service and as the model has them."""

    reach: ClassVar[Reach]

    def __init__(self) -> None:
        super().__init__()
        self.user_id = new_user_id()
        self.sessions: list[Session] = []
        self.kept: list[tuple[str, str, Json, Json]] = []
        """Successful calls under a key: path, key, body, answer."""
        self.known: list[tuple[str, str, Message, Json]] = []
        """Messages stored under an id of their own: path, id, message, answer."""
        self.numbers = iter(range(10**6))
        self.agreed = False
        """Whether the last write's outcome was found to be the model's; not so when a step has failed."""

    # ── calling ──

    def call(
        self, method: str, path: str, body: Json | None = None, key: str | None = None, **params: Any
    ) -> httpx.Response:
        options: dict[str, Any] = {} if body is None else {"json": body}
        headers = {} if key is None else {"Idempotency-Key": key}
        params["user_id"] = self.user_id
        self.agreed = self.agreed and method == "GET"
        return self.reach.http.request(method, path, params=params, headers=headers, **options)

    def get(self, path: str, **params: Any) -> Json:
        return fine(self.call("GET", path, **params))

    def told(self, response: httpx.Response, refusal: Refusal) -> Json:
        if refusal is None:
            return fine(response)
        return refused(response, STATUS_OF.get(refusal, 409), refusal)

    def create_keyed(self, path: str, body: Json, refusal: Refusal) -> Json:
        """A creating POST under a new key, kept for being sent again."""
        key = f"key-{next(self.numbers)}"
        answer = self.told(self.call("POST", path, body, key), refusal)
        if refusal is None:
            self.kept.append((path, key, body, answer))
        return answer

    def some(self, place: float) -> Session:
        return self.sessions[int(place * (len(self.sessions) - 1) + 0.5)]

    @staticmethod
    def seq_in(session: Session, place: float) -> int:
        return int(place * session.last_seq + 0.5)

    # ── looking ──

    def check(self, session: Session, *, moved: bool | None) -> None:
        """The session as the model says; `moved`: whether its version must have (None: it may)."""
        path = f"/sessions/{session.session_id}"
        seen = self.get(path)
        if moved is not None:
            assert (seen["version"] > session.version) == moved, (seen["version"], session.version)
        assert seen["version"] >= session.version
        session.version = seen["version"]
        parent = session.parent and {"session_id": session.parent[0], "seq": session.parent[1]}
        names = ("status", "ended_reason", "generation", "session_summary", "summary_to_seq", "parent")
        assert {name: seen[name] for name in names} == {
            "status": session.status,
            "ended_reason": session.ended_reason,
            "generation": session.generation,
            "session_summary": session.summary,
            "summary_to_seq": session.summary_to_seq if session.summary else None,
            "parent": parent,
        }
        assert seen["is_active"] == (session.status == "active")
        assert seen["message_count"] == len(session.visible)
        assert (seen["total_tokens"], seen["total_cost"]) == (session.tokens, session.cost_usd)
        stored = self.get(f"{path}/messages", include_superseded="true", page_size=1000)["messages"]
        assert [_as_model(each) for each in stored] == session.messages
        listed = self.get(f"{path}/messages", page_size=1000)
        assert [each["seq"] for each in listed["messages"]] == [each.seq for each in session.visible]
        assert listed["total"] == len(session.visible)
        turns = self.get(f"{path}/turns", limit=100)["turns"]
        assert {each["turn_id"]: each["status"] for each in turns} == {
            each.turn_id: each.status for each in session.turns
        }
        assert sum(each["status"] == "open" for each in turns) <= 1
        self.agreed = True

    def check_view(self, session: Session) -> None:
        """The context, and lining up with what is visible."""
        path = f"/sessions/{session.session_id}"
        receipt = self.get(f"{path}/context")["receipt"]
        assert [seq for one, other in receipt["included"] for seq in range(one, other + 1)] == session.in_context
        hashes = [message_hash(each.role, each.content).hex() for each in session.visible]
        aligned = fine(self.call("POST", f"{path}/align", {"hashes": [*hashes, "0" * 64]}))
        last = session.visible[-1].seq if hashes else 0
        assert aligned == {"matched": len(hashes), "seq": last, "version": session.version}

    def turns(self) -> list[tuple[Session, Turn]]:
        return [(session, turn) for session in self.sessions for turn in session.turns]

    def open_turns(self) -> list[tuple[Session, Turn]]:
        return [(session, turn) for session, turn in self.turns() if turn.status == "open"]

    def expire(self, session: Session, turn: Turn) -> None:
        """As if the lease's time were over."""
        for table in ("sessions", "session_turns"):
            self.reach.sql(
                f"UPDATE dev.{table} SET lease_expires_at = now() - interval '1 second'"
                " WHERE user_id = $1 AND session_id = $2 AND lease_expires_at > now()",
                self.user_id,
                session.session_id,
            )
        turn.lease_is_over = True

    def teardown(self) -> None:
        if not self.agreed:
            return
        shown = [each for session in self.sessions for each in session.visible]
        totals = (
            len(self.sessions),
            sum(session.status == "active" for session in self.sessions),
            len(shown),
            sum(each.tokens for each in shown),
            sum(each.cost_micro_usd for each in shown) / MILLION,
        )
        seen = self.get(f"/users/{self.user_id}/stats")
        names = ("sessions", "messages", "tokens", "cost")
        assert [seen[f"total_{name}"] for name in names] == [totals[0], *totals[2:]]
        assert seen["active_sessions"] == totals[1]
        self.reach.expected[self.user_id] = totals


def _as_model(each: Json) -> Message:
    return Message(
        seq=each["seq"],
        role=each["role"],
        content=each["content"],
        tokens=each["tokens_used"],
        cost_micro_usd=round(each["cost_usd"] * MILLION),
        superseded=each["superseded_at"] is not None,
    )


def priced(messages: list[Message], usage: Json | None, cost_micro_usd: int | None) -> list[Message]:
    """An answer's messages: its last assistant message gets the call's figures where it has none of its own."""
    new = copy.deepcopy(messages)
    last = next((each for each in reversed(new) if each.role == "assistant"), None)
    if last is not None:
        spent = sum((usage or {}).get(name, 0) for name in ("input_tokens", "output_tokens"))
        last.tokens = last.tokens or spent
        last.cost_micro_usd = last.cost_micro_usd or cost_micro_usd or 0
    return new
