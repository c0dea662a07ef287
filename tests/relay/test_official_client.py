"""The official client of the Claude API against the relay, as its users call it."""

from collections.abc import AsyncIterator
from typing import Any

import anthropic
import pytest
import pytest_asyncio

from tests.processes import Process
from tests.relay.calls import Chat
from tests.upstream.client import TestUpstream

WEATHER = {
    "name": "weather",
    "description": "The weather of a city",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
}


@pytest_asyncio.fixture(loop_scope="session")
async def claude(relay: Process, chat: Chat) -> AsyncIterator[anthropic.AsyncAnthropic]:
    """The official client in the test's own session."""
    async with anthropic.AsyncAnthropic(
        base_url=relay.url,
        api_key=chat.http.headers["x-api-key"],
        default_headers={"x-session-id": chat.session_id},
        max_retries=2,
    ) as client:
        yield client


async def ask(claude: anthropic.AsyncAnthropic, text: str, **fields: Any) -> anthropic.types.Message:
    messages: list[anthropic.types.MessageParam] = [{"role": "user", "content": text}]
    answer: anthropic.types.Message = await claude.messages.create(
        model="test-model", max_tokens=100, messages=messages, **fields
    )
    return answer


async def test_a_plain_answer(claude: anthropic.AsyncAnthropic, chat: Chat) -> None:
    answer = await ask(claude, "Hello")
    assert answer.content[0].type == "text"
    assert answer.content[0].text == "You said: Hello. I see 1 messages."
    assert answer.usage.output_tokens > 0
    assert answer._request_id
    assert len(await chat.stored()) == 2


async def test_a_stream(claude: anthropic.AsyncAnthropic, chat: Chat) -> None:
    messages: list[anthropic.types.MessageParam] = [{"role": "user", "content": "Hello"}]
    async with claude.messages.stream(model="test-model", max_tokens=100, messages=messages) as stream:
        text = "".join([piece async for piece in stream.text_stream])
        final = await stream.get_final_message()
    assert text == "You said: Hello. I see 1 messages."
    assert final.stop_reason == "end_turn"
    assert (await chat.stored())[1]["content"] == text


async def test_tools_over_three_turns(claude: anthropic.AsyncAnthropic, chat: Chat, upstream: TestUpstream) -> None:
    """The client sends everything again each time, as agents do."""
    calls = [{"type": "tool_use", "id": f"toolu_{city}", "name": "weather", "input": {"city": city}} for city in "AB"]
    upstream.script({"blocks": calls[:1]}, {"blocks": calls[1:]}, {"text": "Both are sunny."})
    messages: list[Any] = [{"role": "user", "content": "Weather in A and B?"}]
    for _ in range(3):
        answer = await claude.messages.create(
            model="test-model",
            max_tokens=100,
            messages=messages,
            tools=[WEATHER],  # type: ignore[list-item]
        )
        messages.append({"role": "assistant", "content": answer.content})
        results = [
            {"type": "tool_result", "tool_use_id": block.id, "content": "sunny"}
            for block in answer.content
            if block.type == "tool_use"
        ]
        if results:
            messages.append({"role": "user", "content": results})
    assert answer.stop_reason == "end_turn"
    stored = await chat.stored()
    assert [each["role"] for each in stored] == ["user", "assistant"] * 3
    assert [each["seq"] for each in stored] == [1, 2, 3, 4, 5, 6]


async def test_counting_tokens(claude: anthropic.AsyncAnthropic, chat: Chat) -> None:
    messages: list[anthropic.types.MessageParam] = [{"role": "user", "content": "Hello"}]
    counted = await claude.messages.count_tokens(model="test-model", messages=messages)
    assert counted.input_tokens > 0
    assert await chat.stored() == []


async def test_models(claude: anthropic.AsyncAnthropic) -> None:
    assert "demo" in [model.id async for model in claude.models.list()]


@pytest.mark.parametrize(
    ("status", "error", "calls"),
    [
        (400, anthropic.BadRequestError, 1),
        (404, anthropic.NotFoundError, 1),
        (413, anthropic.APIStatusError, 1),
        (403, anthropic.InternalServerError, 1),
        (429, anthropic.RateLimitError, 1),
        (500, anthropic.InternalServerError, 1),
        (529, anthropic.InternalServerError, 1),
    ],
)
async def test_errors(
    claude: anthropic.AsyncAnthropic, upstream: TestUpstream, status: int, error: type[Exception], calls: int
) -> None:
    """Each is its own class, and not tried again where the relay has tried already."""
    upstream.script({"status": status, "repeat": -1})
    with pytest.raises(error):
        await ask(claude, "Hello")
    assert len(upstream.requests()) == calls


async def test_a_wrong_key(claude: anthropic.AsyncAnthropic) -> None:
    with pytest.raises(anthropic.AuthenticationError, match="API key"):
        await ask(claude.with_options(api_key="wrong"), "Hello")


async def test_a_bearer_token(claude: anthropic.AsyncAnthropic, relay: Process) -> None:
    async with anthropic.AsyncAnthropic(base_url=relay.url, auth_token=claude.api_key, api_key=None) as bearer:
        assert (await ask(bearer, "Hello")).content


async def test_a_stream_that_breaks_raises(claude: anthropic.AsyncAnthropic, upstream: TestUpstream) -> None:
    upstream.script({"text": "word " * 50, "cut_after_events": 6})
    messages: list[anthropic.types.MessageParam] = [{"role": "user", "content": "Hello"}]
    with pytest.raises(anthropic.APIStatusError):
        async with claude.messages.stream(model="test-model", max_tokens=100, messages=messages) as stream:
            await stream.get_final_message()
