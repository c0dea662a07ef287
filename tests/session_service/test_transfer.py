"""Export and import: the round trip gives the same session."""

import asyncio
import json
from collections.abc import AsyncIterator

import httpx
import pytest

from tests.session_service.calls import Chat, Db, User, check_counters, fine, invalid, refused, said, stored_rows, wait
from tests.session_service.creations import exported
from tests.session_service.exports import a_rich_chat, grow, lines_of, seen, take_back, taken_back
from tests.session_service.test_rewind import of_six


async def test_the_file(user: User, db: Db) -> None:
    chat = await a_rich_chat(user, db)
    file = await exported(chat)
    header, *body = lines_of(file)
    assert (header["format"], header["format_version"]) == ("session-export", 1)
    assert header["session"] == await chat.get()
    kinds = [line["type"] for line in body]
    assert kinds == ["message"] * 12 + ["memory"] * 2 + ["turn"] * 6
    assert [line["seq"] for line in body[:12]] == list(range(1, 13))
    listed = (await chat.messages(include_superseded=True))["messages"]
    for line, message in zip(body, listed, strict=False):
        shown = {name: value for name, value in line.items() if name in message}
        assert shown == {name: message[name] for name in shown}
        assert shown.keys() >= {"seq", "role", "created_at", "superseded_at", "native", "metadata", "message_id"}
    tokens = [row[0] for row in await db.fetch("SELECT lease_token FROM dev.session_turns WHERE user_id = $1", user.id)]
    assert len(tokens) == 6
    assert not any(token in file.decode() for token in tokens)
    assert await exported(chat) == file


@pytest.mark.parametrize("steps", [[], ["completed"], ["completed", "archived"], ["ended"]])
async def test_round_trip_to_another_user(user: User, db: Db, steps: list[str]) -> None:
    chat = await a_rich_chat(user, db)
    for step in steps:
        fine(await chat.put(status=step))
    before = await seen(chat)
    there = user.other()
    copy = await taken_back(there, await exported(chat))
    assert copy.id == chat.id
    after = await seen(copy)
    for part, expected in before.items():
        assert after[part] == expected, part
    await check_counters(db, copy)
    assert await seen(chat) == before
    renamed = [json.loads(json.dumps(line).replace(user.id, there.id)) for line in lines_of(await exported(chat))]
    assert lines_of(await exported(copy)) == renamed
    if not steps:
        assert (await copy.append("goes on"))["seq"] == 13
        turn = await copy.open(said("and on", "user"))
        done = await turn.complete(said("yes", "assistant"))
        assert done["session"]["message_count"] == before["session"]["message_count"] + 3
        await check_counters(db, copy)


async def test_the_same_user_gets_a_copy_under_another_id(user: User, db: Db) -> None:
    """Its messages' ids are taken, by the original; all else is the same."""
    chat = await a_rich_chat(user, db)
    before = await seen(chat)
    file = await exported(chat)
    refused(await take_back(user, file), 409, "session_exists", "Session already exists")
    copy = await taken_back(user, file, session_id="another id")
    assert copy.id == "another id"
    after = await seen(copy)
    ids = [[each.pop("message_id") for each in shown["messages"]] for shown in (before, after)]
    assert not set(ids[0]) & set(ids[1])
    assert after == before
    await check_counters(db, copy)
    refused(await take_back(user, file, session_id="another id"), 409, "session_exists")


async def test_message_ids_are_kept_unless_taken(user: User) -> None:
    chat = await user.chat()
    for name in ("a", "b", "c"):
        await chat.append(name, message_id=f"id-{name}")
    there = user.other()
    await (await there.chat()).append("mine", message_id="id-b")
    copy = await taken_back(there, await exported(chat))
    ids = [each["message_id"] for each in (await copy.messages())["messages"]]
    assert (ids[0], ids[2]) == ("id-a", "id-c")
    assert ids[1] != "id-b"
    assert await copy.contents() == ["a", "b", "c"]


