"""What a model is given to summarise, and the extract that the demo makes of it."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.relay import transcript
from services.relay.upstream.demo_extract import extract
from services.relay.upstream.demo_model import estimate_tokens
from services.relay.upstream.demo_names import latest_name
from shared import wire


def entry(role: str, content: str | list[dict[str, Any]]) -> str:
    plain, blocks = (content, None) if isinstance(content, str) else ("", content)
    fields: dict[str, Any] = {"role": role, "content": plain, "content_blocks": blocks}
    return transcript.entry(wire.Message.model_construct(**fields))


def block(kind: str, **fields: Any) -> dict[str, Any]:
    return {"type": kind, **fields}


def text(said: str) -> dict[str, Any]:
    return block("text", text=said)


def result(content: Any, **fields: Any) -> dict[str, Any]:
    return block("tool_result", tool_use_id="1", content=content, **fields)


ENTRIES: list[tuple[str, Any, str]] = [
    ("user", "  Hi \n", "User: Hi"),
    ("assistant", [block("thinking", thinking="hm", signature="s"), text("Hello")], "Assistant: Hello"),
    ("assistant", [block("redacted_thinking", data="x")], ""),
    ("system", "Be brief.", ""),
    ("assistant", [block("tool_use", id="1", name="ls", input={"p": "/"})], 'Assistant: [calls ls with {"p":"/"}]'),
    ("user", [result("bin"), text("So?")], "User: [result: bin]\nSo?"),
    ("user", [result([text("no"), block("image")], is_error=True)], "User: [failed: no\n[image]]"),
    ("tool_result", "42", "Tool: 42"),
    ("user", [block("document", title="Plan", source={}), block("new")], "User: [document: Plan]\n[new]"),
]


@pytest.mark.parametrize(("role", "content", "expected"), ENTRIES)
def test_an_entry_tells_what_was_said_and_done(role: str, content: Any, expected: str) -> None:
    assert entry(role, content) == expected


def test_an_entry_is_short() -> None:
    long = entry("user", "beginning " + "x" * 100_000 + " end")
    assert len(long) < 6_100
    assert long.startswith("User: beginning x")
    assert long.endswith("x end")
    assert len(entry("assistant", [block("tool_use", id="1", name="f", input={"x": "y" * 9_000})])) < 400
    assert len(entry("user", [result("z" * 9_000)])) < 700


@given(st.lists(st.tuples(st.sampled_from(["User", "Assistant", "Tool"]), st.from_regex(r"\A\w[\w ,.]{0,30}\w\Z"))))
def test_what_is_asked_can_be_read_again(entries: list[tuple[str, str]]) -> None:
    for before in ("", "They met.\n\nTwice."):
        asked = transcript.prompt(before, [f"{label}: {said}" for label, said in entries] or ["User: x"])
        assert transcript.read(asked) == (before, entries or [("User", "x")])


def told(*texts: str, before: str = "") -> str:
    """The extract of a conversation in which user and assistant speak in turn."""
    entries = [f"{('User', 'Assistant')[n % 2]}: {said}" for n, said in enumerate(texts)]
    return extract(transcript.prompt(before, entries))


def test_the_extract() -> None:
    assert told("Hello, my name is Ada. I like tea.", "Hello Ada! How can I help?", "Find a kettle\nsoon") == (
        "Extract by the demo model, which cannot summarise:\n"
        "User: Hello, my name is Ada.\n"
        "Assistant: Hello Ada! How can I help?\n"
        "User: Find a kettle\n"
        "The user has said: my name is Ada."
    )
    assert told("你好，我是小明。我在学Python。", "好的。一起学吧！") == (
        "演示模型的摘录（它不会作摘要）：\n用户：你好，我是小明。我在学Python。\n助手：好的。一起学吧！\n用户说过：我叫小明。"
    )


def test_the_extract_goes_on_from_another() -> None:
    first = told("I am Ada.", "My name is Claude.", "Noted?", "Yes, all of it.")
    assert latest_name([first], outright_only=True) == "Ada"
    second = told("And what is new?", "Nothing at all.", before=first)
    assert second.count("Extract by the demo model") == second.count("my name is Ada") == 1
    assert second.splitlines()[-1] == "The user has said: my name is Ada."
    assert second.index("Noted?") < second.index("And what is new?")
    long = "".join(told(*[f"This is sentence number {n} 你好。" for n in range(200)], before=second).split("\n")[1:])
    assert "Ada" in long
    assert estimate_tokens(long) < 1024


@given(st.text(max_size=200), st.text(max_size=200))
def test_any_text_gives_an_extract(one: str, other: str) -> None:
    assert told(one, other, before=other) == told(one, other, before=other)
    assert extract(one)
