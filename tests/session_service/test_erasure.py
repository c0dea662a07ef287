"""Erasing a user: everything of theirs, nothing of anyone else's, whatever goes on meanwhile."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import asyncpg
import httpx
import pytest

from shared.http_client import http_client
from tests.processes import free_port, start_session_service
from tests.session_service.calls import Chat, Db, Json, User, fine, invalid, new_user_id, refused, said
from tests.session_service.creations import Request
from tests.session_service.exports import USER_TABLES, a_rich_chat, count, grow, seen

NOTHING = {"sessions": 0, "messages": 0, "memories": 0, "turns": 0}


async def erase(user: User) -> Json:
    body = fine(await user.http.delete(f"/users/{user.id}"))
    assert list(body) == ["deleted"]
    assert list(body["deleted"]) == list(NOTHING)
    deleted: Json = body["deleted"]
    return deleted


async def indexed(db: Db, user: User, seconds: float = 10) -> None:
    """Waits until what happens beside the request path has seen all of the user's writes."""
    deadline = time.monotonic() + seconds
    behind = "SELECT count(*) FROM dev.sessions WHERE user_id = $1 AND indexed_version < version"
    while await db.fetchval(behind, user.id):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)


async def test_nothing_is_left(user: User, db: Db) -> None:
    chats = [await a_rich_chat(user, db) for _ in range(2)]
    fork = Chat(user, fine(await chats[0].call("POST", "/fork", json={}))["session_id"])
    fine(await chats[1].end())
    await user.chat(title="empty")
    request = Request("/sessions", {}, {"json": {"user_id": user.id}})
    fine(await request.send(user.http, "a-key"))
    await indexed(db, user)
    tables = [row[0] for row in await db.fetch(USER_TABLES)]
    counts = {
        name: await db.fetchval(f'SELECT count(*) FROM dev."{name}" WHERE user_id = $1', user.id) for name in tables
    }
    assert all(counts.values()), counts
    messages = 2 * 12 + (await fork.get())["message_count"]
    assert await erase(user) == {"sessions": 5, "messages": messages, "memories": 4, "turns": 12}
    assert await count(db, user) == 0
    for chat in (*chats, fork):
        refused(await chat.call("GET"), 404, "session_not_found")
        refused(await chat.post("x"), 404, "session_not_found")
    assert (await user.sessions())["total"] == 0
    assert fine(await user.http.get(f"/users/{user.id}/memories"))["memories"] == []
    for params in ({"q": "question"}, {"q": "真的"}):
        assert fine(await user.http.get("/sessions/search", params=user.params | params))["results"] == []
    stats = await user.stats()
    assert (stats["total_sessions"], stats["total_messages"], stats["total_tokens"], stats["total_cost"]) == (
        0,
        0,
        0,
        0,
    )
    usage = fine(await user.http.get("/sessions/stats/usage", params=user.params | {"bucket": "hour"}))
    assert sum(each["messages"] for each in usage["items"]) == 0
    assert await erase(user) == NOTHING


async def test_all_others_are_untouched(user: User, db: Db) -> None:
    """Even those who use the same session ids and message ids."""
    other = user.other()
    for each in (user, other):
        await each.create(session_id="same")
        await Chat(each, "same").append("hello", message_id="same")
    chat = await a_rich_chat(other, db)
    await indexed(db, other)
    before, rows, listed = await seen(chat), await count(db, other), await other.sessions()
    assert (await erase(user))["sessions"] == 1
    assert (await seen(chat), await count(db, other), await other.sessions()) == (before, rows, listed)
    assert await Chat(other, "same").contents() == ["hello"]


async def test_the_user_may_begin_anew(user: User, db: Db) -> None:
    chat = await a_rich_chat(user, db)
    await erase(user)
    session = await user.create(session_id=chat.id)
    assert (session["version"], session["generation"], session["message_count"]) == (1, 1, 0)
    assert (await chat.append("x", message_id=f"a/b ü?# {chat.id}"))["seq"] == 1
    assert fine(await chat.call("GET", "/turns"))["turns"] == []


@pytest.mark.parametrize("user_id", ["%20a", "a%00", "x" * 256, "a%C2%85", "%2Fa"])
async def test_ids_that_are_none(sessions: httpx.AsyncClient, user_id: str) -> None:
    invalid(await sessions.delete(f"/users/{user_id}"), "path")


