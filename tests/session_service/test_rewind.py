"""Rewind: later messages are taken back: kept and paid for, and no longer part of the conversation."""

import asyncio
from typing import Any

import httpx
import pytest

from shared.canonical import message_hash
from tests.session_service.calls import (
    TIME,
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


async def rewind(chat: Chat, to_seq: Any, **options: Any) -> httpx.Response:
    return await chat.call("POST", "/rewind", json={"to_seq": to_seq}, **options)


async def of_six(user: User, **fields: Any) -> Chat:
    """m1 … m6, each with tokens and cost of its own."""
    chat = await user.chat(**fields)
    for n in range(1, 7):
        await chat.append(f"m{n}", "user" if n % 2 else "assistant", tokens_used=2**n, cost_usd=n / 1000)
    return chat


def hashes(*messages: tuple[str, str]) -> list[str]:
    return [message_hash(role, content).hex() for role, content in messages]


@pytest.mark.parametrize("to_seq", range(7))
async def test_what_is_seen_after_a_rewind(user: User, db: Db, to_seq: int) -> None:
    chat = await of_six(user)
    before = await chat.get()
    session = fine(await rewind(chat, to_seq))
    kept = [f"m{n}" for n in range(1, to_seq + 1)]
    assert session == await check_counters(db, chat)
    assert (session["message_count"], session["status"]) == (to_seq, "active")
    assert (session["total_tokens"], session["total_cost"]) == (126, 0.021)
    assert session["last_activity"] >= before["last_activity"]
    # listings
    assert await chat.contents() == kept
    listed = await chat.messages(after_seq=0)
    assert (listed["total"], listed["has_more"]) == (to_seq, False)
    assert (await chat.messages(role="user"))["total"] == (to_seq + 1) // 2
    everything = (await chat.messages(include_superseded=True))["messages"]
    assert [each["content"] for each in everything] == [f"m{n}" for n in range(1, 7)]
    for each in everything:
        assert (each["superseded_at"] is None) == (each["seq"] <= to_seq)
        assert each["superseded_at"] is None or TIME.fullmatch(each["superseded_at"])
        assert fine(await chat.call("GET", f"/messages/{each['message_id']}")) == each
    # context and align
    context = await chat.context()
    shown = [part for each in context["messages"] for part in [each["content"]]]
    assert shown == kept
    six = hashes(*((("user", "assistant")[(n + 1) % 2], f"m{n}") for n in range(1, 7)))
    aligned = fine(await chat.call("POST", "/align", json={"hashes": six}))
    assert (aligned["matched"], aligned["seq"], aligned["version"]) == (to_seq, to_seq, session["version"])
    # stats count what is visible
    stats = await user.stats()
    assert (stats["total_messages"], stats["total_tokens"]) == (to_seq, 2 ** (to_seq + 1) - 2)
    summary = fine(await chat.call("GET", "/summary"))
    assert (summary["message_count"], summary["total_tokens"]) == (to_seq, 126)


async def test_seqs_go_on_after_a_rewind(user: User, db: Db) -> None:
    chat = await of_six(user)
    fine(await rewind(chat, 2))
    message = await chat.append("other 3")
    assert message["seq"] == 7
    assert await chat.contents() == ["m1", "m2", "other 3"]
    fine(await rewind(chat, 1))
    fine(await chat.call("POST", "/messages/batch", json={"messages": [said("a", "assistant"), said("b")]}))
    assert [each["seq"] for each in (await chat.messages())["messages"]] == [1, 8, 9]
    aligned = hashes(("user", "m1"), ("assistant", "a"), ("user", "b"))
    assert fine(await chat.call("POST", "/align", json={"hashes": aligned}))["seq"] == 9
    assert (await chat.context())["receipt"]["included"] == [[1, 1], [8, 9]]
    turn = await chat.open(said("c"), rewind_to_seq=8)
    assert [each["content"] for each in turn.opened["context"]["messages"]] == ["m1", "a", "c"]
    assert turn.opened["session"]["message_count"] == 3
    await turn.complete()
    assert (await check_counters(db, chat))["total_tokens"] == 126


async def test_to_seq_counts_superseded_messages(user: User, db: Db) -> None:
    """0…last: the last message is the last stored one, and a seq in between may be of one taken back before."""
    chat = await of_six(user)
    fine(await rewind(chat, 3))
    for to_seq in (6, 5, 4, 3):
        assert fine(await rewind(chat, to_seq))["message_count"] == 3
    invalid(await rewind(chat, 7), "body", "to_seq")
    everything = (await chat.messages(include_superseded=True))["messages"]
    assert len({each["superseded_at"] for each in everything}) == 2
    fine(await rewind(chat, 1))
    again = (await chat.messages(include_superseded=True))["messages"]
    assert again[3:] == everything[3:]
    await check_counters(db, chat)


@pytest.mark.parametrize("bad", [-1, 7, 2**31, True, 1.0, "1", None, [1]])
async def test_to_seq_out_of_bounds(user: User, db: Db, bad: Any) -> None:
    chat = await of_six(user)
    before = await stored_rows(db, user.id)
    invalid(await rewind(chat, bad), "body", "to_seq")
    invalid(await chat.call("POST", "/rewind", json={}), "body", "to_seq")
    if bad is not None:
        invalid(await chat.turn(said("x"), rewind_to_seq=bad), "body", "rewind_to_seq")
    assert await stored_rows(db, user.id) == before


async def test_sessions_that_cannot_be_rewound(user: User, db: Db) -> None:
    refused(await rewind(Chat(user, "nowhere"), 0), 404, "session_not_found")
    for steps in (["completed"], ["completed", "archived"], ["ended"]):
        chat = await of_six(user)
        for step in steps:
            fine(await chat.put(status=step))
        before = await stored_rows(db, user.id)
        for to_seq in (0, 6):
            refused(await rewind(chat, to_seq), 409, "session_not_active")
        assert await stored_rows(db, user.id) == before
    expired = await of_six(user, idle_timeout_seconds=60)
    await wait(db, expired, 61)
    refused(await rewind(expired, 0), 409, "session_not_active")
    assert len(await expired.contents()) == 6


async def test_rewind_and_turns(user: User, db: Db) -> None:
    chat = await of_six(user)
    turn = await chat.open(said("q"), lease_seconds=100)
    body = refused(await rewind(chat, 2), 409, "turn_in_progress")
    assert body["turn_id"] == turn.id
    assert len(await chat.contents()) == 7
    await wait(db, chat, 101)
    fine(await rewind(chat, 2))
    assert (await turn.get())["status"] == "expired"
    assert await chat.contents() == ["m1", "m2"]
    done = await turn.complete(said("late", "assistant"))
    assert done["turn"]["status"] == "completed"
    assert await chat.contents() == ["m1", "m2", "late"]
    await check_counters(db, chat)


# ── summary and window ──────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("covers", "to_seq", "kept"),
    [
        (6, 6, True),
        (6, 5, False),
        (6, 0, False),
        (3, 3, True),
        (3, 4, True),
        (3, 2, False),
        (0, 0, True),
        (None, 5, False),
    ],
)
async def test_a_summary_that_covers_one_of_them_is_dropped(
    user: User, covers: int | None, to_seq: int, kept: bool
) -> None:
    chat = await of_six(user)
    fine(await chat.put(session_summary="so far", summary_to_seq=covers, summary_model="m-1"))
    session = fine(await rewind(chat, to_seq))
    assert session["session_summary"] == ("so far" if kept else "")
    expected = (6 if covers is None else covers, "m-1") if kept else (None, None)
    assert (session["summary_to_seq"], session["summary_model"]) == expected
    assert ("so far" in (await chat.context())["system"]) == kept
    assert fine(await chat.call("GET", "/summary"))["session_summary"] == ("so far" if kept else "")


