"""Fork: a new session with the visible messages up to a place, that costs nothing and goes its own way."""

import asyncio
from typing import Any

import httpx
import pytest

from tests.session_service.calls import (
    UUID7,
    Chat,
    Db,
    Json,
    User,
    check_counters,
    fine,
    invalid,
    refused,
    said,
    stored_rows,
    wait,
)
from tests.session_service.test_rewind import hashes, of_six, rewind

# What a copy does not take from the original: its place, its id, what it cost.
OWN = {"message_id", "session_id", "seq", "tokens_used", "cost_usd"}
BLOCKS: list[Json] = [{"type": "text", "text": "b", "z": 1, "a": 2}, {"type": "text", "text": "!"}]


async def fork(chat: Chat, **fields: Any) -> httpx.Response:
    return await chat.call("POST", "/fork", json=fields)


async def forked(chat: Chat, **fields: Any) -> Chat:
    return Chat(chat.user, fine(await fork(chat, **fields))["session_id"])


def copies(messages: list[Json]) -> list[Json]:
    return [{name: value for name, value in each.items() if name not in OWN} for each in messages]


@pytest.mark.parametrize("at_seq", [None, 0, 1, 4, 6])
async def test_a_fork(user: User, db: Db, at_seq: int | None) -> None:
    chat = await of_six(user, title="T", metadata={"a": 1}, conversation_data={"c": 2}, idle_timeout_seconds=500)
    await chat.remember("not taken along")
    before = await chat.get()
    body = fine(await fork(chat, **({} if at_seq is None else {"at_seq": at_seq})))
    count = 6 if at_seq is None else at_seq
    assert UUID7.fullmatch(body["session_id"])
    assert body["parent"] == {"session_id": chat.id, "seq": count}
    assert (body["title"], body["metadata"]) == ("T", {"a": 1})
    assert (body["status"], body["version"], body["generation"]) == ("active", 1, 1)
    assert (body["message_count"], body["total_tokens"], body["total_cost"]) == (count, 0, 0)
    assert body["created_at"] == body["last_activity"] > before["created_at"]
    new = Chat(user, body["session_id"])
    assert body == await check_counters(db, new)
    listed = (await new.messages(include_superseded=True))["messages"]
    assert [each["seq"] for each in listed] == list(range(1, count + 1))
    assert all((each["tokens_used"], each["cost_usd"]) == (0, 0) for each in listed)
    originals = (await chat.messages())["messages"][:count]
    assert copies(listed) == copies(originals)
    assert not {each["message_id"] for each in listed} & {each["message_id"] for each in originals}
    assert fine(await new.call("GET", "/memories")) == {"memories": [], "next_cursor": None}
    assert fine(await new.call("GET", "/turns"))["turns"] == []
    assert await chat.get() == before


async def test_content_goes_along_untouched(user: User) -> None:
    chat = await user.chat()
    await chat.append(BLOCKS, "assistant", native={"z": 1, "a": [1e-7]}, metadata={"m": 1}, message_type="notification")
    await chat.append("system words", "system")
    turn = await chat.open(said("question"))
    await turn.complete(said([{"type": "tool_use", "id": "t", "name": "n", "input": {}}], "assistant"), cost_usd=1)
    await chat.append([{"type": "tool_result", "tool_use_id": "t", "content": "r"}])
    new = await forked(chat)
    listed = (await new.messages())["messages"]
    assert copies(listed) == copies((await chat.messages())["messages"])
    assert list(listed[0]["content_blocks"][0]) == list(BLOCKS[0])
    contexts = [await each.context() for each in (chat, new)]
    assert contexts[0] == contexts[1]


