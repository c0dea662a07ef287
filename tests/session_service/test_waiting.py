"""Waiting for a busy session: in order of arrival, and nothing for a waiter who has gone."""

import asyncio
import time

import httpx
import pytest

from tests.processes import ServiceProcess
from tests.session_service.calls import Chat, Db, Turn, User, check_counters, fine, refused, said


async def queue(chat: Chat, count: int, seconds: float = 30) -> list["asyncio.Task[httpx.Response]"]:
    """Waiters, in this order of arrival."""
    waiting = []
    for number in range(count):
        waiting.append(asyncio.create_task(chat.turn(said(f"w{number}"), wait_seconds=seconds)))
        await asyncio.sleep(0.03)
    return waiting


async def test_waiters_are_served_in_order_of_arrival(user: User, crowd: httpx.AsyncClient, db: Db) -> None:
    chat = (await user.chat()).of(user.at(crowd))
    turn = await chat.open(said("first"))
    waiting = await queue(chat, 8)
    assert not any(task.done() for task in waiting)
    for number, task in enumerate(waiting):
        began = time.monotonic()
        await turn.complete()
        turn = Turn(chat, fine(await task))
        assert time.monotonic() - began < 0.5
        assert turn.opened["messages"][0]["content"] == f"w{number}"
        assert not any(other.done() for other in waiting[number + 1 :])
    await turn.complete()
    assert await chat.contents() == ["first", *(f"w{number}" for number in range(8))]
    await check_counters(db, chat)


async def test_a_free_session_needs_no_waiting(user: User) -> None:
    chat = await user.chat()
    began = time.monotonic()
    turn = await chat.open(said("x"), wait_seconds=60)
    assert time.monotonic() - began < 1
    await turn.complete()


@pytest.mark.parametrize("seconds", [0, 0.2, 1])
async def test_who_waited_in_vain_is_told_which_turn_is_in_the_way(
    user: User, crowd: httpx.AsyncClient, seconds: float
) -> None:
    chat = (await user.chat()).of(user.at(crowd))
    turn = await chat.open(said("x"), lease_seconds=60)
    before = await chat.get()
    began = time.monotonic()
    answers = await asyncio.gather(*(chat.turn(said(f"w{n}"), wait_seconds=seconds) for n in range(4)))
    assert seconds <= time.monotonic() - began < seconds + 1
    for answer in answers:
        body = refused(answer, 409, "turn_in_progress")
        assert body["turn_id"] == turn.id
        assert 1 <= int(answer.headers["retry-after"]) <= 60
    assert await chat.get() == before
    await turn.complete()


async def test_a_waiter_who_has_gone_gets_nothing(
    user: User, session_service: ServiceProcess, crowd: httpx.AsyncClient, db: Db
) -> None:
    chat = (await user.chat()).of(user.at(crowd))
    turn = await chat.open(said("x"))
    async with httpx.AsyncClient(base_url=f"{session_service.url}/api/v1", trust_env=False, timeout=30) as leaving:
        gone = await queue(chat.of(user.at(leaving)), 3)
        staying = await queue(chat, 1)
        for task in gone:
            task.cancel()
        await asyncio.gather(*gone, return_exceptions=True)
    await asyncio.sleep(0.2)
    began = time.monotonic()
    await turn.complete()
    served = Turn(chat, fine(await staying[0]))
    assert time.monotonic() - began < 1
    assert served.opened["messages"][0]["content"] == "w0"
    assert served.opened["messages"][0]["seq"] == 2
    await served.complete()
    assert await chat.contents() == ["x", "w0"]
    assert fine(await chat.call("GET", "/turns"))["turns"][1:][0]["turn_id"] == turn.id
    await check_counters(db, chat)


async def test_a_line_where_only_the_last_has_stayed(user: User, session_service: ServiceProcess, db: Db) -> None:
    """The head of the line is gone when the session becomes free; no time is lost over it."""
    chat = await user.chat()
    turn = await chat.open(said("x"))
    async with httpx.AsyncClient(base_url=f"{session_service.url}/api/v1", trust_env=False, timeout=30) as leaving:
        gone = await queue(chat.of(user.at(leaving)), 2)
        staying = await queue(chat, 1)
        for task in gone:
            task.cancel()
        await asyncio.gather(*gone, return_exceptions=True)
        await turn.complete()  # at once: the service may not have noticed yet
    served = Turn(chat, fine(await staying[0]))
    await served.complete()
    contents = await chat.contents()
    assert contents[0] == "x"
    assert contents[-1] == "w0"
    await check_counters(db, chat)


async def test_waiters_of_a_session_that_ends(user: User, crowd: httpx.AsyncClient) -> None:
    chat = (await user.chat()).of(user.at(crowd))
    turn = await chat.open(said("x"))
    waiting = await queue(chat, 3, seconds=20)
    began = time.monotonic()
    fine(await chat.end())
    await turn.complete()
    for task in waiting:
        refused(await task, 409, "session_not_active")
    assert time.monotonic() - began < 2
    assert await chat.contents() == ["x"]


async def test_waiters_behind_one_whose_context_is_too_small(user: User, crowd: httpx.AsyncClient) -> None:
    chat = (await user.chat()).of(user.at(crowd))
    turn = await chat.open(said("x"))
    big = said("word " * 1000)
    too_big = asyncio.create_task(chat.turn(big, wait_seconds=20, context={"max_tokens": 10}))
    await asyncio.sleep(0.05)
    waiting = await queue(chat, 1)
    await turn.complete()
    refused(await too_big, 422, "context_too_small")
    await Turn(chat, fine(await waiting[0])).complete()
    assert await chat.contents() == ["x", "w0"]


async def test_sessions_wait_apart(user: User, crowd: httpx.AsyncClient) -> None:
    busy, free = [(await user.chat()).of(user.at(crowd)) for _ in range(2)]
    turn = await busy.open(said("x"))
    waiting = await queue(busy, 2)
    began = time.monotonic()
    await (await free.open(said("y"), wait_seconds=30)).complete()
    assert time.monotonic() - began < 1
    await turn.complete()
    for task in waiting:
        await Turn(busy, fine(await task)).complete()
