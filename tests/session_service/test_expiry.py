"""Idle sessions: an expired one is never served as active, whether or not the sweeper has come by."""

import asyncio
import time

from tests.session_service.calls import Chat, Db, User, check_counters, fine, refused, said, wait


async def expired_chat(user: User, db: Db) -> Chat:
    """A session that has expired a second ago, and that nobody has looked at since."""
    chat = await user.chat(idle_timeout_seconds=60)
    await chat.append("x")
    await wait(db, chat, 61)
    stored = await db.fetchval(
        "SELECT status FROM dev.sessions WHERE user_id = $1 AND session_id = $2", user.id, chat.id
    )
    assert stored == "active"
    return chat


async def test_expiry_by_the_real_clock(user: User) -> None:
    chat = await user.chat(idle_timeout_seconds=1)
    message = await chat.append("x")
    session = await chat.get()
    assert (session["is_active"], session["last_activity"]) == (True, message["created_at"])
    began = time.monotonic()
    while (session := await chat.get())["is_active"]:
        assert time.monotonic() - began < 3
        await asyncio.sleep(0.05)
    assert time.monotonic() - began > 0.8
    assert (session["status"], session["ended_reason"]) == ("ended", "expired")
    refused(await chat.post("late"), 409, "session_not_active")


async def test_expires_at_follows_activity(user: User) -> None:
    session = await user.create(idle_timeout_seconds=60)
    chat = Chat(user, session["session_id"])

    def gap(found: dict[str, str]) -> float:
        moments = [
            time.mktime(time.strptime(found[name][:19], "%Y-%m-%dT%H:%M:%S"))
            for name in ("expires_at", "last_activity")
        ]
        return moments[0] - moments[1]

    assert gap(session) == 60
    await chat.append("x")
    later = await chat.get()
    assert later["expires_at"] > session["expires_at"]
    assert gap(later) == 60
    turn = await chat.open(said("y"))
    assert turn.opened["session"]["expires_at"] > later["expires_at"]
    renewed = fine(await turn.renew())
    assert renewed["lease_expires_at"] > turn.opened["lease_expires_at"]
    before = await chat.get()
    assert before["expires_at"] > turn.opened["session"]["expires_at"]
    done = await turn.complete(said("z", "assistant"))
    assert done["session"]["expires_at"] > before["expires_at"]
    changed = fine(await chat.put(idle_timeout_seconds=120))
    assert gap(changed) == 120
    assert changed["last_activity"] == done["session"]["last_activity"]


async def test_an_expired_session_is_ended_wherever_it_is_read(user: User, db: Db) -> None:
    chat = await expired_chat(user, db)
    shown = [
        await chat.get(),
        fine(await chat.call("GET", "/summary")),
        (await user.sessions())["sessions"][0],
        fine(await user.http.get(f"/users/{user.id}/sessions"))["sessions"][0],
        (await user.sessions(status="ended"))["sessions"][0],
        fine(
            await user.http.post("/sessions", json={"user_id": user.id, "session_id": chat.id, "if_exists": "return"})
        ),
    ]
    for each in shown:
        assert (each["status"], each["is_active"]) == ("ended", False)
        assert each.get("ended_reason", "expired") == "expired"
    for params in ({"active_only": "true"}, {"status": "active"}, {"active_only": "true", "status": "active"}):
        listed = await user.sessions(**params)
        assert (listed["sessions"], listed["total"]) == ([], 0)
    stats = await user.stats()
    assert (stats["total_sessions"], stats["active_sessions"]) == (1, 0)
    assert await chat.contents() == ["x"]
    assert (await chat.context())["messages"] == [{"role": "user", "content": "x"}]


async def test_an_expired_session_takes_nothing(user: User, db: Db) -> None:
    chat = await expired_chat(user, db)
    refused(await chat.post("late"), 409, "session_not_active")
    again = await expired_chat(user, db)
    refused(await again.turn(said("late")), 409, "session_not_active")
    refused(
        await again.turn(said("late"), create_session={"if_exists": "return"}, wait_seconds=5),
        409,
        "session_not_active",
    )
    assert await again.contents() == ["x"]
    for each in (chat, again):
        session = await check_counters(db, each)
        assert (session["status"], session["ended_reason"], session["message_count"]) == ("ended", "expired", 1)


async def test_put_on_an_expired_session(user: User, db: Db) -> None:
    chat = await expired_chat(user, db)
    nothing = fine(await chat.put())
    assert (nothing["status"], nothing["ended_reason"]) == ("ended", "expired")
    assert fine(await chat.put(status="ended"))["ended_reason"] == "expired"
    other = await expired_chat(user, db)
    refused(await other.put(status="completed"), 409, "invalid_transition")
    refused(await other.put(status="active"), 409, "invalid_transition")
    titled = fine(await other.put(title="still", idle_timeout_seconds=1_000_000))
    assert (titled["title"], titled["status"], titled["ended_reason"]) == ("still", "ended", "expired")


async def test_a_turn_may_bring_an_expired_session_back(user: User, db: Db) -> None:
    chat = await expired_chat(user, db)
    turn = await chat.open(said("new"), create_session={"if_exists": "restart"})
    session = turn.opened["session"]
    assert (session["status"], session["generation"], session["message_count"]) == ("active", 2, 1)
    other = await expired_chat(user, db)
    turn = await other.open(said("new"), create_session={"if_exists": "resume"})
    session = turn.opened["session"]
    assert (session["status"], session["generation"], session["message_count"]) == ("active", 2, 2)


async def test_an_open_lease_holds_expiry_off(user: User, db: Db) -> None:
    chat = await user.chat(idle_timeout_seconds=60)
    turn = await chat.open(said("x"), lease_seconds=300)
    await wait(db, chat, 200)
    session = await chat.get()
    assert (session["status"], session["is_active"]) == ("active", True)
    assert (await user.sessions(active_only="true"))["total"] == 1
    refused(await chat.turn(said("y")), 409, "turn_in_progress")
    fine(await turn.renew())
    await wait(db, chat, 200)
    done = await turn.complete(said("z", "assistant"))
    assert (done["session"]["status"], done["session"]["message_count"]) == ("active", 2)
    assert done["session"]["expires_at"] > done["session"]["last_activity"]


async def test_expiry_comes_with_the_end_of_the_lease(user: User, db: Db) -> None:
    chat = await user.chat(idle_timeout_seconds=60)
    turn = await chat.open(said("x"), lease_seconds=300)
    await wait(db, chat, 301)
    assert (await chat.get())["ended_reason"] == "expired"
    refused(await chat.turn(said("y")), 409, "session_not_active")
    done = await turn.complete(said("paid for", "assistant"))
    assert (done["session"]["status"], done["session"]["message_count"]) == ("ended", 2)
    await check_counters(db, chat)


async def test_a_session_without_a_timeout_never_expires(user: User, db: Db) -> None:
    chat = await user.chat()
    await wait(db, chat, 10**8)
    assert (await chat.get())["is_active"] is True
    await chat.append("back after three years")