async def test_after_an_erase_everything_comes_back(user: User, db: Db) -> None:
    chat = await a_rich_chat(user, db)
    before, file = await seen(chat), await exported(chat)
    fine(await user.http.delete(f"/users/{user.id}"))
    assert await seen(await taken_back(user, file)) == before
    assert await exported(chat) == file


async def test_an_expired_session(user: User, db: Db) -> None:
    chat = await of_six(user, idle_timeout_seconds=60)
    await wait(db, chat, 61)
    copy = await taken_back(user.other(), await exported(chat))
    session = await copy.get()
    assert (session["status"], session["ended_reason"]) == ("ended", "expired")
    refused(await copy.post("x"), 409, "session_not_active")


async def test_a_turn_that_was_open_is_nobodys_in_the_copy(user: User, db: Db) -> None:
    chat = await of_six(user)
    turn = await chat.open(said("q"))
    copy = await taken_back(user.other(), await exported(chat))
    listed = fine(await copy.call("GET", "/turns"))["turns"]
    assert [(each["turn_id"], each["status"]) for each in listed] == [(turn.id, "expired")]
    assert listed[0]["closed_at"] is not None
    body = {"lease_token": turn.token, "status": "completed", "messages": [said("a", "assistant")]}
    refused(await copy.call("POST", f"/turns/{turn.id}/complete", json=body), 409, "lease_lost")
    await copy.append("free")
    assert (await turn.complete(said("a", "assistant")))["session"]["message_count"] == 8
    for each in (chat, copy):
        await check_counters(db, each)


async def test_a_fork_keeps_its_parent(user: User) -> None:
    chat = await of_six(user)
    fork = Chat(user, fine(await chat.call("POST", "/fork", json={"at_seq": 2}))["session_id"])
    copy = await taken_back(user.other(), await exported(fork))
    assert (await copy.get())["parent"] == {"session_id": chat.id, "seq": 2}


async def test_an_empty_session(user: User) -> None:
    chat = await user.chat()
    before = await seen(chat)
    copy = await taken_back(user.other(), await exported(chat))
    assert await seen(copy) == before
    assert (await copy.append("first"))["seq"] == 1


async def test_the_moved_window_comes_along(user: User) -> None:
    chat = await user.chat()
    for n in range(1, 31):
        await chat.append(f"m{n} " + "word " * 100, "user" if n % 2 else "assistant")
    turn = await chat.open(said("q"), context={"max_tokens": 2000})
    await turn.complete(said("a", "assistant"))
    start = turn.receipt["window_start_seq"]
    assert start > 1
    copy = await taken_back(user.other(), await exported(chat))
    assert (await copy.context())["receipt"]["window_start_seq"] == start
    assert await copy.context() == await chat.context()


async def test_parameters(user: User, db: Db) -> None:
    chat = await of_six(user)
    file, before = await exported(chat), await stored_rows(db, user.id)
    for bad in ("", "a/b", " a", "stats", "import", "x" * 256):
        invalid(await take_back(user, file, session_id=bad), "query", "session_id")
    invalid(await user.http.post("/sessions/import", content=file), "query", "user_id")
    invalid(await user.http.post("/sessions/import", params={"user_id": " x"}, content=file), "query", "user_id")
    invalid(await user.http.get(f"/sessions/{chat.id}/export"), "query", "user_id")
    refused(await Chat(user, "nowhere").call("GET", "/export"), 404, "session_not_found")
    refused(await chat.of(user.other()).call("GET", "/export"), 404, "session_not_found")
    assert await stored_rows(db, user.id) == before


async def test_a_file_that_comes_byte_by_byte(user: User) -> None:
    chat = await of_six(user)
    file = await exported(chat)

    async def bytes_of_it() -> AsyncIterator[bytes]:
        for start in range(0, len(file), 7):
            yield file[start : start + 7]

    copy = Chat(user.other(), chat.id)
    fine(await take_back(copy.user, bytes_of_it()))
    assert await copy.contents() == await chat.contents()


