"""The window's start: stored on the session, still from turn to turn, moved in large steps, and by turns only."""

from itertools import pairwise
from typing import Any

import pytest

from tests.session_service.calls import Chat, Db, Json, Turn, User, fine, said
from tests.session_service.test_context import checked

BUDGET = 4000
QUESTION = "word " * 40  # about 75 tokens by the estimate
ANSWER = "reply " * 40


async def talk(chat: Chat, budget: Json, number: int) -> Turn:
    """One turn with this budget, completed."""
    turn = await chat.open(said(f"q{number} {QUESTION}"), context=budget)
    await turn.complete(said(f"a{number} {ANSWER}", "assistant"))
    return turn


async def stored_start(db: Any, chat: Chat) -> int:
    query = "SELECT window_start_seq FROM dev.sessions WHERE user_id = $1 AND session_id = $2"
    return int(await db.fetchval(query, chat.user.id, chat.id))


async def test_the_start_stands_still_until_the_budget_is_exceeded_then_takes_a_large_step(user: User, db: Db) -> None:
    chat = await user.chat()
    budget = {"max_tokens": BUDGET}
    starts, totals, texts = [], [], []
    for number in range(70):
        turn = await talk(chat, budget, number)
        receipt = checked(turn.opened["context"], BUDGET)
        starts.append(receipt["window_start_seq"])
        totals.append(receipt["tokens"]["total"])
        texts.append([each["content"] for each in turn.opened["context"]["messages"]])
        assert await stored_start(db, chat) == starts[-1]
    assert starts == sorted(starts)
    moves = [place for place in range(1, 70) if starts[place] != starts[place - 1]]
    assert 2 <= len(moves) <= 6
    for place in range(1, 70):
        grown = totals[place - 1] + 2 * 110
        if place in moves:
            assert grown > BUDGET  # it would not have fitted
            assert 0.45 * BUDGET < totals[place] <= 0.6 * BUDGET
            assert starts[place] % 2 == 1  # at a message of the user's
            assert texts[place][0].startswith("q")
        else:
            assert texts[place][: len(texts[place - 1])] == texts[place - 1]  # the same beginning: caches hit
    last = await chat.context(max_tokens=BUDGET)
    assert last["receipt"]["window_start_seq"] == starts[-1]
    assert last["receipt"]["left_out"] == [{"from_seq": 1, "to_seq": starts[-1] - 1, "reason": "before_window"}]


async def test_a_budget_of_messages_moves_it_too(user: User) -> None:
    chat = await user.chat()
    starts = []
    for number in range(30):
        turn = await talk(chat, {"max_messages": 11}, number)
        receipt = checked(turn.opened["context"], max_messages=11)
        starts.append(receipt["window_start_seq"])
    assert starts[:6] == [1] * 6
    moves = [place for place in range(1, 30) if starts[place] != starts[place - 1]]
    for place in moves:
        kept = 2 * place + 1 - starts[place] + 1
        assert kept <= 0.6 * 11
        assert kept >= 5
    assert all(later - earlier >= 3 for earlier, later in pairwise(moves))


async def test_reading_never_moves_it(user: User, db: Db) -> None:
    chat = await user.chat()
    for number in range(10):
        await talk(chat, {}, number)
    before = await chat.get()
    for max_tokens, max_messages in ((500, None), (100_000, 3), (2000, 5)):
        params = {"max_tokens": max_tokens, **({"max_messages": max_messages} if max_messages else {})}
        checked(await chat.context(**params), max_tokens, max_messages)
        assert await stored_start(db, chat) == 1
    assert await chat.get() == before
    assert (await chat.context())["receipt"]["included"] == [[1, 20]]


async def test_appends_do_not_move_it(user: User, db: Db) -> None:
    chat = await user.chat()
    for number in range(60):
        await chat.append(QUESTION, "user" if number % 2 == 0 else "assistant")
    assert await stored_start(db, chat) == 1
    context = await chat.context(max_tokens=1000)
    checked(context, 1000)
    assert await stored_start(db, chat) == 1


async def moved_chat(user: User) -> tuple[Chat, int]:
    """A session of 20 turns whose window has moved, and where to."""
    chat = await user.chat()
    for number in range(20):
        turn = await talk(chat, {"max_tokens": 2000}, number)
    start = int(turn.receipt["window_start_seq"])
    assert 1 < start < 40
    return chat, start


