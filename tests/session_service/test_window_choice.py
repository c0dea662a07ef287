"""Which messages a context is made of, as a pure choice: within the limits, and the best one first."""

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.session_service import tokens
from services.session_service.window import STEP, Entry, Window, choose

sizes = st.integers(1, 50)


@st.composite
def histories(draw: st.DrawFn) -> list[Entry]:
    """Sizes of a history: questions, answers, and loops of tool calls."""
    entries: list[Entry] = []
    first = draw(st.integers(1, 100))
    for _ in range(draw(st.integers(0, 6))):
        kinds = [("user", True)]
        for _ in range(draw(st.integers(0, 4))):
            kinds += [("assistant", False), ("user", False)]
        kinds += [("assistant", False)] * draw(st.integers(0, 1))
        entries += [
            Entry(first + len(entries) + place, role, draw(sizes), own) for place, (role, own) in enumerate(kinds)
        ]
    return entries


limits = st.builds(Window, st.integers(0, 400), st.none() | st.integers(1, 20))


@st.composite
def exceeded(draw: st.DrawFn) -> tuple[list[Entry], Window]:
    """A history, and limits that it exceeds."""
    entries = [Entry(1, "user", draw(sizes), True), *draw(histories())]
    entries = [replace(entry, seq=seq) for seq, entry in enumerate(entries, start=1)]
    total = sum(entry.tokens for entry in entries)
    if draw(st.booleans()):
        return entries, Window(draw(st.integers(0, total - 1)), draw(st.none() | st.integers(1, len(entries))))
    return entries, Window(draw(st.integers(0, 2 * total)), draw(st.integers(0, len(entries) - 1)))


@settings(max_examples=200)
@given(histories(), limits, st.booleans(), st.booleans())
def test_every_candidate_is_within_the_limits(entries: list[Entry], limit: Window, is_whole: bool, moves: bool) -> None:
    by_seq = {entry.seq: entry for entry in entries}
    candidates = list(choose(entries, limit, 1, is_whole=is_whole, moves=moves))
    for start, seqs in candidates:
        assert seqs == sorted(set(seqs))
        assert sum(by_seq[seq].tokens for seq in seqs) <= limit.max_tokens
        assert limit.max_messages is None or len(seqs) <= limit.max_messages
        if seqs:
            assert seqs[-1] == entries[-1].seq
        assert start == (seqs[0] if seqs and not (is_whole and len(seqs) == len(entries)) else start)


@settings(max_examples=200)
@given(histories(), st.integers(0, 100), st.none() | st.integers(0, 10), st.booleans(), st.integers(1, 100))
def test_while_all_of_it_fits_the_start_does_not_move(
    entries: list[Entry], tokens_left: int, messages_left: int | None, moves: bool, start_seq: int
) -> None:
    max_messages = None if messages_left is None else len(entries) + messages_left
    limit = Window(sum(entry.tokens for entry in entries) + tokens_left, max_messages)
    first = next(choose(entries, limit, start_seq, is_whole=True, moves=moves))
    assert first == (start_seq, [entry.seq for entry in entries])


@settings(max_examples=200)
@given(exceeded())
def test_a_move_goes_to_the_earliest_own_message_within_the_step(drawn: tuple[list[Entry], Window]) -> None:
    entries, limit = drawn
    within = [
        place
        for place, entry in enumerate(entries)
        if entry.begins_window
        and sum(each.tokens for each in entries[place:]) <= STEP * limit.max_tokens
        and (limit.max_messages is None or len(entries) - place <= max(1, STEP * limit.max_messages))
    ]
    if not within:
        return
    first = next(choose(entries, limit, 1, is_whole=True, moves=True))
    assert first == (entries[within[0]].seq, [entry.seq for entry in entries[within[0] :]])


@settings(max_examples=200)
@given(exceeded())
def test_reading_takes_as_much_as_fits_from_an_own_message(drawn: tuple[list[Entry], Window]) -> None:
    entries, limit = drawn
    fits = [
        place
        for place, entry in enumerate(entries)
        if entry.begins_window
        and sum(each.tokens for each in entries[place:]) <= limit.max_tokens
        and (limit.max_messages is None or len(entries) - place <= limit.max_messages)
    ]
    if not fits:
        return
    first = next(choose(entries, limit, 1, is_whole=False, moves=False))
    assert first == (entries[fits[0]].seq, [entry.seq for entry in entries[fits[0] :]])