async def test_messages_over_many_pages(user: User, db: Db) -> None:
    """More than any page or chunk of the service's, with sizes of all kinds."""
    chat = await user.chat()
    for start in range(0, 1500, 500):
        sizes = [1 + (n * n) % 5000 for n in range(start, start + 500)]
        messages = [said(chr(0x4E00 + n % 999) * size, tokens_used=n, cost_usd=0.01) for n, size in enumerate(sizes)]
        fine(await chat.call("POST", "/messages/batch", json={"messages": messages}))
    fine(await chat.call("POST", "/rewind", json={"to_seq": 1234}))
    copy = await taken_back(user.other(), await exported(chat))
    for page in (1, 2):
        pages = [await each.messages(include_superseded=True, page=page, page_size=1000) for each in (chat, copy)]
        for one, other in zip(pages[0]["messages"], pages[1]["messages"], strict=True):
            assert other == one | {"user_id": copy.user.id}
    session = await check_counters(db, copy)
    assert session["message_count"] == 1234
    assert session == await chat.get() | {"user_id": copy.user.id}


# ── at once ─────────────────────────────────────────────────────────────────────────────────────


async def test_twenty_imports_of_one_file(user: User, crowd: httpx.AsyncClient, db: Db) -> None:
    chat = await a_rich_chat(user, db)
    before, file = await seen(chat), await exported(chat)
    there = user.other().at(crowd)
    answers = await asyncio.gather(*(take_back(there, file) for _ in range(20)))
    assert [answer.status_code for answer in answers].count(200) == 1
    for answer in answers:
        if answer.status_code != 200:
            refused(answer, 409, "session_exists")
    assert await seen(Chat(there, chat.id)) == before


async def test_parallel_copies_for_one_user(user: User, crowd: httpx.AsyncClient, db: Db) -> None:
    """All want the messages' ids; one gets them, none is refused for it."""
    chat = await of_six(user)
    file = await exported(chat)
    there = user.other().at(crowd)
    answers = await asyncio.gather(*(take_back(there, file, session_id=f"copy {n}") for n in range(8)))
    copies = [Chat(there, fine(answer)["session_id"]) for answer in answers]
    for copy in copies:
        assert await copy.contents() == await chat.contents()
        await check_counters(db, copy)


async def test_an_export_beside_writers(user: User, crowd: httpx.AsyncClient) -> None:
    """Whatever is written meanwhile, a file is whole, and what it holds is a session that was."""
    chat = (await of_six(user)).of(user.at(crowd))

    async def write() -> None:
        for n in range(20):
            await chat.append(f"w{n}")
            await chat.remember(f"r{n}")
            turn = await chat.open(said("q"))
            await turn.complete(said("a", "assistant"), status="refused" if n % 2 else "completed")

    async def keep_exporting() -> list[bytes]:
        return [await exported(chat) for _ in range(12)]

    _, first, second = await asyncio.gather(write(), keep_exporting(), keep_exporting())
    for file in first + second:
        lines_of(file)
        fine(await take_back(user.other(), file))


async def test_an_export_of_a_session_that_is_erased_meanwhile(user: User, crowd: httpx.AsyncClient, db: Db) -> None:
    """What was left of it never looks like all of it: the answer breaks off."""
    chat = (await user.chat()).of(user.at(crowd))
    await chat.append("first")
    await grow(db, chat, 400, "repeat('x', 100000)")

    async def take() -> None:
        erased = False
        async with crowd.stream("GET", f"/sessions/{chat.id}/export", params=user.params) as answer:
            assert answer.status_code == 200
            async for _ in answer.aiter_raw():
                if not erased:
                    fine(await crowd.delete(f"/users/{user.id}"))
                    erased = True

    with pytest.raises(httpx.TransportError):
        await take()
    refused(await chat.call("GET", "/export"), 404, "session_not_found")
