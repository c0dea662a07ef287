"""The official client of the Claude API against the relay, as its users call it."""

import asyncio
import base64
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anthropic
import pytest
import pytest_asyncio
from anthropic import AsyncAnthropic, beta_async_tool
from anthropic.types import Message

from tests.processes import Process, free_port, start_session_service
from tests.relay.calls import MODEL, Chat, Json, assistant, user
from tests.upstream import answers
from tests.upstream.client import TestUpstream
from tests.upstream.rules import signature
from tests.upstream.script import Step

WEATHER = {
    "name": "weather",
    "description": "The weather of a city",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
}


@asynccontextmanager
async def client_in(relay: Process, chat: Chat, **options: Any) -> AsyncIterator[AsyncAnthropic]:
    """The official client at a relay, in the chat's session."""
    headers = {"x-session-id": chat.session_id}
    key = chat.http.headers["x-api-key"]
    async with AsyncAnthropic(base_url=relay.url, api_key=key, default_headers=headers, **options) as client:
        yield client


@pytest_asyncio.fixture(loop_scope="session")
async def claude(relay: Process, chat: Chat) -> AsyncIterator[AsyncAnthropic]:
    """The official client in the test's own session."""
    async with client_in(relay, chat, max_retries=2) as client:
        yield client


async def send(claude: AsyncAnthropic, *messages: Any, streamed: bool = False, **fields: Any) -> Message:
    """The answer to these messages; texts are the user's. Streamed: as the stream helper puts it together."""
    listed = [user(each) if isinstance(each, str) else each for each in messages]
    request: dict[str, Any] = {"model": MODEL, "max_tokens": 2000, "messages": listed, **fields}
    if not streamed:
        answer: Message = await claude.messages.create(**request)
        return answer
    async with claude.messages.stream(**request) as stream:
        final: Message = await stream.get_final_message()
    return final


def blocks_of(message: Message) -> list[Json]:
    return [block.to_dict() for block in message.content]


async def test_a_plain_answer(claude: AsyncAnthropic, chat: Chat) -> None:
    answer = await send(claude, "Hello")
    assert answer.content[0].type == "text"
    assert answer.content[0].text == "You said: Hello. I see 1 messages."
    assert answer.usage.output_tokens > 0
    assert answer._request_id
    assert len(await chat.stored()) == 2


async def test_a_stream(claude: AsyncAnthropic, chat: Chat) -> None:
    messages: Any = [user("Hello")]
    async with claude.messages.stream(model=MODEL, max_tokens=100, messages=messages) as stream:
        text = "".join([piece async for piece in stream.text_stream])
        final = await stream.get_final_message()
    assert text == "You said: Hello. I see 1 messages."
    assert final.stop_reason == "end_turn"
    assert (await chat.stored())[1]["content"] == text


async def test_tools_over_three_turns(claude: AsyncAnthropic, chat: Chat, upstream: TestUpstream) -> None:
    """The client sends everything again each time, as agents do."""
    calls = [{"type": "tool_use", "id": f"toolu_{city}", "name": "weather", "input": {"city": city}} for city in "AB"]
    upstream.script({"blocks": calls[:1]}, {"blocks": calls[1:]}, {"text": "Both are sunny."})
    messages: list[Any] = [user("Weather in A and B?")]
    for _ in range(3):
        answer = await send(claude, *messages, tools=[WEATHER])
        messages.append(assistant(answer.content))
        results = [
            {"type": "tool_result", "tool_use_id": block.id, "content": "sunny"}
            for block in answer.content
            if block.type == "tool_use"
        ]
        if results:
            messages.append(user(results))
    assert answer.stop_reason == "end_turn"
    stored = await chat.stored()
    assert [each["role"] for each in stored] == ["user", "assistant"] * 3
    assert [each["seq"] for each in stored] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("streamed", [False, True])
