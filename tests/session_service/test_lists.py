"""The lists of a user's sessions: honest totals, pages, and walks by cursor while others write."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.session_service.calls import Chat, Db, Json, User, fine, invalid, said, wait
from tests.session_service.test_update_end import WAY_TO


async def made(user: User, count: int) -> list[str]:
    return [(await user.create(title=str(number)))["session_id"] for number in range(count)]


def ids(listed: Json) -> list[str]:
    return [each["session_id"] for each in listed["sessions"]]


async def walk(user: User, **params: Any) -> AsyncIterator[Json]:
    """The pages of a walk by cursor; whoever iterates may write between them."""
    cursor = None
    for _ in range(100):
        listed = await user.sessions(**params, **({"cursor": cursor} if cursor else {}))
        yield listed
        cursor = listed["next_cursor"]
        if cursor is None:
            return
    raise AssertionError("the walk does not end")


async def test_both_lists_are_one(user: User) -> None:
    await made(user, 3)
    chat = await user.chat()
    await chat.append("x", tokens_used=4)
    for params in (
        {},
        {"page": 2, "page_size": 2},
        {"active_only": "true"},
        {"status": "ended"},
        {"order": "created_at"},
    ):
        there = await user.http.get(f"/users/{user.id}/sessions", params=params)
        assert fine(there) == await user.sessions(**params)
    listed = await user.sessions()
    assert list(listed) == ["sessions", "total", "page", "page_size", "next_cursor"]
    assert listed["sessions"][0] == await chat.get()


async def test_only_these_sessions(user: User) -> None:
    made_ids = await made(user, 4)
    (foreign,) = await made(user.other(), 1)
    wanted = [made_ids[0], made_ids[2], foreign, "none"]
    listed = await user.sessions(session_id=wanted)
    assert (ids(listed), listed["total"]) == ([made_ids[2], made_ids[0]], 2)
    first = await user.sessions(session_id=wanted, page_size=1)
    assert (ids(first), first["total"]) == ([made_ids[2]], 2)
    rest = await user.sessions(session_id=wanted, page_size=1, cursor=first["next_cursor"])
    assert (ids(rest), rest["next_cursor"]) == ([made_ids[0]], None)
    await Chat(user, made_ids[0]).end()
    assert ids(await user.sessions(session_id=wanted, active_only="true")) == [made_ids[2]]
    assert ids(await user.sessions(session_id=wanted, status="ended")) == [made_ids[0]]
    there = await user.http.get(f"/users/{user.id}/sessions", params={"session_id": wanted})
    assert ids(fine(there)) == [made_ids[2], made_ids[0]]
    for bad in (["a/b"], ["x"] * 101, [""]):
        invalid(await user.http.get("/sessions", params={"user_id": user.id, "session_id": bad}), "query", "session_id")


async def test_newest_first_by_either_time(user: User) -> None:
    oldest, middle, newest = await made(user, 3)
    await Chat(user, oldest).append("x")
    assert ids(await user.sessions()) == [oldest, newest, middle]
    assert ids(await user.sessions(order="last_activity")) == [oldest, newest, middle]
    assert ids(await user.sessions(order="created_at")) == [newest, middle, oldest]
    turn = await Chat(user, middle).open(said("x"))
    assert ids(await user.sessions())[0] == middle
    await Chat(user, newest).append("x")
    await turn.renew()
    assert ids(await user.sessions())[0] == middle
    fine(await Chat(user, newest).put(title="reads and PUT do not count"))
    assert ids(await user.sessions())[0] == middle


@pytest.mark.parametrize("order", ["last_activity", "created_at"])
async def test_pages_by_number(user: User, order: str) -> None:
    everything = (await made(user, 7))[::-1]
    for size in (1, 2, 3, 7, 100):
        found: list[str] = []
        for page in range(1, 9):
            listed = await user.sessions(order=order, page=page, page_size=size)
            assert (listed["total"], listed["page"], listed["page_size"]) == (7, page, size)
            assert (listed["next_cursor"] is None) == (page * size >= 7)
            found += ids(listed)
        assert found == everything


@pytest.mark.parametrize("order", ["last_activity", "created_at"])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 12])
async def test_a_walk_by_cursor_gives_everything_once(user: User, order: str, size: int) -> None:
    everything = (await made(user, 6))[::-1]
    found = [each async for listed in walk(user, order=order, page_size=size) for each in ids(listed)]
    assert found == everything


async def test_a_cursor_wins_over_page(user: User) -> None:
    everything = (await made(user, 4))[::-1]
    cursor = (await user.sessions(page_size=2))["next_cursor"]
    listed = await user.sessions(page_size=2, page=40, cursor=cursor)
    assert (ids(listed), listed["total"], listed["next_cursor"]) == (everything[2:], 4, None)


@pytest.mark.parametrize("order", ["last_activity", "created_at"])
async def test_a_walk_while_others_write_repeats_and_skips_nothing(user: User, order: str) -> None:
    everything = (await made(user, 12))[::-1]
    found: list[str] = []
    touched: set[str] = set()
    async for listed in walk(user, order=order, page_size=3):
        found += ids(listed)
        await made(user, 2)
        last = everything[-1 - len(touched)]
        touched.add(last)
        await Chat(user, last).append("touched meanwhile")
    assert len(found) == len(set(found))
    expected = everything if order == "created_at" else [each for each in everything if each not in touched]
    assert [each for each in found if each in expected] == expected


async def test_sessions_of_one_moment_are_told_apart_by_their_ids(user: User, db: Db) -> None:
    everything = await made(user, 5)
    await db.execute("UPDATE dev.sessions SET last_activity = now(), created_at = now() WHERE user_id = $1", user.id)
    for order in ("last_activity", "created_at"):
        found = [each async for listed in walk(user, order=order, page_size=2) for each in ids(listed)]
        assert sorted(found) == sorted(everything)


async def test_statuses(user: User, db: Db) -> None:
    by_status: dict[str, list[str]] = {}
    for status, way in WAY_TO.items():
        for _ in range(2):
            chat = await user.chat()
            for step in way:
                fine(await chat.put(status=step))
            by_status.setdefault(status, []).insert(0, chat.id)
    gone = await user.chat(idle_timeout_seconds=10)
    await wait(db, gone, 20)
    by_status["ended"].append(gone.id)
    for status, expected in by_status.items():
        listed = await user.sessions(status=status)
        assert (ids(listed), listed["total"]) == (expected, len(expected)), status
        assert {each["status"] for each in listed["sessions"]} == {status}
        page = await user.sessions(status=status, page_size=1)
        assert (ids(page), page["total"]) == (expected[:1], len(expected))
        walked = [each async for part in walk(user, status=status, page_size=1) for each in ids(part)]
        assert walked == expected
    active = await user.sessions(active_only="true")
    assert (ids(active), active["total"]) == (by_status["active"], 2)
    assert active["sessions"] == (await user.sessions(active_only="true", status="active"))["sessions"]
    none = await user.sessions(active_only="true", status="ended")
    assert none == {"sessions": [], "total": 0, "page": 1, "page_size": 50, "next_cursor": None}
    assert (await user.sessions(active_only="false"))["total"] == 9
    assert (await user.sessions())["total"] == 9


@pytest.mark.parametrize("size", [0, 101, -1])
async def test_page_sizes_out_of_bounds(user: User, size: int) -> None:
    for path in ("/sessions", f"/users/{user.id}/sessions"):
        invalid(await user.http.get(path, params=user.params | {"page_size": size}), "query", "page_size")
    fine(await user.http.get("/sessions", params=user.params | {"page_size": 100}))


async def test_lists_while_sessions_are_made_in_parallel(user: User) -> None:
    await asyncio.gather(*(made(user, 5) for _ in range(8)))
    listed = await user.sessions(page_size=100)
    assert (listed["total"], len(set(ids(listed)))) == (40, 40)
    moments = [each["last_activity"] for each in listed["sessions"]]
    assert moments == sorted(moments, reverse=True)
