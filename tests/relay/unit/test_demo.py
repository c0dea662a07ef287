"""The demo account: the seed's dialogues, and a Claude answer in every respect."""

import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.relay import sse
from services.relay.assembly import Assembly
from services.relay.upstream import COUNT_TOKENS_PATH, MESSAGES_PATH, UpstreamRequest
from services.relay.upstream.demo import DemoUpstream
from services.relay.upstream.demo_names import asks_for_name, latest_name
from tests.upstream import rules


def body(*turns: Any, **more: Any) -> dict[str, Any]:
    """A request whose turns are the user's and the assistant's in turn."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
    return {"model": "demo", "max_tokens": 500, "messages": messages, **more}


async def send(request: dict[str, Any], path: str = MESSAGES_PATH) -> tuple[int, dict[str, Any]]:
    answer = await DemoUpstream().open(UpstreamRequest(path, "", {}, request))
    return answer.status, json.loads(await answer.read())


async def say(*turns: Any, **more: Any) -> str:
    status, message = await send(body(*turns, **more))
    assert status == 200
    return str(message["content"][0]["text"])


async def streamed(request: dict[str, Any]) -> tuple[list[sse.Event], dict[str, Any]]:
    answer = await DemoUpstream().open(UpstreamRequest(MESSAGES_PATH, "", {}, request | {"stream": True}))
    assert answer.headers["content-type"].startswith("text/event-stream")
    events, assembly = [], Assembly()
    async for event in sse.Events(answer.chunk):
        events.append(event)
        assembly.add(event)
    return events, assembly.message()


async def test_the_seed_in_chinese() -> None:
    greeting = await say("你好，我叫张三")
    assert "你好张三！" in greeting
    assert "你叫张三" in await say("你好，我叫张三", greeting, "我叫什么名字？")
    assert "你叫张三" in await say("我叫张三", greeting, "我叫什么？")
    assert "我不知道你的名字，请告诉我。" in await say("我是谁？")
    assert "我不知道你的名字" in await say("我叫什么？")
    assert "你叫 Alice" in await say("你好，我叫 Alice", "…", "我叫什么名字？")
    assert "你叫 Bob" in await say("你好，我叫 Bob", "…", "我叫什么名字？")
    assert "演示模型" in greeting


async def test_the_same_in_english() -> None:
    greeting = await say("Hello, my name is Alice")
    assert "Hello Alice!" in greeting
    assert "demo model" in greeting
    assert "Your name is Alice." in await say("Hello, my name is Alice", greeting, "What is my name?")
    assert "I do not know your name" in await say("what is my name")
    assert "I do not know your name" in await say("Who am I?")


NAMES = {
    "你好，我叫张三": "张三",
    "我叫张三今年20岁": "张三",
    "我叫欧阳娜娜": "欧阳娜娜",
    "我的名字是李四。": "李四",
    "我叫“赵六”": "赵六",
    "我叫alice": "alice",
    "我是张三": "张三",
    "我是小明": "小明",
    "我是 Bob，你好": "Bob",
    "my name is bob": "bob",
    "My name is Jean-Luc O'Brien, hello": "Jean-Luc O'Brien",
    "I am Alice and I live in Paris": "Alice",
    "Hi, I’m José": "José",
    "my name is 张三": "张三",
    "My name is Alice. I am happy": "Alice",
    "I am Alice. No wait, my name is Bob": "Bob",
}
NO_NAMES = [
    "我叫什么名字？", "我叫什么？", "我是谁？", "你知道我是谁吗", "我叫了外卖", "我叫他来", "我不是张三",
    "我是学生", "我是高中生", "我是程序员", "我是北京人", "我是来问问题的", "我是想问一下", "我是张三的朋友",
    "我是 Java 开发", "我是王老师", "I am fine", "I am happy to help", "I'm Going home", "I AM FINE",
    "I am American", "I am Alice's sister", "my name is not Alice", "What is my name?", "我叫", "I am",
]  # fmt: skip


@pytest.mark.parametrize(("said", "name"), NAMES.items())
def test_names_are_heard(said: str, name: str) -> None:
    assert latest_name([said]) == name
    assert latest_name(["我叫王五", said, "ok"]) == name
    assert not asks_for_name(said)


@pytest.mark.parametrize("said", NO_NAMES)
def test_other_words_are_no_names(said: str) -> None:
    assert latest_name([said]) is None
    assert latest_name(["my name is Carol", said]) == "Carol"


@settings(max_examples=500)
@given(st.text(max_size=60), st.sampled_from(["我叫", "我是", "my name is ", "I am ", "I'm "]))
def test_any_text_may_follow(text: str, opening: str) -> None:
    name = latest_name([opening + text])
    assert name is None or (name in opening + text and name.strip() == name != "")


async def test_the_latest_name_counts_and_only_the_users_own() -> None:
    assert "你叫李四" in await say("我叫张三", "好", "不对，我叫李四", "好", "我是谁")
    assert "do not know" in await say("hi", "My name is Claude", "what's my name?")
    summary = "Earlier: the user wrote: my name is Dora."
    assert "Dora" in await say("what's my name?", system=[{"type": "text", "text": summary}])


async def test_it_counts_what_it_sees() -> None:
    assert "3 条消息" in await say("一", "二", "三")
    assert "1 message." in await say("one")
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}
    assert "1 message and 2 images" in await say([image, {"type": "text", "text": "what are these?"}, image])


async def test_tool_results_are_answered() -> None:
    call = {"type": "tool_use", "id": "t1", "name": "clock", "input": {}}
    result = {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "noon"}]}
    assert 'The tool answered: "noon"' in await say("what time is it?", [call], [result])


async def test_streamed_equals_plain_and_comes_in_pieces() -> None:
    for request in (body("你好，我叫张三"), body("Hello there"), body("hi", max_tokens=3)):
        _, plain = await send(request)
        events, message = await streamed(request)
        assert message["content"] == plain["content"]
        assert message["usage"] == plain["usage"]
        assert message["stop_reason"] == plain["stop_reason"]
        assert [event.name for event in events[:3]] == ["message_start", "content_block_start", "ping"]
        assert [event.name for event in events[-3:]] == ["content_block_stop", "message_delta", "message_stop"]
        assert sum(event.name == "content_block_delta" for event in events) >= 3
        assert b"".join(event.raw for event in events).endswith(b"\n\n")


async def test_the_same_request_gives_the_same_text() -> None:
    assert await say("你好") == await say("你好")


async def test_max_tokens_and_stop_sequences() -> None:
    _, message = await send(body("hello", max_tokens=4))
    assert (message["stop_reason"], message["usage"]["output_tokens"]) == ("max_tokens", 4)
    assert message["content"][0]["text"] == 'You said: "'
    _, message = await send(body("hello", stop_sequences=["stand-in", "demo"]))
    assert (message["stop_reason"], message["stop_sequence"]) == ("stop_sequence", "demo")
    assert message["content"][0]["text"].endswith("I am the ")
    _, message = await send(body("hello", stop_sequences=["You"]))
    assert message["content"] == []
    _, message = await streamed(body("hello", stop_sequences=["You"]))
    assert (message["content"], message["stop_reason"]) == ([], "stop_sequence")


async def test_a_prefill_is_gone_on_with() -> None:
    whole = await say("hello")
    begun = await say("hello", "You said")
    assert "You said" + begun == whole.replace("1 message.", "2 messages.")
    assert (await say("hello", "The answer:")).startswith(" You said")


async def test_a_forced_tool_is_called() -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "unit": {"enum": ["C", "F"]}},
        "required": ["city", "unit"],
    }
    tools = [{"name": "weather", "input_schema": schema}]
    request = body("Oslo", tools=tools, tool_choice={"type": "tool", "name": "weather"})
    _, message = await send(request)
    (call,) = message["content"]
    assert (call["name"], call["input"], message["stop_reason"]) == (
        "weather",
        {"city": "Oslo", "unit": "C"},
        "tool_use",
    )
    _, same = await streamed(request)
    assert same["content"] == [call]


async def test_usage_grows_with_the_context() -> None:
    _, short = await send(body("你好"))
    _, long = await send(body("你好，今天天气很好。", "是的", "你好"))
    assert 0 < short["usage"]["input_tokens"] < long["usage"]["input_tokens"]
    assert short["usage"]["cache_read_input_tokens"] == short["usage"]["cache_creation_input_tokens"] == 0
    status, counted = await send({"messages": body("你好")["messages"]}, COUNT_TOKENS_PATH)
    assert (status, counted) == (200, {"input_tokens": short["usage"]["input_tokens"]})


BAD: list[dict[str, Any]] = [
    {"messages": None},
    {"messages": []},
    {"messages": "hi"},
    {"messages": ["hi"]},
    {"messages": [{"role": "system", "content": "x"}]},
    {"messages": [{"role": "assistant", "content": "x"}]},
    {"messages": [{"role": "user", "content": None}]},
    {"max_tokens": None},
    {"max_tokens": 0},
    {"max_tokens": True},
    {"max_tokens": "9"},
    {"stop_sequences": [1]},
]


@pytest.mark.parametrize("change", BAD[:-1])
async def test_invalid_requests_are_refused_as_claude_refuses_them(change: dict[str, Any]) -> None:
    status, error = await send(body("hi") | change)
    assert (status, error["type"], error["error"]["type"]) == (400, "error", "invalid_request_error")
    assert rules.problem(body("hi") | change) is not None


async def test_stop_sequences_must_be_texts() -> None:
    assert (await send(body("hi") | BAD[-1]))[0] == 400


async def test_the_pause_before_each_delta() -> None:
    answer = await DemoUpstream(delay_seconds=0.01).open(
        UpstreamRequest(MESSAGES_PATH, "", {}, body("hi", stream=True, max_tokens=10))
    )
    started = time.monotonic()
    count = 0
    while await answer.chunk():
        count += 1
    assert count == 16
    assert 0.1 <= time.monotonic() - started < 2


async def test_odd_content_does_not_break_it() -> None:
    assert await say("\ud800\0 my name is \ud800")
    assert await say([{"type": "text"}, {"type": "text", "text": 7}, "x", {"type": "of_the_future"}])
    assert await say([])
    odd = [{"properties": 5, "required": ["q"]}, {"properties": {"q": 1}, "required": 7}, {"type": "object"}, 5, None]
    for schema in odd:
        tools = [{"name": "t", "input_schema": schema}]
        _, message = await send(body("hi", tools=tools, tool_choice={"type": "tool", "name": "t"}))
        assert message["content"][0]["name"] == "t"
    assert await say("hi", system=[{"type": ["no", "name"], "text": "x"}, {"type": {}}, 7])
    assert await say("hi", tools=[{"name": ["t"]}], tool_choice={"type": ["any"], "name": []})