async def test_the_clients_own_tool_loop(
    claude: AsyncAnthropic, chat: Chat, upstream: TestUpstream, streamed: bool
) -> None:
    """Its runner calls the tools by itself: two at once, then one, then the answer."""

    @beta_async_tool
    async def weather(city: str) -> str:
        """The weather of a city."""
        return f"{city} is sunny"

    calls = [{"type": "tool_use", "id": f"toolu_{city}", "name": "weather", "input": {"city": city}} for city in "ABC"]
    spoken = {"type": "text", "text": "Let me see."}
    upstream.script({"blocks": [spoken, *calls[:2]]}, {"blocks": calls[2:]}, {"text": "All are sunny."})
    messages: Any = [user("Weather in A, B and C?")]
    fields: dict[str, Any] = {"stream": True} if streamed else {}
    runner = claude.beta.messages.tool_runner(model=MODEL, max_tokens=100, messages=messages, tools=[weather], **fields)
    final = await runner.until_done()
    assert final.content[0].to_dict() == {"type": "text", "text": "All are sunny."}
    stored = await chat.stored()
    assert [each["seq"] for each in stored] == [1, 2, 3, 4, 5, 6]
    assert stored[1]["content_blocks"] == [spoken, *calls[:2]]
    told = [[result["tool_use_id"] for result in stored[place]["content_blocks"]] for place in (2, 4)]
    assert told == [["toolu_A", "toolu_B"], ["toolu_C"]]
    last = upstream.requests("/v1/messages")[2]["json"]["messages"]
    assert [each["content"] for each in last] == [
        messages[0]["content"], *(each["content_blocks"] for each in stored[1:5])
    ]  # fmt: skip


# ── what was said stays what it was ─────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Exchange:
    """What the user says, what the model answers, what the user says to that; `fields` are the request's own."""

    asked: list[Json]
    answered: list[Json]
    then: list[Json] = field(default_factory=lambda: [text("And then?")])
    fields: Json = field(default_factory=dict)


def text(value: str, **more: Any) -> Json:
    return {"type": "text", "text": value, **more}


def thinking(thought: str) -> Json:
    return {"type": "thinking", "thinking": thought, "signature": signature(thought)}


def call(name: str, kind: str = "tool_use", **arguments: Any) -> Json:
    return {"type": kind, "id": f"id_{name}", "name": name, "input": arguments}


def result(name: str, content: Any, **more: Any) -> Json:
    return {"type": "tool_result", "tool_use_id": f"id_{name}", "content": content, **more}


def cited(kind: str, **place: Any) -> Json:
    return {"type": kind, "cited_text": "The sky is blue. ", "document_index": 0, "document_title": "Sky", **place}


MARK = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}
PIXEL = base64.b64encode(b"\x89PNG\r\n\x1a\n").decode()
IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PIXEL}}
PDF = {"type": "base64", "media_type": "application/pdf", "data": base64.b64encode(b"%PDF-1.7 " * 300).decode()}
PLAIN = {"type": "text", "media_type": "text/plain", "data": "The sky is blue. Grass is green."}
PAGE = {"url": "https://example.com/sky", "title": "Sky"}

