"""Two messages that a model reads alike have one hash; two that it reads differently have two."""

import copy
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.canonical import canonical_blocks, message_hash, speaker

texts = st.text(st.characters(blacklist_categories=["Cs"]), max_size=20)
CACHE = {"cache_control": {"type": "ephemeral"}}


def text(value: str, **more: Any) -> dict[str, Any]:
    return {"type": "text", "text": value, **more}


def call(**more: Any) -> dict[str, Any]:
    return {"type": "tool_use", "id": "t", "name": "f", "input": {"a": 1}} | more


def result(content: Any, **more: Any) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": "t", "content": content, **more}


ALIKE: dict[str, tuple[Any, Any]] = {
    "a string and its block": ("hello", [text("hello")]),
    "texts side by side": ([text("a"), text("b")], "ab"),
    "blanks at the end": ("a \n", "a"),
    "blanks at the end of a block": ([text("a "), call()], [text("a"), call()]),
    "an empty text": ([text(""), text("a")], "a"),
    "cache marks": ([text("a", **CACHE)], "a"),
    "cache marks inside": ([result([text("a", **CACHE)])], [result("a")]),
    "thinking": ([{"type": "thinking", "thinking": "t", "signature": "s"}, text("a")], "a"),
    "hidden thinking": ([{"type": "redacted_thinking", "data": "d"}, text("a")], "a"),
    "thinking between": ([text("a"), {"type": "thinking", "thinking": "t"}, text("b")], "ab"),
    "nulls": ([text("a", citations=None)], "a"),
    "our own mark": ([text("a", incomplete=True)], "a"),
    "the order of keys": ([call(input={"a": 1, "b": 2})], [dict(reversed(call(input={"b": 2, "a": 1}).items()))]),
    "1 and 1.0": ([call(input={"a": 1})], [call(input={"a": 1.0})]),
    "a result as text and as blocks": ([result("r")], [result([text("r")])]),
    "a result with blanks at the end": ([result("r ")], [result([text("r")])]),
    "no error, said and unsaid": ([result("r", is_error=False)], [result("r")]),
    "a call of the model's own, said and unsaid": ([call(caller={"type": "direct"})], [call()]),
    "nothing": ([], ""),
}
DIFFERENT: dict[str, tuple[Any, Any]] = {
    "texts": ("a", "b"),
    "case": ("a", "A"),
    "blanks in front": (" a", "a"),
    "normal forms": ("é", "e\u0301"),
    "input": ([call(input={"a": 1})], [call(input={"a": 2})]),
    "true and 1": ([call(input={"a": 1})], [call(input={"a": True})]),
    "null in input": ([call(input={"a": None})], [call(input={})]),
    "text and number": ([call(input={"a": "1"})], [call(input={"a": 1})]),
    "names": ([call()], [call(name="g")]),
    "ids": ([call()], [call(id="u")]),
    "an error": ([result("r", is_error=True)], [result("r")]),
    "a call of a program's": ([call(caller={"type": "code_execution_20260120", "tool_id": "c"})], [call()]),
    "a text beside a call": ([text("a"), call()], [call(), text("a")]),
    "the order of input's lists": ([call(input=[1, 2])], [call(input=[2, 1])]),
    "an image": (
        [{"type": "image", "source": {"type": "url", "url": "a"}}],
        [{"type": "image", "source": {"type": "url", "url": "b"}}],
    ),
}


@pytest.mark.parametrize("name", ALIKE)
def test_alike(name: str) -> None:
    one, two = ALIKE[name]
    assert message_hash("user", one) == message_hash("user", two)


@pytest.mark.parametrize("name", DIFFERENT)
def test_different(name: str) -> None:
    one, two = DIFFERENT[name]
    assert message_hash("user", one) != message_hash("user", two)


def test_who_speaks_counts() -> None:
    assert message_hash("user", "a") != message_hash("assistant", "a")
    for role, side in {"tool": "user", "tool_result": "user", "tool_call": "assistant"}.items():
        assert speaker(role) == side
        assert message_hash(role, "a") == message_hash(side, "a")


plain = st.builds(text, texts)
blocks = st.lists(
    plain
    | st.builds(result, texts | st.lists(plain, max_size=3))
    | st.builds(
        call,
        input=st.dictionaries(
            texts, st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts | st.none()
        ),
    )
    | st.just({"type": "thinking", "thinking": "t", "signature": "s"}),
    max_size=6,
)


@given(blocks | texts)
def test_the_canonical_form_is_its_own(content: Any) -> None:
    before = copy.deepcopy(content)
    form = canonical_blocks(content)
    assert content == before
    assert canonical_blocks(form) == form
    assert message_hash("user", form) == message_hash("user", content)
    assert len(message_hash("user", content)) == 32


@given(blocks, st.data())
def test_cutting_a_text_in_two_changes_nothing(content: list[dict[str, Any]], data: st.DataObject) -> None:
    cut: list[dict[str, Any]] = []
    for block in content:
        if block["type"] != "text":
            cut.append({**block, **CACHE} if block["type"] != "thinking" else block)
            continue
        place = data.draw(st.integers(0, len(block["text"])))
        cut += [text(block["text"][:place]), text(block["text"][place:], **CACHE)]
    assert message_hash("user", cut) == message_hash("user", content)


@given(texts)
def test_a_string_and_its_block(content: str) -> None:
    assert message_hash("user", content) == message_hash("user", [text(content)])


def test_the_hash_is_the_same_in_every_process_and_release() -> None:
    content = [text("Grüße 😀"), call(input={"b": [1.0, None, True], "a": {"y": 1e22, "x": "z"}}), result([text("r ")])]
    expected = message_hash("assistant", content).hex()
    code = f"from shared.canonical import message_hash; print(message_hash('assistant', {content!r}).hex())"
    for seed in ("0", "1"):
        environment = {"PYTHONHASHSEED": seed, "PATH": "/usr/bin:/bin"}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == expected
    # Written down: stored hashes of earlier releases must go on matching.
    assert message_hash("user", "hello").hex() == "7eb55d5f402cd2e4778904ef5d56b011c6e72cbe0d6fe34eec1ef83509829bca"
