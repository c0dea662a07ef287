"""The lines of an exported session, as models: each line is checked by itself.

Its one invariant: what passes here breaks no constraint of a row by itself.
"""

from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, Field, model_validator

from services.session_service import drafts
from shared import values, wire

_CLOCKS_APART = timedelta(days=1)

Model = TypeVar("Model", bound=BaseModel)


def _moment(value: Any) -> Any:
    """A time with its offset; a bare number or date is none."""
    if isinstance(value, str):
        moment = datetime.fromisoformat(value)
        # Later writes never go before what is there, so that a time to come would be theirs as well.
        if moment.tzinfo is not None and moment.year > 1 and moment < datetime.now(UTC) + _CLOCKS_APART:
            return moment
    raise ValueError("A time in RFC 3339, with its offset, that has been")


Moment = Annotated[datetime, BeforeValidator(_moment)]


# Ids that the service made are UUIDs; whatever else a file says must still fit into an index.
MadeId = Annotated[str, Field(pattern=r"^[\x21-\x7e]{1,255}$")]


class Parent(wire.Input):
    session_id: values.SessionId
    seq: values.Seq


class Session(wire.Input):
    session_id: values.SessionId
    title: values.Title | None = None
    status: wire.Status
    metadata: values.JsonObject
    conversation_data: values.JsonObject
    session_summary: values.Summary
    summary_model: values.SummaryModel | None = None
    created_at: Moment
    updated_at: Moment
    last_activity: Moment
    version: Annotated[int, Field(ge=1, le=2**53)]
    generation: Annotated[int, Field(ge=1, le=2**31 - 1)]
    idle_timeout_seconds: Annotated[int, Field(ge=1, le=31_536_000)] | None = None
    ended_reason: Literal["user", "expired"] | None = None
    parent: Parent | None = None

    @model_validator(mode="after")
    def _reason_of_the_end(self) -> Self:
        if (self.status == "ended") != (self.ended_reason is not None):
            raise ValueError("An ended session has an ended_reason, and no other has")
        return self


class Header(wire.Input):
    format: str
    format_version: int
    session: Session
    summary_to_seq: values.Seq | None = None
    first_seq: Annotated[int, Field(ge=1, le=2**31 - 1)]
    window_start_seq: Annotated[int, Field(ge=1, le=2**31 - 1)]


class Message(wire.NewMessage):
    """A message as exported: with its blocks, or with its text."""

    message_id: values.MessageId
    seq: Annotated[int, Field(ge=1, le=2**31 - 1)]
    content: Annotated[str, BeforeValidator(values.check_content)] | None = None  # type: ignore[assignment]
    content_blocks: values.Blocks | None = None
    turn_id: MadeId | None = None
    created_at: Moment
    superseded_at: Moment | None = None
    context_tokens: values.Tokens
    context_tokens_reported: bool

    @model_validator(mode="after")
    def _has_content(self) -> Self:
        if (self.content is None) == (self.content_blocks is None):
            raise ValueError("A message has content or content_blocks")
        return self

    def draft(self) -> drafts.Draft:
        names = ("role", "message_type", "tokens_used", "cost_usd", "metadata", "native")
        values = {name: getattr(self, name) for name in names}
        content = self.content_blocks if self.content_blocks is not None else self.content or ""
        new = wire.NewMessage.model_construct(content=content, message_id=self.message_id, **values)
        return drafts.draft(new, reported_tokens=self.context_tokens if self.context_tokens_reported else None)


class Memory(wire.NewMemory):
    memory_id: MadeId
    created_at: Moment
    updated_at: Moment


class Turn(wire.Input):
    turn_id: MadeId
    status: wire.TurnStatus
    lease_expires_at: Moment
    opened_at: Moment
    closed_at: Moment | None = None
    input_from_seq: values.Seq | None = None
    input_to_seq: values.Seq | None = None
    output_from_seq: values.Seq | None = None
    output_to_seq: values.Seq | None = None
    stop_reason: str | None = None
    model: str | None = None
    usage: values.JsonObject | None = None
    cost_usd: values.CostUsd | None = None
    upstream: values.JsonObject | None = None
    error: values.JsonObject | None = None

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        if (self.status == "open") != (self.closed_at is None):
            raise ValueError("A turn has closed_at exactly when it is not open")
        for first, last in ((self.input_from_seq, self.input_to_seq), (self.output_from_seq, self.output_to_seq)):
            if (first is None) != (last is None) or (first or 0) > (last or 0):
                raise ValueError("A range of messages has a beginning and, not before it, an end")
        return self

    @property
    def last_seq(self) -> int:
        return max(self.input_to_seq or 0, self.output_to_seq or 0)