EXCHANGES: dict[str, Exchange] = {
    "cache marks": Exchange(
        [text("long ago", **MARK), text("你好 é \U0001f600", **MARK)],
        [text("  blanks around, and\r\nline ends \n")],
        [text("again", cache_control={"type": "ephemeral"})],
        {"system": [text("Be brief", **MARK)]},
    ),
    "parallel tools": Exchange(
        [text("Weather?")],
        [text("Let me look."), call("one", city="Ulm", deep={"list": [1, 2.5, None, {"é": "\n"}]}), call("two")],
        [result("one", [text("sunny"), IMAGE], **MARK), result("two", "no such city", is_error=True), text("Well?")],
        {"tools": [WEATHER | {"name": name} for name in ("one", "two")]},
    ),
    "thinking": Exchange(
        [text("Hard question")],
        [thinking("Let me see. " * 20), {"type": "redacted_thinking", "data": "EmwKAhgB"}, thinking(""), text("42")],
        fields={"thinking": {"type": "enabled", "budget_tokens": 1024}},
    ),
    "thinking before tools": Exchange(
        [text("Time?")],
        [thinking("I need the clock."), call("clock", zone="UTC"), call("date")],
        [result("clock", "noon"), {"type": "tool_result", "tool_use_id": "id_date"}],
        {"thinking": {"type": "enabled", "budget_tokens": 1024}, "tools": [WEATHER | {"name": "clock"}]},
    ),
    "images": Exchange(
        [IMAGE, {"type": "image", "source": {"type": "url", "url": "https://example.com/a.png"}, **MARK}, text("?")],
        [text("Two images.")],
        [{"type": "image", "source": {"type": "file", "file_id": "file_1"}}],
    ),
    "documents and citations": Exchange(
        [
            {"type": "document", "source": PLAIN, "title": "Sky", "context": "c", "citations": {"enabled": True}},
            {"type": "document", "source": PDF, "citations": {"enabled": True}, **MARK},
            {"type": "document", "source": {"type": "content", "content": [text("a"), IMAGE]}, "title": None},
            {"type": "search_result", "source": "https://a.example", "title": "Sky", "content": [text("blue")]},
            text("What colour is the sky?"),
        ],
        [
            text("According to the document, "),
            text("the sky is blue", citations=[
                cited("char_location", start_char_index=0, end_char_index=17, file_id=None),
                cited("page_location", start_page_number=1, end_page_number=2, file_id=None),
            ]),
            text("; and "),
            text("so on", citations=[cited("content_block_location", start_block_index=0, end_block_index=1)]),
        ],
    ),
    "server tools": Exchange(
        [text("Search"), {"type": "container_upload", "file_id": "file_2"}],
        [
            text("I'll search."),
            call("web_search", "server_tool_use", query="sky"),
            {"type": "web_search_tool_result", "tool_use_id": "id_web_search", "content": [
                {"type": "web_search_result", **PAGE, "encrypted_content": "EqgfCioIARgB", "page_age": None},
            ]},
            text("Blue", citations=[
                {"type": "web_search_result_location", **PAGE, "cited_text": "b", "encrypted_index": "Eo8BCioI"},
            ]),
        ],
    ),
    "blocks of the future": Exchange(
        [{"type": "hologram", "source": {"z": [1, {"y": None}], "mirrored": False}}, text("What is it?")],
        [{"type": "holographic_answer", "value": {"n": 2**60, "f": 0.5, "none": None}}, text("That.")],
    ),
}  # fmt: skip


@pytest.mark.parametrize("streamed", [False, True], ids=["plain", "streamed"])
@pytest.mark.parametrize("exchange", EXCHANGES.values(), ids=EXCHANGES)
async def test_blocks_survive(
    claude: AsyncAnthropic, chat: Chat, upstream: TestUpstream, exchange: Exchange, streamed: bool
) -> None:
    """Block for block: the client has them, the store has them, and upstream gets them again in the next turns,
    whether the client sends only what is new, or everything again in the client's own objects."""
    upstream.script({"blocks": exchange.answered}, {"text": "Fine"}, {"text": "Good"})
    first = await send(claude, user(exchange.asked), streamed=streamed, **exchange.fields)
    assert blocks_of(first) == exchange.answered
    assert [each["content_blocks"] for each in await chat.stored()] == [exchange.asked, exchange.answered]
    second = await send(claude, user(exchange.then), streamed=streamed, **exchange.fields)
    array = [user(exchange.asked), assistant(first.content), user(exchange.then), assistant(second.content)]
    await send(claude, *array, "Thanks", streamed=streamed, **exchange.fields)
    only_new, everything = (entry["json"]["messages"] for entry in upstream.requests("/v1/messages")[1:])
    said = [user(exchange.asked), assistant(exchange.answered), user(exchange.then)]
    assert only_new == said
    assert everything == [*said, assistant([text("Fine")]), user("Thanks")]
    assert [each["seq"] for each in await chat.stored()] == [1, 2, 3, 4, 5, 6]


