"""What a model should see of a session: the newest part of its history that fits a budget, made valid.

Its one invariant: never over the budget, never an invalid request, and the same state gives the same bytes.

The window's start is stored on the session. It moves only when a turn opens and the budget is exceeded, and
then in a large step, so that the beginning of the prompt stays the same from turn to turn and upstream prompt
caches hit. Reading never moves it.
"""

import hashlib
import json
from dataclasses import dataclass
from typing import Final, Literal

from services.session_service import memories, tokens
from services.session_service.formats import to_format
from services.session_service.recent import Recent
from services.session_service.repairs import Repaired, repair
from services.session_service.window import Entry, Window, choose
from shared import wire
from shared.canonical import canonical_blocks
from shared.errors import ContextTooSmall

_SUMMARY_HEADING: Final = "Summary of the earlier conversation:\n"
_MEMORIES_HEADING: Final = "Memories:\n"
_MEMORIES_LIMIT: Final = 200


@dataclass(frozen=True, slots=True)
class Budget:
    max_tokens: int
    max_messages: int | None
    memories: bool = False
    format: str = "claude"

    @property
    def limits(self) -> Window:
        return Window(self.max_tokens, self.max_messages)

    @classmethod
    def of(cls, options: wire.ContextOptions | None, default_max_tokens: int) -> "Budget":
        options = options or wire.ContextOptions()
        return cls(
            max_tokens=options.max_tokens or default_max_tokens,
            max_messages=options.max_messages,
            memories=bool(options.memories),
            format=options.format or "claude",
        )


@dataclass(slots=True)
class _System:
    """The parts of the system prompt that fit, oldest first, and the system messages that did not."""

    parts: list[str]
    tokens: int
    seqs: list[int]
    left_out: list[wire.LeftOut]

    def add_if_fits(self, part: str, room_tokens: int) -> None:
        part_tokens = tokens.estimate_text(part)
        if self.tokens + part_tokens <= room_tokens:
            self.parts.append(part)
            self.tokens += part_tokens


async def build(recent: Recent, budget: Budget, *, moves: bool) -> tuple[wire.Context, int]:
    """The context, and where its window starts; with `moves` a window over the budget takes its large step.

    `recent` has been read within the budget's limits. `moves` is for an opening turn. Raises ContextTooSmall when the
    newest user message cannot fit.
    """
    found = recent.found
    entries, is_whole = recent.entries, recent.is_whole
    asked = next((entry for entry in reversed(entries) if entry.role == "user"), None)
    asked_tokens = asked.tokens if asked else 0
    if asked_tokens > budget.max_tokens:
        raise _too_small(asked_tokens, budget)
    system = await _system_of(recent, budget, room_tokens=budget.max_tokens - asked_tokens)
    limits = Window(
        max_tokens=budget.max_tokens - system.tokens,
        max_messages=None if budget.max_messages is None else budget.max_messages - len(system.seqs),
    )
    for start_seq, seqs in choose(entries, limits, found.window_start_seq, is_whole=is_whole, moves=moves):
        done = repair(await recent.pieces(seqs))
        used = sum(piece.tokens for piece in done.included) + sum(tokens.estimate([each]) for each in done.added)
        is_cut = not is_whole or len(seqs) < len(entries)
        answers = asked is None or any(piece.seq == asked.seq for piece in done.included)
        if used <= limits.max_tokens and (answers or not (moves and is_cut)):
            left_out = await _left_out(recent, seqs, done, system)
            return _context(done, system, used, start_seq, left_out, budget), start_seq
    raise _too_small(_needed(entries, system), budget)


def _needed(entries: list[Entry], system: _System) -> int:
    """Tokens of the least that would have to fit: the newest message of the user's own and the newest step after it."""
    own = max((place for place, entry in enumerate(entries) if entry.begins_window), default=0)
    step = max((place for place, entry in enumerate(entries) if entry.role == "assistant"), default=own)
    places = {own, *range(max(own, step), len(entries))}
    needed: int = system.tokens + sum(entries[place].tokens for place in places)
    return needed