async def test_a_rewind_behind_it_lets_the_next_turn_place_it_anew(user: User, db: Db) -> None:
    chat, start = await moved_chat(user)
    turn = await chat.open(said("new"), rewind_to_seq=start - 3, context={"max_tokens": 100_000})
    receipt = checked(turn.opened["context"])
    assert receipt["window_start_seq"] == 1
    assert receipt["included"] == [[1, start - 3], [41, 41]]
    assert await stored_start(db, chat) == 1
    await turn.complete()


async def test_a_rewind_within_it_leaves_it(user: User, db: Db) -> None:
    chat, start = await moved_chat(user)
    turn = await chat.open(said("new"), rewind_to_seq=start + 1, context={"max_tokens": 100_000})
    assert turn.receipt["included"] == [[start, start + 1], [41, 41]]
    assert await stored_start(db, chat) == start
    await turn.complete()


async def test_a_refused_turn_and_one_that_does_not_fit_leave_it(user: User, db: Db) -> None:
    chat, start = await moved_chat(user)
    answer = await chat.turn(said("word " * 5000), context={"max_tokens": 2000})
    assert answer.status_code == 422
    assert await stored_start(db, chat) == start


async def test_a_restart_begins_a_new_window(user: User, db: Db) -> None:
    chat, _ = await moved_chat(user)
    fine(await chat.end())
    turn = await chat.open(said("new"), create_session={"if_exists": "restart"})
    assert turn.receipt["window_start_seq"] == 41
    assert turn.receipt["included"] == [[41, 41]]
    assert turn.receipt["left_out"] == []


async def test_a_window_begins_at_the_users_own_words_not_at_results(user: User) -> None:
    chat = await user.chat()
    for number in range(12):
        await chat.append(f"q{number} {QUESTION}")
        for step in range(3):
            call_id = f"c{number}-{step}"
            await chat.append([{"type": "tool_use", "id": call_id, "name": "f", "input": {"x": QUESTION}}], "assistant")
            await chat.append([{"type": "tool_result", "tool_use_id": call_id, "content": QUESTION}])
        await chat.append("done", "assistant")
    turn = await chat.open(said("next"), context={"max_tokens": 3000})
    receipt = checked(turn.opened["context"], 3000)
    assert receipt["repairs"] == []
    first = turn.opened["context"]["messages"][0]
    assert first["role"] == "user"
    assert first["content"].startswith("q")


async def test_a_loop_of_tools_longer_than_the_budget(user: User) -> None:
    chat = await user.chat()
    await chat.append("the question")
    for step in range(40):
        await chat.append([{"type": "tool_use", "id": f"c{step}", "name": "f", "input": {"x": QUESTION}}], "assistant")
        if step < 39:
            await chat.append([{"type": "tool_result", "tool_use_id": f"c{step}", "content": QUESTION}])
    last = said([{"type": "tool_result", "tool_use_id": "c39", "content": "the last result"}], "user")
    turn = await chat.open(last, context={"max_tokens": 3000})
    context = turn.opened["context"]
    receipt = checked(context, 3000)
    assert context["messages"][0]["content"] == "the question"
    assert context["messages"][-1]["content"][0]["content"] == "the last result"
    assert [each["reason"] for each in receipt["left_out"]] == ["budget"]
    assert receipt["repairs"] == []


@pytest.mark.parametrize("extra", ["system", "summary", "memories"])
async def test_the_system_prompt_counts_and_gives_way_to_the_newest_message(user: User, extra: str) -> None:
    chat = await user.chat()
    big = "word " * 300  # about 560 tokens
    if extra == "system":
        await chat.append(big, "system")
    elif extra == "summary":
        fine(await chat.put(session_summary=big))
    else:
        await chat.remember(big)
    budget = {"max_tokens": 1000, "memories": True}
    turn = await chat.open(said("word " * 100), context=budget)
    receipt = checked(turn.opened["context"], 1000)
    assert 400 < receipt["tokens"]["system"] < 700
    await turn.complete()
    turn = await chat.open(said("word " * 400), context=budget)
    receipt = checked(turn.opened["context"], 1000)
    assert receipt["tokens"]["system"] == 0
    assert turn.opened["context"]["system"] == ""
    await turn.complete()
