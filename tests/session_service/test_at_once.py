"""A turn is opened and completed by one statement each: what the statement meets when another writer comes first.

The order is made, not waited for: a lock on the session's row keeps the other writer and then the turn's own waiting,
so that the turn has read a session that will have changed when its statement goes on.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import asyncpg
import httpx
import pytest

from services.session_service import retention
from shared.database import compile_statement
from tests.session_service.calls import Chat, Db, Turn, User, check_counters, fine, new_user_id, refused, said, wait

Call = Callable[[Chat], Awaitable[httpx.Response]]

LOCK = "SELECT 1 FROM dev.sessions WHERE user_id = $1 AND session_id = $2 FOR NO KEY UPDATE"
WAITING = (
    "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    " AND application_name LIKE 'session_service%'"
)


class Line:
    """Those who wait for a session's row, in order of arrival."""

    def __init__(self, db: Db) -> None:
        self._db = db
        self._waiting: list[asyncio.Task[httpx.Response]] = []

    async def join(self, call: Awaitable[httpx.Response]) -> "asyncio.Task[httpx.Response]":
        """Begins the call, and comes back when its statement waits."""
        task = asyncio.ensure_future(call)
        self._waiting.append(task)
        async with asyncio.timeout(10):
            while await self._db.fetchval(WAITING) < len(self._waiting):
                assert not task.done(), task.result().text
                await asyncio.sleep(0.002)
        return task


@asynccontextmanager
async def writing(url: str, *, commits: bool = True) -> AsyncIterator[Db]:
    """A connection in a transaction that ends with the block."""
    connection = await asyncpg.connect(url)
    try:
        transaction = connection.transaction()
        await transaction.start()
        yield connection
        await (transaction.commit() if commits else transaction.rollback())
    finally:
        await connection.close()


@asynccontextmanager
async def held(url: str, db: Db, chat: Chat) -> AsyncIterator[Line]:
    """The session's row, locked until the block ends."""
    async with writing(url) as connection:
        assert await connection.fetchval(LOCK, chat.user.id, chat.id) == 1
        yield Line(db)


async def in_order(url: str, db: Db, chat: Chat, first: Call, second: Call) -> tuple[httpx.Response, httpx.Response]:
    """The answers of two calls that both began before either could write, and wrote in this order."""
    async with held(url, db, chat) as line:
        one = await line.join(first(chat))
        two = await line.join(second(chat))
    return await one, await two


@pytest.fixture
def mine(user: User, crowd: httpx.AsyncClient) -> User:
    return user.at(crowd)


async def talked(user: User) -> Chat:
    """A session with a turn behind it: seqs 1 and 2."""
    chat = await user.chat()
    await (await chat.open(said("root"))).complete(said("well", "assistant"))
    return chat


def texts(opened: httpx.Response) -> str:
    context = fine(opened)["context"]
    return f"{context['system']} | {context['messages']}"


def reopening(chat: Chat) -> Awaitable[httpx.Response]:
    """As clients that send everything again open their turns."""
    return chat.turn(said("new"), rewind_to_seq=2, context={"memories": True}, create_session={})


def opening(chat: Chat) -> Awaitable[httpx.Response]:
    return chat.turn(said("new"), context={"memories": True}, create_session={})


APPEND: Call = lambda chat: chat.post("late")  # noqa: E731
BATCH: Call = lambda chat: chat.call("POST", "/messages/batch", json={"messages": [said("late")]})  # noqa: E731
REMEMBER: Call = lambda chat: chat.call(  # noqa: E731
    "POST", "/memory", json={"memory_type": "entity", "content": "late"}
)
SUMMARISE: Call = lambda chat: chat.put(session_summary="late")  # noqa: E731
REWIND: Call = lambda chat: chat.call("POST", "/rewind", json={"to_seq": 1})  # noqa: E731
END: Call = lambda chat: chat.end()  # noqa: E731
COMPLETE: Call = lambda chat: chat.put(status="completed")  # noqa: E731
ERASE: Call = lambda chat: chat.user.http.delete(f"/users/{chat.user.id}")  # noqa: E731
FORK: Call = lambda chat: chat.call("POST", "/fork", json={})  # noqa: E731


@pytest.mark.parametrize("other", [APPEND, BATCH, REMEMBER, SUMMARISE])
async def test_what_came_first_is_in_the_context(mine: User, database_url: str, db: Db, other: Call) -> None:
    chat = await talked(mine)
    first, opened = await in_order(database_url, db, chat, other, opening)
    fine(first)
    assert "late" in texts(opened)
    session = await check_counters(db, chat)
    assert opened.json()["session"] == session
    assert opened.json()["messages"][0]["seq"] == session["message_count"]


