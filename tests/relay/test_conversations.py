"""Conversations: started, spoken to, paused, gone on with; one history with the Claude door; one order of events."""

import asyncio
import uuid

import httpx

from tests.relay.calls import MODEL, text_of
from tests.relay.conversing import Conversation, User, fine, say, text, until
from tests.upstream.client import TestUpstream

SLOW = {"text": "one two three four five six seven eight nine ten", "event_delay_ms": 100, "delta_characters": 5}


async def test_a_start_ends_in_ready(caller: User) -> None:
    request = {"llm_model": MODEL, "title": "Trip", "selected_repository": "a/b", "trigger": "gui", "unknown": 1}
    task = await caller.start(**request)
    assert set(task) == {
        *("id", "created_by_user_id", "status", "detail", "app_conversation_id", "sandbox_id"),
        *("agent_server_url", "request", "created_at", "updated_at"),
    }
    assert (task["status"], task["app_conversation_id"], task["created_by_user_id"]) == (
        "WORKING",
        None,
        caller.user_id,
    )
    assert task["request"]["title"] == "Trip"
    ready = await caller.ended(task["id"])
    assert ready["status"] == "READY", ready
    assert ready["detail"] is None
    app = await caller.app(ready["app_conversation_id"])
    assert set(app) == {
        *("id", "created_by_user_id", "sandbox_id", "selected_repository", "selected_branch", "git_provider"),
        *("title", "trigger", "pr_number", "llm_model", "metrics", "parent_conversation_id", "sub_conversation_ids"),
        *("created_at", "updated_at", "sandbox_status", "execution_status", "conversation_url", "session_api_key"),
        "session_id",
    }
    assert (app["sandbox_status"], app["execution_status"], app["title"]) == ("RUNNING", "idle", "Trip")
    assert app["sandbox_id"] == ready["sandbox_id"]
    assert app["conversation_url"].endswith(f"/api/conversations/{app['id']}")
    assert app["conversation_url"].startswith(ready["agent_server_url"])
    assert len(app["session_api_key"]) == 43


async def test_a_message_is_answered(caller: User, upstream: TestUpstream) -> None:
    conversation = await caller.conversation()
    upstream.script({"text": "Hello there"})
    app = await conversation.answered("Hi, how are you?")
    assert (app["execution_status"], app["title"]) == ("finished", "Hi, how are you?")
    assert await conversation.stored() == [("user", "Hi, how are you?"), ("assistant", "Hello there")]
    assert await conversation.told() == [("user", "Hi, how are you?"), ("agent", "Hello there")]
    asked = upstream.requests()[-1]["json"]
    assert asked["messages"] == [{"role": "user", "content": "Hi, how are you?"}]
    assert asked["model"] == MODEL


async def test_the_first_message_of_a_start(caller: User, upstream: TestUpstream) -> None:
    upstream.script({"text": "Answered"})
    conversation = await caller.conversation(initial_message=say("First"))
    await conversation.until_status("finished")
    assert await conversation.stored() == [("user", "First"), ("assistant", "Answered")]
    quiet = await caller.conversation(initial_message=say("Only kept", run=False))
    assert (await quiet.app())["execution_status"] == "idle"
    assert await quiet.stored() == [("user", "Only kept")]


async def test_one_history_with_the_claude_door(caller: User, upstream: TestUpstream) -> None:
    conversation = await caller.conversation()
    upstream.script({"text": "A1"}, {"text": "A2"}, {"text": "A3"})
    await conversation.answered("Q1")
    body = {"model": MODEL, "max_tokens": 100, "messages": [{"role": "user", "content": "Q2"}]}
    headers = {"x-session-id": conversation.session_id}
    answer = await caller.http.post("/v1/messages", json=body, headers=headers)
    assert text_of(answer.json()) == "A2"
    await conversation.answered("Q3")
    expected = [("Q1", "A1"), ("Q2", "A2"), ("Q3", "A3")]
    both = [(role, said) for question, reply in expected for role, said in (("user", question), ("agent", reply))]
    assert await conversation.told() == both
    assert [said for _, said in await conversation.stored()] == [said for _, said in both]
    asked = upstream.requests()[-1]["json"]["messages"]
    assert [message["role"] for message in asked] == ["user", "assistant"] * 2 + ["user"]


