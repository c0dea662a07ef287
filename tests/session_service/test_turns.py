"""Turns: opened and completed once, and what may happen to the session meanwhile."""

import json
from typing import Any

import pytest

from tests.session_service.calls import (
    Chat,
    Db,
    Json,
    Turn,
    User,
    check_counters,
    fine,
    invalid,
    refused,
    said,
    stored_rows,
)

TURN_FIELDS = {
    *("turn_id", "session_id", "user_id", "status", "lease_expires_at", "opened_at", "closed_at"),
    *("input_from_seq", "input_to_seq", "output_from_seq", "output_to_seq"),
    *("stop_reason", "model", "usage", "cost_usd", "upstream", "error"),
}
USAGE = {"input_tokens": 10, "output_tokens": 5, "cache_creation_input_tokens": 3, "cache_read_input_tokens": 2}
ANSWER = said("Hello to you", "assistant")


async def test_a_turn_from_beginning_to_end(user: User, db: Db) -> None:
    chat = Chat(user, "made-by-the-turn")
    turn = await chat.open(said("Hi"), said("there"), create_session={"title": "T", "metadata": {"a": 1}})
    opened = turn.opened
    assert list(opened) == ["turn_id", "lease_token", "lease_expires_at", "session", "messages", "context"]
    assert opened["session"] == await chat.get()
    assert (opened["session"]["title"], opened["session"]["message_count"]) == ("T", 2)
    assert [(each["seq"], each["content"]) for each in opened["messages"]] == [(1, "Hi"), (2, "there")]
    assert opened["messages"] == (await chat.messages())["messages"]
    shown = await turn.get()
    assert set(shown) == TURN_FIELDS
    assert shown == dict.fromkeys(TURN_FIELDS) | {
        "turn_id": turn.id,
        "session_id": chat.id,
        "user_id": user.id,
        "status": "open",
        "lease_expires_at": opened["lease_expires_at"],
        "opened_at": shown["opened_at"],
        "input_from_seq": 1,
        "input_to_seq": 2,
    }
    assert turn.token not in str(shown)

    result: Json = {
        "usage": USAGE | {"service_tier": "x"},
        "cost_usd": 0.012345,
        "stop_reason": "end_turn",
        "model": "m-1",
        "upstream": {"account": "a", "tries": [1]},
        "error": {"type": "none"},
    }
    done = await turn.complete(ANSWER, **result)
    assert list(done) == ["turn", "messages", "session"]
    assert done["session"] == await chat.get()
    assert done["turn"] == await turn.get()
    assert {name: done["turn"][name] for name in result} == result
    assert (done["turn"]["status"], done["turn"]["output_from_seq"], done["turn"]["output_to_seq"]) == (
        "completed",
        3,
        3,
    )
    assert done["turn"]["closed_at"] >= done["turn"]["opened_at"]
    assert [each["seq"] for each in done["messages"]] == [3]
    assert (done["messages"][0]["tokens_used"], done["messages"][0]["cost_usd"]) == (20, 0.012345)
    assert done["messages"] == (await chat.messages(after_seq=2))["messages"]
    session = await check_counters(db, chat)
    assert (session["total_tokens"], session["total_cost"]) == (20, 0.012345)


async def test_every_write_of_a_turn_moves_the_version(user: User) -> None:
    chat = await user.chat()
    versions = [(await chat.get())["version"]]
    turn = await chat.open(said("x"))
    versions.append(turn.opened["session"]["version"])
    fine(await turn.renew())
    versions.append((await chat.get())["version"])
    versions.append((await turn.complete(ANSWER))["session"]["version"])
    assert versions == sorted(set(versions))


@pytest.mark.parametrize("status", ["completed", "interrupted", "failed", "refused"])
async def test_completing_twice_gives_the_same_answer(user: User, db: Db, status: str) -> None:
    chat = await user.chat()
    turn = await chat.open(said("x"))
    sent: Json = {"status": status, "usage": USAGE, "cost_usd": 0.5, "upstream": {"b": 1, "a": 1e-7}, "error": {}}
    messages = [said("part", "assistant", native=[1], metadata={"z": 1, "a": 2}), said("2", "assistant", cost_usd=0.1)]
    first = await turn.finish(*messages, **sent)
    before = await chat.get()
    second = await turn.finish(*messages, **sent)
    assert fine(first)["turn"]["status"] == status
    assert second.json() == first.json()
    assert await chat.get() == before
    later = await chat.open(said("next"))
    assert fine(await turn.finish(*messages, **sent))["messages"] == first.json()["messages"]
    await later.complete()
    assert fine(await turn.finish(*messages, **sent))["turn"] == first.json()["turn"]
    await check_counters(db, chat)


