"""The calls that existing clients of this API make, as they make them."""

from typing import Any

import httpx


async def create(sessions: httpx.AsyncClient, user_id: str, **fields: Any) -> dict[str, Any]:
    answer = await sessions.post("/sessions", json={"user_id": user_id, **fields})
    assert answer.status_code == 200, answer.text
    created: dict[str, Any] = answer.json()
    return created


async def test_a_session_from_beginning_to_end(sessions: httpx.AsyncClient, user_id: str) -> None:
    metadata = {"source": "web_app", "device": "desktop"}
    session = await create(sessions, user_id, title="Test Session", metadata=metadata)
    path, params = f"/sessions/{session['session_id']}", {"user_id": user_id}
    assert session["status"] == "active"
    assert session["is_active"] is True
    assert session["metadata"] == metadata
    assert session["conversation_data"] == {}
    assert session["session_summary"] == ""
    assert (session["message_count"], session["total_tokens"], session["total_cost"]) == (0, 0, 0)

    sent = {
        "role": "user",
        "content": "Hello, this is a test message",
        "message_type": "chat",
        "tokens_used": 5,
        "cost_usd": 0.0001,
        "metadata": {"model": "gpt-4"},
    }
    message = (await sessions.post(f"{path}/messages", params=params, json=sent)).json()
    assert {name: message[name] for name in sent} == sent
    assert message["seq"] == 1
    listed = (await sessions.get(f"{path}/messages", params={**params, "page": 1, "page_size": 100})).json()
    assert listed["messages"] == [message]
    assert (listed["total"], listed["page"], listed["page_size"], listed["has_more"]) == (1, 1, 100, False)

    memory_body = {
        "memory_type": "preference",
        "content": "User prefers dark mode UI",
        "metadata": {"category": "settings", "priority": "high"},
    }
    memory = (await sessions.post(f"{path}/memory", params=params, json=memory_body)).json()
    assert {name: memory[name] for name in memory_body} == memory_body
    assert (await sessions.get(f"{path}/memory", params=params)).json() == memory

    updated = (await sessions.put(path, params=params, json={"title": "Updated", "metadata": {"version": 2}})).json()
    assert (updated["title"], updated["metadata"]) == ("Updated", {"version": 2})
    assert updated["last_activity"] == message["created_at"]

    summary = (await sessions.get(f"{path}/summary", params=params)).json()
    assert summary["has_memory"] is True
    assert (summary["message_count"], summary["total_tokens"], summary["total_cost"]) == (1, 5, 0.0001)

    listed = (await sessions.get(f"/users/{user_id}/sessions", params={"active_only": "true"})).json()
    assert [each["session_id"] for each in listed["sessions"]] == [session["session_id"]]
    assert (listed["total"], listed["page"], listed["page_size"]) == (1, 1, 50)

    ended = await sessions.delete(path, params=params)
    assert (ended.status_code, ended.json()) == (200, {"message": "Session ended successfully"})
    assert (await sessions.get(path, params=params)).json()["status"] == "ended"
    again = await sessions.post(f"{path}/messages", params=params, json=sent)
    assert (again.status_code, again.json()["code"]) == (409, "session_not_active")


async def test_errors_as_printed(sessions: httpx.AsyncClient, user_id: str) -> None:
    missing = await sessions.get("/sessions/nowhere", params={"user_id": user_id})
    assert missing.status_code == 404
    assert missing.content == b'{"detail":"Session not found","code":"session_not_found"}'
    session = await create(sessions, user_id)
    path = f"/sessions/{session['session_id']}/memory"
    invalid = await sessions.post(path, params={"user_id": user_id}, json={"content": "x"})
    assert invalid.status_code == 400
    assert invalid.json() == {
        "detail": [{"type": "missing", "loc": ["body", "memory_type"], "msg": "Field required"}],
        "code": "validation_error",
    }


async def test_stats_count_what_is_there(sessions: httpx.AsyncClient, user_id: str) -> None:
    session = await create(sessions, user_id)
    message = {"role": "user", "content": "hello", "tokens_used": 7, "cost_usd": 0.5}
    await sessions.post(f"/sessions/{session['session_id']}/messages", params={"user_id": user_id}, json=message)
    assert (await sessions.get(f"/users/{user_id}/stats")).json() == {
        "total_sessions": 1,
        "active_sessions": 1,
        "total_messages": 1,
        "total_tokens": 7,
        "total_cost": 0.5,
        "average_messages_per_session": 1.0,
    }
    stats = (await sessions.get("/sessions/stats")).json()
    assert stats["total_sessions"] >= 1
    usage = (await sessions.get("/sessions/stats/usage", params={"user_id": user_id, "bucket": "day"})).json()
    assert usage["items"][-1] | {"start": ""} == {
        "start": "",
        "messages": 1,
        "tokens": 7,
        "cost": 0.5,
        "active_sessions": 1,
    }
    assert sum(item["messages"] for item in usage["items"][:-1]) == 0
