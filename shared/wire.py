"""session_service's HTTP contract as Pydantic models: what goes in, checked; what comes out, described.

Its one invariant: input that a model here accepts can be stored exactly as it was sent; the values' rules are in
values.py.
"""

from datetime import datetime
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from shared.values import (
    Content,
    CostUsd,
    JsonObject,
    MemoryContent,
    MessageId,
    Seq,
    SessionId,
    Summary,
    SummaryModel,
    Title,
    Tokens,
    UserId,
    check_native,
    limits_of,
    refusal,
)

Role = Literal["user", "assistant", "system", "tool_call", "tool_result", "tool"]
MessageType = Literal["chat", "system", "tool_call", "tool_result", "notification"]
Status = Literal["active", "completed", "archived", "ended"]
MemoryType = Literal["preference", "conversation", "entity", "summary", "custom"]
IfExists = Literal["error", "return", "restart", "resume"]
ContextFormat = Literal["claude", "openai", "plain"]
TurnStatus = Literal["open", "completed", "interrupted", "failed", "refused", "expired"]
Outcome = Literal["completed", "interrupted", "failed", "refused"]


# ── what comes in ───────────────────────────────────────────────────────────────────────────────


class Input(BaseModel):
    """A request body: strict types, unknown fields ignored, null the same as absent."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, hide_input_in_errors=True)


class SessionOptions(Input):
    """How to make a session where there is none, and what to do where there is one."""

    title: Title | None = None
    metadata: JsonObject | None = None
    conversation_data: JsonObject | None = None
    idle_timeout_seconds: Annotated[int, Field(ge=1, le=31_536_000)] | None = None
    if_exists: IfExists | None = None


class CreateSession(SessionOptions):
    user_id: UserId
    session_id: SessionId | None = None


class CreateSessionInTurn(SessionOptions):
    """As CreateSession; the ids may be left out, and equal the URL's where they are given."""

    user_id: UserId | None = None
    session_id: SessionId | None = None


class UpdateSession(Input):
    """`summary_model` is who wrote the summary; a new summary that comes without it is nobody's."""

    title: Title | None = None
    metadata: JsonObject | None = None
    conversation_data: JsonObject | None = None
    session_summary: Summary | None = None
    summary_to_seq: Seq | None = None
    summary_model: SummaryModel | None = None
    status: Status | None = None
    idle_timeout_seconds: Annotated[int, Field(ge=1, le=31_536_000)] | None = None


class NewMessage(Input):
    role: Role
    content: Content
    message_type: MessageType | None = None
    tokens_used: Tokens | None = None
    cost_usd: CostUsd | None = None
    metadata: JsonObject | None = None
    message_id: MessageId | None = None
    native: Annotated[Any, AfterValidator(check_native)] = None


class ContextOptions(Input):
    max_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    max_messages: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    memories: bool | None = None
    format: ContextFormat | None = None


def _turn_messages(value: list[NewMessage], info: ValidationInfo) -> list[NewMessage]:
    limit = limits_of(info).turn_messages
    if len(value) > limit:
        raise refusal("A turn has at most {limit} messages", limit=limit)
    return value


TurnMessages = Annotated[list[NewMessage], AfterValidator(_turn_messages)]


_UUID: Final = r"^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$"


class _WithMessages(Input):
    messages: TurnMessages = []

    @field_validator("messages", "lease_seconds", "wait_seconds", mode="before", check_fields=False)
    @classmethod
    def _null_is_absent(cls, value: Any, info: ValidationInfo) -> Any:
        return cls.model_fields[str(info.field_name)].default if value is None else value


class OpenTurn(_WithMessages):
    """`turn_id`: a UUID that the caller has made, so that it knows the turn before it is opened."""

    turn_id: Annotated[str, Field(pattern=_UUID)] | None = None
    rewind_to_seq: Seq | None = None
    create_session: CreateSessionInTurn | None = None
    context: ContextOptions | None = None
    lease_seconds: Annotated[int, Field(ge=5, le=3600)] = 600
    wait_seconds: Annotated[float, Field(ge=0, le=60)] = 0


def _batch_messages(value: list[NewMessage], info: ValidationInfo) -> list[NewMessage]:
    limit = limits_of(info).batch_messages
    if not 1 <= len(value) <= limit:
        raise refusal("A batch has 1 to {limit} messages", limit=limit)
    return value


class Batch(Input):
    messages: Annotated[list[NewMessage], AfterValidator(_batch_messages)]
    create_session: CreateSessionInTurn | None = None
    metadata: JsonObject | None = None
    conversation_data: JsonObject | None = None


class Rewind(Input):
    to_seq: Seq


class Fork(Input):
    at_seq: Seq | None = None
    session_id: SessionId | None = None
    title: Title | None = None


class RenewTurn(Input):
    lease_token: str


class CompleteTurn(_WithMessages):
    lease_token: str
    status: Outcome
    usage: JsonObject | None = None
    cost_usd: CostUsd | None = None
    stop_reason: Annotated[str, Field(max_length=255)] | None = None
    model: Annotated[str, Field(max_length=255)] | None = None
    upstream: JsonObject | None = None
    error: JsonObject | None = None


class Align(Input):
    hashes: Annotated[list[Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]], Field(max_length=100_000)]


class NewMemory(Input):
    memory_type: MemoryType
    content: MemoryContent
    metadata: JsonObject | None = None


