"""Reading messages back: pages, around a seq, filters, superseded ones."""

from typing import Any

import pytest

from tests.session_service.calls import Chat, Json, User, said


async def filled(user: User, count: int) -> Chat:
    chat = await user.chat()
    turn = await chat.open(
        *(said(f"m{number}", "user" if number % 2 else "assistant") for number in range(1, count + 1))
    )
    await turn.complete()
    return chat


def seqs(listed: Json) -> list[int]:
    return [each["seq"] for each in listed["messages"]]


async def test_the_answer(user: User) -> None:
    chat = await filled(user, 3)
    listed = await chat.messages()
    assert list(listed) == ["messages", "total", "page", "page_size", "has_more"]
    assert (listed["total"], listed["page"], listed["page_size"], listed["has_more"]) == (3, 1, 100, False)
    empty = await (await user.chat()).messages()
    assert empty == {"messages": [], "total": 0, "page": 1, "page_size": 100, "has_more": False}


@pytest.mark.parametrize("order", ["asc", "desc"])
@pytest.mark.parametrize("size", [1, 3, 5, 9, 10, 1000])
async def test_pages(user: User, order: str, size: int) -> None:
    chat = await filled(user, 10)
    found: list[int] = []
    page = 0
    while page < 20:
        page += 1
        listed = await chat.messages(order=order, page=page, page_size=size)
        assert (listed["total"], listed["page"], listed["page_size"]) == (10, page, size)
        assert listed["has_more"] == (page * size < 10)
        found += seqs(listed)
        if not listed["has_more"]:
            break
    assert found == (list(range(1, 11)) if order == "asc" else list(range(10, 0, -1)))


AROUND: list[tuple[dict[str, Any], list[int], bool]] = [
    ({"after_seq": 0, "limit": 3}, [1, 2, 3], True),
    ({"after_seq": 0}, list(range(1, 11)), False),
    ({"after_seq": 4, "limit": 3}, [5, 6, 7], True),
    ({"after_seq": 7, "limit": 3}, [8, 9, 10], False),
    ({"after_seq": 8, "limit": 3}, [9, 10], False),
    ({"after_seq": 10, "limit": 3}, [], False),
    ({"after_seq": 99, "limit": 3}, [], False),
    ({"after_seq": 4, "limit": 3, "order": "desc"}, [7, 6, 5], True),
    ({"before_seq": 0, "limit": 3}, [], False),
    ({"before_seq": 1, "limit": 3}, [], False),
    ({"before_seq": 3, "limit": 3}, [1, 2], False),
    ({"before_seq": 4, "limit": 3}, [1, 2, 3], False),
    ({"before_seq": 5, "limit": 3}, [2, 3, 4], True),
    ({"before_seq": 5, "limit": 3, "order": "desc"}, [4, 3, 2], True),
    ({"before_seq": 2**31 - 1, "limit": 2}, [9, 10], True),
    ({"after_seq": 2**31 - 1, "limit": 2}, [], False),
]


@pytest.mark.parametrize(("params", "expected", "has_more"), AROUND)
async def test_the_nearest_ones(user: User, params: dict[str, Any], expected: list[int], has_more: bool) -> None:
    chat = await filled(user, 10)
    listed = await chat.messages(**params)
    assert (seqs(listed), listed["has_more"], listed["total"]) == (expected, has_more, 10)


async def test_walking_on_from_a_seq_while_others_append(user: User) -> None:
    chat = await filled(user, 10)
    found: list[int] = []
    while listed := seqs(await chat.messages(after_seq=found[-1] if found else 0, limit=4)):
        found += listed
        if len(found) < 14:
            await chat.append("meanwhile")
    assert found == list(range(1, len(found) + 1))
    assert len(found) > 10


async def test_filters(user: User) -> None:
    chat = await user.chat()
    kinds = [
        ("user", "chat"),
        ("assistant", "tool_call"),
        ("tool", "tool_result"),
        ("system", "system"),
        ("user", "notification"),
    ]
    for role, kind in kinds * 2:
        await chat.append("x", role, message_type=kind)
    for number, (role, kind) in enumerate(kinds, start=1):
        listed = await chat.messages(message_type=kind)
        assert (seqs(listed), listed["total"]) == ([number, number + 5], 2)
        both = await chat.messages(message_type=kind, role=role, page_size=1)
        assert (seqs(both), both["total"], both["has_more"]) == ([number], 2, True)
    users = await chat.messages(role="user", order="desc")
    assert (seqs(users), users["total"]) == ([10, 6, 5, 1], 4)
    assert seqs(await chat.messages(role="user", after_seq=1, limit=2)) == [5, 6]
    assert seqs(await chat.messages(role="user", before_seq=10, limit=2)) == [5, 6]
    assert seqs(await chat.messages(role="assistant", message_type="chat")) == []
    assert seqs(await chat.messages(role="tool_result")) == []


async def test_superseded_messages_are_listed_only_on_request(user: User) -> None:
    chat = await filled(user, 6)
    await (await chat.open(said("other"), rewind_to_seq=2)).complete()
    listed = await chat.messages()
    assert (seqs(listed), listed["total"]) == ([1, 2, 7], 3)
    assert {each["superseded_at"] for each in listed["messages"]} == {None}
    everything = await chat.messages(include_superseded=True)
    assert (seqs(everything), everything["total"]) == (list(range(1, 8)), 7)
    gone = [each["seq"] for each in everything["messages"] if each["superseded_at"]]
    assert gone == [3, 4, 5, 6]
    assert seqs(await chat.messages(after_seq=2, limit=1)) == [7]
    assert seqs(await chat.messages(before_seq=7, limit=1)) == [2]
    assert seqs(await chat.messages(before_seq=7, limit=1, include_superseded=True)) == [6]
    assert (await chat.messages(role="user", include_superseded=True))["total"] == 4
    assert (await chat.messages(role="user"))["total"] == 2
    page = await chat.messages(page=2, page_size=2)
    assert (seqs(page), page["has_more"]) == ([7], False)
    one = await chat.call("GET", f"/messages/{everything['messages'][2]['message_id']}")
    assert one.json() == everything["messages"][2]
