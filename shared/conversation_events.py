"""A conversation's events as they happen, for clients: over a WebSocket, or by asking again and again.

Its one invariant: every event after the place where one begins is given once and in order, however often the
connection is lost in between.
"""

import asyncio
import random
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from datetime import datetime
from time import monotonic
from typing import Any, Final, Literal, Self

from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException

from shared.conversation_calls import Times
from shared.conversation_errors import ConversationError, NotFound, Unauthorized, Unavailable, from_status
from shared.json import loads

Json = Mapping[str, Any]

_OPEN_SECONDS: Final = 10.0
_CLOSE_SECONDS: Final = 2.0
_FIRST_SECONDS: Final = 0.5
_MOST_SECONDS: Final = 15.0
_PAGE: Final = 100
_POLL_SECONDS: Final = 1.0
_FINAL_CODES: Final[Mapping[int, tuple[type[ConversationError], int, str]]] = {
    4001: (Unauthorized, 401, "The conversation's key is wrong"),
    4004: (NotFound, 404, "The conversation is not there"),
}
_ROLES: Final = {"agent": "assistant", "user": "user"}
_V0_STATES: Final = {
    "awaiting_user_input": "idle",
    "awaiting_user_confirmation": "waiting_for_confirmation",
    "stopped": "paused",
}


@dataclass(frozen=True, slots=True)
class Event:
    """One event. Of a message: `role`, `text`, `content`; of a change of the execution status: `status`."""

    id: str
    timestamp: datetime
    source: str
    kind: Literal["message", "status", "error", "other"]
    role: str | None = None
    text: str = ""
    content: tuple[Json, ...] = ()
    status: str | None = None
    raw: Json = field(default_factory=dict, repr=False)

    @classmethod
    def from_v1(cls, frame: Json) -> Self:
        common = frame["id"], datetime.fromisoformat(frame["timestamp"]), frame["source"]
        if isinstance(message := frame.get("llm_message"), dict):
            content = tuple(message.get("content", ()))
            text = "".join(part.get("text", "") for part in content)
            return cls(*common, "message", message.get("role"), text, content, raw=frame)
        if frame.get("key") == "execution_status":
            return cls(*common, "status", status=frame["value"], raw=frame)
        if frame.get("kind") == "ConversationErrorEvent":
            return cls(*common, "error", text=str(frame.get("detail", "")), raw=frame)
        return cls(*common, "other", raw=frame)

    @classmethod
    def from_v0(cls, frame: Json) -> Self:
        common = str(frame["id"]), datetime.fromisoformat(frame["timestamp"]), frame["source"]
        if frame.get("action") == "message":
            told = frame.get("args", {})
            text, urls = told.get("content", ""), told.get("image_urls") or []
            images = ({"type": "image", "image_urls": urls},) if urls else ()
            content = ({"type": "text", "text": text}, *images)
            return cls(*common, "message", _ROLES.get(common[2]), text, content, raw=frame)
        if state := (frame.get("extras") or {}).get("agent_state"):
            return cls(*common, "status", status=_V0_STATES.get(state, state), raw=frame)
        if frame.get("observation") == "error":
            return cls(*common, "error", text=str(frame.get("content", "")), raw=frame)
        return cls(*common, "other", raw=frame)


class Patience:
    """Waits between tries: twice as long after each failure in a row, at random up to a half less.

    Gives up once nothing was heard for `most_seconds`.
    """

    def __init__(self, most_seconds: float, *, first_wait_seconds: float, longest_wait_seconds: float) -> None:
        self._most_seconds = most_seconds
        self._first_seconds = first_wait_seconds
        self._longest_seconds = longest_wait_seconds
        self._failures = 0
        self._failed_at = 0.0
        self._silent_since: float | None = None

    def heard(self, *, news: bool = False) -> None:
        """The other side is there; with `news` it is well."""
        self._silent_since = None
        if news:
            self._failures = 0

    async def wait(self, error: Unavailable) -> None:
        """Raises the error when it has been one too many."""
        now = monotonic()
        if now - self._failed_at > 2 * self._longest_seconds:
            self._failures = 0
        self._silent_since = self._silent_since or now
        wait_seconds = min(self._first_seconds * 2**self._failures, self._longest_seconds)
        wait_seconds = max(wait_seconds * random.uniform(0.5, 1), error.retry_after_seconds)  # noqa: S311
        if now + wait_seconds - self._silent_since > self._most_seconds:
            raise error
        self._failures += 1
        await asyncio.sleep(wait_seconds)
        self._failed_at = monotonic()


