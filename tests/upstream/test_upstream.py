"""The test upstream itself, seen by the official client: a tool that others rely on has to be right."""

import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from typing import Any

import anthropic
import pytest

from tests.upstream.client import TestUpstream

HI: list[Any] = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def process() -> Iterator[TestUpstream]:
    with TestUpstream.started() as upstream:
        yield upstream


@pytest.fixture
def upstream(process: TestUpstream) -> TestUpstream:
    process.reset()
    return process


@pytest.fixture
async def sdk(upstream: TestUpstream) -> AsyncIterator[anthropic.AsyncAnthropic]:
    async with anthropic.AsyncAnthropic(base_url=upstream.url, api_key="k", max_retries=0, timeout=5) as sdk:
        yield sdk


async def test_plain_and_streamed(sdk: anthropic.AsyncAnthropic) -> None:
    message = await sdk.messages.create(model="m", max_tokens=9, messages=HI)
    assert message.content[0].to_dict() == {"type": "text", "text": "You said: hello. I see 1 messages."}
    async with sdk.messages.stream(model="m", max_tokens=9, messages=HI) as stream:
        final = await stream.get_final_message()
    assert final.content[0].to_dict()["text"] == "You said: hello. I see 1 messages."
    assert final.usage.output_tokens == message.usage.output_tokens


async def test_all_kinds_of_blocks(sdk: anthropic.AsyncAnthropic, upstream: TestUpstream) -> None:
    citation = {
        "type": "char_location", "cited_text": "a", "document_index": 0, "document_title": None,
        "start_char_index": 0, "end_char_index": 1, "file_id": None,
    }  # fmt: skip
    blocks = [
        {"type": "thinking", "thinking": "let me see", "signature": "sig"},
        {"type": "redacted_thinking", "data": "xyz"},
        {"type": "text", "text": "looking 你好", "citations": [citation]},
        {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {"query": "x"}},
        {"type": "tool_use", "id": "t", "name": "clock", "input": {"zone": {"name": "UTC", "offset": [0, 1.5]}}},
    ]
    upstream.script({"blocks": blocks, "delta_characters": 3, "insert": [{"event": "of_the_future", "data": {"a": 1}}]})
    async with sdk.messages.stream(model="m", max_tokens=9, messages=HI) as stream:
        final = await stream.get_final_message()
    assert [block.to_dict() for block in final.content] == blocks
    assert final.stop_reason == "tool_use"


async def test_tools_and_thinking_without_a_script(sdk: anthropic.AsyncAnthropic) -> None:
    tools: list[Any] = [{"name": "clock", "input_schema": {"type": "object"}}]
    choice: Any = {"type": "tool", "name": "clock"}
    first = await sdk.messages.create(model="m", max_tokens=9, messages=HI, tools=tools, tool_choice=choice)
    (call,) = first.content
    assert call.type == "tool_use"
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "noon"}
    history: list[Any] = [*HI, {"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
    second = await sdk.messages.create(model="m", max_tokens=9, messages=history, tools=tools)
    assert second.content[0].to_dict()["text"] == "You said: noon. I see 3 messages."
    thinking: Any = {"type": "enabled", "budget_tokens": 1024}
    third = await sdk.messages.create(model="m", max_tokens=2000, messages=HI, thinking=thinking)
    history = [*HI, {"role": "assistant", "content": third.content}, {"role": "user", "content": "go on"}]
    assert (await sdk.messages.create(model="m", max_tokens=9, messages=history)).type == "message"


async def test_count_tokens_and_models(sdk: anthropic.AsyncAnthropic) -> None:
    assert (await sdk.messages.count_tokens(model="m", messages=HI)).input_tokens > 0
    assert "test-model" in [model.id async for model in sdk.models.list()]


async def test_refusals(sdk: anthropic.AsyncAnthropic) -> None:
    with pytest.raises(anthropic.BadRequestError, match="at least one message"):
        await sdk.messages.create(model="m", max_tokens=9, messages=[])


@pytest.mark.parametrize(
    ("status", "kind"),
    [(401, anthropic.AuthenticationError), (429, anthropic.RateLimitError), (529, anthropic.InternalServerError)],
)
async def test_scripted_status(
    sdk: anthropic.AsyncAnthropic, upstream: TestUpstream, status: int, kind: type[anthropic.APIStatusError]
) -> None:
    upstream.script({"status": status, "headers": {"retry-after": "7"}})
    with pytest.raises(kind) as caught:
        await sdk.messages.create(model="m", max_tokens=9, messages=HI)
    assert caught.value.response.headers["retry-after"] == "7"
    assert (await sdk.messages.create(model="m", max_tokens=9, messages=HI)).type == "message"


async def test_the_error_event(sdk: anthropic.AsyncAnthropic, upstream: TestUpstream) -> None:
    error = {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}
    upstream.script({"error_event": error, "after_events": 4})
    with pytest.raises(anthropic.APIStatusError, match="Overloaded"):
        async with sdk.messages.stream(model="m", max_tokens=9, messages=HI) as stream:
            await stream.get_final_message()
    assert upstream.requests()[0]["events_sent"] == 5


async def test_steps_match_and_repeat(sdk: anthropic.AsyncAnthropic, upstream: TestUpstream) -> None:
    upstream.script(
        {"match": {"model": "other"}, "text": "other"},
        {"match": {"contains": "hello"}, "repeat": 2, "text": "twice", "name": "greeting"},
    )
    texts = []
    for model in ("m", "m", "m", "other"):
        message = await sdk.messages.create(model=model, max_tokens=9, messages=HI)
        texts.append(message.content[0].to_dict()["text"])
    assert texts == ["twice", "twice", "You said: hello. I see 1 messages.", "other"]
    assert [entry["step"] for entry in upstream.requests()] == ["greeting", "greeting", "", ""]
    assert upstream.state()["steps"] == []


async def test_usage_may_be_missing_or_absurd(sdk: anthropic.AsyncAnthropic, upstream: TestUpstream) -> None:
    upstream.script({"usage": None}, {"usage": {"output_tokens": -5}})
    raw = await sdk.messages.with_raw_response.create(model="m", max_tokens=9, messages=HI)
    assert "usage" not in await raw.text()
    assert (await sdk.messages.create(model="m", max_tokens=9, messages=HI)).usage.output_tokens == -5


def test_a_step_that_is_not_understood_is_refused(upstream: TestUpstream) -> None:
    with pytest.raises(ValueError, match="cut_after_event"):
        upstream.script({"cut_after_event": 3})


def test_help_and_a_taken_port(upstream: TestUpstream) -> None:
    command = [sys.executable, "-m", "tests.upstream"]
    told = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True)
    assert "POST /control/script" in told.stdout
    port = upstream.url.rpartition(":")[2]
    taken = subprocess.run([*command, "--port", port], capture_output=True, text=True, check=False)
    assert taken.returncode == 1
    assert taken.stderr.count("\n") == 1


def test_it_ends_with_the_one_that_started_it() -> None:
    upstream = TestUpstream.started()
    process = upstream._process
    assert process is not None
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(timeout=5) == 0
    process.stdin = None
    upstream.stop()
