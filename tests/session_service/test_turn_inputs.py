"""What a turn may begin with: no new messages, a rewind, a budget that is too small."""

import pytest

from tests.session_service.calls import Chat, Db, User, check_counters, fine, invalid, refused, said, stored_rows


@pytest.mark.parametrize("role", ["user", "tool_result", "tool"])
async def test_no_messages_when_the_last_is_the_users(user: User, role: str) -> None:
    chat = await user.chat()
    await chat.append("q")
    await chat.append("a", "assistant")
    await chat.append("last", role)
    turn = await chat.open()
    assert turn.opened["messages"] == []
    shown = await turn.get()
    assert (shown["input_from_seq"], shown["input_to_seq"]) == (None, None)
    assert [each["role"] for each in turn.opened["context"]["messages"]] == ["user", "assistant", "user"]


@pytest.mark.parametrize("role", ["assistant", "tool_call", "system", None])
async def test_no_messages_when_the_last_is_not_the_users(user: User, db: Db, role: str | None) -> None:
    chat = await user.chat()
    if role:
        await chat.append("q")
        await chat.append("a", role)
    before = await stored_rows(db, user.id)
    invalid(await chat.turn(), "body", "messages")
    assert await stored_rows(db, user.id) == before
    refused(await Chat(user, "new").turn(create_session={}), 400, "validation_error")
    refused(await Chat(user, "new").call("GET"), 404, "session_not_found")


async def test_no_messages_after_a_rewind_to_the_users(user: User) -> None:
    chat = await user.chat()
    for number in range(1, 5):
        await chat.append(f"m{number}", "user" if number % 2 else "assistant")
    turn = await chat.open(rewind_to_seq=3)
    assert [each["content"] for each in turn.opened["context"]["messages"]] == ["m1", "m2", "m3"]
    assert turn.opened["session"]["message_count"] == 3
    done = await turn.complete(said("m4 again", "assistant"))
    assert done["messages"][0]["seq"] == 5
    assert await chat.contents() == ["m1", "m2", "m3", "m4 again"]
    refused(await chat.turn(rewind_to_seq=2), 400, "validation_error")
    assert await chat.contents() == ["m1", "m2", "m3", "m4 again"]


@pytest.mark.parametrize("to_seq", [0, 1, 2, 4])
async def test_rewind(user: User, db: Db, to_seq: int) -> None:
    chat = await user.chat()
    for number in range(1, 5):
        await chat.append(f"m{number}", "user" if number % 2 else "assistant", tokens_used=1, cost_usd=0.5)
    before = await chat.get()
    turn = await chat.open(said("new"), rewind_to_seq=to_seq)
    session = turn.opened["session"]
    assert session["message_count"] == to_seq + 1
    assert (session["total_tokens"], session["total_cost"]) == (4, 2.0)
    assert session["generation"] == before["generation"]
    assert [each["seq"] for each in turn.opened["messages"]] == [5]
    assert await chat.contents() == [*(f"m{number}" for number in range(1, to_seq + 1)), "new"]
    times = {each["superseded_at"] for each in (await chat.messages(include_superseded=True))["messages"][to_seq:4]}
    assert None not in times
    await turn.complete()
    stats = await user.stats()
    assert (stats["total_messages"], stats["total_tokens"], stats["total_cost"]) == (to_seq + 1, to_seq, to_seq / 2)
    await check_counters(db, chat)


async def test_rewinding_again_supersedes_only_what_is_visible(user: User, db: Db) -> None:
    chat = await user.chat()
    for number in range(1, 4):
        await chat.append(f"m{number}")
    await (await chat.open(said("n1"), rewind_to_seq=1)).complete(said("n2", "assistant"))
    first = {each["seq"]: each["superseded_at"] for each in (await chat.messages(include_superseded=True))["messages"]}
    await (await chat.open(said("o1"), rewind_to_seq=1)).complete()
    second = {each["seq"]: each["superseded_at"] for each in (await chat.messages(include_superseded=True))["messages"]}
    assert {seq: second[seq] for seq in (2, 3)} == {seq: first[seq] for seq in (2, 3)}
    assert await chat.contents() == ["m1", "o1"]
    await check_counters(db, chat)
    # A rewind to what was superseded goes back to what is visible before it.
    await (await chat.open(said("p1"), rewind_to_seq=3)).complete()
    assert await chat.contents() == ["m1", "p1"]
    await check_counters(db, chat)


async def test_a_rewind_beyond_the_last_message(user: User, db: Db) -> None:
    chat = await user.chat()
    await chat.append("x")
    before = await stored_rows(db, user.id)
    invalid(await chat.turn(said("y"), rewind_to_seq=2), "body", "rewind_to_seq")
    new = Chat(user, "new")
    invalid(await new.turn(said("y"), rewind_to_seq=1, create_session={}), "body", "rewind_to_seq")
    assert await stored_rows(db, user.id) == before
    turn = await new.open(said("y"), rewind_to_seq=0, create_session={})
    assert turn.opened["session"]["message_count"] == 1


async def test_a_context_that_is_too_small_stores_nothing_and_leaves_no_turn_open(user: User, db: Db) -> None:
    chat = await user.chat()
    await chat.append("x")
    await chat.append("y", "assistant")
    before, rows = await chat.get(), await stored_rows(db, user.id)
    answer = await chat.turn(said("word " * 1000), context={"max_tokens": 100}, rewind_to_seq=0)
    body = refused(answer, 422, "context_too_small")
    assert body["over_by_tokens"] > 0
    assert str(body["over_by_tokens"]) in body["detail"]
    assert await chat.get() == before
    assert await stored_rows(db, user.id) == rows
    assert fine(await chat.call("GET", "/turns"))["turns"] == []
    new = Chat(user, "new")
    answer = await new.turn(said("word " * 1000), context={"max_tokens": 100}, create_session={})
    refused(answer, 422, "context_too_small")
    refused(await new.call("GET"), 404, "session_not_found")
    await chat.append("free")
    by = body["over_by_tokens"]
    fits = await chat.open(said("word " * 1000), context={"max_tokens": 100 + by}, rewind_to_seq=0)
    assert fits.receipt["tokens"]["total"] <= 100 + by


async def test_a_get_of_a_context_that_is_too_small(user: User) -> None:
    chat = await user.chat()
    await chat.append("word " * 1000)
    body = refused(await chat.call("GET", "/context", params={"max_tokens": 10}), 422, "context_too_small")
    assert body["over_by_tokens"] > 0
    assert fine(await chat.call("GET", "/context", params={"max_tokens": 10 + body["over_by_tokens"]}))["messages"]


async def test_system_messages_in_a_turn(user: User) -> None:
    chat = await user.chat()
    turn = await chat.open(said("Be brief.", "system"), said("Hi"))
    context = turn.opened["context"]
    assert context["system"] == "Be brief."
    assert context["messages"] == [{"role": "user", "content": "Hi"}]
    assert context["receipt"]["included"] == [[1, 2]]
