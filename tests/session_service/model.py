"""The rules of sessions, messages and turns once more, plain and in memory, for the state machine to compare with.

Its one invariant: it knows the contract's words only; every method gives what the service must answer: None where
it succeeds, else the code of its refusal, with nothing changed.
"""

from dataclasses import dataclass, field, replace
from typing import Any

Refusal = str | None
MILLION = 1_000_000


@dataclass
class Message:
    seq: int
    role: str
    content: str
    tokens: int = 0
    cost_micro_usd: int = 0
    superseded: bool = False

    def body(self, message_id: str | None = None) -> dict[str, Any]:
        own: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.tokens:
            own["tokens_used"] = self.tokens
        if self.cost_micro_usd:
            own["cost_usd"] = self.cost_micro_usd / MILLION
        return own if message_id is None else own | {"message_id": message_id}


@dataclass
class Turn:
    """`completion` is the call that closed it, once one has."""

    turn_id: str
    lease_token: str
    inputs: tuple[int, int] | None
    status: str = "open"
    lease_is_over: bool = False
    completion: dict[str, Any] | None = None
    output_seqs: list[int] = field(default_factory=list)


@dataclass
class Session:
    session_id: str
    status: str = "active"
    ended_reason: str | None = None
    generation: int = 1
    first_seq: int = 1
    messages: list[Message] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    holder: Turn | None = None
    """The turn opened last, until a restart lets nobody hold the session."""
    summary: str = ""
    summary_to_seq: int | None = None
    parent: tuple[str, int] | None = None
    version: int = 1

    # ── what can be seen ──

    @property
    def last_seq(self) -> int:
        return len(self.messages)

    @property
    def visible(self) -> list[Message]:
        return [each for each in self.messages if not each.superseded]

    @property
    def tokens(self) -> int:
        return sum(each.tokens for each in self.messages)

    @property
    def cost_usd(self) -> float:
        return sum(each.cost_micro_usd for each in self.messages) / MILLION

    @property
    def in_context(self) -> list[int]:
        """Without a budget in its way: everything visible from the first message of the user's on."""
        shown = self.visible
        first = next((place for place, each in enumerate(shown) if each.role == "user"), len(shown))
        return [each.seq for each in shown[first:]]

    @property
    def is_held(self) -> bool:
        return any(turn.status == "open" and not turn.lease_is_over for turn in self.turns)

    # ── what may be done ──

    def why_not_written(self) -> Refusal:
        if self.status != "active":
            return "session_not_active"
        return "turn_in_progress" if self.is_held else None

    def append(self, new: list[Message]) -> list[int]:
        for each in new:
            self.messages.append(replace(each, seq=self.last_seq + 1))
        return [each.seq for each in self.messages[self.last_seq - len(new) :]]

    def close_overdue(self) -> None:
        for turn in self.turns:
            if turn.status == "open" and turn.lease_is_over:
                turn.status = "expired"

    def supersede(self, first: int, last: int) -> None:
        gone = [each for each in self.messages[first - 1 : last] if not each.superseded]
        for each in gone:
            each.superseded = True
        if self.summary_to_seq is not None and any(each.seq <= self.summary_to_seq for each in gone):
            self.summary, self.summary_to_seq = "", None

    def rewind(self, to_seq: int) -> Refusal:
        if refusal := self.why_not_written():
            return refusal
        if to_seq > self.last_seq:
            return "validation_error"
        self.close_overdue()
        self.supersede(to_seq + 1, self.last_seq)
        return None

    def revive(self, if_exists: str) -> Refusal:
        """`restart` or `resume` of a session that is there."""
        if self.status == "active":
            return None
        if self.status != "ended":
            return "session_archived" if self.status == "archived" else "session_not_active"
        if self.is_held:
            return "turn_in_progress"
        self.close_overdue()
        if if_exists == "restart":
            self.supersede(self.first_seq, self.last_seq)
            self.first_seq = self.last_seq + 1
            self.summary, self.summary_to_seq = "", None
            self.holder = None
        self.status, self.ended_reason = "active", None
        self.generation += 1
        return None

    def may_open(self, new: list[Message], rewind_to_seq: int | None, if_exists: str | None) -> Refusal:
        """What opening a turn does before the turn; on a refusal the caller throws this copy away."""
        if if_exists == "error":
            return "session_exists"
        if if_exists in {"restart", "resume"} and self.status == "ended" and (refusal := self.revive(if_exists)):
            return refusal
        if refusal := self.why_not_written():
            return refusal
        self.close_overdue()
        if rewind_to_seq is not None and (refusal := self.rewind(rewind_to_seq)):
            return refusal
        if not new and (not self.visible or self.visible[-1].role != "user"):
            return "validation_error"
        return None

    def complete(self, turn: Turn, body: dict[str, Any], new: list[Message]) -> Refusal:
        if turn.completion is not None:
            return None if turn.completion == body else "turn_closed"
        if self.holder is not turn:
            return "lease_lost"
        if body["status"] == "refused" and turn.inputs is not None:
            self.supersede(*turn.inputs)
        turn.output_seqs = self.append(new)
        turn.status, turn.completion = body["status"], body
        return None

    def end(self) -> Refusal:
        if self.status == "archived":
            return "session_archived"
        if self.status != "ended":
            self.status, self.ended_reason = "ended", "user"
        return None

    def put_status(self, status: str) -> Refusal:
        if status == self.status:
            return None
        if self.status == "archived":
            return "session_archived"
        if (self.status, status) not in {("active", "completed"), ("completed", "archived")}:
            return "invalid_transition"
        self.status = status
        return None

    def put_summary(self, summary: str, to_seq: int) -> Refusal:
        if self.status == "archived":
            return "session_archived"
        self.summary, self.summary_to_seq = summary, to_seq
        return None

    def fork(self, session_id: str, at_seq: int) -> "Session":
        kept = [each for each in self.visible if each.seq <= at_seq]
        new = Session(session_id, parent=(self.session_id, at_seq))
        new.append([replace(each, tokens=0, cost_micro_usd=0) for each in kept])
        covered = [each.seq for each in self.visible if each.seq <= (self.summary_to_seq or 0)]
        if self.summary_to_seq is not None and all(seq <= at_seq for seq in covered):
            new.summary, new.summary_to_seq = self.summary, len(covered)
        return new