async def test_more_than_one_batch(user: User, db: Db) -> None:
    """12,000 messages in one session, and 40 sessions beside it."""
    chat = await user.chat()
    await chat.append("first")
    await grow(db, chat, 12_000, "'m' || g")
    for _ in range(40):
        await (await user.chat()).remember("m")
    assert await erase(user) == {"sessions": 41, "messages": 12_000, "memories": 40, "turns": 0}
    assert await count(db, user) == 0


async def test_an_open_turn_is_gone_too(user: User, db: Db) -> None:
    chat = await user.chat()
    turn = await chat.open(said("q"))
    assert await erase(user) == {"sessions": 1, "messages": 1, "memories": 0, "turns": 1}
    refused(await turn.finish(said("a", "assistant")), 404, "session_not_found")
    refused(await turn.renew(), 404, "session_not_found")
    assert await count(db, user) == 0


# ── at once ─────────────────────────────────────────────────────────────────────────────────────


async def test_what_was_written_meanwhile_is_counted_and_gone(user: User, crowd: httpx.AsyncClient, db: Db) -> None:
    """Appends, batches, turns and memories go on meanwhile: what was acknowledged is counted, and nothing stays."""
    chats = [(await user.chat(session_id=f"s{n}")).of(user.at(crowd)) for n in range(6)]
    for chat in chats[:3]:
        await chat.append("first")
        await grow(db, chat, 3000, "'m' || g")
    written = {"messages": 3 * 3000, "memories": 0, "turns": 0}

    def gone(answer: httpx.Response) -> bool:
        if answer.status_code == 409:
            refused(answer, 409, "turn_in_progress")
            return False
        if answer.status_code == 200:
            return False
        assert answer.status_code == 404, answer.text
        assert answer.json()["code"] in {"session_not_found", "turn_not_found"}
        return True

    async def append(chat: Chat) -> None:
        while not gone(answer := await chat.post("x")):
            written["messages"] += answer.status_code == 200

    async def in_batches(chat: Chat) -> None:
        body = {"messages": [said("x"), said("y")]}
        while not gone(answer := await chat.call("POST", "/messages/batch", json=body)):
            written["messages"] += 2 * (answer.status_code == 200)

    async def remember(chat: Chat) -> None:
        body = {"memory_type": "custom", "content": "x"}
        while not gone(answer := await chat.call("POST", "/memory", json=body)):
            written["memories"] += answer.status_code == 200

    async def talk(chat: Chat) -> None:
        while not gone(answer := await chat.turn(said("q"))):
            if answer.status_code == 200:
                written["turns"] += 1
                written["messages"] += 1
                told = answer.json()
                body = {"lease_token": told["lease_token"], "status": "refused", "messages": [said("a", "assistant")]}
                path = f"/turns/{told['turn_id']}/complete"
                done = await chat.call("POST", path, json=body)
                if gone(done) or done.status_code != 200:
                    return
                written["messages"] += 1

    ways: list[Callable[[Chat], Awaitable[None]]] = [append, append, in_batches, remember, talk]
    tasks = [asyncio.ensure_future(way(chat)) for chat in chats for way in ways]
    await asyncio.sleep(0.3)
    deleted = await erase(user.at(crowd))
    await asyncio.wait_for(asyncio.gather(*tasks), 20)
    assert deleted == {"sessions": 6, **written}
    assert await count(db, user) == 0


async def test_two_erase_one_user(user: User, crowd: httpx.AsyncClient, db: Db) -> None:
    for n in range(12):
        chat = await user.chat()
        await chat.append("first")
        await grow(db, chat, 500 + n, "'m' || g")
        await chat.remember("m")
    answers = await asyncio.gather(*(erase(user.at(crowd)) for _ in range(3)))
    sums = {name: sum(each[name] for each in answers) for name in NOTHING}
    assert sums == {"sessions": 12, "messages": 12 * 500 + 66, "memories": 12, "turns": 0}
    assert await count(db, user) == 0


async def test_sessions_made_and_erased_again_and_again(user: User, crowd: httpx.AsyncClient, db: Db) -> None:
    """Whatever way these cross, there is no fault, and the last erase leaves nothing."""
    crowded = user.at(crowd)

    async def make() -> None:
        for n in range(12):
            chat = Chat(crowded, f"s{n % 4}")
            opened = await chat.turn(said("q"), create_session={"if_exists": "restart"})
            assert opened.status_code in {200, 404, 409}, opened.text
            for answer in (await chat.call("POST", "/fork", json={}), await chat.end(), await chat.post("x")):
                assert answer.status_code in {200, 404, 409}, answer.text

    async def keep_erasing() -> None:
        for _ in range(8):
            await erase(crowded)

    await asyncio.gather(make(), make(), make(), keep_erasing(), keep_erasing())
    await erase(user)
    assert await count(db, user) == 0


