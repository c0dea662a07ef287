"""A turn's reply on its way to the client, and the client being watched meanwhile.

Its one invariant: a turn hears of it, once, when its client goes, before the answer or in the middle of it.
"""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass
from typing import Any, Self

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from services.relay.parts import Reply
from services.relay.pipe import Pipe
from services.relay.routes.rendering import render
from services.relay.streaming import PING
from services.relay.turn import Turn

_CLIENT_GONE = 499


@dataclass(frozen=True, slots=True)
class Begun:
    """A turn whose reply is there, or whose client has gone before; `gone` is done once the client has left."""

    turn: Turn
    gone: asyncio.Task[None]

    @property
    def reply(self) -> Reply:
        return self.turn.reply.result()

    def early_end(self, request: Request) -> Response | None:
        """The response that ends it here: for an error, or for a client that is not there to read it."""
        if not self.turn.reply.done():
            return Response(status_code=_CLIENT_GONE)
        if self.reply.error is None:
            return None
        self.gone.cancel()
        response = render(self.reply.error, request.scope)
        response.headers.update(self.reply.headers)
        return response

    def plain(self, content: bytes, headers: dict[str, str]) -> Response:
        self.gone.cancel()
        return Response(content, self.reply.status, headers)


async def begun(turn: Turn, request: Request) -> Begun:
    """The turn once its reply is there; it hears of it when its client goes, then or later."""
    gone = asyncio.create_task(_disconnected(request.receive))
    gone.add_done_callback(lambda task: None if task.cancelled() else turn.leave())
    either: set[asyncio.Future[Any]] = {turn.reply, gone}
    try:
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
    except asyncio.CancelledError:
        turn.leave()
        gone.cancel()
        raise
    return Begun(turn, gone)


async def reply_of(turn: Turn, request: Request, *, ping_seconds: float) -> Response:
    """The turn's answer as a response; when the client goes first, one that nobody reads."""
    seen = await begun(turn, request)
    if (end := seen.early_end(request)) is not None:
        return end
    content = seen.reply.content
    if isinstance(content, Pipe):
        return EventStream(_Pieces(content, ping_seconds), seen, headers=seen.reply.headers)
    return seen.plain(content, {"request-id": request.state.request_id} | seen.reply.headers)


async def unless_gone(request: Request, work: Coroutine[Any, Any, Response]) -> Response:
    """What the work gives; it is cut off when its client goes first."""
    task, gone = asyncio.create_task(work), asyncio.create_task(_disconnected(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else Response(status_code=_CLIENT_GONE)
    finally:
        gone.cancel()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


class _Pieces:
    """What comes through a pipe, and pings where nothing does; no generator, because a stream would hold its frame."""

    __slots__ = ("_ping_seconds", "_pipe")

    def __init__(self, pipe: Pipe, ping_seconds: float) -> None:
        self._pipe = pipe
        self._ping_seconds = ping_seconds

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        piece = await self._pipe.get(self._ping_seconds)
        if piece == b"":
            raise StopAsyncIteration
        return PING if piece is None else piece


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue


class EventStream(Response):
    """A stream of pieces as they come."""

    def __init__(self, pieces: AsyncIterator[bytes], seen: Begun, *, headers: dict[str, str]) -> None:
        self.status_code = 200
        self.background = None
        self._pieces = pieces
        self._seen = seen
        self.init_headers(headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            self.raw_headers = []  # they are sent, and the stream may run for minutes
            async for piece in self._pieces:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self._seen.turn.leave()  # means nothing to a turn that has ended
            self._seen.gone.cancel()