async def test_the_same_completion_may_be_written_in_another_way(user: User) -> None:
    """What an object's keys come in, and how many zeros a number ends with, says nothing."""
    turn = await (await user.chat()).open(said("x"))
    message = ANSWER | {"native": 2**70}
    first = await turn.finish(message, usage={"a": 1, "b": {"c": 1, "d": 2}}, cost_usd=1, upstream={"x": 1, "y": 2})
    rest = f'"lease_token": "{turn.token}", "status": "completed", "messages": [{json.dumps(message)}]'
    again = '{"upstream": {"y": 2, "x": 1}, "usage": {"b": {"d": 2, "c": 1}, "a": 1}, "cost_usd": 1.00, %s}'
    second = await turn.chat.call("POST", f"/turns/{turn.id}/complete", content=again % rest)
    assert fine(second) == fine(first)


async def test_a_second_and_different_completion_is_refused(user: User, db: Db) -> None:
    chat = await user.chat()
    turn = await chat.open(said("x"))
    await turn.complete(ANSWER, status="completed", cost_usd=1)
    before = await stored_rows(db, user.id)
    for messages, fields in (
        ([said("other", "assistant")], {"cost_usd": 1}),
        ([ANSWER], {"cost_usd": 2}),
        ([ANSWER], {"cost_usd": 1, "status": "failed"}),
        ([], {"cost_usd": 1}),
    ):
        body = refused(await turn.finish(*messages, **fields), 409, "turn_closed", "Turn is closed")
        assert list(body) == ["detail", "code"]
    assert await stored_rows(db, user.id) == before


async def test_refused_takes_the_turns_own_input_back(user: User, db: Db) -> None:
    chat = await user.chat()
    await chat.append("before", tokens_used=1)
    turn = await chat.open(said("bad", tokens_used=2), said("worse", tokens_used=4))
    done = await turn.complete(status="refused", error={"type": "invalid_request_error"})
    assert done["messages"] == []
    assert (done["session"]["message_count"], done["session"]["total_tokens"]) == (1, 7)
    assert await chat.contents() == ["before"]
    everything = (await chat.messages(include_superseded=True))["messages"]
    assert [each["superseded_at"] is not None for each in everything] == [False, True, True]
    assert await turn.complete(status="refused", error={"type": "invalid_request_error"}) == done
    await check_counters(db, chat)
    again = await chat.open(said("better"))
    assert [each["seq"] for each in again.opened["messages"]] == [4]
    assert "bad" not in str(again.opened["context"]["messages"])
    assert (await user.stats())["total_tokens"] == 1


async def test_refused_without_input_of_its_own(user: User, db: Db) -> None:
    chat = await user.chat()
    await chat.append("kept")
    turn = await chat.open()
    done = await turn.complete(status="refused")
    assert done["session"]["message_count"] == 1
    assert await chat.contents() == ["kept"]
    await check_counters(db, chat)


@pytest.mark.parametrize("status", ["interrupted", "failed"])
async def test_an_interrupted_answer_is_kept(user: User, status: str) -> None:
    chat = await user.chat()
    turn = await chat.open(said("x"))
    blocks = [{"type": "text", "text": "whole"}, {"type": "text", "text": "ha", "incomplete": True}]
    done = await turn.complete(said(blocks, "assistant"), status=status)
    assert done["messages"][0]["content_blocks"] == blocks
    assert await chat.contents() == ["x", "wholeha"]
    again = await chat.open(said("go on"))
    assert [each["content"] for each in again.opened["context"]["messages"]] == [
        "x",
        [{"type": "text", "text": "whole"}],
        "go on",
    ]


FIGURES: list[tuple[list[Json], list[tuple[int, float]]]] = [
    ([ANSWER], [(20, 0.5)]),
    ([ANSWER | {"tokens_used": 7}], [(7, 0.5)]),
    ([ANSWER | {"cost_usd": 0.25}], [(20, 0.25)]),
    ([ANSWER | {"tokens_used": 0, "cost_usd": 0}], [(0, 0)]),
    ([said("result", "tool"), ANSWER], [(0, 0), (20, 0.5)]),
    ([ANSWER, said("result", "tool")], [(20, 0.5), (0, 0)]),
    ([said("note", "system")], [(0, 0)]),
]


@pytest.mark.parametrize(("messages", "expected"), FIGURES)
async def test_an_assistant_message_without_figures_gets_the_calls(
    user: User, db: Db, messages: list[Json], expected: list[tuple[int, float]]
) -> None:
    turn = await (await user.chat()).open(said("x"))
    done = await turn.complete(*messages, usage=USAGE, cost_usd=0.5)
    assert [(each["tokens_used"], each["cost_usd"]) for each in done["messages"]] == expected
    await check_counters(db, turn.chat)


