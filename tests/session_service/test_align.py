"""Lining a client's array up with the stored history."""

import hashlib
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shared.canonical import message_hash
from tests.session_service.calls import Chat, Json, User, fine, said


async def align(chat: Chat, *messages: tuple[str, Any]) -> Json:
    hashes = [message_hash(role, content).hex() for role, content in messages]
    answer = fine(await chat.call("POST", "/align", json={"hashes": hashes}))
    assert list(answer) == ["matched", "seq", "version"]
    return answer


def matched(answer: Json) -> tuple[int, int]:
    return answer["matched"], answer["seq"]


HISTORY: list[tuple[str, Any]] = [
    ("user", "one"),
    ("assistant", [{"type": "thinking", "thinking": "t", "signature": "s"}, {"type": "text", "text": "two"}]),
    ("user", [{"type": "text", "text": "three", "cache_control": {"type": "ephemeral"}}]),
    ("assistant", "four "),
]


async def talked(user: User) -> Chat:
    chat = await user.chat()
    for role, content in HISTORY:
        await chat.append(content, role)
    return chat


@pytest.mark.parametrize("count", range(5))
async def test_as_far_as_it_agrees(user: User, count: int) -> None:
    chat = await talked(user)
    assert matched(await align(chat, *HISTORY[:count])) == (count, count)
    assert matched(await align(chat, *HISTORY[:count], ("user", "new"))) == (count, count)
    assert matched(await align(chat, *HISTORY[:count], ("user", "new"), *HISTORY[count:])) == (count, count)


async def test_the_version_is_the_sessions(user: User) -> None:
    chat = await talked(user)
    before = await chat.get()
    assert (await align(chat, *HISTORY))["version"] == before["version"]
    assert await chat.get() == before


async def test_messages_alike_line_up(user: User) -> None:
    chat = await talked(user)
    alike = [
        ("user", [{"type": "text", "text": "one"}]),
        ("assistant", "two"),
        ("user", "three \n"),
        ("assistant", "four"),
    ]
    assert matched(await align(chat, *alike)) == (4, 4)
    assert matched(await align(chat, ("assistant", "one"))) == (0, 0)
    assert matched(await align(chat, ("user", "One"))) == (0, 0)


async def test_system_messages_are_passed_over(user: User) -> None:
    chat = await user.chat()
    await chat.append("Be brief.", "system")
    await chat.append("one")
    await chat.append("Be long.", "system")
    await chat.append("two", "assistant")
    assert matched(await align(chat, ("user", "one"), ("assistant", "two"))) == (2, 4)
    assert matched(await align(chat, ("user", "one"), ("assistant", "x"))) == (1, 2)
    assert matched(await align(chat, ("system", "Be brief."))) == (0, 0)


async def test_superseded_messages_are_passed_over(user: User) -> None:
    chat = await talked(user)
    await (await chat.open(said("other"), rewind_to_seq=2)).complete(said("answer", "assistant"))
    assert matched(await align(chat, *HISTORY)) == (2, 2)
    now = [*HISTORY[:2], ("user", "other"), ("assistant", "answer")]
    assert matched(await align(chat, *now)) == (4, 6)


async def test_a_restart_begins_anew(user: User) -> None:
    chat = await talked(user)
    fine(await chat.end())
    await (await chat.open(said("fresh"), create_session={"if_exists": "restart"})).complete()
    assert matched(await align(chat, *HISTORY)) == (0, 0)
    assert matched(await align(chat, ("user", "fresh"))) == (1, 5)


async def test_a_long_history(user: User) -> None:
    chat = await user.chat()
    messages = [said(f"m{number}", "user" if number % 2 == 0 else "assistant") for number in range(3001)]
    await (await chat.open(*messages, context={"max_messages": 3})).complete()
    pairs = [(each["role"], each["content"]) for each in messages]
    assert matched(await align(chat, *pairs)) == (3001, 3001)
    for count in (999, 1000, 1001, 2000, 3000):
        assert matched(await align(chat, *pairs[:count])) == (count, count)
        assert matched(await align(chat, *pairs[:count], ("user", "other"), *pairs[count:])) == (count, count)


async def test_the_most_hashes(user: User) -> None:
    chat = await talked(user)
    hashes = [hashlib.sha256(str(number).encode()).hexdigest() for number in range(100_000)]
    assert matched(fine(await chat.call("POST", "/align", json={"hashes": hashes}))) == (0, 0)


contents = st.sampled_from(["a", "b", "c"])
pairs = st.tuples(st.sampled_from(["user", "assistant", "tool_result", "tool_call"]), contents)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(stored=st.lists(pairs, max_size=6), wanted=st.lists(pairs, max_size=6), data=st.data())
async def test_any_two_arrays(
    user: User, stored: list[tuple[str, str]], wanted: list[tuple[str, str]], data: st.DataObject
) -> None:
    kept = data.draw(st.integers(0, len(stored)))
    array = stored[:kept] + wanted
    chat = await user.chat()
    for role, content in stored:
        await chat.append(content, role)
    expected = 0
    for (one_role, one), (two_role, two) in zip(stored, array, strict=False):
        if message_hash(one_role, one) != message_hash(two_role, two):
            break
        expected += 1
    assert matched(await align(chat, *array)) == (expected, expected)