async def test_a_call_sent_back_without_its_caller(claude: AsyncAnthropic, chat: Chat, upstream: TestUpstream) -> None:
    """Upstream says that the model itself has called; Claude Code and others leave that out when they send it back."""
    told = call("weather", city="Ulm") | {"caller": {"type": "direct"}}
    upstream.script({"blocks": [told]}, {"text": "Sunny"})
    first = await send(claude, "Weather?", tools=[WEATHER])
    sent_back = [{name: value for name, value in block.items() if name != "caller"} for block in blocks_of(first)]
    array = [user("Weather?"), assistant(sent_back), user([result("weather", "sunny")])]
    await send(claude, *array, tools=[WEATHER], extra_headers={"x-session-conflict": "reject"})
    stored = await chat.stored()
    assert [each["seq"] for each in stored] == [1, 2, 3, 4]
    assert stored[1]["content_blocks"] == [told]


MIXED = {
    "blocks": [
        thinking("Let me see. " * 3),
        text("Blue é", citations=EXCHANGES["documents and citations"].answered[1]["citations"]),
        call("clock", zone="Europe/Berlin"),
    ],
    "message": {"id": "msg_fixed", "field_of_the_future": {"a": [1, None]}},
    "usage": {"input_tokens": 7, "output_tokens": 5, "cache_creation": {"ephemeral_1h_input_tokens": 3}},
    "insert": [
        {"after_events": 0, "raw": ": a comment\n\n"},
        {"after_events": 5, "event": "event_of_the_future", "data": {"type": "event_of_the_future", "x": "\u2028"}},
    ],
    "delta_characters": 5,
}


async def test_the_streams_events_are_those_of_upstream(
    claude: AsyncAnthropic, chat: Chat, upstream: TestUpstream
) -> None:
    """The stream helper sees the same events through the relay as without it."""
    upstream.script(MIXED, MIXED)
    seen: list[list[Json]] = []
    for client in (claude, claude.with_options(base_url=upstream.url)):
        messages: Any = [user("Hello")]
        async with client.messages.stream(model=MODEL, max_tokens=2000, messages=messages) as stream:
            seen.append([event.to_dict() async for event in stream])
    assert seen[0] == seen[1]
    kinds = {event["type"] for event in seen[0]}
    assert kinds >= {"text", "citation", "thinking", "signature", "input_json", "message_stop"}
    assert (await chat.stored())[1]["content_blocks"] == MIXED["blocks"]


async def test_a_paused_turn_goes_on(claude: AsyncAnthropic, chat: Chat, upstream: TestUpstream) -> None:
    """A long turn of server tools: the client sends the unfinished answer back, and both parts are one message."""
    search = call("web_search", "server_tool_use", query="sky")
    found = {"type": "web_search_tool_result", "tool_use_id": search["id"], "content": []}
    paused, finished = [text("I'll search."), search], [found, text("Blue")]
    upstream.script({"blocks": paused, "stop_reason": "pause_turn"}, {"blocks": finished})
    first = await send(claude, "Colour of the sky?")
    assert first.stop_reason == "pause_turn"
    array = [user("Colour of the sky?"), assistant(first.content)]
    second = await send(claude, *array)
    assert blocks_of(second) == finished
    assert [each["content_blocks"] for each in (await chat.stored())[1:]] == [[*paused, *finished]]
    await send(claude, array[0], assistant([*first.content, *second.content]), "Thanks")
    assert upstream.requests("/v1/messages")[2]["json"]["messages"][1] == assistant([*paused, *finished])
    assert len(await chat.stored()) == 4


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"], ids=["lf", "crlf", "cr"])
@pytest.mark.parametrize("chunk_bytes", [None, 3])
async def test_a_streams_bytes_are_those_of_upstream(
    claude: AsyncAnthropic, chat: Chat, upstream: TestUpstream, newline: str, chunk_bytes: int | None
) -> None:
    """Unknown events, unknown fields and comments included, with any line ends, in pieces of any size."""
    step = MIXED | {"newline": newline, "chunk_bytes": chunk_bytes}
    upstream.script(step)
    messages: Any = [user("Hello")]
    async with claude.messages.with_streaming_response.create(
        model=MODEL, max_tokens=2000, messages=messages, stream=True
    ) as response:
        received = b"".join([chunk async for chunk in response.iter_bytes()])
    made = Step.model_validate(step)
    asked = upstream.requests("/v1/messages")[0]["json"]
    assert received == b"".join(answers.events(answers.message(asked, made), made))
    assert (await chat.stored())[1]["content_blocks"] == MIXED["blocks"]