@pytest.mark.parametrize(
    ("usage", "tokens"),
    [
        (None, 0),
        ({}, 0),
        ({"output_tokens": 5}, 5),
        ({"output_tokens": None, "input_tokens": 3}, 3),
        ({"output_tokens": "5", "input_tokens": True, "cache_read_input_tokens": 1.5}, 0),
        ({"output_tokens": 2**31 - 1, "input_tokens": 5}, 2**31 - 1),
        ({"output_tokens": 2**53}, 2**31 - 1),
        ({"output_tokens": -5, "input_tokens": 6}, 6),
    ],
)
async def test_usage_as_the_provider_reports_it(user: User, usage: Any, tokens: int) -> None:
    turn = await (await user.chat()).open(said("x"))
    done = await turn.complete(ANSWER, usage=usage)
    assert done["messages"][0]["tokens_used"] == tokens
    assert done["turn"]["usage"] == usage


async def test_what_an_open_turn_stops_and_what_it_does_not(user: User, db: Db) -> None:
    chat = await user.chat()
    turn = await chat.open(said("x"), lease_seconds=100)
    for answer in (await chat.post("y"), await chat.turn(said("y")), await chat.turn(said("y"), rewind_to_seq=0)):
        body = refused(answer, 409, "turn_in_progress", "Another turn of this session is open")
        assert list(body) == ["detail", "code", "turn_id"]
        assert body["turn_id"] == turn.id
        assert 1 <= int(answer.headers["retry-after"]) <= 100
    assert fine(await chat.put(title="T", session_summary="s"))["title"] == "T"
    memory = await chat.remember("x")
    fine(await chat.call("PUT", f"/memories/{memory['memory_id']}", json={"content": "y"}))
    fine(await chat.call("DELETE", f"/memories/{memory['memory_id']}"))
    for path in ("", "/summary", "/messages", "/context", "/turns", "/memories"):
        fine(await chat.call("GET", path))
    assert await chat.contents() == ["x"]
    other = await user.chat()
    await other.append("another session is free")
    await turn.complete(ANSWER)
    await chat.append("now it goes")
    await check_counters(db, chat)


async def test_a_session_ended_during_a_turn_keeps_the_answer(user: User, db: Db) -> None:
    chat = await user.chat()
    turn = await chat.open(said("x"))
    fine(await chat.end())
    refused(await chat.post("y"), 409, "session_not_active")
    refused(await chat.turn(said("y")), 409, "session_not_active")
    refused(await chat.turn(said("y"), wait_seconds=30), 409, "session_not_active")
    fine(await turn.renew())
    done = await turn.complete(ANSWER, usage=USAGE, cost_usd=0.5)
    assert (done["session"]["status"], done["session"]["ended_reason"]) == ("ended", "user")
    assert (done["session"]["message_count"], done["session"]["total_tokens"]) == (2, 20)
    assert await chat.contents() == ["x", "Hello to you"]
    await check_counters(db, chat)


async def test_turns_are_listed_newest_first(user: User) -> None:
    chat = await user.chat()
    ids: list[str] = []
    for number in range(5):
        turn = await chat.open(said(f"m{number}"))
        ids.insert(0, turn.id)
        if number < 4:
            await turn.complete()
    listed = fine(await chat.call("GET", "/turns"))
    assert list(listed) == ["turns", "next_cursor"]
    assert ([each["turn_id"] for each in listed["turns"]], listed["next_cursor"]) == (ids, None)
    assert listed["turns"][0]["status"] == "open"
    assert listed["turns"][1] == fine(await chat.call("GET", f"/turns/{ids[1]}"))
    found: list[str] = []
    cursor: dict[str, str] = {}
    while len(found) < 20:
        page = fine(await chat.call("GET", "/turns", params={"limit": 2, **cursor}))
        found += [each["turn_id"] for each in page["turns"]]
        if not found[4:]:
            assert len(page["turns"]) == 2
        if page["next_cursor"] is None:
            break
        cursor = {"cursor": page["next_cursor"]}
    assert found == ids
    other = await user.chat()
    assert fine(await other.call("GET", "/turns")) == {"turns": [], "next_cursor": None}


async def test_the_ids_in_create_session_are_the_urls(user: User) -> None:
    chat = Chat(user, "here")
    for name, value in (("user_id", "someone"), ("session_id", "elsewhere")):
        invalid(await chat.turn(said("x"), create_session={name: value}), "body", "create_session", name)
    refused(await chat.call("GET"), 404, "session_not_found")
    turn = await chat.open(said("x"), create_session={"user_id": user.id, "session_id": "here"})
    await turn.complete()
    refused(await chat.turn(said("x"), create_session={"if_exists": "error"}), 409, "session_exists")
    assert isinstance(await chat.open(said("y"), create_session={"if_exists": None, "title": "ignored"}), Turn)
    assert (await chat.get())["title"] is None
