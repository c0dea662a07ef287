"""Files that are cut short, damaged, or whole and wrong: 400, and nothing is stored."""

import json
import random
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from shared.canonical import message_hash
from tests.session_service.calls import Chat, Db, Json, User, fine, invalid, refused, said
from tests.session_service.creations import exported
from tests.session_service.exports import a_rich_chat, count, lines_of, sealed, take_back, taken_back
from tests.session_service.test_rewind import of_six


async def a_file(user: User) -> bytes:
    """A small file with something of each kind."""
    chat = await user.chat(title="T")
    await chat.append("hello")
    turn = await chat.open(said("q"))
    await turn.complete(said("a", "assistant"))
    await chat.remember("m")
    return await exported(chat)


async def test_cut_at_every_line(user: User, db: Db) -> None:
    file = await exported(await a_rich_chat(user, db))
    there = user.other()
    lines = file.splitlines(keepends=True)
    for kept in range(len(lines)):
        invalid(await take_back(there, b"".join(lines[:kept])), "body")
        if kept:
            invalid(await take_back(there, b"".join(lines[kept:])), "body")
            invalid(await take_back(there, b"".join(lines[: kept - 1] + lines[kept:])), "body")
    assert await count(db, there) == 0


async def test_cut_anywhere(user: User, db: Db) -> None:
    file = await a_file(user)
    there = user.other()
    chance = random.Random(11)
    ends = {1, len(file) - 1, *(chance.randrange(len(file)) for _ in range(40)), *range(len(file) - 140, len(file), 7)}
    for end in ends:
        invalid(await take_back(there, file[:end]), "body")
    assert await count(db, there) == 0


async def test_any_bit_flipped(user: User, db: Db) -> None:
    """Some hundred of all bits, and of the last line every byte's."""
    file = await a_file(user)
    there = user.other()
    chance = random.Random(5)
    last_line = file[:-1].rindex(b"\n") + 1
    places = [*(chance.randrange(last_line) for _ in range(150)), *range(last_line - 1, len(file))]
    for place in places:
        damaged = bytearray(file)
        damaged[place] ^= 1 << chance.randrange(8)
        answer = await take_back(there, bytes(damaged))
        assert answer.status_code == 400, (place, bytes(damaged[place - 5 : place + 5]), answer.text)
        invalid(answer, "body")
    assert await count(db, there) == 0


async def test_bytes_added(user: User, db: Db) -> None:
    file = await a_file(user)
    there = user.other()
    for damaged in (
        *(b"\n" + file, file + b"\n", file + b" ", file + b"{}\n", file * 2, file.replace(b"\n", b"\r\n")),
        *(b"\xef\xbb\xbf" + file, file.decode().encode("utf-16"), b"", b"\n", b"{}\n", b"[]\n", b"null\n", b"[" * 9999),
        file.replace(b'"hello"', b'"hell\xff"'),
        file.replace(b'"end"', b'"end","end":NaN'),
    ):
        invalid(await take_back(there, damaged), "body")
    assert await count(db, there) == 0


# ── whole files of contents that break a rule ───────────────────────────────────────────────────

Change = Callable[[list[Json]], Any]


def of(body: list[Json], kind: str, place: int = 0) -> Json:
    return [line for line in body if line["type"] == kind][place]


def changed(kind: str, place: int = 0, **fields: Any) -> Change:
    return lambda body: of(body, kind, place).update(fields)


def in_session(**fields: Any) -> Change:
    return lambda body: body[0]["session"].update(fields)


def again(kind: str) -> Change:
    return lambda body: body.append(of(body, kind))