def _patience(times: Times) -> Patience:
    return Patience(times.patience_seconds, first_wait_seconds=_FIRST_SECONDS, longest_wait_seconds=_MOST_SECONDS)


# ── V1 ──────────────────────────────────────────────────────────────────────────────────────────


async def follow(
    url_after: Callable[[str | None], str], times: Times, *, after: str | None
) -> AsyncGenerator[Event, None]:
    """The events after that one, or all; then those that come. Never ends by itself.

    `url_after` gives the WebSocket's address for going on after an event. Raises Unauthorized and NotFound, and
    Unavailable when no connection could be had for `patience_seconds`.
    """
    last, seen, patience = after, set[str](), _patience(times)
    while True:
        try:
            async with aclosing(_frames(url_after(last), times.keepalive_seconds)) as frames:
                async for frame in frames:
                    # The state that a connection begins with is no event; a server may send more than was asked for.
                    is_new = frame.get("key") != "full_state" and frame["id"] not in seen
                    patience.heard(news=is_new)
                    if is_new:
                        event = Event.from_v1(frame)
                        seen.add(event.id)
                        last = event.id
                        yield event
        except (OSError, WebSocketException) as error:
            await patience.wait(_temporary(error))


async def _frames(url: str, keepalive_seconds: float) -> AsyncGenerator[Json, None]:
    async with connect(
        url,
        proxy=None,
        max_size=None,
        open_timeout=_OPEN_SECONDS,
        close_timeout=_CLOSE_SECONDS,
        ping_interval=keepalive_seconds,
        ping_timeout=keepalive_seconds,
    ) as socket:
        while True:
            yield _frame(await socket.recv())


def _frame(text: str | bytes) -> Json:
    try:
        frame: Any = loads(text)
    except ValueError:
        frame = None
    if not isinstance(frame, dict) or not frame.keys() >= {"id", "timestamp", "source"}:
        raise ConversationError("The server has sent what is no event")
    return frame


def _temporary(error: Exception) -> Unavailable:
    """What has failed, if trying again may help; raises what has failed for good."""
    failure = _failure(error)
    if isinstance(failure, Unavailable):
        return failure
    raise failure from error


def _failure(error: Exception) -> ConversationError:
    if isinstance(error, ConnectionClosed) and error.rcvd is not None:
        cls, status, detail = _FINAL_CODES.get(error.rcvd.code, (Unavailable, None, "The connection was closed"))
        return cls(f"{detail} (close code {error.rcvd.code} {error.rcvd.reason})".replace(" )", ")"), status=status)
    if isinstance(error, InvalidStatus):
        answer = error.response
        detail = f"No WebSocket: {answer.reason_phrase}"
        return from_status(answer.status_code, detail, answer.headers.get("retry-after"))
    return Unavailable(f"The connection was lost: {type(error).__name__} {error}")


# ── V0 ──────────────────────────────────────────────────────────────────────────────────────────


async def poll(
    page_from: Callable[[int, int], Awaitable[Json]], times: Times, *, after: str | None
) -> AsyncGenerator[Event, None]:
    """As `follow`; `page_from` gives events from a number on, and at most so many."""
    next_id, patience = 0 if after is None else int(after) + 1, _patience(times)
    while True:
        try:
            page = await page_from(next_id, _PAGE)
        except Unavailable as error:
            await patience.wait(error)
            continue
        patience.heard(news=True)
        for frame in page["events"]:
            next_id = frame["id"] + 1
            yield Event.from_v0(frame)
        if not page["has_more"]:
            await asyncio.sleep(min(times.poll_seconds, _POLL_SECONDS))
