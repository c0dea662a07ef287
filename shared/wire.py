"""session_service's HTTP contract as Pydantic models: what goes in, checked; what comes out, described.

Its one invariant: input that a model here accepts can be stored exactly as it was sent.
Checks that depend on settings read their `Limits` from the validation context.
"""

from datetime import datetime
from decimal import Decimal
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, WithJsonSchema
from pydantic_core import PydanticCustomError

from shared.json import dumps

MAX_SAFE_INTEGER = 2**53
RESERVED_SESSION_IDS = frozenset({"stats", "search", "import", ".", ".."})

Role = Literal["user", "assistant", "system", "tool_call", "tool_result", "tool"]
MessageType = Literal["chat", "system", "tool_call", "tool_result", "notification"]
Status = Literal["active", "completed", "archived", "ended"]
MemoryType = Literal["preference", "conversation", "entity", "summary", "custom"]
IfExists = Literal["error", "return", "restart", "resume"]
ContextFormat = Literal["claude", "openai", "plain"]
TurnStatus = Literal["open", "completed", "interrupted", "failed", "refused", "expired"]
Outcome = Literal["completed", "interrupted", "failed", "refused"]


class Limits(BaseModel):
    """Sizes that settings may change; `_bytes` counts compact UTF-8 JSON, or UTF-8 for plain text."""

    model_config = ConfigDict(frozen=True)

    body_bytes: int = 40 * 2**20
    content_bytes: int = 32 * 2**20
    native_bytes: int = 2**20
    metadata_bytes: int = 64 * 2**10
    metadata_depth: int = 32
    title_characters: int = 500
    summary_bytes: int = 64 * 2**10
    memory_bytes: int = 64 * 2**10
    batch_messages: int = 500
    turn_messages: int = 10_000


_DEFAULT_LIMITS = Limits()


def _limits(info: ValidationInfo) -> Limits:
    return info.context if isinstance(info.context, Limits) else _DEFAULT_LIMITS


def _refuse(problem: str, **data: Any) -> PydanticCustomError:
    return PydanticCustomError("value_error", problem, data or None)


# ── identifiers and text ────────────────────────────────────────────────────────────────────────


def _is_control(character: str) -> bool:
    return character < " " or "\x7f" <= character <= "\x9f"


def _id(value: str) -> str:
    if not 1 <= len(value) <= 255:
        raise _refuse("An id has 1 to 255 characters")
    if "/" in value or any(map(_is_control, value)):
        raise _refuse("An id has no control characters and no '/'")
    if value != value.strip():
        raise _refuse("An id has no blanks at its ends")
    return value


def _session_id(value: str) -> str:
    if value in RESERVED_SESSION_IDS:
        raise _refuse("This session id is reserved")
    return _id(value)


def _message_id(value: str) -> str:
    if not 1 <= len(value) <= 255 or any(map(_is_control, value)):
        raise _refuse("A message id has 1 to 255 characters and no control characters")
    return value


def _no_nul(value: str) -> str:
    if "\0" in value:
        raise _refuse("U+0000 cannot be stored")
    return value


QueryText = Annotated[str, Field(min_length=1, max_length=256), AfterValidator(_no_nul)]
_DESCRIBED_ID = WithJsonSchema(
    {
        "type": "string",
        "minLength": 1,
        "maxLength": 255,
        "pattern": r"^[^\s/\x00-\x1f\x7f-\x9f]([^/\x00-\x1f\x7f-\x9f]*[^\s/\x00-\x1f\x7f-\x9f])?$",
    }
)
UserId = Annotated[str, AfterValidator(_id), _DESCRIBED_ID]
SessionId = Annotated[str, AfterValidator(_session_id), _DESCRIBED_ID]
MessageId = Annotated[
    str,
    AfterValidator(_message_id),
    WithJsonSchema({"type": "string", "minLength": 1, "maxLength": 255, "pattern": r"^[^\x00-\x1f\x7f-\x9f]+$"}),
]


def _at_most_utf8(name: str, what: str) -> AfterValidator:
    def check(value: str, info: ValidationInfo) -> str:
        limit: int = getattr(_limits(info), name)
        if len(value) > limit or len(value.encode()) > limit:
            raise _refuse(f"{what} has at most {{limit}} bytes", limit=limit)
        return value

    return AfterValidator(check)


def _title(value: str, info: ValidationInfo) -> str:
    limit = _limits(info).title_characters
    if len(value) > limit:
        raise _refuse("A title has at most {limit} characters", limit=limit)
    return value


Title = Annotated[str, AfterValidator(_title)]
Summary = Annotated[str, _at_most_utf8("summary_bytes", "A summary")]


def _not_blank(value: str) -> str:
    if not value.strip():
        raise _refuse("Empty or blank content")
    return value


MemoryContent = Annotated[str, AfterValidator(_not_blank), _at_most_utf8("memory_bytes", "A memory")]

# ── numbers ─────────────────────────────────────────────────────────────────────────────────────