WRONG: dict[str, Change] = {
    "no header": lambda body: body.pop(0),
    "two headers": lambda body: body.insert(0, body[0]),
    "the header last": lambda body: body.append(body.pop(0)),
    "another format": changed("header", format="other"),
    "a later version": changed("header", format_version=2),
    "an unknown line": lambda body: body.insert(1, {"type": "x"}),
    "a line without a type": lambda body: body[1].pop("type"),
    "a type that is a list": lambda body: body[1].update(type=["message"]),
    "a reserved id": in_session(session_id="stats"),
    "a bad id": in_session(session_id="a/b"),
    "no such status": in_session(status="new"),
    "ended without a reason": in_session(status="ended", ended_reason=None),
    "active with a reason": in_session(ended_reason="user"),
    "version 0": in_session(version=0),
    "version 2^62": in_session(version=2**62),
    "a long title": in_session(title="t" * 501),
    "big metadata": in_session(metadata={"x": "x" * 70_000}),
    "a long summary": in_session(session_summary="s" * 70_000),
    "a summary by nobody's name": in_session(summary_model=""),
    "no idle timeout": in_session(idle_timeout_seconds=0),
    "times without offset": in_session(created_at="2024-01-01T00:00:00"),
    "activity in the year 9998": in_session(last_activity="9998-12-31T23:59:59Z"),
    "a summary of more": changed("header", summary_to_seq=99),
    "a window behind the end": changed("header", window_start_seq=9),
    "a generation behind the end": changed("header", first_seq=9),
    "a seq left out": lambda body: body.remove(of(body, "message", 1)),
    "a seq twice": changed("message", 1, seq=1),
    "seq 0": changed("message", seq=0),
    "messages in another order": lambda body: body.insert(1, body.pop(2)),
    "a message's id twice": lambda body: of(body, "message").update(message_id=of(body, "message", 1)["message_id"]),
    "a memory twice": again("memory"),
    "a turn twice": again("turn"),
    "a message twice": again("message"),
    "blank content": changed("message", content=" "),
    "no content": changed("message", content=None),
    "blocks that are none": changed("message", content=None, content_blocks=[{"text": "x"}]),
    "no such role": changed("message", role="robot"),
    "U+0000": changed("message", content="a\0b"),
    "seven decimals": changed("message", cost_usd=1e-7),
    "negative tokens": changed("message", tokens_used=-1),
    "a date for a time": changed("message", created_at="2024-01-01"),
    "a number for a time": changed("message", superseded_at=5),
    "no such memory type": changed("memory", memory_type="x"),
    "a blank memory": changed("memory", content=""),
    "closed at no time": changed("turn", closed_at=None),
    "open, and closed": changed("turn", status="open"),
    "no such turn status": changed("turn", status="x"),
    "input past the end": changed("turn", input_to_seq=99),
    "output past the end": changed("turn", output_to_seq=99),
    "output from nowhere": changed("turn", output_from_seq=None),
    "input backwards": changed("turn", input_from_seq=3, input_to_seq=2),
    "usage that is none": changed("turn", usage=[]),
}


@pytest.mark.parametrize("name", WRONG)
async def test_a_sealed_file_that_breaks_a_rule(user: User, db: Db, name: str) -> None:
    body = lines_of(await a_file(user))
    there = user.other()
    WRONG[name](body)
    answer = await take_back(there, sealed(body))
    invalid(answer, "body")
    assert await count(db, there) == 0


@pytest.mark.parametrize("kind", ["messages", "memories", "turns"])
@pytest.mark.parametrize("off", [-1, 1])
async def test_counts_that_are_not_those_of_the_lines(user: User, db: Db, kind: str, off: int) -> None:
    body = lines_of(await a_file(user))
    counts = {"messages": 3, "memories": 1, "turns": 1}
    there = user.other()
    for wrong in (counts | {kind: counts[kind] + off}, counts | {"more": 1}, {}):
        invalid(await take_back(there, sealed(body, wrong or {"x": 1})), "body")
    assert await count(db, there) == 0
    fine(await take_back(there, sealed(body, counts)))


async def test_derived_things_are_derived_anew(user: User) -> None:
    """A file says nothing about hashes, sizes and counters; what it says in vain is not believed."""
    chat = await of_six(user)
    body = lines_of(await exported(chat))
    body[0]["session"].update(message_count=99, total_tokens=99, total_cost=99, user_id="someone", is_active=False)
    for line in body[1:]:
        line.update(user_id="someone", session_id="x", canonical_hash="00", begins_window=False, unknown=[1])
    copy = await taken_back(user.other(), sealed(body))
    session = await copy.get()
    expected = await chat.get()
    assert session == expected | {"user_id": copy.user.id}
    wanted = [message_hash(("user", "assistant")[(n + 1) % 2], f"m{n}").hex() for n in range(1, 7)]
    assert fine(await copy.call("POST", "/align", json={"hashes": wanted}))["matched"] == 6
    assert {each["user_id"] for each in (await copy.messages())["messages"]} == {copy.user.id}
    refused(await Chat(User(user.http, "someone"), copy.id).call("GET"), 404, "session_not_found")


async def test_a_message_of_the_largest_size(user: User) -> None:
    """32 MiB of content as blocks and 1 MiB of native: what may be stored can be taken away and brought back."""
    chat = await user.chat()
    blocks = [{"type": "text", "text": "x" * (2**25 - 100)}]
    body = json.dumps(said(blocks, native="n" * (2**20 - 10))).encode()
    fine(await chat.call("POST", "/messages", content=body))
    file = await exported(chat)
    answer: httpx.Response = await take_back(user.other(), file)
    assert fine(answer)["message_count"] == 1
