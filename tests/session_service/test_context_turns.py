"""Random conversations, turn by turn, under random budgets: the window's rules hold at every step."""

from typing import Any

from hypothesis import HealthCheck, Phase, event, given, settings
from hypothesis import strategies as st

from services.session_service import tokens
from tests.session_service.calls import Json, User, fine, said
from tests.session_service.test_context import checked

UNLIMITED = 10**9
words = st.integers(1, 120).map(lambda count: "word " * count)


@st.composite
def conversations(draw: st.DrawFn) -> list[tuple[Json, Json]]:
    """(what the user's side sends, what the assistant answers) of each turn; calls are answered by the next turn."""
    turns: list[tuple[Json, Json]] = []
    waiting: list[str] = []
    for number in range(draw(st.integers(1, 14))):
        if waiting:
            blocks: list[Json] = [
                {"type": "tool_result", "tool_use_id": each, "content": draw(words)} for each in waiting
            ]
            blocks += draw(st.sampled_from([[], [{"type": "text", "text": "and this"}]]))
            sent = said(blocks)
        else:
            sent = said(f"{number} {draw(words)}")
        waiting = [f"call-{number}-{each}" for each in range(draw(st.sampled_from([0, 0, 1, 2])))]
        calls: list[Json] = [
            {"type": "tool_use", "id": each, "name": "f", "input": {"x": draw(words)}} for each in waiting
        ]
        text: list[Json] = (
            [{"type": "text", "text": draw(words)}] if not calls or draw(st.sampled_from([True, False])) else []
        )
        turns.append((sent, said([*text, *calls], "assistant")))
    return turns


def least(history: list[Json]) -> int:
    """Tokens of the least that makes sense: the user's newest own message, and the newest step of a loop after it."""
    own = max(place for place, each in enumerate(history) if isinstance(each["content"], str))
    step = max((place for place, each in enumerate(history) if each["role"] == "assistant"), default=own)
    needed = {own, *range(max(own, step), len(history))}
    return sum(tokens.estimate(history[place]["content"]) for place in needed)


@settings(
    max_examples=12,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # shrinking over HTTP takes minutes
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(conversation=conversations(), budget=st.integers(400, 2500))
async def test_the_windows_rules_hold_at_every_turn(
    user: User, conversation: list[tuple[Json, Json]], budget: int
) -> None:
    chat = await user.chat()
    start = 1
    history: list[Json] = []
    for sent, answer in conversation:
        before: Any = (await chat.context(max_tokens=UNLIMITED))["receipt"]
        assert before["window_start_seq"] == start
        opened = await chat.turn(sent, context={"max_tokens": budget})
        if opened.status_code == 422:
            event("too small")
            assert least([*history, sent]) >= opened.json()["needed_tokens"] > budget
            assert (await chat.context(max_tokens=UNLIMITED))["receipt"] == before
            return
        turn = fine(opened)
        receipt = checked(turn["context"], budget)
        assert (receipt["pending_tool_calls"], receipt["repairs"]) == ([], [])
        assert receipt["included"][-1][1] == turn["messages"][-1]["seq"]
        history.append(sent)
        whole = before["tokens"]["total"] + tokens.estimate(sent["content"])
        if whole <= budget:
            assert receipt["window_start_seq"] == start
            assert receipt["tokens"]["total"] == whole
        else:
            event("moved")
            assert receipt["window_start_seq"] >= start
            assert receipt["tokens"]["total"] <= budget
        start = receipt["window_start_seq"]
        assert receipt["included"][0][0] == start
        assert isinstance(history[start - 1]["content"], str)  # the user's own words
        done = {"lease_token": turn["lease_token"], "status": "completed", "messages": [answer]}
        fine(await chat.call("POST", f"/turns/{turn['turn_id']}/complete", json=done))
        history.append(answer)
