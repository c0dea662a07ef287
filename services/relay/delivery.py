"""The client's side of a turn: the reply's head, the pipe that a stream goes through, and the headers of both.

Its one invariant: a client gets one head, and an error that comes after it as the last event of its stream.
"""

import asyncio
from time import monotonic
from typing import Final

from services.relay import replays, streaming
from services.relay.errors import Interrupted
from services.relay.idempotency import Replay
from services.relay.metrics import Metrics
from services.relay.outcomes import Ended
from services.relay.parts import Caller, Reply
from services.relay.pipe import Pipe
from shared.errors import ServiceError

EVENT_STREAM: Final = "text/event-stream"
_ATTEMPTS: Final = "x-relay-attempts"
_PERSISTED: Final = "x-session-persisted"
_REPLAYED: Final = {"idempotent-replayed": "true"}


class Delivery:
    """What one client gets. `reply` is there when the answer's head may go out."""

    def __init__(self, caller: Caller, metrics: Metrics, *, is_stream: bool) -> None:
        self.headers = {_ATTEMPTS: "0"}
        self.pipe = Pipe()
        self.reply: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._request_id = caller.request_id
        self._metrics = metrics
        self._is_stream = is_stream
        self._started_at = monotonic()

    def attempted(self, number: int) -> None:
        self.headers[_ATTEMPTS] = str(number)

    def opened(self, session_id: str, turn_id: str) -> None:
        self.headers |= {"x-session-id": session_id, "x-turn-id": turn_id, _PERSISTED: "pending"}

    @property
    def has_turn(self) -> bool:
        return "x-turn-id" in self.headers

    def release(self, headers: dict[str, str]) -> None:
        """Lets a stream's head go out."""
        own = {
            "content-type": f"{EVENT_STREAM}; charset=utf-8",
            "cache-control": "no-cache",
            "request-id": self._request_id,
        }
        persisted = {_PERSISTED: self.headers.get(_PERSISTED, "none")}
        self._tell(Reply(200, own | self.headers | headers | persisted, self.pipe))

    def release_early(self) -> None:
        """Upstream says nothing for long: a stream's head goes out, with a ping, before there is an answer."""
        if self._is_stream and not self.reply.done():
            self.pipe.put_now(streaming.PING)
            self.release({})

    def replay(self, replay: Replay) -> None:
        """Gives an answer again, as JSON or as a stream."""
        self.headers |= replay.headers | _REPLAYED
        if self._is_stream:
            self.pipe.put_now(b"".join(replays.stream_of(replay.message)))
            self.release({})
        else:
            self._tell(Reply(200, self.headers | {"content-type": "application/json"}, replay.message))

    def whole_headers(self, ended: Ended, persisted: str) -> dict[str, str]:
        return self.headers | ended.headers | {_PERSISTED: persisted}

    def end(self, ended: Ended, persisted: str) -> None:
        """The whole of a plain answer, or the end of a stream."""
        if self.reply.done():
            if ended.error is not None:
                self.pipe.put_now(streaming.error_event(ended.error, self._request_id))
            self.pipe.put_now(_rest_of_stream(ended))
        else:
            self._tell(Reply(ended.status, self.whole_headers(ended, persisted), ended.content, ended.error))

    def fail(self, error: ServiceError) -> None:
        if self.reply.done():
            self.pipe.put_now(streaming.error_event(error, self._request_id))
        else:
            self._tell(Reply(error.status, self.headers, error=error))

    def let_go(self) -> None:
        """The client does not read: should it come back, it finds an error."""
        self.pipe.cut(streaming.error_event(Interrupted(), self._request_id))

    def _tell(self, reply: Reply) -> None:
        if not self.reply.done():
            self._metrics.first_byte.observe(monotonic() - self._started_at)
            self.reply.set_result(reply)


def _rest_of_stream(ended: Ended) -> bytes:
    """The last bytes of a stream; what came as a whole answer, or as a refusal, is told as events."""
    if ended.status != 200:
        return streaming.refusal_event(ended.status, ended.content)
    return b"".join(replays.stream_of(ended.plain)) if ended.plain else ended.content