async def test_what_was_taken_back_first_is_not_in_the_context(mine: User, database_url: str, db: Db) -> None:
    chat = await talked(mine)
    first, opened = await in_order(database_url, db, chat, REWIND, opening)
    fine(first)
    assert "root" in texts(opened)
    assert "well" not in texts(opened)
    assert opened.json()["messages"][0]["seq"] == 3
    await check_counters(db, chat)


async def test_a_client_that_takes_back_what_it_has_not_seen(mine: User, database_url: str, db: Db) -> None:
    """It asked for the history up to seq 2; what came first is superseded, as if it had been there before."""
    chat = await talked(mine)
    first, opened = await in_order(database_url, db, chat, APPEND, reopening)
    assert fine(first)["seq"] == 3
    assert "late" not in texts(opened)
    assert fine(opened)["messages"][0]["seq"] == 4
    assert (await check_counters(db, chat))["message_count"] == 3


async def test_if_match_is_judged_by_what_came_first(mine: User, database_url: str, db: Db) -> None:
    chat = await talked(mine)
    version = (await chat.get())["version"]

    def guarded(chat: Chat) -> Awaitable[httpx.Response]:
        headers = {"If-Match": f'"{version}"'}
        return chat.call("POST", "/turns", json={"messages": [said("new")], "rewind_to_seq": 2}, headers=headers)

    first, opened = await in_order(database_url, db, chat, APPEND, guarded)
    fine(first)
    assert refused(opened, 412, "version_mismatch")["version"] == version + 1
    assert (await check_counters(db, chat))["message_count"] == 3
    assert len(fine(await chat.call("GET", "/turns"))["turns"]) == 1


@pytest.mark.parametrize("other", [END, COMPLETE])
async def test_a_session_that_was_ended_first_is_not_written_to(
    mine: User, database_url: str, db: Db, other: Call
) -> None:
    chat = await talked(mine)
    first, opened = await in_order(database_url, db, chat, other, opening)
    fine(first)
    refused(opened, 409, "session_not_active")
    assert (await check_counters(db, chat))["message_count"] == 2


async def test_a_session_that_was_erased_first(user: User, crowd: httpx.AsyncClient, database_url: str, db: Db) -> None:
    chat = await talked(User(crowd, new_user_id()))
    first, opened = await in_order(database_url, db, chat, ERASE, lambda chat: chat.turn(said("new")))
    assert fine(first)["deleted"]["messages"] == 2
    refused(opened, 404, "session_not_found")
    chat = await talked(User(crowd, new_user_id()))
    first, made_anew = await in_order(database_url, db, chat, ERASE, opening)
    fine(first)
    assert (fine(made_anew)["messages"][0]["seq"], made_anew.json()["session"]["version"]) == (1, 3)


@pytest.mark.parametrize("second", [opening, reopening])
async def test_of_two_openings_the_first_has_the_session(mine: User, database_url: str, db: Db, second: Call) -> None:
    chat = await talked(mine)
    first, late = await in_order(database_url, db, chat, reopening, second)
    assert refused(late, 409, "turn_in_progress")["turn_id"] == fine(first)["turn_id"]
    assert (await check_counters(db, chat))["message_count"] == 3
    turns = fine(await chat.call("GET", "/turns"))["turns"]
    assert [turn["status"] for turn in turns] == ["open", "completed"]


@pytest.mark.parametrize("other", [APPEND, BATCH, REWIND])
async def test_an_opening_that_came_first_keeps_others_out(mine: User, database_url: str, db: Db, other: Call) -> None:
    chat = await talked(mine)
    opened, late = await in_order(database_url, db, chat, opening, other)
    assert refused(late, 409, "turn_in_progress")["turn_id"] == fine(opened)["turn_id"]
    assert await chat.contents() == ["root", "well", "new"]
    await check_counters(db, chat)


async def test_a_session_that_ends_after_the_opening_keeps_the_turn(mine: User, database_url: str, db: Db) -> None:
    chat = await talked(mine)
    opened, ended = await in_order(database_url, db, chat, opening, END)
    fine(ended)
    done = await Turn(chat, fine(opened)).complete(said("paid for", "assistant"))
    assert done["session"]["status"] == "ended"
    assert await chat.contents() == ["root", "well", "new", "paid for"]


async def test_a_session_that_another_is_just_making(mine: User, database_url: str, db: Db) -> None:
    """Made by the other, it is found; not made after all, it is made here."""
    for number, commits in enumerate((True, False)):
        chat = Chat(mine, f"just-made-{number}")
        async with writing(database_url, commits=commits) as connection:
            await connection.execute(
                "INSERT INTO dev.sessions (user_id, session_id, title, created_at, updated_at, last_activity)"
                " VALUES ($1, $2, 'theirs', now(), now(), now())",
                mine.id,
                chat.id,
            )
            waiting = await Line(db).join(chat.turn(said("new"), create_session={"title": "ours"}))
        opened = fine(await waiting)
        assert opened["session"]["title"] == ("theirs" if commits else "ours")
        assert opened["session"] == await check_counters(db, chat)
        assert (opened["session"]["version"], opened["messages"][0]["seq"]) == (3, 1)


