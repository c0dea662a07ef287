"""Appends at the same time, which are stored together: as if each had come alone, and nobody waits for another's."""

import asyncio
import uuid
from typing import Any

import asyncpg
import httpx
import pytest

TEXT = "hello"


class Appending:
    """One user's sessions, and appends to them."""

    def __init__(self, sessions: httpx.AsyncClient, user_id: str) -> None:
        self._sessions = sessions
        self.user_id = user_id

    async def create(self, *session_ids: str) -> None:
        for session_id in session_ids:
            body = {"user_id": self.user_id, "session_id": session_id}
            (await self._sessions.post("/sessions", json=body)).raise_for_status()

    async def append(self, session_id: str, content: str = TEXT, **fields: Any) -> httpx.Response:
        body = {"role": "user", "content": content, "tokens_used": 3, "cost_usd": 0.5, **fields}
        params = {"user_id": self.user_id}
        return await self._sessions.post(f"/sessions/{session_id}/messages", params=params, json=body)

    async def session(self, session_id: str) -> dict[str, Any]:
        answer = await self._sessions.get(f"/sessions/{session_id}", params={"user_id": self.user_id})
        found: dict[str, Any] = answer.json()
        return found

    async def texts(self, session_id: str) -> list[tuple[int, str]]:
        params: dict[str, Any] = {"user_id": self.user_id, "page_size": 1000}
        listed = (await self._sessions.get(f"/sessions/{session_id}/messages", params=params)).json()["messages"]
        return [(each["seq"], each["content"]) for each in listed]


@pytest.fixture
def appending(sessions: httpx.AsyncClient, user_id: str) -> Appending:
    return Appending(sessions, user_id)


async def test_each_is_stored_and_counted_as_if_it_had_come_alone(appending: Appending) -> None:
    names = [f"s{number}" for number in range(8)]
    await appending.create(*names)
    wanted = [(name, f"{name}-{number}") for number in range(25) for name in names]
    answers = await asyncio.gather(*(appending.append(name, text) for name, text in wanted))
    assert [answer.status_code for answer in answers] == [200] * 200
    for name in names:
        told = sorted((a.json()["seq"], a.json()["content"]) for a in answers if a.json()["session_id"] == name)
        assert told == await appending.texts(name)
        assert [seq for seq, _ in told] == list(range(1, 26))
        session = await appending.session(name)
        assert (session["message_count"], session["total_tokens"], session["total_cost"]) == (25, 75, 12.5)
        assert session["version"] == 26


async def test_what_cannot_be_stored_takes_nobody_with_it(appending: Appending, sessions: httpx.AsyncClient) -> None:
    await appending.create("good", "ended", "other")
    await sessions.delete("/sessions/ended", params={"user_id": appending.user_id})
    taken = f"id-{uuid.uuid4().hex}"
    assert (await appending.append("other", "first", message_id=taken)).status_code == 200
    calls = [appending.append("good", f"m{number}") for number in range(30)]
    calls[5:5] = [appending.append("missing")]
    calls[10:10] = [appending.append("ended")]
    calls[15:15] = [appending.append("good", "second", message_id=taken)]
    calls[20:20] = [appending.append("other", "first", message_id=taken)]
    answers = await asyncio.gather(*calls)
    refused = [(answers[place].status_code, answers[place].json()["code"]) for place in (5, 10, 15)]
    assert refused == [(404, "session_not_found"), (409, "session_not_active"), (409, "message_exists")]
    assert (answers[20].status_code, answers[20].json()["seq"]) == (200, 1)
    stored = [answer for place, answer in enumerate(answers) if place not in {5, 10, 15, 20}]
    assert [answer.status_code for answer in stored] == [200] * 30
    assert sorted(text for _, text in await appending.texts("good")) == sorted(f"m{number}" for number in range(30))
    assert await appending.texts("other") == [(1, "first")]
    assert (await appending.session("good"))["total_tokens"] == 90


async def test_one_id_sent_many_times_at_once_is_stored_once(appending: Appending) -> None:
    await appending.create("twice")
    message_id = f"id-{uuid.uuid4().hex}"
    answers = await asyncio.gather(*(appending.append("twice", message_id=message_id) for _ in range(20)))
    assert [answer.status_code for answer in answers] == [200] * 20
    assert len({answer.content for answer in answers}) == 1
    assert await appending.texts("twice") == [(1, TEXT)]


async def test_sessions_that_someone_holds_hold_up_no_other(appending: Appending, database_url: str) -> None:
    held_ids = [f"held-{number}" for number in range(6)]
    await appending.create(*held_ids, "free")
    connection = await asyncpg.connect(database_url)
    try:
        async with connection.transaction():
            await connection.execute(
                "SELECT 1 FROM dev.sessions WHERE user_id = $1 AND session_id LIKE 'held-%' FOR NO KEY UPDATE",
                appending.user_id,
            )
            held = [asyncio.create_task(appending.append(name)) for name in held_ids]
            for _ in range(3):
                async with asyncio.timeout(5):
                    answers = await asyncio.gather(*(appending.append("free") for _ in range(10)))
                assert [answer.status_code for answer in answers] == [200] * 10
            assert not any(each.done() for each in held)
        answers = await asyncio.gather(*held)
    finally:
        await connection.close()
    assert [answer.status_code for answer in answers] == [200] * 6
    assert [await appending.texts(name) for name in held_ids] == [[(1, TEXT)]] * 6
