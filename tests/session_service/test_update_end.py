"""PUT and DELETE: what they change, what they leave alone, which statuses follow which."""

from typing import Any

import pytest

from tests.session_service.calls import Chat, Db, User, check_counters, fine, invalid, refused, said, wait

ENDED = {"message": "Session ended successfully"}
STATUSES = ("active", "completed", "archived", "ended")
WAY_TO = {"active": (), "completed": ("completed",), "archived": ("completed", "archived"), "ended": ("ended",)}
ALLOWED = {
    ("active", "completed"),
    ("active", "ended"),
    ("completed", "archived"),
    ("completed", "ended"),
}


async def in_status(user: User, status: str, **fields: Any) -> Chat:
    chat = await user.chat(**fields)
    for step in WAY_TO[status]:
        fine(await chat.put(status=step))
    return chat


@pytest.mark.parametrize("old", STATUSES)
@pytest.mark.parametrize("new", STATUSES)
async def test_transitions(user: User, old: str, new: str) -> None:
    chat = await in_status(user, old)
    before = await chat.get()
    answer = await chat.put(status=new)
    if old == new:
        assert fine(answer) == before
    elif (old, new) in ALLOWED:
        after = fine(answer)
        assert (after["status"], after["is_active"]) == (new, False)
        assert after["ended_reason"] == ("user" if new == "ended" else None)
        assert after["version"] == before["version"] + 1
        assert after["updated_at"] > before["updated_at"]
        assert after["last_activity"] == before["last_activity"]
        assert await chat.get() == after
    else:
        refused(answer, 409, "session_archived" if old == "archived" else "invalid_transition")
        assert await chat.get() == before


@pytest.mark.parametrize("status", STATUSES)
async def test_a_put_that_changes_nothing(user: User, status: str) -> None:
    fields: dict[str, Any] = {"title": "T", "metadata": {"a": {"b": [1, None]}}, "conversation_data": {"c": 1}}
    chat = await user.chat(**fields, idle_timeout_seconds=500)
    await chat.append("x")
    fine(await chat.put(session_summary="s", summary_model="m-1"))
    for step in WAY_TO[status]:
        fine(await chat.put(status=step))
    before = await chat.get()
    summary = {"session_summary": "s", "summary_to_seq": 1, "summary_model": "m-1"}
    everything = {**fields, "idle_timeout_seconds": 500, **summary, "status": status}
    nothings: list[dict[str, Any]] = [{}, dict.fromkeys(everything), everything, {"unknown": 1}]
    nothings += [{name: value} for name, value in everything.items()]
    for nothing in nothings:
        assert fine(await chat.put(**nothing)) == before, nothing
    assert await chat.get() == before