async def test_what_the_client_adds_arrives(claude: AsyncAnthropic, chat: Chat, upstream: TestUpstream) -> None:
    """Betas, fields of the future and a query of one's own, also where the stored context goes before the request."""
    await send(claude, "Hello")
    messages: Any = [user([text("more")])]
    await claude.beta.messages.create(
        model=MODEL,
        max_tokens=100,
        messages=messages,
        betas=["one-2030-01-01", "two"],
        extra_body={"field_of_the_future": {"deep": [1, 2.5, None]}, "metadata": {"user_id": "somebody"}},
        extra_query={"beta": "true", "a": "b c"},
        extra_headers={"anthropic-version": "2030-01-01", "x-mine": "1"},
    )
    sent = upstream.requests("/v1/messages")[1]
    assert sent["query"] in {"beta=true&a=b+c", "beta=true&a=b%20c"}  # as the client writes it
    assert sent["headers"]["anthropic-beta"] == "one-2030-01-01,two"
    assert sent["headers"]["anthropic-version"] == "2030-01-01"
    assert not [name for name in sent["headers"] if name.startswith(("x-stainless", "x-mine", "x-session"))]
    assert sent["json"] | {"messages": messages} == {
        "model": MODEL,
        "max_tokens": 100,
        "messages": messages,
        "field_of_the_future": {"deep": [1, 2.5, None]},
        "metadata": {"user_id": "somebody"},
    }
    assert len(sent["json"]["messages"]) == 3


@pytest.mark.parametrize("streamed", [False, True], ids=["plain", "streamed"])
async def test_the_raw_responses_headers(
    claude: AsyncAnthropic, chat: Chat, upstream: TestUpstream, streamed: bool
) -> None:
    """The relay's own are there, and of upstream's only those that are for the client."""
    upstream.script(
        {
            "headers": {
                "request-id": "req_of_upstream",
                "anthropic-ratelimit-requests-remaining": "5",
                "anthropic-ratelimit-unified-status": "allowed",
                "anthropic-organization-id": "org-of-the-operator",
                "retry-after": "3",
                "set-cookie": "session=1",
                "x-should-retry": "true",
                "x-session-id": "of upstream",
            }
        }
    )
    messages: Any = [user("Hello")]
    fields: dict[str, Any] = {"stream": True} if streamed else {}
    raw = await claude.messages.with_raw_response.create(model=MODEL, max_tokens=100, messages=messages, **fields)
    parsed: Any = await raw.parse()
    if streamed:
        assert [event.type async for event in parsed][-1] == "message_stop"
    else:
        assert parsed._request_id == "req_of_upstream"
    headers = raw.headers
    assert headers["request-id"] == "req_of_upstream"
    assert headers["x-session-id"] == chat.session_id
    assert headers["x-session-persisted"] == ("pending" if streamed else "yes")
    assert headers["x-relay-attempts"] == "1"
    assert headers["x-turn-id"] == (await chat.turns())[0]["turn_id"]
    passed = [name for name in headers if name.startswith("anthropic-")]
    assert passed + [name for name in ("retry-after", "set-cookie", "x-should-retry") if name in headers] == []


# ── tokens and models ───────────────────────────────────────────────────────────────────────────