def looped(steps: int, tokens: int = 10) -> list[Entry]:
    """A question, and so many steps of a loop of tools."""
    entries = [Entry(1, "user", tokens, True)]
    for step in range(steps):
        entries += [Entry(2 + 2 * step, "assistant", tokens, False), Entry(3 + 2 * step, "user", tokens, False)]
    return entries


@pytest.mark.parametrize("limit", [Window(100, None), Window(10_000, 10)])
def test_a_long_loop_of_tools_keeps_the_question_and_its_newest_part(limit: Window) -> None:
    parts = []
    for steps in range(5, 200):
        found = [next(choose(looped(steps), limit, 1, is_whole=True, moves=moves)) for moves in (True, False)]
        start, seqs = found[0]
        assert found[1] == found[0]  # reading shows what was opened with
        assert (start, seqs[0]) == (1, 1)
        assert seqs[1:] == list(range(seqs[1], 2 + 2 * steps))
        assert seqs[1] % 2 == 0  # an assistant's step, with its results
        assert 5 <= len(seqs) <= 10
        parts.append(seqs[1])
    # It goes on in steps of 40 %, which are two of the loop's here, and stays in between.
    assert parts == sorted(parts)
    assert {later - earlier for earlier, later in pairwise(parts)} == {0, 4}


@settings(max_examples=100)
@given(st.lists(sizes, min_size=4, max_size=80), st.integers(60, 300))
def test_the_newest_part_of_a_loop_moves_seldom(steps: list[int], max_tokens: int) -> None:
    entries = [Entry(1, "user", 5, True)]
    beginnings = []
    for size in steps:
        seq = len(entries) + 1
        entries += [Entry(seq, "assistant", size, False), Entry(seq + 1, "user", 1, False)]
        _, seqs = next(choose(entries, Window(max_tokens, None), 1, is_whole=True, moves=True))
        beginnings.append(seqs[1])
    moves = sum(earlier != later for earlier, later in pairwise(beginnings))
    assert beginnings == sorted(beginnings)
    # No step takes 85 % of the limits, so that each move leaves some room.
    assert moves <= 1 + sum(size + 1 for size in steps) / (0.4 * max_tokens)


# ── token estimates ─────────────────────────────────────────────────────────────────────────────

texts = st.text(max_size=200)


@given(texts, texts)
def test_more_text_is_never_fewer_tokens(one: str, two: str) -> None:
    assert tokens.estimate(one + two) >= tokens.estimate(one) > 0
    assert tokens.estimate_text(one + two) >= tokens.estimate_text(one) >= 0


@given(texts)
def test_a_text_and_its_block_are_one(text: str) -> None:
    assert tokens.estimate(text) == tokens.estimate([{"type": "text", "text": text}])


def test_the_estimates_scale() -> None:
    english = "The quick brown fox jumps over the lazy dog. " * 100
    assert 1.2 * len(english) / 4 <= tokens.estimate(english) <= 2 * len(english) / 4
    for script in ("汉字", "日本語テキスト", "한국어", "😀"):
        text = script * 100
        assert tokens.estimate(text) >= 1.3 * len(text)
    russian = "Съешь же ещё этих мягких французских булок " * 20
    assert tokens.estimate(russian) >= 1.3 * len(russian) / 3
    mixed = "我们使用Python写代码" * 50
    assert tokens.estimate(mixed) > tokens.estimate("Python" * 50) + 7 * 50


def test_images_and_documents_cost_what_they_show_not_their_bytes() -> None:
    def image(data: str) -> dict[str, object]:
        return {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": data}}

    small, large = tokens.estimate([image("A" * 100)]), tokens.estimate([image("A" * 1_000_000)])
    assert 1_600 * 1.3 <= small == large < 5_000
    assert tokens.estimate([image("A")] * 3) > 2.9 * small - 20
    inside = {"type": "tool_result", "tool_use_id": "t", "content": [image("A" * 1_000_000)]}
    assert 1_600 * 1.3 <= tokens.estimate([inside]) < 5_000
    document = {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "word " * 1000}}
    assert tokens.estimate([document]) >= tokens.estimate("word " * 1000)
    pdf = {"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": "A" * 400_000}}
    assert tokens.estimate([pdf]) > small


def test_a_tool_call_costs_its_input() -> None:
    call = {"type": "tool_use", "id": "t", "name": "f", "input": {"text": "word " * 1000}}
    assert tokens.estimate([call]) >= tokens.estimate("word " * 1000)
    assert tokens.estimate([{"type": "thinking", "thinking": "word " * 1000, "signature": "s"}]) >= 1000
