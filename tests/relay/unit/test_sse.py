"""The splitter: every byte in exactly one event, however the stream arrives."""

import itertools
import re
import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from services.relay.sse import Event, Events, EventTooLarge, Splitter, format_event


def split(stream: bytes, cuts: list[int] | None = None) -> list[Event]:
    splitter = Splitter()
    places = sorted({min(cut, len(stream)) for cut in cuts or []} | {0, len(stream)})
    found: list[Event] = []
    for start, end in itertools.pairwise(places):
        found += splitter.feed(stream[start:end])
    return [*found, *splitter.finish()]


line_ends = st.sampled_from([b"\n", b"\r\n", b"\r"])
lines = st.sampled_from(
    [
        b"event: message_start",
        b"event:x",
        b'data: {"a":1}',
        b"data",
        b"data:  two",
        b": note",
        b"id: 7",
        b"",
        "data: 你好 é".encode(),
    ]
)
streams = st.lists(st.tuples(lines, line_ends), max_size=12).map(lambda parts: b"".join(a + b for a, b in parts))
rough_streams = st.lists(st.sampled_from([b"\r", b"\n", b"a", b"data:x", b"\xef\xbb\xbf", b"\xff"]), max_size=14).map(
    b"".join
)


@given(st.one_of(streams, rough_streams), st.lists(st.integers(0, 200), max_size=10))
@example(b"data: a\r\n\r\ndata: b\r\n\r\n", [8, 10])
@example(b"data: a\r\rdata: b\r\r", [9])
@example(b"data: a\r\r\ndata: b\n\n", [9])
def test_any_chunking_gives_the_same_events_and_all_bytes(stream: bytes, cuts: list[int]) -> None:
    whole = split(stream)
    assert split(stream, cuts) == whole
    assert split(stream, list(range(len(stream)))) == whole
    assert b"".join(event.raw for event in whole) == stream


@given(streams)
def test_fields_are_those_of_the_living_standard(stream: bytes) -> None:
    expected: list[tuple[str, bytes]] = []
    name, data = "", list[bytes]()
    for line in [*re.split(rb"\r\n|\r|\n", stream), b""]:
        if not line:
            if data:
                expected.append((name, b"\n".join(data)))
            name, data = "", []
        elif line.startswith(b"event:"):
            name = line[6:].removeprefix(b" ").decode()
        elif line.startswith(b"data"):
            data.append(line[5:].removeprefix(b" "))
    assert [(event.name, event.data) for event in split(stream) if b"data" in event.raw] == expected


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_line_ends(end: str) -> None:
    first = f"event: ping{end}data: {{}}{end}{end}".encode()
    comment = f": still here{end}{end}".encode()
    cut_off = f"event: error{end}data: 1".encode()
    assert split(first + comment + cut_off) == [
        Event(first, "ping", b"{}"),
        Event(comment, "", b""),
        Event(cut_off, "error", b"1"),
    ]


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_an_event_comes_with_its_last_byte(end: bytes) -> None:
    splitter = Splitter()
    for _ in range(3):
        event = b"data: 1" + end + end
        assert list(splitter.feed(event[:-1])) == []
        assert [found.raw for found in splitter.feed(event[-1:])] == [event]


def test_a_stream_of_bare_crs_is_not_held_back() -> None:
    splitter = Splitter()
    assert [event.data for event in splitter.feed(b"data: 1\r\r")] == [b"1"]
    assert [event.data for event in splitter.feed(b"data: 2\r\r")] == [b"2"]


def test_event_limit() -> None:
    splitter = Splitter(limit_bytes=20)
    fits = b"data: " + b"x" * 12 + b"\n\n"
    assert [event.raw for event in splitter.feed(fits)] == [fits]
    found = splitter.feed(fits + b"data: " + b"x" * 13 + b"\n\n")
    assert next(found).raw == fits
    with pytest.raises(EventTooLarge):
        next(found)
    with pytest.raises(EventTooLarge):
        list(Splitter(limit_bytes=20).feed(b"x" * 21))


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_a_large_event_in_small_chunks_costs_its_bytes(end: bytes) -> None:
    stream = b": cr" + end + b"data: " + b"x" * (4 * 2**20) + end + end
    splitter = Splitter()
    started = time.process_time()
    found = [event for at in range(0, len(stream), 256) for event in splitter.feed(stream[at : at + 256])]
    assert time.process_time() - started < 2  # quadratic would be minutes
    assert [len(event.raw) for event in found] == [len(stream)]


async def test_events_of_a_body() -> None:
    chunks = [b"data: 1\n", b"\ndata", b": 2", b""]

    async def read() -> bytes:
        return chunks.pop(0)

    events = Events(read)
    assert [event.data async for event in events] == [b"1", b"2"]
    assert [event async for event in events] == []  # and nothing is read again


def test_format_event() -> None:
    written = format_event("ping", {"text": "你好\n\ud800", "big": 2**70})
    (event,) = split(written)
    assert (event.raw, event.name) == (written, "ping")
    assert format_event("", {"a": 1}) == b'data: {"a":1}\n\n'
