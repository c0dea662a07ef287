"""Memories: made, found, changed and deleted; of a session, and across a user's sessions."""

from typing import Any

import httpx
import pytest

from tests.session_service.calls import Chat, Json, User, fine, invalid, new_user_id, refused
from tests.session_service.creations import exported
from tests.session_service.exports import taken_back

TYPES = ("preference", "conversation", "entity", "summary", "custom")


def contents(listed: Json) -> list[str]:
    assert list(listed) == ["memories", "next_cursor"]
    return [each["content"] for each in listed["memories"]]


async def memories(chat: Chat, **params: Any) -> Json:
    return fine(await chat.call("GET", "/memories", params=params))


async def of_user(user: User, **params: Any) -> Json:
    return fine(await user.http.get(f"/users/{user.id}/memories", params=params))


@pytest.mark.parametrize("memory_type", TYPES)
async def test_a_memory(user: User, memory_type: str) -> None:
    chat = await user.chat()
    memory = await chat.remember(" kept\r\nexactly 😀 ", memory_type, metadata={"a": [None, 1]})
    assert memory == {
        "memory_id": memory["memory_id"],
        "session_id": chat.id,
        "user_id": user.id,
        "memory_type": memory_type,
        "content": " kept\r\nexactly 😀 ",
        "metadata": {"a": [None, 1]},
        "created_at": memory["created_at"],
        "updated_at": memory["created_at"],
    }
    assert fine(await chat.call("GET", "/memory")) == memory
    assert (await memories(chat))["memories"] == [memory]


async def test_the_newest_is_given(user: User) -> None:
    chat = await user.chat()
    refused(await chat.call("GET", "/memory"), 404, "memory_not_found", "Memory not found")
    made = [await chat.remember(f"m{number}") for number in range(3)]
    assert fine(await chat.call("GET", "/memory")) == made[2]
    fine(await chat.call("PUT", f"/memories/{made[0]['memory_id']}", json={"content": "changed"}))
    assert fine(await chat.call("GET", "/memory")) == made[2]
    fine(await chat.call("DELETE", f"/memories/{made[2]['memory_id']}"))
    assert fine(await chat.call("GET", "/memory")) == made[1]


async def test_lists_and_their_filters(user: User) -> None:
    chat, other = await user.chat(), await user.chat()
    for number, kind in enumerate(TYPES * 2):
        await (chat if number % 2 else other).remember(f"Fact {number} Größe", kind)
    stranger = user.other()
    await (await stranger.chat()).remember("Fact of a stranger")
    assert contents(await memories(chat)) == [f"Fact {number} Größe" for number in (9, 7, 5, 3, 1)]
    assert contents(await of_user(user)) == [f"Fact {number} Größe" for number in range(9, -1, -1)]
    assert contents(await memories(chat, memory_type="preference")) == ["Fact 5 Größe"]
    assert contents(await of_user(user, memory_type="preference")) == ["Fact 5 Größe", "Fact 0 Größe"]
    assert contents(await of_user(user, q="fact 3")) == ["Fact 3 Größe"]
    assert len(contents(await of_user(user, q="GRÖSSE"))) == 0
    assert len(contents(await of_user(user, q="GRÖßE"))) in {0, 10}
    assert len(contents(await of_user(user, q="größe"))) == 10
    for pattern in ("%", "_", "Fact_3", "\\", ".*", "'"):
        assert contents(await of_user(user, q=pattern)) == []
    assert contents(await of_user(user, q="Fact 3", memory_type="custom")) == []
    assert contents(await memories(chat, limit=2)) == ["Fact 9 Größe", "Fact 7 Größe"]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 200])
async def test_walks(user: User, size: int) -> None:
    chat = await user.chat()
    made = [(await chat.remember(f"m{number}"))["content"] for number in range(7)][::-1]
    for path in (f"/sessions/{chat.id}/memories", f"/users/{user.id}/memories"):
        found: list[str] = []
        cursor: dict[str, str] = {}
        while len(found) < 50:
            listed = fine(await user.http.get(path, params={**user.params, "limit": size, **cursor}))
            found += contents(listed)
            await chat.remember("meanwhile")
            if listed["next_cursor"] is None:
                break
            cursor = {"cursor": listed["next_cursor"]}
        assert [each for each in found if each != "meanwhile"] == made
        for each in (await memories(chat, limit=200, q="meanwhile"))["memories"]:
            fine(await chat.call("DELETE", f"/memories/{each['memory_id']}"))