async def test_only_what_is_visible_goes_along(user: User, db: Db) -> None:
    chat = await of_six(user)
    fine(await rewind(chat, 2))
    await chat.append("m7")
    await chat.append("m8", "assistant")
    for at_seq, kept in ((8, ["m1", "m2", "m7", "m8"]), (7, ["m1", "m2", "m7"]), (5, ["m1", "m2"]), (1, ["m1"])):
        new = await forked(chat, at_seq=at_seq)
        assert await new.contents(include_superseded=True) == kept
        assert (await check_counters(db, new))["parent"] == {"session_id": chat.id, "seq": at_seq}
        assert [each["seq"] for each in (await new.messages())["messages"]] == list(range(1, len(kept) + 1))
        said_by = hashes(*(((("user", "assistant")[int(each in {"m2", "m8"})]), each) for each in kept))
        aligned = fine(await new.call("POST", "/align", json={"hashes": said_by}))
        assert (aligned["matched"], aligned["seq"]) == (len(kept), len(kept))


async def test_after_a_restart_only_the_new_generation(user: User) -> None:
    chat = await of_six(user)
    fine(await chat.end())
    await user.create(session_id=chat.id, if_exists="restart")
    await chat.append("new")
    assert await (await forked(chat)).contents(include_superseded=True) == ["new"]
    assert await (await forked(chat, at_seq=6)).contents(include_superseded=True) == []


@pytest.mark.parametrize(
    ("covers", "at_seq", "kept"), [(6, 6, True), (6, 5, False), (3, 3, True), (3, 6, True), (3, 2, False), (0, 0, True)]
)
async def test_the_summary_goes_along_where_it_fits(user: User, covers: int, at_seq: int, kept: bool) -> None:
    chat = await of_six(user)
    fine(await chat.put(session_summary="so far", summary_to_seq=covers, summary_model="m-1"))
    new = await forked(chat, at_seq=at_seq)
    session = await new.get()
    assert session["session_summary"] == ("so far" if kept else "")
    assert (session["summary_to_seq"], session["summary_model"]) == ((covers, "m-1") if kept else (None, None))
    assert ("so far" in (await new.context())["system"]) == kept
    if kept and covers:
        # It covers in the fork what it covered there.
        fine(await new.call("POST", "/rewind", json={"to_seq": covers}))
        assert (await new.get())["session_summary"] == "so far"
        session = fine(await new.call("POST", "/rewind", json={"to_seq": covers - 1}))
        assert session["session_summary"] == ""


async def test_a_summary_of_what_is_visible_up_to_there_fits(user: User) -> None:
    chat = await of_six(user)
    fine(await rewind(chat, 2))
    fine(await chat.put(session_summary="of m1 and m2"))
    await chat.append("m7")
    assert (await (await forked(chat, at_seq=3)).get())["session_summary"] == "of m1 and m2"
    new = await forked(chat)
    assert fine(await rewind(new, 2))["session_summary"] == "of m1 and m2"
    assert fine(await rewind(new, 1))["session_summary"] == ""


async def test_a_title_and_an_id_of_ones_own(user: User, db: Db) -> None:
    chat = await of_six(user, title="T")
    body = fine(await fork(chat, at_seq=2, session_id="mine", title="other", unknown=1))
    assert (body["session_id"], body["title"]) == ("mine", "other")
    assert (await chat.get())["title"] == "T"
    before = await stored_rows(db, user.id)
    for taken in ("mine", chat.id):
        refused(await fork(chat, session_id=taken), 409, "session_exists", "Session already exists")
    assert await stored_rows(db, user.id) == before
    assert fine(await chat.call("POST", "/fork"))["message_count"] == 6
    assert fine(await fork(chat, at_seq=None, session_id=None, title=None))["title"] == "T"


BAD_VALUES: dict[str, list[Any]] = {
    "at_seq": [-1, 7, 2**31, True, 1.0, "1", {}],
    "session_id": ["", "a/b", " a", "a\n", "stats", "x" * 256, 1],
    "title": ["t" * 501, 1, {}],
}
BAD_FIELDS = [(field, bad) for field, values in BAD_VALUES.items() for bad in values]


@pytest.mark.parametrize(("field", "bad"), BAD_FIELDS)
async def test_bad_fields(user: User, db: Db, field: str, bad: Any) -> None:
    chat = await of_six(user)
    before = await stored_rows(db, user.id)
    invalid(await fork(chat, **{field: bad}), "body", field)
    assert await stored_rows(db, user.id) == before