async def test_turns_that_bring_each_others_message_ids(mine: User, db: Db) -> None:
    """Each waits for an id that the other has; one of them is stored, or both say what is in the way."""
    for number in range(20):
        ids = [f"{number}-{place}" for place in range(40)]
        chats = [Chat(mine, f"crossed-{number}-{side}") for side in "ab"]
        answers = await asyncio.gather(
            *(
                chat.turn(*(said(name, message_id=name) for name in order), create_session={})
                for chat, order in zip(chats, (ids, ids[::-1]), strict=True)
            )
        )
        stored = [answer for answer in answers if answer.status_code == 200]
        assert len(stored) == 1
        for chat, answer in zip(chats, answers, strict=True):
            if answer not in stored:
                refused(answer, 409, "message_exists")
                refused(await chat.call("GET"), 404, "session_not_found")
            else:
                await check_counters(db, chat)


# ── completing ──────────────────────────────────────────────────────────────────────────────────


def answering(turn: Turn, text: str = "answer") -> Call:
    return lambda _: turn.finish(said(text, "assistant", message_id=f"{turn.id}-{text}"), usage={"output_tokens": 7})


@pytest.mark.parametrize("other", [END, SUMMARISE, REMEMBER, FORK])
async def test_what_came_first_stays_and_the_answer_is_kept(mine: User, database_url: str, db: Db, other: Call) -> None:
    chat = await talked(mine)
    turn = await chat.open(said("q", tokens_used=5))
    before = (await chat.get())["version"]
    first, completed = await in_order(database_url, db, chat, other, answering(turn))
    fine(first)
    session = await check_counters(db, chat)
    assert fine(completed)["session"] == session
    assert session["version"] == before + 2 + (other is not FORK)
    assert (session["total_tokens"], session["message_count"]) == (12, 4)
    assert session["status"] == ("ended" if other is END else "active")
    assert session["session_summary"] == ("late" if other is SUMMARISE else "")
    assert (completed.json()["turn"]["output_from_seq"], completed.json()["turn"]["output_to_seq"]) == (4, 4)
    fine(await chat.turn(said("next"), create_session={"if_exists": "resume"}))  # nothing holds it any more


async def test_a_lease_that_was_renewed_first(mine: User, database_url: str, db: Db) -> None:
    chat = await talked(mine)
    turn = await chat.open(said("q"))
    renewed, completed = await in_order(database_url, db, chat, lambda _: turn.renew(), answering(turn))
    assert fine(completed)["turn"]["lease_expires_at"] == fine(renewed)["lease_expires_at"]
    assert fine(completed)["session"] == await check_counters(db, chat)


async def test_of_two_completions_the_first_is_kept(mine: User, database_url: str, db: Db) -> None:
    chat = await talked(mine)
    turn = await chat.open(said("q"))
    first, late = await in_order(database_url, db, chat, answering(turn, "one"), answering(turn, "two"))
    fine(first)
    refused(late, 409, "turn_closed")
    assert await chat.contents() == ["root", "well", "q", "one"]
    await check_counters(db, chat)


async def test_of_the_same_completion_twice_both_have_the_same_answer(mine: User, database_url: str, db: Db) -> None:
    chat = await talked(mine)
    turn = await chat.open(said("q"))
    first, again = await in_order(database_url, db, chat, answering(turn), answering(turn))
    assert fine(again) == fine(first)
    assert await chat.contents() == ["root", "well", "q", "answer"]
    await check_counters(db, chat)


@pytest.mark.parametrize("other", [opening, reopening])
async def test_a_turn_that_was_taken_over_first_has_lost_its_lease(
    mine: User, database_url: str, db: Db, other: Call
) -> None:
    chat = await talked(mine)
    turn = await chat.open(said("q"))
    await wait(db, chat, 700)
    opened, late = await in_order(database_url, db, chat, other, answering(turn))
    refused(late, 409, "lease_lost")
    turns = {each["turn_id"]: each["status"] for each in fine(await chat.call("GET", "/turns"))["turns"]}
    assert (turns[turn.id], turns[fine(opened)["turn_id"]]) == ("expired", "open")
    assert "answer" not in await chat.contents(include_superseded=True)
    await check_counters(db, chat)