CHANGES: list[dict[str, Any]] = [
    {"title": "new"},
    {"title": ""},
    {"metadata": {"b": 2}},
    {"metadata": {}},
    {"metadata": {"a": None}},
    {"metadata": {"a": True}},
    {"metadata": {"a": "1"}},
    {"conversation_data": {"x": 1}},
    {"session_summary": "new", "summary_to_seq": 0},
    {"session_summary": "new", "summary_to_seq": 0, "summary_model": "m-1"},
    {"idle_timeout_seconds": 7},
    {"title": "n", "metadata": {"n": 1}, "conversation_data": {"n": []}, "session_summary": "n", "summary_to_seq": 0},
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("status", ["active", "completed", "ended"])
async def test_a_put_replaces_what_it_names(user: User, status: str, change: dict[str, Any]) -> None:
    chat = await in_status(user, status, title="T", metadata={"a": 1}, conversation_data={"c": 1})
    before = await chat.get()
    after = fine(await chat.put(**change))
    moved = {"version": before["version"] + 1, "updated_at": after["updated_at"], "expires_at": after["expires_at"]}
    assert after == before | change | moved
    assert after["updated_at"] > before["updated_at"]
    assert await chat.get() == after


@pytest.mark.parametrize("change", [*CHANGES, {"status": "active"}, {"status": "ended"}])
async def test_an_archived_session_cannot_be_changed(user: User, change: dict[str, Any]) -> None:
    chat = await in_status(user, "archived", title="T", metadata={"a": 1}, conversation_data={"c": 1})
    before = await chat.get()
    refused(await chat.put(**change), 409, "session_archived", "Session is archived")
    assert await chat.get() == before


async def test_a_put_is_all_or_nothing(user: User) -> None:
    chat = await in_status(user, "ended")
    before = await chat.get()
    refused(await chat.put(title="new", status="completed"), 409, "invalid_transition")
    invalid(await chat.put(title="new", session_summary="s", summary_to_seq=1), "body", "summary_to_seq")
    assert await chat.get() == before


async def test_a_put_is_no_activity(user: User) -> None:
    chat = await user.chat(idle_timeout_seconds=100)
    before = await chat.get()
    after = fine(await chat.put(title="new"))
    assert (after["last_activity"], after["expires_at"]) == (before["last_activity"], before["expires_at"])


async def test_a_summary_goes_into_the_context_until_what_it_covers_is_rewound(user: User) -> None:
    chat = await user.chat()
    for number in range(1, 5):
        await chat.append(f"m{number}", "user" if number % 2 else "assistant")
    assert fine(await chat.put(session_summary="of two", summary_to_seq=2))["session_summary"] == "of two"
    assert "of two" in (await chat.context())["system"]
    turn = await chat.open(said("other"), rewind_to_seq=2)
    assert turn.opened["session"]["session_summary"] == "of two"
    assert "of two" in turn.opened["context"]["system"]
    await turn.complete()
    fine(await chat.put(session_summary="of all"))
    turn = await chat.open(said("again"), rewind_to_seq=2)
    assert turn.opened["session"]["session_summary"] == ""
    assert turn.opened["context"]["system"] == ""


def summary_of(session: dict[str, Any]) -> tuple[str, int | None, str | None]:
    return session["session_summary"], session["summary_to_seq"], session["summary_model"]


async def test_a_summary_tells_its_range_and_who_wrote_it(user: User) -> None:
    chat = await user.chat()
    for number in range(4):
        await chat.append(f"m{number}")
    assert summary_of(fine(await chat.put(summary_model="m-1"))) == ("", None, None)
    assert summary_of(fine(await chat.put(session_summary="by m-1", summary_model="m-1"))) == ("by m-1", 4, "m-1")
    assert summary_of(fine(await chat.put(summary_to_seq=3))) == ("by m-1", 3, "m-1")
    assert summary_of(fine(await chat.put(session_summary="by m-1"))) == ("by m-1", 3, "m-1")
    assert summary_of(fine(await chat.put(summary_model="m-2"))) == ("by m-1", 3, "m-2")
    assert summary_of((await user.sessions())["sessions"][0]) == ("by m-1", 3, "m-2")
    # A new text is nobody's who has not signed it.
    assert summary_of(fine(await chat.put(session_summary="mine", summary_to_seq=2))) == ("mine", 2, None)
    emptied = await chat.put(session_summary="", summary_to_seq=1, summary_model="m-1")
    assert summary_of(fine(emptied)) == summary_of(await chat.get()) == ("", None, None)


async def test_the_context_holds_a_summary_once_and_tells_what_it_does_not_cover(user: User) -> None:
    chat = await user.chat()
    for number in range(1, 21):
        await chat.append(f"m{number} " + "word " * 50, "user" if number % 2 else "assistant")
    budget = {"max_tokens": 800}
    turn = await chat.open(said("q1"), context=budget)
    start = turn.receipt["window_start_seq"]
    assert 9 < start < 21
    await turn.complete(said("a1", "assistant"))
    fine(await chat.put(session_summary="of the first eight", summary_to_seq=8, summary_model="m-1"))
    turn = await chat.open(said("q2"), context=budget)
    context = turn.opened["context"]
    assert context["system"].count("of the first eight") == 1
    told = [block["text"] for each in context["messages"] for block in _blocks(each["content"])]
    assert told[0].startswith(f"m{start} ")
    assert len(told) == len(set(told))
    # Nine and on are neither told nor summarised, and the receipt says so of all that is before the window.
    assert turn.receipt["window_start_seq"] == start
    assert turn.receipt["left_out"] == [{"from_seq": 1, "to_seq": start - 1, "reason": "before_window"}]


def _blocks(content: Any) -> list[dict[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


# ── DELETE ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("status", ["active", "completed"])
async def test_delete_ends(user: User, status: str) -> None:
    chat = await in_status(user, status)
    before = await chat.get()
    assert fine(await chat.end()) == ENDED
    after = await chat.get()
    assert (after["status"], after["is_active"], after["ended_reason"]) == ("ended", False, "user")
    assert after["version"] == before["version"] + 1
    assert fine(await chat.end()) == ENDED
    assert await chat.get() == after


async def test_delete_of_an_archived_session(user: User) -> None:
    chat = await in_status(user, "archived")
    before = await chat.get()
    refused(await chat.end(), 409, "session_archived")
    assert await chat.get() == before


async def test_delete_of_an_expired_session_keeps_the_reason(user: User, db: Db) -> None:
    chat = await user.chat(idle_timeout_seconds=10)
    await wait(db, chat, 11)
    assert fine(await chat.end()) == ENDED
    after = await chat.get()
    assert (after["status"], after["ended_reason"]) == ("ended", "expired")
    assert fine(await chat.end()) == ENDED
    assert await chat.get() == after


async def test_an_ended_session_is_kept_and_takes_nothing_more(user: User, db: Db) -> None:
    chat = await user.chat()
    await chat.append("kept")
    fine(await chat.end())
    before = await chat.get()
    refused(await chat.post("more"), 409, "session_not_active", "Session is not active")
    refused(await chat.turn(said("more")), 409, "session_not_active")
    refused(await chat.turn(said("more"), create_session={}), 409, "session_not_active")
    refused(await chat.turn(said("more"), wait_seconds=30), 409, "session_not_active")
    assert await chat.contents() == ["kept"]
    assert await chat.get() == before
    assert (await chat.remember("still"))["content"] == "still"
    await check_counters(db, chat)


@pytest.mark.parametrize("status", ["completed", "archived", "ended"])
async def test_only_active_sessions_take_messages(user: User, status: str) -> None:
    chat = await in_status(user, status)
    before = await chat.get()
    refused(await chat.post("x"), 409, "session_not_active")
    refused(await chat.turn(said("x")), 409, "session_not_active")
    assert await chat.get() == before
