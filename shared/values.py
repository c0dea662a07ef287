"""Values that requests are made of, each with its rule: ids, texts, numbers, JSON objects, content.

Its one invariant: a value that passes here can be stored exactly as it was sent.
Rules that depend on settings read their `Limits` from the validation context.
"""

from decimal import Decimal
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, WithJsonSchema
from pydantic_core import PydanticCustomError

from shared.json import dumps

MAX_SAFE_INTEGER = 2**53
RESERVED_SESSION_IDS = frozenset({"stats", "search", "import", ".", ".."})


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


def limits_of(info: ValidationInfo) -> Limits:
    return info.context if isinstance(info.context, Limits) else _DEFAULT_LIMITS


def refusal(problem: str, **data: Any) -> PydanticCustomError:
    return PydanticCustomError("value_error", problem, data or None)


# ── identifiers and text ────────────────────────────────────────────────────────────────────────


def _is_control(character: str) -> bool:
    return character < " " or "\x7f" <= character <= "\x9f"


def _id(value: str) -> str:
    if not 1 <= len(value) <= 255:
        raise refusal("An id has 1 to 255 characters")
    if "/" in value or any(map(_is_control, value)):
        raise refusal("An id has no control characters and no '/'")
    if value != value.strip():
        raise refusal("An id has no blanks at its ends")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise refusal("An id has no lone surrogates")
    return value


def _session_id(value: str) -> str:
    if value in RESERVED_SESSION_IDS:
        raise refusal("This session id is reserved")
    return _id(value)


def _message_id(value: str) -> str:
    if not 1 <= len(value) <= 255 or any(map(_is_control, value)):
        raise refusal("A message id has 1 to 255 characters and no control characters")
    return value


def _no_nul(value: str) -> str:
    if "\0" in value:
        raise refusal("U+0000 cannot be stored")
    return value


Storable = Annotated[str, AfterValidator(_no_nul)]
QueryText = Annotated[Storable, Field(min_length=1, max_length=256)]
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
        limit: int = getattr(limits_of(info), name)
        if len(value) > limit or len(value.encode()) > limit:
            raise refusal(f"{what} has at most {{limit}} bytes", limit=limit)
        return value

    return AfterValidator(check)


def _title(value: str, info: ValidationInfo) -> str:
    limit = limits_of(info).title_characters
    if len(value) > limit:
        raise refusal("A title has at most {limit} characters", limit=limit)
    return value


Title = Annotated[str, AfterValidator(_title)]
Summary = Annotated[str, _at_most_utf8("summary_bytes", "A summary")]
SummaryModel = Annotated[str, Field(min_length=1, max_length=255)]


def _not_blank(value: str) -> str:
    if not value.strip():
        raise refusal("Empty or blank content")
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
        raise refusal("A cost is between 0 and 999999.999999")
    if cost != round(cost, 6):
        raise refusal("A cost has at most six decimals")
    return abs(cost)


CostUsd = Annotated[Decimal, BeforeValidator(_cost)]
Tokens = Annotated[int, Field(strict=True, ge=0, le=2**31 - 1)]
Seq = Annotated[int, Field(strict=True, ge=0, le=2**31 - 1)]


# ── JSON objects ────────────────────────────────────────────────────────────────────────────────


def _check_depth_and_integers(value: Any, levels: int) -> None:
    if isinstance(value, dict | list):
        if levels == 0:
            raise refusal("Nested too deeply")
        for below in value.values() if isinstance(value, dict) else value:
            _check_depth_and_integers(below, levels - 1)
    elif isinstance(value, int | float) and not -MAX_SAFE_INTEGER <= value <= MAX_SAFE_INTEGER:
        raise refusal("An integer beyond 2^53 loses digits in many readers")  # every float beyond it is one


def _json_object(value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
    limits = limits_of(info)
    _check_depth_and_integers(value, limits.metadata_depth)
    if len(dumps(value)) > limits.metadata_bytes:
        raise refusal("At most {limit} bytes as compact JSON", limit=limits.metadata_bytes)
    return value


JsonObject = Annotated[dict[str, Any], AfterValidator(_json_object)]


def check_native(value: Any, info: ValidationInfo) -> Any:
    limit = limits_of(info).native_bytes
    if value is not None and len(dumps(value)) > limit:
        raise refusal("native has at most {limit} bytes as JSON", limit=limit)
    return value


def check_content(value: Any, info: ValidationInfo) -> Any:
    """A text that is not blank, or a list of blocks that each have a type."""
    limit = limits_of(info).content_bytes
    if isinstance(value, str):
        _not_blank(value)
        if len(value) * 6 + 2 > limit and len(dumps(value)) > limit:
            raise refusal("Content has at most {limit} bytes as JSON", limit=limit)
        return value
    if not isinstance(value, list):
        raise PydanticCustomError("content_type", "Content is a string or a list of content blocks")
    if not value:
        raise refusal("Empty or blank content")
    for index, block in enumerate(value):
        _check_block(index, block)
    if len(dumps(value)) > limit:
        raise refusal("Content has at most {limit} bytes as JSON", limit=limit)
    return value


def _check_block(index: int, block: Any) -> None:
    if not isinstance(block, dict) or not isinstance(block.get("type"), str):
        raise refusal("Block {index} is not an object with a type", index=index)
    if block["type"] == "text" and not isinstance(block.get("text"), str):
        raise refusal("Block {index} is a text block without a text", index=index)
    if block["type"] == "tool_use" and not isinstance(block.get("id"), str):
        raise refusal("Block {index} is a tool_use block without an id", index=index)
    if block["type"] == "tool_result" and not isinstance(block.get("tool_use_id"), str):
        raise refusal("Block {index} is a tool_result block without a tool_use_id", index=index)


Content = Annotated[str | list[dict[str, Any]], BeforeValidator(check_content)]
Blocks = Annotated[list[dict[str, Any]], BeforeValidator(check_content)]