async def test_counting_tokens(claude: AsyncAnthropic, chat: Chat, upstream: TestUpstream) -> None:
    """Upstream's figure for just this request; nothing is stored, and no max_tokens is made up."""
    messages: Any = [user([text("Hello"), IMAGE])]
    tools: Any = [WEATHER]
    counted = await claude.messages.count_tokens(model=MODEL, messages=messages, tools=tools, system="Be brief")
    (sent,) = upstream.requests("/v1/messages/count_tokens")
    assert sent["json"] == {"model": MODEL, "messages": messages, "tools": tools, "system": "Be brief"}
    assert counted.input_tokens == answers.count_tokens(sent["json"])
    assert await chat.stored() == []
    with pytest.raises(anthropic.BadRequestError, match="unexpected `tool_use_id`"):
        await claude.messages.count_tokens(model=MODEL, messages=[user([result("nope", "x")])])  # type: ignore[list-item]


async def test_models(claude: AsyncAnthropic) -> None:
    assert "demo" in [model.id async for model in claude.models.list()]
    for call in (claude.models.with_raw_response.list(), claude.models.with_raw_response.retrieve("demo")):
        answer = await call
        assert answer.headers["request-id"] == answer.headers["x-request-id"]


# ── errors ──────────────────────────────────────────────────────────────────────────────────────


def refusal(message: str) -> Json:
    """An upstream's error that names itself."""
    body = {"type": "error", "error": {"type": "invalid_request_error", "message": message}, "request_id": "req_up"}
    return {"headers": {"request-id": "req_up", "x-should-retry": "true"}, "body": body}


@pytest.mark.parametrize("streamed", [False, True], ids=["plain", "streamed"])
@pytest.mark.parametrize(
    ("status", "error"),
    [
        (400, anthropic.BadRequestError),
        (404, anthropic.NotFoundError),
        (413, anthropic.RequestTooLargeError),
        (422, anthropic.UnprocessableEntityError),
    ],
)
async def test_what_upstream_refuses(
    claude: AsyncAnthropic, upstream: TestUpstream, status: int, error: type[anthropic.APIStatusError], streamed: bool
) -> None:
    """The client's own mistake: its class, upstream's words and request id; not tried again."""
    upstream.script({"status": status, "repeat": -1, **refusal("image 3 is broken")})
    with pytest.raises(error, match="image 3 is broken") as caught:
        await send(claude, "Hello", streamed=streamed)
    assert caught.value.status_code == status
    assert caught.value.request_id == "req_up"
    assert len(upstream.requests()) == 1


@pytest.mark.parametrize("streamed", [False, True], ids=["plain", "streamed"])
@pytest.mark.parametrize(
    ("status", "error", "told"),
    [
        (401, anthropic.OverloadedError, 529),
        (403, anthropic.OverloadedError, 529),
        (429, anthropic.RateLimitError, 429),
        (500, anthropic.OverloadedError, 529),
        (529, anthropic.OverloadedError, 529),
    ],
)
async def test_what_upstream_fails_at(
    claude: AsyncAnthropic,
    upstream: TestUpstream,
    status: int,
    error: type[anthropic.APIStatusError],
    told: int,
    streamed: bool,
) -> None:
    """Its class, the relay's words and request id; not tried again, as the relay has tried already."""
    upstream.script({"status": status, "repeat": -1, **refusal("key k-123 of the operator")})
    with pytest.raises(error) as caught:
        await send(claude, "Hello", streamed=streamed)
    failure = caught.value
    assert failure.status_code == told
    assert isinstance(failure.body, dict)
    assert failure.body["error"]["message"]
    assert failure.body["request_id"] == failure.request_id == failure.response.headers["x-request-id"] != "req_up"
    assert "k-123" not in str(failure.body)
    assert len(upstream.requests()) == 1


async def test_a_wrong_key(claude: AsyncAnthropic) -> None:
    with pytest.raises(anthropic.AuthenticationError, match="API key") as caught:
        await send(claude.with_options(api_key="wrong"), "Hello")
    assert caught.value.request_id


async def test_a_bearer_token(claude: AsyncAnthropic, relay: Process) -> None:
    async with AsyncAnthropic(base_url=relay.url, auth_token=claude.api_key, api_key=None) as bearer:
        assert (await send(bearer, "Hello")).content


