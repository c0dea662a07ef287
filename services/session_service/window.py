"""Which messages a context is made of: a pure choice over sizes, without their contents.

Its one invariant: the candidates come best first, and each is within the limits by the sizes given.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Final

STEP: Final = 0.6
"""The share of the budget that a window keeps when it moves."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A message by its size; `begins_window` is true for the user's own, not for results of tools."""

    seq: int
    role: str
    tokens: int
    begins_window: bool


@dataclass(frozen=True, slots=True)
class Window:
    """What a context may hold: tokens, and stored messages (None: any number)."""

    max_tokens: int
    max_messages: int | None

    def holds(self, tokens: int, messages: int, share: float = 1.0) -> bool:
        if tokens > self.max_tokens * share:
            return False
        return self.max_messages is None or messages <= max(1, self.max_messages * share)


def choose(
    entries: list[Entry], limits: Window, start_seq: int, *, is_whole: bool, moves: bool
) -> Iterator[tuple[int, list[int]]]:
    """Candidates (window start, seqs of its messages), best first, from `entries` in order of seq.

    `is_whole` says that `entries` reach back to the stored start. Then all of it comes first, if it fits. Next
    come the beginnings at a message of the user's own: with `moves` those within 60 % of the limits, then those
    within all of them. Then, for one long loop of tool calls, the user's message and the loop's newest part, which
    begins at a step of a grid (`_grid`) if it can. Last, whatever fits, for histories without any message of the user's
    own.
    """
    # tokens_from[place]: tokens of entries[place:]
    tokens_from = list(accumulate((entry.tokens for entry in reversed(entries)), initial=0))[::-1]
    seqs = [entry.seq for entry in entries]
    count = len(entries)
    if is_whole and limits.holds(tokens_from[0], count):
        yield start_seq, seqs
    starts = [place for place, entry in enumerate(entries) if entry.begins_window]
    shares = (STEP, 1.0) if moves else (1.0,)
    for share in shares:
        for place in starts:
            if limits.holds(tokens_from[place], count - place, share):
                yield seqs[place], seqs[place:]
    own = starts[-1] if starts else count
    steps = list(_steps_after(entries, own))
    for place in [*_grid(steps, own, tokens_from, limits), *steps]:
        if limits.holds(entries[own].tokens + tokens_from[place], 1 + count - place):
            yield seqs[own], [seqs[own], *seqs[place:]]
    if not (moves and starts):  # without the user's own message a turn would answer something else
        fitting = (place for place in range(count) if limits.holds(tokens_from[place], count - place))
        place = next(fitting, count)
        yield (seqs[place] if place < count else start_seq), seqs[place:]


def _steps_after(entries: list[Entry], own: int) -> Iterator[int]:
    """Places after the user's own message where the assistant's next step of a loop begins."""
    for place in range(own + 2, len(entries)):
        if entries[place].role == "assistant" and entries[place - 1].role != "assistant":
            yield place


def _grid(steps: list[int], own: int, tokens_from: list[int], limits: Window) -> Iterator[int]:
    """Of a loop's steps those with which, from the user's message on, another 40 % of the limits are complete.

    What comes later does not move them: a part that begins at one keeps its beginning until it no longer fits, and goes
    on at the next then.
    """
    passed = 0
    for place in steps:
        complete = _strides(tokens_from[own + 1] - tokens_from[place], limits.max_tokens)
        if limits.max_messages is not None:
            complete = max(complete, _strides(place - own - 1, limits.max_messages))
        if complete > passed:
            passed = complete
            yield place


def _strides(amount: int, limit: int) -> int:
    """How often the share that a move gives up is in an amount; whole numbers, so that no rounding shifts it."""
    return 100 * amount // max(1, round(100 * (1 - STEP)) * limit)