async def test_a_turn_that_is_just_being_taken_over(mine: User, database_url: str, db: Db) -> None:
    """The statement waits for the session before it touches the turn: what was decided on both is seen on both."""
    chat = await talked(mine)
    turn = await chat.open(said("q"))
    async with writing(database_url) as connection:
        key = (chat.user.id, chat.id)
        await connection.fetchval(LOCK, *key)
        await connection.execute(
            "UPDATE dev.session_turns SET status = 'expired', closed_at = now()"
            " WHERE user_id = $1 AND session_id = $2 AND status = 'open'",
            *key,
        )
        await connection.execute(
            "UPDATE dev.sessions SET version = version + 1, latest_turn_id = 'another'"
            " WHERE user_id = $1 AND session_id = $2",
            *key,
        )
        late = await Line(db).join(answering(turn)(chat))
    refused(await late, 409, "lease_lost")
    assert (await turn.get())["status"] == "expired"
    assert await chat.contents() == ["root", "well", "q"]


@pytest.mark.parametrize("completes", [True, False])
async def test_a_lease_that_is_just_being_swept(mine: User, database_url: str, db: Db, completes: bool) -> None:
    chat = await talked(mine)
    turn = await chat.open(said("q"))
    await wait(db, chat, 700)
    async with writing(database_url) as connection:
        statement = compile_statement(retention.EXPIRE_TURNS, "dev")
        async with asyncio.timeout(10):  # it passes over a session that is just being indexed
            while not await connection.fetchval(statement.sql, *statement.arguments({}), column=1):
                await asyncio.sleep(0.01)
        waiting = await Line(db).join(answering(turn)(chat) if completes else opening(chat))
    answer = fine(await waiting)
    assert answer["session"] == await check_counters(db, chat)
    assert (await turn.get())["status"] == ("completed" if completes else "expired")


@pytest.mark.parametrize(("if_exists", "still_may"), [("restart", False), ("resume", True)])
async def test_a_session_that_was_brought_back_first(
    mine: User, database_url: str, db: Db, if_exists: str, still_may: bool
) -> None:
    chat = await talked(mine)
    turn = await chat.open(said("q"))
    await wait(db, chat, 700)
    fine(await chat.end())

    def revive(chat: Chat) -> Awaitable[httpx.Response]:
        body = {"user_id": chat.user.id, "session_id": chat.id, "if_exists": if_exists}
        return chat.user.http.post("/sessions", json=body)

    revived, completed = await in_order(database_url, db, chat, revive, answering(turn))
    assert fine(revived)["generation"] == 2
    if still_may:
        assert fine(completed)["turn"]["status"] == "completed"
    else:
        refused(completed, 409, "lease_lost")
    assert (await check_counters(db, chat))["message_count"] == (4 if still_may else 0)


async def test_a_turn_whose_user_was_erased_first(
    user: User, crowd: httpx.AsyncClient, database_url: str, db: Db
) -> None:
    chat = await talked(User(crowd, new_user_id()))
    turn = await chat.open(said("q"))
    erased, completed = await in_order(database_url, db, chat, ERASE, answering(turn))
    assert fine(erased)["deleted"]["turns"] == 2
    refused(completed, 404, "session_not_found")
    assert await db.fetchval("SELECT count(*) FROM dev.session_messages WHERE user_id = $1", chat.user.id) == 0


@pytest.mark.parametrize("other", [BATCH, opening])
async def test_a_turn_that_was_completed_first_lets_others_in(
    mine: User, database_url: str, db: Db, other: Call
) -> None:
    chat = await talked(mine)
    turn = await chat.open(said("q"))
    completed, late = await in_order(database_url, db, chat, answering(turn), other)
    fine(completed)
    assert fine(late)["messages"][0]["seq"] == 5
    if other is opening:
        assert "answer" in texts(late)
    await check_counters(db, chat)


async def test_an_expired_session_is_not_completed_as_an_active_one(mine: User, db: Db) -> None:
    chat = await mine.chat(idle_timeout_seconds=60)
    turn = await chat.open(said("q"), lease_seconds=5)
    await wait(db, chat, 100)
    done = await turn.complete(said("answer", "assistant"))
    assert (done["session"]["status"], done["session"]["ended_reason"]) == ("ended", "expired")
    assert done["session"] == await check_counters(db, chat)
    assert await chat.contents() == ["q", "answer"]


async def test_a_wrong_token_writes_nothing(mine: User, db: Db) -> None:
    chat = await talked(mine)
    turn = await chat.open(said("q"))
    for token in ("", "x", turn.token[:-1], turn.token + "x", "é" * 32):
        body = {"lease_token": token, "status": "completed", "messages": [said("stolen", "assistant")]}
        answer = await chat.call("POST", f"/turns/{turn.id}/complete", json=body)
        assert answer.status_code in {400, 409}
        if answer.status_code == 409:
            refused(answer, 409, "lease_lost")
    assert await chat.contents() == ["root", "well", "q"]
    assert (await turn.get())["status"] == "open"
    await turn.complete(said("mine", "assistant"))