def _too_small(needed: int, budget: Budget) -> ContextTooSmall:
    over = max(1, needed - budget.max_tokens)
    return ContextTooSmall(
        f"The newest user message needs {needed} tokens, {over} more than the {budget.max_tokens} of the context",
        over_by_tokens=over,
        needed_tokens=needed,
        max_tokens=budget.max_tokens,
    )


async def _system_of(recent: Recent, budget: Budget, *, room_tokens: int) -> _System:
    """System messages, summary and memories, in this order of worth, as far as there is room."""
    system = _System([], 0, [], [])
    most = None if budget.max_messages is None else budget.max_messages - 1
    for message in recent.system:
        fits = system.tokens + message.tokens <= room_tokens and (most is None or len(system.seqs) < most)
        if fits:
            system.parts.insert(0, str(message.content))
            system.seqs.insert(0, message.seq)
            system.tokens += message.tokens
        else:
            system.left_out.append(wire.LeftOut(from_seq=message.seq, to_seq=message.seq, reason="budget"))
    session = recent.found.session
    if session.session_summary.strip():
        system.add_if_fits(_SUMMARY_HEADING + session.session_summary, room_tokens)
    if budget.memories:
        listed = await memories.list_memories(recent.conn, session.user_id, session.session_id, limit=_MEMORIES_LIMIT)
        lines: list[str] = []
        for memory in listed.memories:
            longer = [f"- {memory.content}", *lines]
            if system.tokens + tokens.estimate_text(_MEMORIES_HEADING + "\n".join(longer)) > room_tokens:
                break
            lines = longer
        if lines:
            system.add_if_fits(_MEMORIES_HEADING + "\n".join(lines), room_tokens)
    return system


# ── the receipt ─────────────────────────────────────────────────────────────────────────────────


async def _left_out(recent: Recent, seqs: list[int], done: Repaired, system: _System) -> list[wire.LeftOut]:
    """What the context lacks of the visible history, in order of seq."""
    left_out = [*system.left_out, *done.left_out]
    first_kept = seqs[0] if seqs else recent.end_seq
    earlier = await recent.first_before(first_kept) if first_kept > recent.found.first_seq else None
    if earlier is not None:
        left_out.append(wire.LeftOut(from_seq=earlier, to_seq=first_kept - 1, reason="before_window"))
    kept = set(seqs)
    skipped = [entry.seq for entry in recent.entries if entry.seq not in kept and entry.seq > first_kept]
    left_out += [wire.LeftOut(from_seq=start, to_seq=end, reason="budget") for start, end in _ranges(skipped)]
    return sorted(left_out, key=lambda each: each.from_seq)


def _ranges(seqs: list[int]) -> list[tuple[int, int]]:
    ranges: list[tuple[int, int]] = []
    for seq in seqs:
        if ranges and ranges[-1][1] == seq - 1:
            ranges[-1] = (ranges[-1][0], seq)
        else:
            ranges.append((seq, seq))
    return ranges


def _context(
    done: Repaired, system: _System, used: int, start_seq: int, left_out: list[wire.LeftOut], budget: Budget
) -> wire.Context:
    reported = {piece.reported for piece in done.included}
    source: Literal["usage", "estimate", "mixed"] = "estimate"
    if True in reported:
        source = "mixed" if False in reported or system.tokens else "usage"
    form = [[message["role"], canonical_blocks(message["content"])] for message in done.messages]
    canonical = json.dumps(form, sort_keys=True, separators=(",", ":")).encode()
    return wire.Context.model_construct(
        system="\n\n".join(system.parts),
        messages=to_format(done.messages, budget.format),
        receipt=wire.Receipt.model_construct(
            included=_ranges(sorted([*system.seqs, *(piece.seq for piece in done.included)])),
            left_out=left_out,
            repairs=done.repairs,
            pending_tool_calls=done.pending_tool_calls,
            tokens=wire.ContextTokens.model_construct(
                system=system.tokens, messages=used, total=system.tokens + used, source=source
            ),
            window_start_seq=start_seq,
            sha256=hashlib.sha256(canonical).hexdigest(),
        ),
    )
