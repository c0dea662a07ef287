"""V0: made, listed, renamed, stopped and started, read; and how both APIs show each other's conversations."""

from typing import Any

import pytest

from tests.relay.calls import MODEL
from tests.relay.conversing import Conversation, User, fine, refused, say, text
from tests.upstream.client import TestUpstream

INFO = {
    *("conversation_id", "title", "last_updated_at", "status", "runtime_status", "selected_repository"),
    *("selected_branch", "git_provider", "trigger", "num_connections", "url", "session_api_key", "created_at"),
    *("pr_number", "conversation_version", "sub_conversation_ids"),
}


async def make(user: User, **body: Any) -> Conversation:
    made = fine(await user.http.post("/api/conversations", json=body))
    assert (made["status"], made["conversation_status"]) == ("ok", "RUNNING")
    return Conversation(user, made["conversation_id"], await user.secret(made["conversation_id"]))


async def test_a_conversation_with_everything(caller: User, upstream: TestUpstream) -> None:
    mine = await make(
        caller,
        repository="me/mine",
        git_provider="github",
        selected_branch="main",
        initial_user_msg="What is this?",
        image_urls=["https://example.org/a.png", "data:image/png;base64,aGk="],
        conversation_instructions="Be brief",
        suggested_task=None,
        create_microagent=None,
        replay_json=None,
        mcp_config=None,
    )
    await mine.until_status("finished")
    asked = upstream.requests()[-1]["json"]
    assert asked["system"] == "Be brief"
    assert asked["messages"][0]["content"] == [
        {"type": "text", "text": "What is this?"},
        {"type": "image", "source": {"type": "url", "url": "https://example.org/a.png"}},
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aGk="}},
    ]
    info = fine(await caller.http.get(mine.path))
    assert set(info) == INFO
    assert (info["selected_repository"], info["git_provider"], info["selected_branch"]) == ("me/mine", "github", "main")
    assert (info["trigger"], info["conversation_version"], info["title"]) == ("gui", "V0", "What is this?")
    assert (info["status"], info["runtime_status"]) == ("RUNNING", "STATUS$READY")
    assert info["url"].endswith(mine.path)
    assert info["session_api_key"] == mine.secret
    (said,) = [event for event in await mine.events() if event["source"] == "user"]
    assert said["args"]["image_urls"] == ["https://example.org/a.png", "data:image/png;base64,aGk="]
    assert said["args"]["content"] == said["message"] == "What is this?"


async def test_a_title_until_there_is_one(caller: User, upstream: TestUpstream) -> None:
    mine = await make(caller)
    info = fine(await caller.http.get(mine.path))
    assert info["title"] == f"Conversation {mine.id}"
    await mine.answered("  Please   tell me everything about the history of the railways in the Alps, in detail  ")
    title = fine(await caller.http.get(mine.path))["title"]
    assert title == "Please tell me everything about the history of…"
    assert fine(await caller.http.patch(mine.path, json={"title": "  Mine  "})) is True
    assert fine(await caller.http.get(mine.path))["title"] == "Mine"
    await mine.answered("More")
    assert (await mine.app())["title"] == "Mine"


@pytest.mark.parametrize(
    "body", [{}, {"title": ""}, {"title": "  "}, {"title": "x" * 201}, {"title": 3}, {"title": "x", "other": 1}, []]
)
async def test_bad_titles(caller: User, body: Any) -> None:
    mine = await make(caller)
    refused(await caller.http.patch(mine.path, json=body), 422)
    assert fine(await caller.http.patch(mine.path, json={"title": "x" * 200})) is True


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"unknown": None}, "unknown"),
        ({"repository": 3}, "repository"),
        ({"git_provider": "svn"}, "git_provider"),
        ({"image_urls": "x"}, "image_urls"),
        ({"initial_user_msg": 3}, "initial_user_msg"),
        ([], "body"),
    ],
)
async def test_bad_requests_make_nothing(caller: User, body: Any, field: str) -> None:
    assert field in refused(await caller.http.post("/api/conversations", json=body), 422)
    assert fine(await caller.http.get("/api/conversations"))["results"] == []