MAX_COST_USD = Decimal("999999.999999")


def _cost(value: Any) -> Any:
    if isinstance(value, Decimal) or value is None:
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise PydanticCustomError("decimal_type", "A cost is a JSON number")
    cost = Decimal(repr(value))
    if not 0 <= cost <= MAX_COST_USD:
        raise _refuse("A cost is between 0 and 999999.999999")
    if cost != round(cost, 6):
        raise _refuse("A cost has at most six decimals")
    return abs(cost)


CostUsd = Annotated[Decimal, BeforeValidator(_cost)]
Tokens = Annotated[int, Field(strict=True, ge=0, le=2**31 - 1)]
Seq = Annotated[int, Field(strict=True, ge=0, le=2**31 - 1)]


# ── JSON objects ────────────────────────────────────────────────────────────────────────────────


def _check_depth_and_integers(value: Any, levels: int) -> None:
    if isinstance(value, dict | list):
        if levels == 0:
            raise _refuse("Nested too deeply")
        for below in value.values() if isinstance(value, dict) else value:
            _check_depth_and_integers(below, levels - 1)
    elif isinstance(value, int | float) and not -MAX_SAFE_INTEGER <= value <= MAX_SAFE_INTEGER:
        raise _refuse("An integer beyond 2^53 loses digits in many readers")  # every float beyond it is one


def _json_object(value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
    limits = _limits(info)
    _check_depth_and_integers(value, limits.metadata_depth)
    if len(dumps(value)) > limits.metadata_bytes:
        raise _refuse("At most {limit} bytes as compact JSON", limit=limits.metadata_bytes)
    return value


JsonObject = Annotated[dict[str, Any], AfterValidator(_json_object)]


def _native(value: Any, info: ValidationInfo) -> Any:
    limit = _limits(info).native_bytes
    if value is not None and len(dumps(value)) > limit:
        raise _refuse("native has at most {limit} bytes as JSON", limit=limit)
    return value


def check_content(value: Any, info: ValidationInfo) -> Any:
    """A text that is not blank, or a list of blocks that each have a type."""
    limit = _limits(info).content_bytes
    if isinstance(value, str):
        _not_blank(value)
        if len(value) * 6 + 2 > limit and len(dumps(value)) > limit:
            raise _refuse("Content has at most {limit} bytes as JSON", limit=limit)
        return value
    if not isinstance(value, list):
        raise PydanticCustomError("content_type", "Content is a string or a list of content blocks")
    if not value:
        raise _refuse("Empty or blank content")
    for index, block in enumerate(value):
        _check_block(index, block)
    if len(dumps(value)) > limit:
        raise _refuse("Content has at most {limit} bytes as JSON", limit=limit)
    return value


def _check_block(index: int, block: Any) -> None:
    if not isinstance(block, dict) or not isinstance(block.get("type"), str):
        raise _refuse("Block {index} is not an object with a type", index=index)
    if block["type"] == "text" and not isinstance(block.get("text"), str):
        raise _refuse("Block {index} is a text block without a text", index=index)
    if block["type"] == "tool_use" and not isinstance(block.get("id"), str):
        raise _refuse("Block {index} is a tool_use block without an id", index=index)
    if block["type"] == "tool_result" and not isinstance(block.get("tool_use_id"), str):
        raise _refuse("Block {index} is a tool_result block without a tool_use_id", index=index)


Content = Annotated[str | list[dict[str, Any]], BeforeValidator(check_content)]
Blocks = Annotated[list[dict[str, Any]], BeforeValidator(check_content)]


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
    title: Title | None = None
    metadata: JsonObject | None = None
    conversation_data: JsonObject | None = None
    session_summary: Summary | None = None
    summary_to_seq: Seq | None = None
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
    native: Annotated[Any, AfterValidator(_native)] = None


class ContextOptions(Input):
    max_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    max_messages: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    memories: bool | None = None
    format: ContextFormat | None = None


def _turn_messages(value: list[NewMessage], info: ValidationInfo) -> list[NewMessage]:
    limit = _limits(info).turn_messages
    if len(value) > limit:
        raise _refuse("A turn has at most {limit} messages", limit=limit)
    return value


TurnMessages = Annotated[list[NewMessage], AfterValidator(_turn_messages)]


class OpenTurn(Input):
    messages: TurnMessages = []
    rewind_to_seq: Seq | None = None
    create_session: CreateSessionInTurn | None = None
    context: ContextOptions | None = None
    lease_seconds: Annotated[int, Field(ge=5, le=3600)] = 600
    wait_seconds: Annotated[float, Field(ge=0, le=60)] = 0


def _batch_messages(value: list[NewMessage], info: ValidationInfo) -> list[NewMessage]:
    limit = _limits(info).batch_messages
    if not 1 <= len(value) <= limit:
        raise _refuse("A batch has 1 to {limit} messages", limit=limit)
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


class CompleteTurn(Input):
    lease_token: str
    status: Outcome
    messages: TurnMessages = []
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
