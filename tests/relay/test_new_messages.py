"""Only what is new is sent: the context goes before it, and it goes on as it was sent."""

from typing import Any

import pytest

from tests.relay.calls import Chat, Json, user
from tests.upstream.client import TestUpstream


def text(value: str, **more: Any) -> Json:
    return {"type": "text", "text": value, **more}


def call(name: str) -> Json:
    return {"type": "tool_use", "id": f"id_{name}", "name": name, "input": {}}


def result(name: str, content: Any = "1", **more: Any) -> Json:
    return {"type": "tool_result", "tool_use_id": f"id_{name}", "content": content, **more}


def sent_last(upstream: TestUpstream) -> list[Json]:
    messages: list[Json] = upstream.requests()[-1]["json"]["messages"]
    return messages


@pytest.mark.parametrize(
    "new",
    [
        user([result("one"), result("two"), result("nobody", "2"), text("hi")]),
        user([result("one"), result("two"), text(""), text("hi")]),
        user([result("one"), result("two"), {"type": "image", "source": None}, text("x")]),
        {**user([result("one"), result("two")]), "future": {"field": 1}},
    ],
)
async def test_it_is_upstreams_to_judge(chat: Chat, upstream: TestUpstream, new: Json) -> None:
    """Odd blocks and unknown fields of the new message are the client's."""
    upstream.script({"blocks": [call("one"), call("two")], "stop_reason": "tool_use"}, {"text": "done", "status": 200})
    await chat.ask("Use both")
    await chat.ask(new)
    assert sent_last(upstream)[-1] == new
    assert [each["role"] for each in sent_last(upstream)] == ["user", "assistant", "user"]


@pytest.mark.parametrize(
    "new",
    [
        [user([text("first"), result("one"), result("two")])],
        [user([text("first")]), user([result("one"), result("two")])],
    ],
)
async def test_results_come_first(chat: Chat, upstream: TestUpstream, new: list[Json]) -> None:
    """Upstream refuses them anywhere else, and nothing is lost by it."""
    upstream.script({"blocks": [call("one"), call("two")], "stop_reason": "tool_use"})
    await chat.ask("Use both")
    assert (await chat.ask(*new)).status_code == 200
    assert sent_last(upstream)[-1] == user([result("one"), result("two"), text("first")])


async def test_calls_without_a_result_get_one_before_it(chat: Chat, upstream: TestUpstream) -> None:
    """What the client sent stands behind the results that upstream must have."""
    upstream.script({"blocks": [call("one"), call("two")], "stop_reason": "tool_use"})
    await chat.ask("Use both")
    new = [result("two"), text("never mind")]
    await chat.ask(user(new))
    last = sent_last(upstream)[-1]["content"]
    assert sorted(block["tool_use_id"] for block in last if block["type"] == "tool_result") == ["id_one", "id_two"]
    assert [block for block in last if not block.get("is_error")] == new


async def test_a_question_that_failed_stays_before_it(chat: Chat, upstream: TestUpstream, rest: Any) -> None:
    await chat.say("u1")
    upstream.script({"status": 529})
    assert (await chat.ask("u2")).status_code == 529
    rest()
    await chat.say("u3")
    assert sent_last(upstream)[-1] == user([text("u2"), text("u3")])