async def test_what_cannot_start_says_so(make_user: Any, upstream: TestUpstream) -> None:
    user: User = await make_user()
    slow = {"text": "word " * 1000, "event_delay_ms": 200, "repeat": 5}
    upstream.script(slow)
    busy = [await user.conversation(initial_message=say("Count")) for _ in range(5)]
    answer = await user.http.post("/api/conversations", json={})
    assert answer.status_code == 400
    told = answer.json()
    assert set(told) == {"status", "message", "msg_id"}
    assert told["status"] == "error"
    assert told["message"]
    assert len(fine(await user.http.get("/api/conversations"))["results"]) == 5
    for each in busy:
        fine(await each.call("pause"))


async def test_stop_and_start(caller: User) -> None:
    for mine in (await make(caller), await caller.conversation()):
        stopped = fine(await caller.http.post(f"{mine.path}/stop"))
        assert stopped == {
            "status": "ok",
            "conversation_id": mine.id,
            "message": "Conversation stopped successfully",
            "conversation_status": "RUNNING",
        }
        info = fine(await caller.http.get(mine.path))
        assert (info["status"], info["runtime_status"], info["url"]) == ("STOPPED", None, None)
        again = fine(await caller.http.post(f"{mine.path}/stop"))
        assert (again["message"], again["conversation_status"]) == ("Conversation was not running", "STOPPED")
        started = fine(await caller.http.post(f"{mine.path}/start", json={"providers_set": ["github"]}))
        assert (started["status"], started["conversation_status"]) == ("ok", "RUNNING")
        assert fine(await caller.http.get(mine.path))["status"] == "RUNNING"
        refused(await caller.http.post(f"{mine.path}/start", json={"providers_set": 3}), 422)


async def test_one_list_over_both_apis(make_user: Any) -> None:
    user: User = await make_user()
    made = [
        await make(user, repository="a/a"),
        await user.conversation(trigger="slack"),
        await make(user),
        await user.conversation(selected_repository="a/a"),
    ]
    child = await user.conversation(parent_conversation_id=made[1].id)
    expected = [child.id, *(each.id for each in reversed(made))]
    seen: list[str] = []
    page_id: str | None = None
    while True:
        params: dict[str, Any] = {"limit": 2} | ({"page_id": page_id} if page_id else {})
        page = fine(await user.http.get("/api/conversations", params=params))
        seen += [each["conversation_id"] for each in page["results"]]
        page_id = page["next_page_id"]
        if page_id is None:
            break
    assert seen == expected
    results = fine(await user.http.get("/api/conversations"))["results"]
    assert [each["conversation_version"] for each in results] == ["V1", "V1", "V0", "V1", "V0"]
    assert all(set(each) == INFO for each in results)
    assert results[3]["sub_conversation_ids"] == [child.id]

    async def ids(**params: str) -> list[str]:
        found = fine(await user.http.get("/api/conversations", params=params))["results"]
        return [each["conversation_id"] for each in found]

    assert await ids(selected_repository="a/a") == [made[3].id, made[0].id]
    assert await ids(conversation_trigger="slack") == [made[1].id]
    assert await ids(conversation_trigger="gui") == [made[2].id, made[0].id]
    for bad in ({"limit": 0}, {"limit": 101}, {"page_id": "x"}):
        refused(await user.http.get("/api/conversations", params=bad), 422)


async def test_both_apis_know_each_others_conversations(caller: User) -> None:
    old, new = await make(caller), await caller.conversation()
    for mine in (old, new):
        app = await mine.app()
        assert fine(await caller.http.get(f"{mine.path}/config")) == {
            "runtime_id": app["sandbox_id"],
            "session_id": mine.session_id,
        }
        assert fine(await caller.http.patch(mine.path, json={"title": "New"})) is True
        assert (await mine.app())["title"] == "New"
        assert fine(await caller.http.delete(mine.path)) is True
        assert fine(await caller.http.get(mine.path)) is None
        query = {"user_id": caller.user_id}
        assert fine(await caller.sessions.get(f"/sessions/{mine.session_id}", params=query))["status"] == "ended"


