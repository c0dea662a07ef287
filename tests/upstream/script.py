"""The script: steps that tell the test upstream what to do with the next matching request.

Its one invariant: a request takes the oldest step that matches it, and a step serves exactly `repeat` requests.
"""

import base64
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

FOREVER = -1
DEFAULT_AFTER_EVENTS = 3  # message_start, content_block_start and ping have gone out: the next is content


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Match(_Model):
    """Which requests a step is for; everything that is given must agree."""

    api_key: str | None = Field(default=None, description="the x-api-key header, or the bearer token")
    model: str | None = None
    path: str | None = Field(default=None, description="e.g. /v1/messages/count_tokens; default: /v1/messages")
    stream: bool | None = None
    headers: dict[str, str] = Field(default={}, description="names in lower case, exact values")
    contains: str | None = Field(default=None, description="a text that occurs in the body")


class Bytes(_Model):
    base64: str


class Insert(_Model):
    """An event of one's own in the stream: by name and data, or as exact bytes in `raw`."""

    after_events: int = Field(default=DEFAULT_AFTER_EVENTS, ge=0)
    event: str = ""
    data: Any = None
    raw: str | Bytes | None = None


class Step(_Model):
    """One step. With no field at all it is a request answered as if there were no script."""

    match: Match = Match()
    repeat: PositiveInt | Literal[-1] = Field(default=1, description="requests it serves; -1: all from now on")
    name: str = Field(default="", description="shows up in the request log")

    # Instead of a message
    delay_ms: float = Field(default=0, ge=0, description="wait before anything is sent; then go on with the step")
    hang_seconds: float | None = Field(
        default=None, description="say nothing for so long, then close; see after_events"
    )
    close: bool = Field(default=False, description="close the connection without a byte")
    garbage: str | Bytes | None = Field(default=None, description="these bytes instead of an HTTP answer, then close")
    redirect: str | None = Field(default=None, description="307 to this location")
    status: int = 200
    headers: dict[str, str | list[str]] = {}
    body: Any = Field(default=None, description="the answer's body: an object (sent as JSON) or a string")

    # The message
    text: str | None = None
    blocks: list[dict[str, Any]] | None = Field(default=None, description="content blocks as in a plain answer")
    model: str | None = None
    stop_reason: str | None = None
    stop_sequence: str | None = None
    usage: dict[str, Any] | None = Field(default={}, description="over the estimated one; null: no usage at all")
    message: dict[str, Any] = Field(default={}, description="top-level fields over the message's own")
    huge_answer_bytes: int | None = Field(default=None, description="a text of so many bytes")

    # The stream
    event_delay_ms: float = Field(default=0, ge=0, description="wait before every event")
    delta_characters: int = Field(default=12, ge=1, description="length of text, thinking and JSON deltas")
    newline: Literal["\n", "\r\n", "\r"] = "\n"
    chunk_bytes: int | None = Field(default=None, ge=1, description="send the events in pieces of this size")
    raw_events: list[str | Bytes] | None = Field(default=None, description="exactly these bytes instead of the events")
    insert: list[Insert] = []
    stamped: bool = Field(
        default=False, description="each event tells when it was sent: `sent_at`, seconds of the monotonic clock"
    )

    # Faults in mid-answer
    after_events: int | None = Field(
        default=None, ge=0, description="when error_event, hang_seconds and the like happen"
    )
    error_event: dict[str, Any] | None = Field(
        default=None, description="an `error` event with this body ends the stream"
    )
    malformed_event: bool = Field(default=False, description="a content_block_delta with broken JSON, then go on")
    huge_event_bytes: int | None = Field(default=None, description="one text delta of so many bytes")
    cut_after_events: int | None = Field(default=None, ge=0)
    cut_after_bytes: int | None = Field(default=None, ge=0, description="bytes of the body, plain answers too")
    cut: Literal["close", "reset", "end"] = Field(
        default="close",
        description="close: the connection ends early; reset: by TCP reset; end: the body ends as if whole",
    )

    @property
    def fault_at(self) -> int:
        return DEFAULT_AFTER_EVENTS if self.after_events is None else self.after_events


class Script:
    """The steps still to come."""

    def __init__(self) -> None:
        self.steps: list[Step] = []

    def take(self, path: str, headers: dict[str, str], body: bytes, parsed: Any) -> Step | None:
        """The step for this request, counted off; None when none matches."""
        for step in self.steps:
            if _matches(step.match, path, headers, body, parsed if isinstance(parsed, dict) else {}):
                if step.repeat != FOREVER:
                    step.repeat -= 1
                    if step.repeat <= 0:
                        self.steps.remove(step)
                return step
        return None


def _matches(match: Match, path: str, headers: dict[str, str], body: bytes, parsed: dict[str, Any]) -> bool:
    key = headers.get("x-api-key") or headers.get("authorization", "").removeprefix("Bearer ")
    return (
        path == (match.path or "/v1/messages")
        and match.api_key in {None, key}
        and match.model in {None, parsed.get("model")}
        and match.stream in {None, parsed.get("stream") is True}
        and all(headers.get(name) == value for name, value in match.headers.items())
        and (match.contains is None or match.contains in str(parsed) or match.contains.encode() in body)
    )


def exact_bytes(value: str | Bytes) -> bytes:
    return value.encode("utf-8", "surrogatepass") if isinstance(value, str) else base64.b64decode(value.base64)