class UpdateMemory(Input):
    memory_type: MemoryType | None = None
    content: MemoryContent | None = None
    metadata: JsonObject | None = None


# ── what goes out ───────────────────────────────────────────────────────────────────────────────


class Output(BaseModel):
    """An answer; built without validation from rows that constraints keep valid."""

    model_config = ConfigDict(extra="ignore")


class ForkParent(Output):
    session_id: str
    seq: int


class Session(Output):
    """`session_summary` covers what is visible up to `summary_to_seq`; without one its other fields are null."""

    session_id: str
    user_id: str
    title: str | None
    status: Status
    conversation_data: dict[str, Any]
    metadata: dict[str, Any]
    is_active: bool
    message_count: int
    total_tokens: int
    total_cost: float
    session_summary: str
    summary_to_seq: int | None = None
    summary_model: str | None = None
    created_at: datetime
    updated_at: datetime
    last_activity: datetime
    version: int
    generation: int
    idle_timeout_seconds: int | None
    expires_at: datetime | None
    ended_reason: Literal["user", "expired"] | None
    parent: ForkParent | None


class SessionList(Output):
    sessions: list[Session]
    total: int
    page: int
    page_size: int
    next_cursor: str | None


class SessionSummary(Output):
    session_id: str
    user_id: str
    status: Status
    message_count: int
    total_tokens: int
    total_cost: float
    has_memory: bool
    is_active: bool
    created_at: datetime
    last_activity: datetime
    session_summary: str


class Notice(Output):
    message: str


class Message(Output):
    message_id: str
    session_id: str
    user_id: str
    seq: int
    role: Role
    content: str
    content_blocks: list[dict[str, Any]] | None
    message_type: MessageType
    metadata: dict[str, Any]
    native: Any
    tokens_used: int
    cost_usd: float
    created_at: datetime
    superseded_at: datetime | None


class MessageList(Output):
    messages: list[Message]
    total: int
    page: int
    page_size: int
    has_more: bool


class BatchStored(Output):
    messages: list[Message]
    session: Session


class Erased(Output):
    """How much of a user was erased."""

    deleted: dict[Literal["sessions", "messages", "memories", "turns"], int]


class Memory(Output):
    memory_id: str
    session_id: str
    user_id: str
    memory_type: MemoryType
    content: str
    metadata: dict[str, Any]
    created_at: datetime
    updated_at: datetime


class MemoryList(Output):
    memories: list[Memory]
    next_cursor: str | None


class Turn(Output):
    turn_id: str
    session_id: str
    user_id: str
    status: TurnStatus
    lease_expires_at: datetime | None
    opened_at: datetime
    closed_at: datetime | None
    input_from_seq: int | None
    input_to_seq: int | None
    output_from_seq: int | None
    output_to_seq: int | None
    stop_reason: str | None
    model: str | None
    usage: dict[str, Any] | None
    cost_usd: float | None
    upstream: dict[str, Any] | None
    error: dict[str, Any] | None


class TurnList(Output):
    turns: list[Turn]
    next_cursor: str | None


class LeftOut(Output):
    from_seq: int
    to_seq: int
    reason: str


class Repair(Output):
    kind: str
    seq: int


class ContextTokens(Output):
    system: int
    messages: int
    total: int
    source: Literal["usage", "estimate", "mixed"]


class Receipt(Output):
    """What a context is made of; `sha256` is of its canonical messages."""

    included: list[tuple[int, int]]
    left_out: list[LeftOut]
    repairs: list[Repair]
    pending_tool_calls: list[str]
    tokens: ContextTokens
    window_start_seq: int
    sha256: str


class Context(Output):
    system: Any
    messages: list[dict[str, Any]]
    receipt: Receipt


class TurnOpened(Output):
    turn_id: str
    lease_token: str
    lease_expires_at: datetime
    session: Session
    messages: list[Message]
    context: Context


class TurnRenewed(Output):
    turn_id: str
    lease_expires_at: datetime


class TurnCompleted(Output):
    turn: Turn
    messages: list[Message]
    session: Session


class Aligned(Output):
    matched: int
    seq: int
    version: int


class Snippet(Output):
    """A piece of a text that matched, with the seq of its message or the id of its memory."""

    text: str
    seq: int | None = None
    memory_id: str | None = None


class SearchResult(Output):
    session_id: str
    title: str | None
    score: float
    last_activity: datetime
    snippets: list[Snippet]


class SearchResults(Output):
    results: list[SearchResult]
    next_cursor: str | None


class Stats(Output):
    total_sessions: int
    active_sessions: int
    total_messages: int
    total_tokens: int
    total_cost: float
    average_messages_per_session: float


class UsageBucket(Output):
    start: datetime
    messages: int
    tokens: int
    cost: float
    active_sessions: int


class Usage(Output):
    bucket: Literal["hour", "day", "month"]
    items: list[UsageBucket]


class Health(Output):
    status: str
    service: str
    port: int
    version: str
    timestamp: datetime


class DatabasePool(Output):
    size: int
    idle: int
    max: int


class DetailedHealth(Health):
    database_connected: bool
    schema_revision: str | None
    pool: DatabasePool | None


class FieldError(Output):
    type: str
    loc: list[str | int]
    msg: str


class Error(Output):
    """Every answer other than success; for validation errors `detail` is a list."""

    detail: str | list[FieldError]
    code: str