async def test_a_walk_over_copies(user: User) -> None:
    """Memories of an imported copy have the ids and times of those that they were copied from."""
    chat = await user.chat()
    for number in range(3):
        await chat.remember(f"m{number}")
    file = await exported(chat)
    for _ in range(2):
        await taken_back(user, file, session_id=new_user_id())
    found: list[Json] = []
    cursor: dict[str, str] = {}
    while len(found) < 50:
        listed = fine(await user.http.get(f"/users/{user.id}/memories", params={"limit": "1", **cursor}))
        found += listed["memories"]
        if listed["next_cursor"] is None:
            break
        cursor = {"cursor": listed["next_cursor"]}
    assert [each["content"] for each in found] == [f"m{number}" for number in (2, 2, 2, 1, 1, 1, 0, 0, 0)]
    assert len({(each["session_id"], each["memory_id"]) for each in found}) == 9


async def test_changing_a_memory(user: User) -> None:
    chat = await user.chat()
    memory = await chat.remember("old", metadata={"a": 1})
    path = f"/memories/{memory['memory_id']}"
    changes: list[Json] = [{"content": "new"}, {"metadata": {"b": 2}}, {"memory_type": "entity"}, {"metadata": {}}]
    for change in changes:
        after = fine(await chat.call("PUT", path, json=change))
        assert after == memory | change | {"updated_at": after["updated_at"]}
        assert after["updated_at"] > memory["updated_at"]
        memory = after
    for nothing in ({}, {"content": None, "metadata": None, "memory_type": None}):
        assert fine(await chat.call("PUT", path, json=nothing)) | {"updated_at": ""} == memory | {"updated_at": ""}
    invalid(await chat.call("PUT", path, json={"content": " "}), "body", "content")
    assert fine(await chat.call("GET", "/memory"))["content"] == "new"


async def test_deleting_a_memory(user: User) -> None:
    chat = await user.chat()
    memory = await chat.remember("x")
    path = f"/memories/{memory['memory_id']}"
    assert list(fine(await chat.call("DELETE", path))) == ["message"]
    refused(await chat.call("DELETE", path), 404, "memory_not_found")
    refused(await chat.call("PUT", path, json={"content": "y"}), 404, "memory_not_found")
    assert await memories(chat) == {"memories": [], "next_cursor": None}


async def test_a_memory_is_a_write_but_no_activity(user: User) -> None:
    chat = await user.chat(idle_timeout_seconds=100)
    before = await chat.get()
    memory = await chat.remember("x")
    after = await chat.get()
    assert after["version"] > before["version"]
    assert (after["last_activity"], after["expires_at"]) == (before["last_activity"], before["expires_at"])
    assert after["message_count"] == 0
    fine(await chat.call("PUT", f"/memories/{memory['memory_id']}", json={"content": "y"}))
    changed = await chat.get()
    assert changed["version"] > after["version"]
    fine(await chat.call("DELETE", f"/memories/{memory['memory_id']}"))
    assert (await chat.get())["version"] > changed["version"]


@pytest.mark.parametrize("status", ["completed", "ended"])
async def test_memories_of_a_session_that_is_over(user: User, status: str) -> None:
    chat = await user.chat()
    fine(await chat.put(status=status))
    memory = await chat.remember("x")
    fine(await chat.call("PUT", f"/memories/{memory['memory_id']}", json={"content": "y"}))
    fine(await chat.call("DELETE", f"/memories/{memory['memory_id']}"))


async def test_memories_of_an_archived_session_stay_as_they_are(user: User) -> None:
    chat = await user.chat()
    memory = await chat.remember("x")
    for status in ("completed", "archived"):
        fine(await chat.put(status=status))
    before = await chat.get()
    body = {"memory_type": "custom", "content": "y"}
    refused(await chat.call("POST", "/memory", json=body), 409, "session_archived")
    refused(await chat.call("PUT", f"/memories/{memory['memory_id']}", json={"content": "y"}), 409, "session_archived")
    refused(await chat.call("DELETE", f"/memories/{memory['memory_id']}"), 409, "session_archived")
    assert await chat.get() == before
    assert (await memories(chat))["memories"] == [memory]


async def test_memories_belong_to_one_user(user: User) -> None:
    other = user.other()
    for each in (user, other):
        await each.create(session_id="s")
    memory = await Chat(user, "s").remember("mine")
    path = f"/memories/{memory['memory_id']}"
    refused(await Chat(other, "s").call("PUT", path, json={"content": "theirs"}), 404, "memory_not_found")
    refused(await Chat(other, "s").call("DELETE", path), 404, "memory_not_found")
    refused(await Chat(other, "s").call("GET", "/memory"), 404, "memory_not_found")
    assert (await of_user(other))["memories"] == []
    assert (await of_user(user))["memories"] == [memory]


async def test_memories_of_nobody(sessions: httpx.AsyncClient, user: User) -> None:
    refused(
        await Chat(user, "nowhere").call("POST", "/memory", json={"memory_type": "custom", "content": "x"}),
        404,
        "session_not_found",
    )
    refused(await Chat(user, "nowhere").call("GET", "/memories"), 404, "session_not_found")
    assert (await sessions.get(f"/users/{user.id}/memories")).json()["memories"] == []
