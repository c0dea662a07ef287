"""Leases: who may still write an answer, and what becomes of a turn that nobody finishes."""

import asyncio
import time

import httpx
import pytest

from tests.session_service.calls import Db, Turn, User, check_counters, fine, invalid, refused, said, stored_rows, wait

ANSWER = said("paid for", "assistant")


async def test_a_lease_runs_out_by_the_real_clock(user: User, db: Db) -> None:
    chat = await user.chat()
    began = time.monotonic()
    turn = await chat.open(said("one"), lease_seconds=5)
    answer = await chat.turn(said("two"))
    refused(answer, 409, "turn_in_progress")
    assert 1 <= int(answer.headers["retry-after"]) <= 5
    second = await chat.open(said("two"), wait_seconds=20)
    assert 4.5 < time.monotonic() - began < 8
    assert (await turn.get())["status"] == "expired"
    refused(await turn.finish(ANSWER), 409, "lease_lost")
    await second.complete(ANSWER)
    assert await chat.contents() == ["one", "two", "paid for"]
    await check_counters(db, chat)


async def test_a_lease_taken_over_is_lost(user: User, db: Db) -> None:
    chat = await user.chat()
    turn = await chat.open(said("one"), lease_seconds=60)
    await wait(db, chat, 61)
    other = await chat.open(said("two"))
    before = await stored_rows(db, user.id)
    refused(await turn.finish(ANSWER), 409, "lease_lost", "This lease no longer holds the turn")
    refused(await turn.finish(ANSWER, status="refused"), 409, "lease_lost")
    refused(await turn.renew(), 409, "turn_closed")
    assert await stored_rows(db, user.id) == before
    shown = await turn.get()
    assert (shown["status"], shown["output_from_seq"]) == ("expired", None)
    assert shown["closed_at"] is not None
    assert await chat.contents() == ["one", "two"]
    await other.complete(ANSWER)
    refused(await turn.finish(ANSWER), 409, "lease_lost")
    assert await chat.contents() == ["one", "two", "paid for"]
    await check_counters(db, chat)


async def test_a_late_completion_without_takeover(user: User, db: Db) -> None:
    chat = await user.chat()
    turn = await chat.open(said("one"), lease_seconds=60)
    await wait(db, chat, 10_000)
    done = await turn.complete(ANSWER)
    assert done["turn"]["status"] == "completed"
    assert await chat.contents() == ["one", "paid for"]
    await check_counters(db, chat)


async def test_after_the_lease_others_may_append_and_the_late_answer_still_comes(user: User, db: Db) -> None:
    chat = await user.chat()
    turn = await chat.open(said("one"), lease_seconds=60)
    await wait(db, chat, 61)
    await chat.append("appended meanwhile")
    done = await turn.complete(ANSWER)
    assert done["messages"][0]["seq"] == 3
    await check_counters(db, chat)


async def test_renewing_a_lease(user: User, db: Db) -> None:
    chat = await user.chat()
    turn = await chat.open(said("one"), lease_seconds=60)
    await wait(db, chat, 50)
    answer = fine(await turn.renew())
    assert list(answer) == ["turn_id", "lease_expires_at"]
    assert answer["turn_id"] == turn.id
    assert (await turn.get())["lease_expires_at"] == answer["lease_expires_at"]
    await wait(db, chat, 50)
    refused(await chat.turn(said("two")), 409, "turn_in_progress")
    fine(await turn.renew())
    await turn.complete(ANSWER)
    refused(await turn.renew(), 409, "turn_closed", "Turn is closed")


async def test_a_lease_that_ran_out_may_be_renewed_until_it_was_taken_over(user: User, db: Db) -> None:
    chat = await user.chat()
    turn = await chat.open(said("one"), lease_seconds=60)
    await wait(db, chat, 100)
    fine(await turn.renew())
    refused(await chat.turn(said("two")), 409, "turn_in_progress")
    await turn.complete(ANSWER)


@pytest.mark.parametrize("token", ["x", "é", "0" * 200, "😀"])
async def test_a_wrong_token(user: User, db: Db, token: str) -> None:
    chat = await user.chat()
    turn = await chat.open(said("one"))
    before = await stored_rows(db, user.id)
    for status in ("completed", "refused"):
        refused(await turn.finish(ANSWER, lease_token=token, status=status), 409, "lease_lost")
    refused(await turn.renew(token), 409, "lease_lost")
    assert await stored_rows(db, user.id) == before
    await turn.complete(ANSWER)
    refused(await turn.finish(ANSWER, lease_token=token), 409, "lease_lost")
    assert await chat.contents() == ["one", "paid for"]


async def test_the_token_of_another_turn(user: User) -> None:
    chat = await user.chat()
    turn = await chat.open(said("one"))
    await turn.complete()
    other = await chat.open(said("two"))
    assert turn.token != other.token
    refused(await other.finish(ANSWER, lease_token=turn.token), 409, "lease_lost")
    invalid(await other.finish(ANSWER, lease_token=None), "body", "lease_token")
    await other.complete()


async def test_of_two_different_completions_at_once_one_counts(user: User, crowd: httpx.AsyncClient, db: Db) -> None:
    chat = (await user.chat()).of(user.at(crowd))
    turn = await chat.open(said("one"))
    answers = await asyncio.gather(*(turn.finish(said(f"a{number}", "assistant")) for number in range(10)))
    assert sorted(answer.status_code for answer in answers) == [200] + [409] * 9
    for answer in answers:
        if answer.status_code == 409:
            refused(answer, 409, "turn_closed")
    assert len(await chat.contents()) == 2
    await check_counters(db, chat)


async def test_the_same_completion_many_times_at_once(user: User, crowd: httpx.AsyncClient, db: Db) -> None:
    chat = (await user.chat()).of(user.at(crowd))
    turn = await chat.open(said("one"))
    answers = await asyncio.gather(*(turn.finish(ANSWER, cost_usd=0.5) for _ in range(20)))
    assert len({str(fine(answer)) for answer in answers}) == 1
    session = await check_counters(db, chat)
    assert (session["message_count"], session["total_cost"]) == (2, 0.5)


async def test_late_completion_and_takeover_at_once(user: User, crowd: httpx.AsyncClient, db: Db) -> None:
    """Whoever comes first: never both, never neither."""
    for _ in range(10):
        chat = (await user.chat()).of(user.at(crowd))
        turn = await chat.open(said("one"), lease_seconds=60)
        await wait(db, chat, 61)
        completed, opened = await asyncio.gather(turn.finish(ANSWER), chat.turn(said("two")))
        taken = Turn(chat, fine(opened))
        contents = await chat.contents()
        if completed.status_code == 200:
            assert contents == ["one", "paid for", "two"]
        else:
            refused(completed, 409, "lease_lost")
            assert contents == ["one", "two"]
        assert (await taken.get())["status"] == "open"
        await check_counters(db, chat)


async def test_completion_and_end_at_once(user: User, crowd: httpx.AsyncClient, db: Db) -> None:
    for _ in range(10):
        chat = (await user.chat()).of(user.at(crowd))
        turn = await chat.open(said("one"))
        completed, ended = await asyncio.gather(turn.finish(ANSWER), chat.end())
        fine(ended)
        fine(completed)
        session = await check_counters(db, chat)
        assert (session["status"], session["message_count"]) == ("ended", 2)