async def test_an_erase_while_its_texts_are_indexed(own_database: str, scratch: Path) -> None:
    """The index is just about to be written when the user goes: what others write is found all the same."""
    db = await asyncpg.connect(own_database)
    await db.execute(
        "CREATE FUNCTION dev.slowly() RETURNS trigger LANGUAGE plpgsql AS"
        " $$BEGIN PERFORM pg_sleep(0.4); RETURN NEW; END$$;"
        "CREATE TRIGGER slowly BEFORE INSERT ON dev.session_search FOR EACH STATEMENT EXECUTE FUNCTION dev.slowly()"
    )
    with start_session_service(own_database, scratch, free_port(), NEWS_INTERVAL_SECONDS="0.05") as service:
        async with http_client(read_seconds=20, connect_seconds=5) as http:
            http.base_url = httpx.URL(f"{service.url}/api/v1/")
            for seconds in (0.1, 0.2, 0.3):
                going = User(http, new_user_id())
                await (await going.chat(title="title")).append("words")
                await asyncio.sleep(seconds)
                assert (await erase(going))["messages"] == 1
            user = User(http, new_user_id())
            await (await user.chat()).append("words of another")
            await indexed(db, user)
            found = fine(await http.get("/sessions/search", params=user.params | {"q": "another"}))
            assert len(found["results"]) == 1
            assert await count(db, going) == 0
        assert service.stop() == 0
    assert "Traceback" not in service.logged()
    await db.close()


async def test_a_user_who_comes_back_in_the_middle(own_database: str, scratch: Path) -> None:
    """Their sessions are gone, and one is made, and counted, before they are taken out of the sums."""
    db = await asyncpg.connect(own_database)
    await db.execute(
        "CREATE FUNCTION dev.slowly() RETURNS trigger LANGUAGE plpgsql AS"
        " $$BEGIN PERFORM pg_sleep(1.5); RETURN OLD; END$$;"
        "CREATE TRIGGER slowly BEFORE DELETE ON dev.idempotency_records FOR EACH ROW EXECUTE FUNCTION dev.slowly()"
    )
    with start_session_service(own_database, scratch, free_port(), NEWS_INTERVAL_SECONDS="0.05") as service:
        async with http_client(read_seconds=20, connect_seconds=5) as http:
            http.base_url = httpx.URL(f"{service.url}/api/v1/")
            user = User(http, new_user_id())
            fine(await Request("/sessions", {}, {"json": {"user_id": user.id}}).send(http, "a-key"))
            await indexed(db, user)
            erasing = asyncio.create_task(erase(user))
            while (await user.sessions())["total"]:
                assert not erasing.done()
            await (await user.chat()).append("back again")
            await indexed(db, user)
            assert not erasing.done()
            assert (await erasing)["sessions"] == 2
            assert await count(db, user) == 0
            await (await user.chat()).append("and again")
            await indexed(db, user)
    for scope in (user.id, ""):
        sums = "SELECT sessions, messages FROM dev.session_totals WHERE user_id = $1"
        used = "SELECT sum(messages), sum(active_sessions) FROM dev.usage_buckets WHERE user_id = $1 AND bucket = 'day'"
        assert tuple(await db.fetchrow(sums, scope) or ()) == (1, 1)
        assert tuple(await db.fetchrow(used, scope) or ()) == (1, 1)
    await db.close()


async def test_a_kill_in_the_middle(own_database: str, scratch: Path) -> None:
    """Called again, it goes on."""
    db = await asyncpg.connect(own_database)
    port, user_id = free_port(), new_user_id()
    async with http_client(read_seconds=30, connect_seconds=5) as http:
        http.base_url = httpx.URL(f"http://127.0.0.1:{port}/api/v1/")
        user = User(http, user_id)
        with start_session_service(own_database, scratch, port) as service:
            for _ in range(20):
                chat = await user.chat()
                await chat.append("first")
                await grow(db, chat, 1500, "'m' || g")
            before = await count(db, user)
            erasing = asyncio.create_task(erase(user))
            while await count(db, user) > before - 4000:
                assert not erasing.done()
            service.kill()
            with pytest.raises(httpx.TransportError):
                await erasing
        left = await count(db, user)
        assert 0 < left < before
        with start_session_service(own_database, scratch, port):
            deleted = await erase(user)
            assert 0 < deleted["sessions"] <= 20
    assert await count(db, user) == 0
    await db.close()