async def test_a_stream_that_breaks_raises(claude: AsyncAnthropic, upstream: TestUpstream) -> None:
    """In the relay's words, once, and not tried again: a part of the answer has been seen."""
    upstream.script({"text": "word " * 50, "cut_after_events": 6})
    with pytest.raises(anthropic.APIStatusError, match="overloaded_error"):
        await send(claude, "Hello", streamed=True)
    assert len(upstream.requests()) == 1


# ── what the client tries again by itself ───────────────────────────────────────────────────────


async def test_a_timeout_tried_again_leaves_the_message_once(
    claude: AsyncAnthropic, chat: Chat, upstream: TestUpstream
) -> None:
    """The client that sends everything again: the second try goes on where the first was given up."""
    first = await send(claude, "u1")
    upstream.reset()
    upstream.script({"hang_seconds": 30}, {"text": "a2"})
    array = [user("u1"), assistant(first.content), user("u2")]
    second = await send(claude.with_options(timeout=0.5, max_retries=1), *array)
    assert blocks_of(second) == [text("a2")]
    assert [each["content"] for each in await chat.stored()][2:] == ["u2", "a2"]
    assert [entry["outcome"] for entry in upstream.requests("/v1/messages")] == ["disconnected", "finished"]


async def test_a_timeout_tried_again_with_a_key(claude: AsyncAnthropic, chat: Chat, upstream: TestUpstream) -> None:
    """The client that sends only what is new: by its Idempotency-Key the second try takes the place of the first."""
    upstream.script({"hang_seconds": 30}, {"text": "a1"})
    await send(
        claude.with_options(timeout=0.5, max_retries=1), "u1", extra_headers={"idempotency-key": chat.session_id}
    )
    assert [each["content"] for each in await chat.stored()] == ["u1", "a1"]
    assert len(upstream.requests("/v1/messages")) == 2


async def test_a_busy_session_tried_again(claude: AsyncAnthropic, chat: Chat, upstream: TestUpstream) -> None:
    """Refused at once because another request is served, the client comes back when it was told to."""
    upstream.script({"delay_ms": 500, "text": "a1"}, {"text": "a2"})
    first = asyncio.create_task(send(claude, "u1"))
    await upstream.until(lambda state: state["running"] == 1)
    await send(claude, "u2", extra_headers={"x-session-busy": "reject"})
    await first
    assert [each["content"] for each in await chat.stored()] == ["u1", "a1", "u2", "a2"]
    assert len(upstream.requests()) == 2


async def test_a_full_relay_tried_again(chat_at: Any, make_relay: Any, upstream: TestUpstream) -> None:
    relay = make_relay(RELAY_MAX_IN_FLIGHT="1", RELAY_MAX_QUEUED="0")
    chats: list[Chat] = [await chat_at(relay) for _ in range(2)]
    upstream.script({"delay_ms": 500, "repeat": -1})
    async with client_in(relay, chats[0]) as one, client_in(relay, chats[1]) as other:
        served = asyncio.create_task(send(one, "Hello"))
        await upstream.until(lambda state: state["running"] == 1)
        with pytest.raises(anthropic.RateLimitError):
            await send(other.with_options(max_retries=0), "Hello")
        await asyncio.gather(served, send(other, "Hello"))
    assert [len(await chat.stored()) for chat in chats] == [2, 2]


async def test_a_store_that_comes_late(
    chat_at: Any, make_relay: Any, database_url: str, scratch: Path, upstream: TestUpstream, tmp_path: Path
) -> None:
    """Nothing was asked of upstream while the store was away, so the client may try again, and does."""
    port = free_port()
    relay = make_relay(session_service_url=f"http://127.0.0.1:{port}", folder=tmp_path)
    chat: Chat = await chat_at(relay, tmp_path)
    async with client_in(relay, chat, max_retries=10) as claude:
        asking = asyncio.create_task(send(claude, "Hello"))
        await asyncio.sleep(0.5)
        assert upstream.requests() == []
        with start_session_service(database_url, scratch, port):
            await asking
            assert [each["role"] for each in await chat.stored()] == ["user", "assistant"]
    assert len(upstream.requests()) == 1
