"""Server-Sent Events as bytes: a stream cut into events, and an event written.

Its one invariant: the raw bytes of all events, joined, are the stream, however it arrived in chunks.
"""

import re
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, NamedTuple, Self

from services.relay.upstream import UpstreamProtocolError, encode_body

EVENT_LIMIT_BYTES = 8 * 2**20

_CR, _LF = 13, 10
_LINE_END = re.compile(rb"\r\n|\r|\n")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class EventTooLarge(UpstreamProtocolError):
    """One event is longer than the relay passes on."""

    kind = "too_large"


class Event(NamedTuple):
    """`raw` is everything up to and with the blank line; `name` is empty when no line gave one.

    Comments, and blank lines of their own, are events without name and data.
    """

    raw: bytes
    name: str
    data: bytes


class Splitter:
    """Cuts a stream into events. Costs O(bytes), also for a large event in small chunks.

    Exhaust what `feed` gives before feeding again.
    """

    __slots__ = ("_any_cr", "_buffer", "_cr_style", "_limit_bytes", "_line_start", "_searched")

    def __init__(self, limit_bytes: int = EVENT_LIMIT_BYTES) -> None:
        self._limit_bytes = limit_bytes
        self._buffer = bytearray()  # begins where the current event begins
        self._searched = 0  # no line end is left to find before this position
        self._line_start = 0
        self._any_cr = False
        self._cr_style = False  # the last line ended in a CR that no LF followed

    def feed(self, chunk: bytes) -> Iterator[Event]:
        """The events that this chunk completes; raises EventTooLarge after those before the large one."""
        self._buffer += chunk
        if not self._any_cr and _CR in chunk:
            self._any_cr = True
            self._searched = 0  # again from the event's start, now line by line
        while (end := self._event_end()) >= 0:
            raw = bytes(self._buffer[:end])
            del self._buffer[:end]
            self._searched = self._line_start = 0
            self._check(len(raw))
            yield _event(raw)
        self._check(len(self._buffer))

    def finish(self) -> Iterator[Event]:
        """At the stream's end: what is left, as an event whose blank line is missing."""
        raw = bytes(self._buffer)
        self._buffer.clear()
        self._searched = self._line_start = 0
        if raw:
            yield _event(raw)

    def _check(self, size_bytes: int) -> None:
        if size_bytes > self._limit_bytes:
            raise EventTooLarge(f"an event is longer than {self._limit_bytes} bytes")

    def _event_end(self) -> int:
        return self._blank_line_end() if self._any_cr else self._double_lf_end()

    def _double_lf_end(self) -> int:
        """The usual case: while the stream has no CR, an event ends at LF LF, or is a lone LF."""
        buffer = self._buffer
        if buffer[:1] == b"\n":
            return 1
        found = buffer.find(b"\n\n", max(0, self._searched - 1))
        self._searched = len(buffer)
        return found + 2 if found >= 0 else -1

    def _blank_line_end(self) -> int:
        """The position after the next blank line, or -1 when it is not there or not decided yet."""
        buffer = self._buffer
        while match := _LINE_END.search(buffer, self._searched):
            start, end = match.span()
            blank = start == self._line_start
            if buffer[start] == _CR:
                if blank and self._cr_style:
                    # A stream of bare CRs: waiting for a LF would hold every event back until the next.
                    # A LF that comes after all is the head of the next event's bytes.
                    return start + 1
                if end == len(buffer) and end == start + 1:
                    self._searched = start  # perhaps the LF is in the next chunk
                    return -1
            lone_lf_after_cr = blank and start == 0 and buffer[start] == _LF and self._cr_style
            self._cr_style = buffer[start] == _CR and end == start + 1
            self._searched = self._line_start = end
            if blank and not lone_lf_after_cr:
                return end
        self._searched = len(buffer)
        return -1


def _event(raw: bytes) -> Event:
    name = ""
    data: list[bytes] = []
    for line in raw.removeprefix(_BYTE_ORDER_MARK).splitlines():
        field, _, value = line.partition(b":")
        if field == b"data":
            data.append(value.removeprefix(b" "))
        elif field == b"event":
            name = value.removeprefix(b" ").decode("utf-8", "replace")
    return Event(raw, name, b"\n".join(data))


class Events:
    """The events of a body as they become complete; raises EventTooLarge, and what `read` raises.

    `read` gives the next bytes, b"" at the end.
    """

    __slots__ = ("_complete", "_read", "_splitter")

    def __init__(self, read: Callable[[], Awaitable[bytes]], limit_bytes: int = EVENT_LIMIT_BYTES) -> None:
        self._read: Callable[[], Awaitable[bytes]] | None = read
        self._splitter = Splitter(limit_bytes)
        self._complete: Iterator[Event] = iter(())

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        while (event := next(self._complete, None)) is None:
            if self._read is None:
                raise StopAsyncIteration
            if chunk := await self._read():
                self._complete = self._splitter.feed(chunk)
            else:
                self._read = None
                self._complete = self._splitter.finish()
        return event


def format_event(name: str, data: Any) -> bytes:
    """One event as Claude writes it: name, one line of JSON, a blank line. An empty name is left out."""
    head = f"event: {name}\n".encode() if name else b""
    return head + b"data: " + encode_body(data) + b"\n\n"