async def test_pause_keeps_the_partial_and_run_goes_on(caller: User, upstream: TestUpstream) -> None:
    conversation = await caller.conversation()
    upstream.script(SLOW, {"text": " and the rest"})
    await conversation.say("Count")
    await conversation.until_status("running")
    await upstream.until(lambda state: state["running"] > 0)
    await asyncio.sleep(0.8)
    again = await conversation.call("run")
    assert again.status_code == 409
    assert fine(await conversation.call("pause")) == {"success": True}
    app = await conversation.app()
    assert app["execution_status"] == "paused"
    stored = await conversation.stored()
    assert [role for role, _ in stored] == ["user", "assistant"]
    partial = stored[1][1]
    assert partial
    assert str(SLOW["text"]).startswith(partial)
    assert partial != SLOW["text"]
    assert (await conversation.turns())[0]["status"] == "interrupted"
    assert fine(await conversation.call("pause")) == {"success": True}
    assert (await conversation.app())["execution_status"] == "paused"
    assert fine(await conversation.call("run")) == {"success": True}
    await conversation.until_status("finished")
    assert await conversation.stored() == [("user", "Count"), ("assistant", partial.rstrip() + " and the rest")]
    assert upstream.requests()[-1]["json"]["messages"][-1] == {"role": "assistant", "content": text(partial.rstrip())}


async def test_a_message_while_it_runs_is_answered_after(caller: User, upstream: TestUpstream) -> None:
    conversation = await caller.conversation()
    upstream.script(SLOW, {"text": "Second answer"})
    await conversation.say("First")
    await upstream.until(lambda state: state["running"] > 0)
    await conversation.say("Only kept", run=False)
    await conversation.say("Second")

    async def both() -> bool:
        return len(await conversation.stored()) == 5

    await until(both)
    await conversation.until_status("finished")
    assert await conversation.stored() == [
        ("user", "First"),
        ("assistant", SLOW["text"]),
        ("user", "Only kept"),
        ("user", "Second"),
        ("assistant", "Second answer"),
    ]
    assert [said for _, said in await conversation.told()] == [
        *("First", "Only kept", "Second", SLOW["text"], "Second answer")
    ]


async def test_a_socket_follows(caller: User, upstream: TestUpstream) -> None:
    conversation = await caller.conversation()
    upstream.script({"text": "Hello"}, {"text": "Bye"})
    async with conversation.socket() as socket:
        first = await socket.next()
        assert (first["kind"], first["key"], first["source"]) == (
            "ConversationStateUpdateEvent",
            "full_state",
            "environment",
        )
        assert first["value"]["execution_status"] == "idle"
        await socket.say("Hi")
        await socket.until_status("finished")
        assert socket.told == [("user", "Hi"), ("status", "running"), ("agent", "Hello"), ("status", "finished")]
        last = socket.frames[-1]
    await conversation.answered("See you")
    async with conversation.socket(last_event_id=last["id"]) as socket:
        await socket.until_status("finished")
        assert socket.told == [("user", "See you"), ("status", "running"), ("agent", "Bye"), ("status", "finished")]
    async with conversation.socket(resend_all="true") as socket:
        await socket.until_status("idle")
        await socket.until_status("finished")
        await socket.until_status("finished")
        ids = [frame["id"] for frame in socket.frames]
        assert len(set(ids)) == len(ids)


async def test_v0(caller: User, upstream: TestUpstream) -> None:
    upstream.script({"text": "Hello"})
    made = fine(await caller.http.post("/api/conversations", json={"initial_user_msg": "Hi"}))
    assert made == {
        "status": "ok",
        "conversation_id": made["conversation_id"],
        "message": None,
        "conversation_status": "RUNNING",
    }
    conversation = Conversation(caller, made["conversation_id"], await caller.secret(made["conversation_id"]))
    await conversation.until_status("finished")
    info = fine(await caller.http.get(conversation.path))
    assert info["conversation_version"] == "V0"
    assert info["title"] == "Hi"
    assert fine(await caller.http.get(f"/api/conversations/{uuid.uuid4().hex}")) is None
    assert fine(await caller.http.delete(conversation.path)) is True
    assert fine(await caller.http.delete(conversation.path)) is False


async def test_bad_ids(caller: User) -> None:
    async with httpx.AsyncClient(base_url=caller.http.base_url, trust_env=False) as client:
        answer = await client.get("/api/conversations/a%2Fb")
        assert answer.status_code == 400
