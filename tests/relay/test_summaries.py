"""Summaries of what a context had to leave out: once for each move, beside the turns, and on demand."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio

from services.relay import transcript
from tests.processes import Process, free_port, start_session_service
from tests.relay.calls import (
    MODEL,
    Chat,
    Json,
    admin_headers,
    assistant,
    client_of,
    error_of,
    rest_account,
    start_relay,
    upstream_settings,
    user,
)
from tests.upstream.client import TestUpstream

SUMMARY_MODEL = "summary-model"
IS_SUMMARY: Json = {"match": {"contains": "You summarise the earlier part"}}
WORDS = "word " * 30
NOTHING = ("", None, None)


@dataclass(frozen=True)
class Place:
    """Two relays and a store whose contexts are small, for the tests of this file."""

    relays: list[Process]
    folder: Path
    upstream: TestUpstream
    clients: list[httpx.AsyncClient]
    sessions: httpx.AsyncClient

    def chat(self, relay: int = 0, **fields: Any) -> Chat:
        return Chat(self.clients[relay], self.sessions, **fields)

    async def change_account(self, **fields: Any) -> Json:
        """The upstream's account, with these fields changed."""
        headers = admin_headers(self.folder)
        answer = await self.clients[0].patch("/admin/accounts/anthropic", json=fields, headers=headers)
        account: Json = answer.raise_for_status().json()
        return account

    def asked(self) -> list[Json]:
        """The requests for summaries that upstream has got."""
        return [each for each in self.upstream.requests() if each["json"].get("system") == transcript.SYSTEM]

    def logged(self, event: str) -> int:
        return sum(relay.logged().count(f'"{event}"') for relay in self.relays)


@pytest.fixture(scope="module")
def relays(
    make_database: Callable[[], str], scratch: Path, upstream_process: TestUpstream
) -> Iterator[tuple[Process, list[Process], Path]]:
    database_url, folder = make_database(), scratch / "summaries"
    folder.mkdir()
    settings = upstream_settings(upstream_process.url) | {"RELAY_SUMMARY_MODEL": SUMMARY_MODEL}
    with ExitStack() as held:
        store = held.enter_context(start_session_service(database_url, folder, free_port(), CONTEXT_MAX_TOKENS="600"))
        started = [held.enter_context(start_relay(database_url, store.url, folder, settings)) for _ in range(2)]
        yield store, started, folder


@pytest_asyncio.fixture(loop_scope="session")
async def place(relays: tuple[Process, list[Process], Path], upstream: TestUpstream) -> AsyncIterator[Place]:
    store, started, folder = relays
    rest_account(started[0], folder)
    async with (
        client_of(started[0], folder) as one,
        client_of(started[1], folder) as other,
        httpx.AsyncClient(base_url=f"{store.url}/api/v1", timeout=30, trust_env=False) as sessions,
    ):
        yield Place(started, folder, upstream, [one, other], sessions)


async def session_of(chat: Chat) -> Json:
    answer = await chat.sessions.get(chat.path, params={"user_id": "dev"})
    session: Json = answer.raise_for_status().json()
    return session


async def summary_of(chat: Chat) -> tuple[str, int | None, str | None]:
    session = await session_of(chat)
    return session["session_summary"], session["summary_to_seq"], session["summary_model"]


async def window_of(chat: Chat) -> int:
    """Where the window of contexts begins, as the last turn has left it."""
    answer = await chat.sessions.get(f"{chat.path}/context", params={"user_id": "dev", "max_tokens": 10**6})
    return int(answer.raise_for_status().json()["receipt"]["window_start_seq"])


async def talk_until_it_moves(chat: Chat, *, most: int = 20, **fields: Any) -> int:
    """Turns until the context's window has moved; gives its new start."""
    before = await window_of(chat) if await chat.stored() else 1
    for number in range(most):
        await chat.say(f"question {number} {WORDS}", **fields)
        if (start := await window_of(chat)) > before:
            return start
    raise AssertionError("the window did not move")


