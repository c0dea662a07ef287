"""Lining up with a history that is known as one sequence, before, while and after it is put together."""

import asyncio
import time
from typing import Any

import asyncpg
import httpx

from shared.canonical import message_hash

Json = dict[str, Any]


async def _visible(sessions: httpx.AsyncClient, path: str, params: Json) -> list[Json]:
    listed = await sessions.get(f"{path}/messages", params={**params, "page_size": 1000})
    return [each for each in listed.json()["messages"] if each["role"] != "system"]


async def _check(sessions: httpx.AsyncClient, path: str, params: Json) -> None:
    """Whatever array is asked for: what matches is the longest common beginning, and nothing else."""
    visible = await _visible(sessions, path, params)
    hashes = [message_hash(each["role"], each["content"]).hex() for each in visible]
    other = message_hash("user", "something else").hex()
    arrays = [(hashes, len(hashes)), ([*hashes, other], len(hashes)), ([other, *hashes], 0), ([], 0)]
    for cut in {0, 1, len(hashes) // 2, len(hashes) - 1} - {-1, len(hashes)}:
        arrays.append((hashes[:cut], cut))
        arrays.append(([*hashes[:cut], other, *hashes[cut + 1 :]], cut))
    for array, matched in arrays:
        answer = await sessions.post(f"{path}/align", params=params, json={"hashes": array})
        told = answer.json()
        assert (told["matched"], told["seq"]) == (matched, visible[matched - 1]["seq"] if matched else 0)


async def _known(database_url: str, user_id: str) -> int:
    """How many messages are known as one sequence, once all news of the user were seen to."""
    connection = await asyncpg.connect(database_url)
    try:
        deadline = time.monotonic() + 15
        query = "SELECT indexed_version = version AS settled, chain_count FROM dev.sessions WHERE user_id = $1"
        while True:
            row = await connection.fetchrow(query, user_id)
            assert row is not None
            if row["settled"]:
                return int(row["chain_count"])
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)
    finally:
        await connection.close()


async def test_lining_up_with_what_is_known(sessions: httpx.AsyncClient, user_id: str, database_url: str) -> None:
    params = {"user_id": user_id}
    created = await sessions.post("/sessions", json={"user_id": user_id})
    path = f"/sessions/{created.json()['session_id']}"

    async def add(*roles: str) -> None:
        said = [{"role": role, "content": f"{role} {time.monotonic_ns()}"} for role in roles]
        answer = await sessions.post(f"{path}/messages/batch", params=params, json={"messages": said})
        assert answer.status_code == 200, answer.text

    await add("system", *["user", "assistant"] * 20)
    await _check(sessions, path, params)
    assert await _known(database_url, user_id) == 40
    await _check(sessions, path, params)
    await add("user", "system", "assistant")
    await _check(sessions, path, params)
    assert await _known(database_url, user_id) == 42
    await sessions.post(f"{path}/rewind", params=params, json={"to_seq": 11})
    await _check(sessions, path, params)
    await add("user")
    await _check(sessions, path, params)
    assert await _known(database_url, user_id) == 11
    await _check(sessions, path, params)
    opened = await sessions.post(f"{path}/turns", params=params, json={"messages": [{"role": "user", "content": "no"}]})
    assert await _known(database_url, user_id) == 12
    refused = {"lease_token": opened.json()["lease_token"], "status": "refused"}
    await sessions.post(f"{path}/turns/{opened.json()['turn_id']}/complete", params=params, json=refused)
    await _check(sessions, path, params)
    assert await _known(database_url, user_id) == 11
    await _check(sessions, path, params)