async def test_events_by_their_numbers(caller: User, upstream: TestUpstream) -> None:
    mine = await make(caller)
    for number in range(3):
        upstream.script({"text": f"A{number}"})
        await mine.answered(f"Q{number}")
    whole = fine(await caller.http.get(f"{mine.path}/trajectory"))["trajectory"]
    assert [event["id"] for event in whole] == list(range(len(whole)))
    for event in whole:
        assert event["source"] in {"user", "agent", "environment"}
        assert event["timestamp"].endswith("Z")
        assert isinstance(event["message"], str)
    states = [event["extras"]["agent_state"] for event in whole if event.get("observation") == "agent_state_changed"]
    assert states == ["awaiting_user_input"] + ["running", "finished"] * 3

    async def page(**params: Any) -> tuple[list[int], bool]:
        found = fine(await caller.http.get(f"{mine.path}/events", params=params))
        return [event["id"] for event in found["events"]], found["has_more"]

    count = len(whole)
    assert await page() == (list(range(min(20, count))), count > 20)
    assert await page(limit=2) == ([0, 1], True)
    assert await page(start_id=2, end_id=4) == ([2, 3, 4], False)
    assert await page(start_id=count - 1) == ([count - 1], False)
    assert await page(reverse=True, limit=2) == ([count - 1, count - 2], True)
    assert await page(reverse=True, end_id=1) == ([1, 0], False)
    assert await page(start_id=count) == ([], False)
    refused(await caller.http.get(f"{mine.path}/events", params={"limit": 101}), 400)
    refused(await caller.http.get(f"{mine.path}/events", params={"limit": 0}), 400)
    refused(await caller.http.get(f"{mine.path}/events", params={"start_id": "x"}), 422)


async def test_messages_and_events_of_v0(caller: User, upstream: TestUpstream) -> None:
    mine = await caller.conversation()
    upstream.script({"text": "A1"}, {"text": "A2"})
    assert fine(await mine.call("message", {"message": "Q1"})) == {"success": True}
    await mine.until_status("finished")
    event = {"action": "message", "args": {"content": "Q2", "image_urls": []}}
    assert fine(await mine.call("events", event)) == {"success": True, "role": "user", "content": text("Q2")}
    await mine.until_status("finished")
    assert [said for _, said in await mine.stored()] == ["Q1", "A1", "Q2", "A2"]
    assert fine(await mine.call("events", {"action": "recall", "args": {"query": "x"}}))["success"] is True
    kept = (await mine.events())[-1]
    assert (kept["action"], kept["args"], kept["source"]) == ("recall", {"query": "x"}, "user")
    bad: Any
    for bad in ({"message": ""}, {"message": 3}, {}, []):
        refused(await mine.call("message", bad), 422)
    for bad in ({"content": []}, {"content": text("  ")}, {"role": "assistant", "content": text("x")}, {}, []):
        refused(await mine.call("events", bad), 422)
    refused(await mine.call("events", {"action": "message", "args": {}}), 422)
    assert len(await mine.stored()) == 4


async def test_what_there_is_not(caller: User) -> None:
    mine = await caller.conversation()
    get = caller.http.get
    assert fine(await get(f"{mine.path}/vscode-url")) == {"vscode_url": None}
    assert fine(await get(f"{mine.path}/web-hosts")) == {"hosts": {}}
    assert fine(await get(f"{mine.path}/microagents")) == {"microagents": []}
    feedback = {"rating": 5, "text": "好"}
    told = fine(await caller.http.post(f"{mine.path}/submit-feedback", json=feedback))
    feedback_id = told["body"]["feedback_id"]
    assert feedback_id
    shown = {"message": "Thank you for your feedback", "feedback_id": feedback_id, "password": ""}
    assert told == {"statusCode": 200, "body": feedback | shown}
    assert fine(await mine.call("events/respond_to_confirmation", {"accept": True, "reason": "ok"})) == {
        "success": True
    }
    refused(await mine.call("events/respond_to_confirmation", {"accept": "yes"}), 422)


async def test_the_demo_is_spoken_to(caller: User) -> None:
    mine = await caller.conversation(llm_model="demo")
    await mine.answered("My name is Ada")
    await mine.answered("What is my name?")
    assert "Ada" in (await mine.stored())[-1][1]
    assert MODEL not in str(await mine.app())