async def test_from_any_status(user: User, db: Db) -> None:
    for steps in (["completed"], ["completed", "archived"], ["ended"], ["completed", "ended"]):
        chat = await of_six(user)
        for step in steps:
            fine(await chat.put(status=step))
        before = await chat.get()
        new = await forked(chat)
        assert ((await new.get())["status"], (await new.get())["ended_reason"]) == ("active", None)
        await new.append("goes on")
        assert await chat.get() == before
    expired = await of_six(user, idle_timeout_seconds=60)
    await wait(db, expired, 61)
    new = await forked(expired)
    assert (await new.get())["is_active"] is True
    assert (await expired.get())["ended_reason"] == "expired"
    refused(await fork(Chat(user, "nowhere")), 404, "session_not_found")
    refused(await fork(expired.of(user.other())), 404, "session_not_found")


async def test_while_a_turn_is_open(user: User, db: Db) -> None:
    chat = await of_six(user)
    turn = await chat.open(said("q"))
    new = await forked(chat)
    assert (await new.contents())[-1] == "q"
    other = await new.open()
    assert other.opened["context"]["messages"][-1]["content"] == "q"
    await turn.complete(said("a", "assistant"))
    await other.complete(said("b", "assistant"))
    assert ((await chat.contents())[-1], (await new.contents())[-1]) == ("a", "b")
    for each in (chat, new):
        await check_counters(db, each)


async def test_each_goes_its_own_way(user: User, db: Db) -> None:
    chat = await of_six(user)
    new = await forked(chat, at_seq=4)
    await chat.append("old goes on")
    await new.append("new goes on", tokens_used=3)
    fine(await rewind(chat, 0))
    fine(await new.put(title="new title", metadata={"n": 1}))
    assert await new.contents() == ["m1", "m2", "m3", "m4", "new goes on"]
    assert (await check_counters(db, new))["total_tokens"] == 3
    fine(await new.end())
    assert (await chat.get())["status"] == "active"
    newest = await forked(new)
    assert (await newest.get())["parent"] == {"session_id": new.id, "seq": 5}
    stats = await user.stats()
    assert (stats["total_sessions"], stats["total_tokens"]) == (3, 3)
    fine(await chat.end())
    await user.create(session_id=chat.id, if_exists="restart")
    assert (await new.get())["parent"] == {"session_id": chat.id, "seq": 4}


async def test_forks_beside_appends_rewinds_and_turns(user: User, crowd: httpx.AsyncClient, db: Db) -> None:
    """Every fork is the visible history at one moment: whole, numbered 1…n, with counters that are its rows'."""
    chat = (await of_six(user)).of(user.at(crowd))

    async def write() -> None:
        for n in range(15):
            fine(await chat.call("POST", "/messages/batch", json={"messages": [said(f"{n}a"), said(f"{n}b")]}))
            if n % 5 == 4:
                fine(await rewind(chat, 6))

    new: list[Chat] = []

    async def keep_forking() -> None:
        new.extend([await forked(chat) for _ in range(10)])

    await asyncio.gather(write(), keep_forking(), keep_forking())
    for each in new:
        contents = await each.contents()
        assert contents[:6] == [f"m{n}" for n in range(1, 7)]
        later = contents[6:]
        assert [each[-1] for each in later] == ["a", "b"] * (len(later) // 2)
        firsts = [int(each[:-1]) for each in later[::2]]
        assert not firsts or firsts == list(range(firsts[0] - firsts[0] % 5, firsts[-1] + 1))
        await check_counters(db, each)


async def test_twenty_want_one_id(user: User, crowd: httpx.AsyncClient, db: Db) -> None:
    chat = (await of_six(user)).of(user.at(crowd))
    answers = await asyncio.gather(*(fork(chat, session_id="wanted", title=str(n)) for n in range(20)))
    assert [answer.status_code for answer in answers].count(200) == 1
    for answer in answers:
        if answer.status_code != 200:
            refused(answer, 409, "session_exists")
    assert (await check_counters(db, Chat(user, "wanted")))["message_count"] == 6
    assert (await user.sessions())["total"] == 2