async def rewind(chat: Chat, to_seq: int) -> None:
    answer = await chat.sessions.post(f"{chat.path}/rewind", json={"to_seq": to_seq}, params={"user_id": "dev"})
    answer.raise_for_status()


async def until_summary(chat: Chat, to_seq: int, seconds: float = 5) -> tuple[str, int | None, str | None]:
    """The session's summary, once it reaches so far."""
    deadline = time.monotonic() + seconds
    while True:
        summary = await summary_of(chat)
        if (summary[1] or 0) >= to_seq:
            return summary
        assert time.monotonic() < deadline, f"no summary up to {to_seq}: {summary}"
        await asyncio.sleep(0.02)


async def until_logged(place: Place, event: str, count: int, seconds: float = 5) -> None:
    deadline = time.monotonic() + seconds
    while place.logged(event) < count:
        assert time.monotonic() < deadline, f"{event} was not logged"
        await asyncio.sleep(0.02)


async def say_quickly(chat: Chat, text: str, seconds: float = 1.0) -> None:
    started = time.monotonic()
    await chat.say(text)
    assert time.monotonic() - started < seconds


# ── beside the turns ────────────────────────────────────────────────────────────────────────────


async def test_once_for_each_move_and_the_next_context_carries_it(place: Place) -> None:
    chat = place.chat()
    place.upstream.script({**IS_SUMMARY, "text": "They counted."}, {**IS_SUMMARY, "text": "They went on counting."})
    await chat.say(f"My name is Ada. {WORDS}")
    start = await talk_until_it_moves(chat)
    assert await until_summary(chat, start - 1) == ("They counted.", start - 1, SUMMARY_MODEL)
    (first,) = place.asked()
    body = first["json"]
    assert (body["model"], body["max_tokens"], "stream" in body) == (SUMMARY_MODEL, 1024, False)
    stored = await chat.stored()
    before, entries = transcript.read(body["messages"][0]["content"])
    assert before == ""
    assert [text for _, text in entries] == [each["content"].strip() for each in stored if each["seq"] < start]
    assert [label for label, _ in entries] == ["User", "Assistant"] * ((start - 1) // 2)

    place.upstream.script({"name": "next", "match": {"contains": "what else"}})
    await chat.say("what else", system="Be brief.")
    (carried,) = [each["json"] for each in place.upstream.requests() if each["step"] == "next"]
    assert [block["text"].count("They counted.") for block in carried["system"]] == [0, 1]
    assert carried["system"][0]["text"] == "Be brief."
    assert not any("They counted." in str(each["content"]) for each in carried["messages"])
    assert await window_of(chat) == start
    assert len(place.asked()) == 1

    start_2 = await talk_until_it_moves(chat)
    assert await until_summary(chat, start_2 - 1) == ("They went on counting.", start_2 - 1, SUMMARY_MODEL)
    before, entries = transcript.read(place.asked()[1]["json"]["messages"][0]["content"])
    assert before == "They counted."
    told = [each["content"].strip() for each in await chat.stored() if start <= each["seq"] < start_2]
    assert [text for _, text in entries] == told
    await chat.say("and then")
    assert len(place.asked()) == 2
    metrics = (await place.clients[0].get("/metrics")).text
    assert f'relay_tokens_total{{model="{SUMMARY_MODEL}",type="output"}}' in metrics


async def test_no_turn_waits_for_it_and_turns_do_not_spoil_it(place: Place) -> None:
    chat = place.chat()
    place.upstream.script({**IS_SUMMARY, "delay_ms": 1500, "text": "late"})
    start = await talk_until_it_moves(chat)
    for number in range(3):
        await say_quickly(chat, f"quick {number}")
    assert await summary_of(chat) == NOTHING
    assert await until_summary(chat, start - 1) == ("late", start - 1, SUMMARY_MODEL)


async def test_a_full_account_is_given_back_to_turns(place: Place) -> None:
    """It serves one at a time: the summary that has it is broken off for the next turn, and only that."""
    await place.change_account(max_concurrency=1)
    try:
        chat, failed = place.chat(), place.logged("summary_failed")
        place.upstream.script({**IS_SUMMARY, "delay_ms": 20_000})
        await talk_until_it_moves(chat)
        await place.upstream.until(lambda state: state["running"] == 1)
        await say_quickly(chat, "quick", seconds=1.5)
        await until_logged(place, "summary_failed", failed + 1)
        assert [each["outcome"] for each in place.asked()] == ["disconnected"]
        await say_quickly(chat, "quick again")
        assert await summary_of(chat) == NOTHING
        assert (await place.change_account())["state"] == "active"
    finally:
        await place.change_account(max_concurrency=None)


@pytest.mark.parametrize("status", [403, 429, 500])
async def test_a_failure_only_means_no_summary(place: Place, status: int) -> None:
    """The account is not blamed, the next turn does not try again, and the log holds nothing of what was said."""
    chat, failed = place.chat(), place.logged("summary_failed")
    place.upstream.script({**IS_SUMMARY, "repeat": -1, "status": status})
    await talk_until_it_moves(chat)
    await until_logged(place, "summary_failed", failed + 1)
    for number in range(2):
        await say_quickly(chat, f"quick {number}")
    assert await summary_of(chat) == NOTHING
    assert len(place.asked()) == 1
    assert place.logged("summary_failed") == failed + 1
    assert not any("word word" in relay.logged() for relay in place.relays)


async def test_a_rewind_drops_it_and_makes_one_under_way_void(place: Place) -> None:
    chat = place.chat()
    place.upstream.script({**IS_SUMMARY, "text": "first"}, {**IS_SUMMARY, "delay_ms": 600, "text": "outdated"})
    start = await talk_until_it_moves(chat)
    await until_summary(chat, start - 1)
    await rewind(chat, start - 2)
    assert await summary_of(chat) == NOTHING

    outdated = place.logged("summary_outdated")
    await talk_until_it_moves(chat)
    await place.upstream.until(lambda state: state["running"] == 1)
    await rewind(chat, 1)
    await until_logged(place, "summary_outdated", outdated + 1)
    assert await summary_of(chat) == NOTHING


async def test_two_relays_ask_once(place: Place) -> None:
    chat = place.chat()
    there = place.chat(1, session_id=chat.session_id)
    place.upstream.script({**IS_SUMMARY, "delay_ms": 500, "text": "once"})
    start = await talk_until_it_moves(chat)
    await place.upstream.until(lambda state: state["running"] == 1)
    for number in range(2):
        await there.say(f"there {number}")
    assert await until_summary(chat, start - 1) == ("once", start - 1, SUMMARY_MODEL)
    await there.say("there again")
    assert len(place.asked()) == 1


async def test_whole_histories_have_no_budget_and_no_summary(place: Place) -> None:
    chat = place.chat()
    array: list[Json] = []
    for number in range(12):
        array.append(user(f"question {number} {WORDS}"))
        array.append(assistant(await chat.say(*array)))
    assert len(await chat.stored()) == 24
    await asyncio.sleep(0.1)
    assert place.asked() == []


async def test_the_relay_stops_without_waiting_for_one(
    make_database: Callable[[], str], scratch: Path, place: Place, relays: tuple[Process, list[Process], Path]
) -> None:
    folder = scratch / "summaries-stopped"
    settings = upstream_settings(place.upstream.url)
    with start_relay(make_database(), relays[0].url, folder, settings) as relay:
        async with client_of(relay, folder) as http:
            chat = Chat(http, place.sessions)
            place.upstream.script({**IS_SUMMARY, "delay_ms": 20_000})
            await talk_until_it_moves(chat)
            await place.upstream.until(lambda state: state["running"] == 1)
            assert place.asked()[0]["json"]["model"] == MODEL  # no setting: the turn's own
        started = time.monotonic()
        assert await asyncio.to_thread(relay.stop) == 0
        assert time.monotonic() - started < 10
        assert '"level": "error"' not in relay.logged().replace('":"', '": "')
    assert await summary_of(chat) == NOTHING


# ── on demand ───────────────────────────────────────────────────────────────────────────────────


async def test_the_demo_makes_an_extract_on_demand(place: Place) -> None:
    chat = place.chat()
    await chat.say("你好，我是小明。我在学习Python编程。", model="demo")
    await chat.say("今天学了列表。还有字典。", model="demo")
    answer = await chat.http.post(f"{chat.path}/summarize", json={"model": "demo"})
    assert answer.status_code == 200, answer.text
    told = answer.json()
    assert set(told) == {"session_id", "session_summary", "summary_to_seq", "summary_model"}
    assert (told["session_id"], told["summary_to_seq"], told["summary_model"]) == (chat.session_id, 4, "demo")
    assert told["session_summary"].startswith("演示模型的摘录")
    assert told["session_summary"].endswith("用户说过：我叫小明。")
    assert "今天学了列表。" in told["session_summary"]
    assert await summary_of(chat) == (told["session_summary"], 4, "demo")
    # What follows goes on from it; the name is known after the message that told it has left the context.
    for number in range(20):
        await chat.say(f"第 {number} 个问题。{'字' * 100}", model="demo")
        if await window_of(chat) > 4:
            break
    assert "你叫小明" in await chat.say("我叫什么名字？", model="demo")


async def test_on_demand_everything_or_up_to_a_seq_and_made_anew(place: Place) -> None:
    chat = place.chat()
    for number in range(2):
        await chat.say(f"question {number}")
    place.upstream.script(*({**IS_SUMMARY, "text": f"summary {number}"} for number in range(4)))
    wanted: list[tuple[Json | None, str, int]] = [({"to_seq": 2}, "", 2), (None, "summary 0", 4), ({}, "", 4)]
    for number, (body, before, to_seq) in enumerate(wanted):
        path = f"/api/v1{chat.path}/summarize" if number == 0 else f"{chat.path}/summarize"
        told = (await chat.http.post(path, json=body)) if body is not None else (await chat.http.post(path))
        assert told.json() == {
            "session_id": chat.session_id,
            "session_summary": f"summary {number}",
            "summary_to_seq": to_seq,
            "summary_model": SUMMARY_MODEL,
        }
        asked = [each["json"]["messages"][0]["content"] for each in place.asked()]
        ours = [content for content in asked if "question" in content]  # one of an earlier test may be late
        assert transcript.read(ours[number])[0] == before
    place.upstream.script({"match": {"contains": "slow"}, "delay_ms": 500})
    turn = asyncio.create_task(chat.say("slow"))
    await place.upstream.until(lambda state: state["running"] == 1)
    told = await chat.http.post(f"{chat.path}/summarize", json={"model": "another-model"})
    assert (told.json()["summary_to_seq"], told.json()["summary_model"]) == (5, "another-model")
    assert not turn.done()
    await turn


async def test_a_long_session_is_summarised_piece_by_piece_and_in_smaller_ones_when_refused(place: Place) -> None:
    chat = place.chat()
    await chat.say("Hi")
    long = [{"role": ("user", "assistant")[n % 2], "content": f"m{n} " + "word " * 1500} for n in range(40)]
    batch = f"{chat.path}/messages/batch"
    (await chat.sessions.post(batch, json={"messages": long}, params={"user_id": "dev"})).raise_for_status()
    place.upstream.script({**IS_SUMMARY, "status": 400}, *({**IS_SUMMARY, "text": f"part {n}"} for n in range(9)))
    told = (await chat.http.post(f"{chat.path}/summarize")).json()
    pieces = [transcript.read(each["json"]["messages"][0]["content"]) for each in place.asked()]
    assert [before for before, _ in pieces[:3]] == ["", "", "part 0"]
    assert len(pieces[1][1]) < len(pieces[0][1]) < 42
    assert sum(len(entries) for _, entries in pieces[1:]) == 42
    assert (told["session_summary"], told["summary_to_seq"]) == (f"part {len(pieces) - 2}", 42)


async def test_a_client_that_hangs_up_gets_no_summary(place: Place) -> None:
    chat = place.chat()
    await chat.say("Hi")
    place.upstream.script({**IS_SUMMARY, "hang_seconds": 60})
    asking = asyncio.create_task(chat.http.post(f"{chat.path}/summarize"))
    await place.upstream.until(lambda state: state["running"] == 1)
    asking.cancel()
    await place.upstream.until(lambda state: state["running"] == 0, seconds=1)
    place.upstream.script({**IS_SUMMARY, "text": "At once."})
    async with asyncio.timeout(10):
        told = (await chat.http.post(f"{chat.path}/summarize")).json()
    assert told["session_summary"] == "At once."


async def test_what_a_key_may_ask_and_use_holds_on_demand(place: Place) -> None:
    limits = {"rateLimitWindow": 10, "rateLimitRequests": 1, "allowedModels": [MODEL]}
    made = await place.clients[0].post(
        "/admin/api-keys", json={"name": "k", "userId": "dev", **limits}, headers=admin_headers(place.folder)
    )
    key = made.raise_for_status().json()["data"]
    chat = place.chat()
    await chat.say("Hi")
    path, headers = f"{chat.path}/summarize", {"x-api-key": key["apiKey"]}
    refused = await chat.http.post(path, json={"model": "another-model"}, headers=headers)
    assert "model" in error_of(refused, 403, "permission_error")
    # Which model the relay's setting names is for the operator to say.
    assert (await chat.http.post(path, headers=headers)).json()["summary_model"] == SUMMARY_MODEL
    error_of(await chat.http.post(path, headers=headers), 429, "rate_limit_error")
    listed = await chat.http.get(f"/admin/api-keys/{key['id']}", headers=admin_headers(place.folder))
    usage = listed.json()["usage"]
    assert "'tokens': 0" not in str(usage)
    assert len(place.asked()) == 1


async def test_what_is_refused(place: Place) -> None:
    chat = place.chat()
    path = f"{chat.path}/summarize"
    error_of(await chat.http.post(path), 404, "not_found_error")
    error_of(await chat.http.post(path, headers={"x-api-key": "cr_unknown"}), 401, "authentication_error")
    new = {"user_id": "dev", "session_id": chat.session_id}
    (await chat.sessions.post("/sessions", json=new)).raise_for_status()
    assert "no messages" in error_of(await chat.http.post(path), 400, "invalid_request_error")
    await chat.say("Hi")
    for body, field in [
        ({"to_seq": 3}, "to_seq"),
        ({"to_seq": 0}, "to_seq"),
        ({"to_seq": "2"}, "to_seq"),
        ({"to_seq": True}, "to_seq"),
        ({"model": ""}, "model"),
        ({"model": 7}, "model"),
        ([], "body"),
    ]:
        assert field in error_of(await chat.http.post(path, json=body), 400, "invalid_request_error")
    error_of(await chat.http.post(path, content=b"{"), 400, "invalid_request_error")
    assert place.asked() == []
    place.upstream.script({**IS_SUMMARY, "status": 404, "headers": {"x-of-the-account": "secret"}})
    answer = await chat.http.post(path)
    assert (answer.status_code, answer.json()["error"]["message"]) == (404, "scripted")
    assert "x-of-the-account" not in answer.headers
    place.upstream.script({**IS_SUMMARY, "repeat": 3, "status": 529})
    error_of(await chat.http.post(path), 529, "overloaded_error")
    assert await summary_of(chat) == NOTHING