async def test_a_summary_that_covers_only_what_stays(user: User) -> None:
    """It was made when 3…6 had been taken back already, so it tells of 1 and 2; then only 7 goes."""
    chat = await of_six(user)
    fine(await rewind(chat, 2))
    fine(await chat.put(session_summary="of m1 and m2"))
    await chat.append("m7")
    assert fine(await rewind(chat, 4))["session_summary"] == "of m1 and m2"
    assert fine(await rewind(chat, 1))["session_summary"] == ""


async def test_a_refused_turn_drops_a_summary_that_covers_its_question(user: User) -> None:
    chat = await of_six(user)
    turn = await chat.open(said("q"))
    fine(await chat.put(session_summary="with q"))
    assert (await turn.complete(status="refused"))["session"]["session_summary"] == ""
    fine(await chat.put(session_summary="without", summary_to_seq=6))
    turn = await chat.open(said("q"))
    assert (await turn.complete(status="refused"))["session"]["session_summary"] == "without"


async def test_a_rewind_behind_the_window_lets_the_next_turn_place_it_anew(user: User) -> None:
    chat = await user.chat()
    for n in range(1, 41):
        await chat.append(f"m{n} " + "word " * 100, "user" if n % 2 else "assistant")
    small: Json = {"max_tokens": 2000}
    turn = await chat.open(said("q"), context=small)
    start = turn.receipt["window_start_seq"]
    assert 1 < start <= 41
    await turn.complete(said("a", "assistant"))
    for to_seq in (start + 1, start):
        fine(await rewind(chat, to_seq))
        turn = await chat.open(said("q"), context={"max_tokens": 100_000})
        assert turn.receipt["window_start_seq"] == start
        await turn.complete(status="refused")
    fine(await rewind(chat, start - 1))
    turn = await chat.open(said("q"), context={"max_tokens": 100_000})
    assert turn.receipt["window_start_seq"] == 1
    assert turn.receipt["included"][0] == [1, start - 1]


async def test_a_rewind_after_a_restart_brings_nothing_back(user: User, db: Db) -> None:
    chat = await of_six(user)
    fine(await chat.end())
    await user.create(session_id=chat.id, if_exists="restart")
    await chat.append("new")
    session = fine(await rewind(chat, 3))
    assert (session["message_count"], session["generation"]) == (0, 2)
    assert await chat.contents() == []
    await chat.append("newer")
    assert (await chat.context())["messages"] == [{"role": "user", "content": "newer"}]
    await check_counters(db, chat)


async def test_appends_and_rewinds_at_once(user: User, crowd: httpx.AsyncClient, db: Db) -> None:
    """Whatever the order was, the counters are the rows', and nothing after a rewind's seq was seen at its answer."""
    chat = (await of_six(user)).of(user.at(crowd))

    async def append(n: int) -> None:
        for _ in range(8):
            await chat.append(f"x{n}", tokens_used=1, cost_usd=0.5)

    async def back(n: int) -> None:
        for _ in range(4):
            session = fine(await rewind(chat, n))
            assert session["message_count"] <= n

    await asyncio.gather(*(append(n) for n in range(8)), *(back(n) for n in range(2, 7)))
    session = await check_counters(db, chat)
    assert (session["total_tokens"], session["total_cost"]) == (126 + 64, 32.021)
    assert session["message_count"] == (await chat.messages())["total"]
