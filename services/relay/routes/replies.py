"""A turn's reply on its way to the client, and the client being watched meanwhile.

Its one invariant: a turn hears of it, once, when its client goes, before the answer or in the middle of it.
"""

import asyncio
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from services.relay.pipe import Pipe
from services.relay.routes.rendering import render
from services.relay.streaming import PING
from services.relay.turn import Turn

_CLIENT_GONE = 499


async def reply_of(turn: Turn, request: Request, *, ping_seconds: float) -> Response:
    """The turn's answer as a response; when the client goes first, one that nobody reads."""
    gone = asyncio.create_task(_disconnected(request.receive))
    gone.add_done_callback(lambda task: None if task.cancelled() else turn.leave())
    either: set[asyncio.Future[Any]] = {turn.reply, gone}
    try:
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
    except asyncio.CancelledError:
        turn.leave()
        gone.cancel()
        raise
    if not turn.reply.done():
        return Response(status_code=_CLIENT_GONE)
    reply = turn.reply.result()
    if isinstance(reply.content, Pipe):
        return EventStream(reply.content, turn, gone, headers=reply.headers, ping_seconds=ping_seconds)
    gone.cancel()
    if reply.error is None:
        return Response(reply.content, reply.status, {"request-id": request.state.request_id} | reply.headers)
    response = render(reply.error, request.scope)
    response.headers.update(reply.headers)
    return response


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue


class EventStream(Response):
    """A stream as it comes out of a pipe; `gone` is done when the client has left."""

    def __init__(
        self, pipe: Pipe, turn: Turn, gone: asyncio.Task[None], *, headers: dict[str, str], ping_seconds: float
    ) -> None:
        self.status_code = 200
        self.background = None
        self._pipe = pipe
        self._turn = turn
        self._gone = gone
        self._ping_seconds = ping_seconds
        self.init_headers(headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            while (piece := await self._pipe.get(self._ping_seconds)) != b"":
                content = PING if piece is None else piece
                await send({"type": "http.response.body", "body": content, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self._turn.leave()  # means nothing to a turn that has ended
            self._gone.cancel()
