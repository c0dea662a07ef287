"""A stream on its way from upstream to the client.

Its one invariant: what the client gets is upstream's bytes, whole events in order; nothing of an answer passes
before its commit point, and its last event only once the turn is kept.
"""

import asyncio
import json
from collections.abc import Callable
from typing import Final

from services.relay import sse
from services.relay.assembly import Assembly
from services.relay.errors import claude_body, claude_type
from services.relay.outcomes import OPERATORS_ERRORS, ErrorEvent
from services.relay.pipe import Pipe
from services.relay.sse import Event
from services.relay.upstream import UpstreamAnswer, UpstreamError, UpstreamProtocolError
from shared.errors import ServiceError

PING: Final = b'event: ping\ndata: {"type": "ping"}\n\n'
_AFTER_STOP_SECONDS: Final = 0.5
_AFTER_STOP_BYTES: Final = 64 * 2**10


class Stalled(Exception):
    """The client has read nothing for too long."""


async def pass_on(
    answer: UpstreamAnswer,
    assembly: Assembly,
    pipe: Pipe,
    *,
    release: Callable[[], None],
    on_stall: Callable[[], None],
    stalled_seconds: float,
) -> bytes:
    """Passes events on as they come, from the commit point on, and gives the bytes of the last ones, to be sent later.

    `release` is called once, at the commit point, `on_stall` when the client has read nothing for so long.
    Raises UpstreamError, and what `on_stall` raises.
    """
    held: list[bytes] | None = []
    events = sse.Events(answer.chunk)
    async for event in events:
        assembly.add(event)
        if assembly.error is not None:
            raise await _error_event(event, assembly, pipe, is_committed=held is None)
        if held is not None and (assembly.committed or assembly.finished):
            release()
            pipe.put_now(b"".join(held))
            held = None
        if assembly.finished:
            return event.raw + await _rest(events)
        if held is not None:
            held.append(event.raw)
        elif pipe.has_room:
            pipe.put_now(event.raw)
        else:
            await _put_later(pipe, event.raw, on_stall, stalled_seconds)
    raise UpstreamProtocolError("the stream ended without message_stop")


async def _put_later(pipe: Pipe, piece: bytes, on_stall: Callable[[], None], stalled_seconds: float) -> None:
    try:
        async with asyncio.timeout(stalled_seconds):
            await pipe.put(piece)
    except TimeoutError:
        on_stall()


async def _error_event(event: Event, assembly: Assembly, pipe: Pipe, *, is_committed: bool) -> ErrorEvent:
    error = ErrorEvent(assembly.error or {}, is_passed=is_committed)
    if is_committed and error.type not in OPERATORS_ERRORS:
        pipe.put_now(event.raw)
        return error
    return ErrorEvent(error.data, is_passed=False)


async def _rest(events: sse.Events) -> bytes:
    """What follows message_stop: as a rule the end of the body, which frees the connection for the next call."""
    rest = b""
    try:
        async with asyncio.timeout(_AFTER_STOP_SECONDS):
            async for event in events:
                rest += event.raw
                if len(rest) > _AFTER_STOP_BYTES:
                    break
    except (TimeoutError, UpstreamError):
        return rest
    return rest


def error_event(error: ServiceError, request_id: str) -> bytes:
    """The event that ends a stream when its 200 is out already."""
    return sse.format_event("error", claude_body(error, request_id))


def refusal_event(status: int, content: bytes) -> bytes:
    """Upstream's refusal as the event that ends a stream: its own words where they are an error of the protocol."""
    try:
        told = json.loads(content)
    except (ValueError, RecursionError):
        told = None
    if not (isinstance(told, dict) and isinstance(told.get("error"), dict)):
        told = {"error": {"type": claude_type(status), "message": "The upstream refused the request"}}
    return sse.format_event("error", {"type": "error"} | told)
