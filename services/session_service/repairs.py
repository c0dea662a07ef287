"""Makes of stored messages a request that the Claude Messages API accepts, losing as little as it can.

Its one invariant: whatever goes in, what comes out has the user's message first, roles that alternate, every
tool call answered in the message right after it (but for calls at the very end), results first in their message,
and no block that the API refuses. The rules are those of the provider's documentation on messages, tool use and
extended thinking.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, Final

from shared import cache_marks, wire

Block = dict[str, Any]

NO_RESULT: Final = "No result of this tool call was recorded."
_THINKING: Final = ("thinking", "redacted_thinking")  # no set: a part's type may be anything, hashable or not
_NEEDED: Final[dict[str, dict[str, type]]] = {
    "tool_use": {"id": str, "name": str, "input": dict},
    "server_tool_use": {"id": str, "name": str, "input": dict},
    "mcp_tool_use": {"id": str, "name": str, "input": dict},
    "redacted_thinking": {"data": str},
    "image": {"source": dict},
    "document": {"source": dict},
}
_ANSWER: Final[dict[str, type]] = {"tool_use_id": str}
_SERVER_CALLS: Final = frozenset({"server_tool_use", "mcp_tool_use"})
_ONLY_ASSISTANT: Final = frozenset({"tool_use", *_SERVER_CALLS, *_THINKING})
_ONLY_USER: Final = frozenset({"tool_result", "image", "document", "search_result", "container_upload"})


@dataclass(slots=True)
class Piece:
    """A stored message on its way into a context; `role` is user or assistant."""

    seq: int
    role: str
    content: str | list[Block]
    tokens: int = 0
    reported: bool = False
    blocks: list[Block] = field(default_factory=list)


@dataclass(slots=True)
class Repaired:
    messages: list[dict[str, Any]] = field(default_factory=list)
    included: list[Piece] = field(default_factory=list)
    left_out: list[wire.LeftOut] = field(default_factory=list)
    repairs: list[wire.Repair] = field(default_factory=list)
    pending_tool_calls: list[str] = field(default_factory=list)
    added: list[Block] = field(default_factory=list)

    def leave_out(self, seq: int, reason: str) -> None:
        self.left_out.append(wire.LeftOut(from_seq=seq, to_seq=seq, reason=reason))

    def note(self, kind: str, seq: int) -> None:
        self.repairs.append(wire.Repair(kind=kind, seq=seq))


def repair(pieces: Iterable[Piece]) -> Repaired:
    """The messages of a valid request, and what had to be done for it."""
    done = Repaired()
    kept = _with_calls_before_results(_with_fit_blocks(pieces, done), done)
    groups = _grouped(kept, done)
    _place_results(groups, done)
    merged: list[_Group] = []
    for group in groups:
        if group.blocks and merged and merged[-1].role == group.role:
            merged[-1].blocks += group.blocks
        elif group.blocks:
            merged.append(group)
    _trim_end(merged)
    _limit_cache_breakpoints(merged, done)
    done.messages = [{"role": group.role, "content": group.content()} for group in merged]
    done.included = kept
    return done


# ── blocks by themselves ────────────────────────────────────────────────────────────────────────


def _with_fit_blocks(pieces: Iterable[Piece], done: Repaired) -> list[Piece]:
    kept = []
    for piece in pieces:
        content = piece.content
        blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
        piece.blocks = []
        for block in blocks:
            problem = _unfit(block, piece.role)
            if problem is None:
                piece.blocks.append(_cleaned(block))
            else:
                done.note(problem, piece.seq)
        kept.append(piece)
    return kept


def _cleaned(block: Block) -> Block:
    """The block without our own mark, and without what the API refuses inside of it."""
    unwanted = {"incomplete", "cache_control"} if block.get("type") in _THINKING else {"incomplete"}
    clean = {key: value for key, value in block.items() if key not in unwanted}
    if block.get("type") == "tool_result" and isinstance(block.get("content"), list):
        clean["content"] = [
            _cleaned(part) if isinstance(part, dict) else part for part in _kept_parts(block["content"])
        ]
    return clean


def _kept_parts(parts: list[Any]) -> list[Any]:
    incomplete = [isinstance(part, dict) and part.get("incomplete") is True for part in parts]
    return [part for part, is_cut in zip(parts, incomplete, strict=True) if not (is_cut or _is_empty_text(part))]


def _is_empty_text(block: Any) -> bool:
    if not isinstance(block, dict) or block.get("type") != "text":
        return False
    text = block.get("text")
    return not isinstance(text, str) or not text.strip()


def _unfit(block: Block, role: str) -> str | None:
    """Why the API would refuse this block in a message of this role, or None."""
    kind = block.get("type")
    if block.get("incomplete") is True:
        return "incomplete_block"
    is_assistants = kind in _ONLY_ASSISTANT or _is_answer(block)
    if (is_assistants and role != "assistant") or (kind in _ONLY_USER and role != "user"):
        return "misplaced_block"
    if _is_empty_text(block):
        return "empty_text"
    if kind == "thinking" and not (isinstance(block.get("signature"), str) and block["signature"]):
        return "unsigned_thinking"
    needed = _ANSWER if _is_answer(block) else _NEEDED.get(str(kind), {})
    if any(not isinstance(block.get(name), type_) or block[name] == "" for name, type_ in needed.items()):
        return "malformed_block"
    # Its text may be empty: then all of it is in the signature.
    if kind == "thinking" and not isinstance(block.get("thinking"), str):
        return "malformed_block"
    return None


# ── calls and results ───────────────────────────────────────────────────────────────────────────


@dataclass(slots=True)
class _Pairs:
    """Calls and answers of the messages kept, and those of the message being looked at, which may yet go."""

    called: set[str] = field(default_factory=set)
    answered: set[str] = field(default_factory=set)
    called_here: set[str] = field(default_factory=set)
    answered_here: set[str] = field(default_factory=set)
    serving_here: set[tuple[str, bool]] = field(default_factory=set)

    def problem(self, block: Block, after: list[Block]) -> str | None:
        """Why the block cannot stand after what came before, and before the rest of its message; or None.

        Takes note of a block that can.
        """
        kind = block["type"]
        if kind == "tool_use" or kind in _SERVER_CALLS:
            if block["id"] in self.called or block["id"] in self.called_here:
                return "duplicate_tool_use"
            self.called_here.add(block["id"])
            if kind in _SERVER_CALLS:
                if _service(block) not in map(_service, filter(_is_answer, after)):
                    return "unfinished_server_tool_use"
                self.serving_here.add(_service(block))
        elif _is_answer(block):  # a server's tool answers in the message of its call
            if _service(block) not in self.serving_here:
                return "orphan_tool_result"
            self.serving_here.discard(_service(block))
        elif kind == "tool_result":
            if block["tool_use_id"] not in self.called:
                return "orphan_tool_result"
            if block["tool_use_id"] in self.answered or block["tool_use_id"] in self.answered_here:
                return "duplicate_tool_result"
            self.answered_here.add(block["tool_use_id"])
        return None

    def next(self, *, kept: bool) -> None:
        """The message looked at is kept, or not; on to the next."""
        if kept:
            self.called |= self.called_here
            self.answered |= self.answered_here
        self.called_here, self.answered_here, self.serving_here = set(), set(), set()


def _service(block: Block) -> tuple[str, bool]:
    """What a server tool's call and its answer, in one message, have in common: the id, and whether it is by MCP."""
    name = "tool_use_id" if _is_answer(block) else "id"
    return block[name], block["type"].startswith("mcp_")


def _is_answer(block: Block) -> bool:
    return str(block["type"]).endswith("_tool_result")


def _with_calls_before_results(pieces: list[Piece], done: Repaired) -> list[Piece]:
    """What begins with the user's, has no call id twice, and no result without its call before it."""
    kept: list[Piece] = []
    pairs = _Pairs()
    for piece in pieces:
        if piece.role == "assistant" and not kept:
            done.leave_out(piece.seq, "before_first_user_message")
            continue
        blocks = []
        for place, block in enumerate(piece.blocks):
            problem = pairs.problem(block, piece.blocks[place + 1 :])
            if problem is None:
                blocks.append(block)
            else:
                done.note(problem, piece.seq)
        if not blocks:
            done.leave_out(piece.seq, "nothing_left")
        elif blocks[-1]["type"] in _THINKING:
            done.leave_out(piece.seq, "ends_with_thinking")
        else:
            piece.blocks = blocks
            kept.append(piece)
        pairs.next(kept=bool(kept) and kept[-1] is piece)
    return kept


@dataclass(slots=True)
class _Group:
    """Adjacent messages of one role, and the stored content where it is one untouched string."""

    role: str
    seq: int
    blocks: list[Block]
    text: str | None

    def content(self) -> str | list[Block]:
        if self.text is not None and len(self.blocks) == 1 and self.blocks[0].get("text") == self.text:
            return self.text
        return self.blocks


def _grouped(pieces: list[Piece], done: Repaired) -> list[_Group]:
    groups: list[_Group] = []
    for piece in pieces:
        if groups and groups[-1].role == piece.role:
            done.note("merged", piece.seq)
            groups[-1].blocks += piece.blocks
            groups[-1].text = None
        else:
            text = piece.content if isinstance(piece.content, str) else None
            groups.append(_Group(piece.role, piece.seq, list(piece.blocks), text))
    return groups


def _place_results(groups: list[_Group], done: Repaired) -> None:
    """Puts every call's result first into the message after the call; an error result where there is none."""
    results: dict[str, tuple[Block, _Group]] = {}
    for group in groups:
        results |= {block["tool_use_id"]: (block, group) for block in group.blocks if block["type"] == "tool_result"}
        group.blocks = [block for block in group.blocks if block["type"] != "tool_result"]
    for group, following in zip_longest(groups, groups[1:]):
        calls = [block["id"] for block in group.blocks if block["type"] == "tool_use"]
        if following is None:
            done.pending_tool_calls = calls
            continue
        placed = []
        for call_id in calls:
            result, found_in = results.get(call_id, (None, following))
            if result is None:
                done.note("missing_tool_result", group.seq)
                result = {"type": "tool_result", "tool_use_id": call_id, "is_error": True, "content": NO_RESULT}
                done.added.append(result)
            elif found_in is not following:
                done.note("moved_tool_result", found_in.seq)
            placed.append(result)
        following.blocks = [*placed, *following.blocks]


# ── the end of the prompt, and its cache marks ──────────────────────────────────────────────────


def _trim_end(groups: list[_Group]) -> None:
    """A final message of the assistant must not end with blanks."""
    if groups and groups[-1].role == "assistant" and groups[-1].blocks[-1]["type"] == "text":
        last = groups[-1].blocks[-1]
        trimmed = {**last, "text": last["text"].rstrip()}
        if trimmed != last:
            groups[-1].blocks = [*groups[-1].blocks[:-1], trimmed]


def _limit_cache_breakpoints(groups: list[_Group], done: Repaired) -> None:
    """The API takes four cache breakpoints a request; the latest ones are worth most."""
    left = cache_marks.MOST
    for group in reversed(groups):
        marks = cache_marks.count(group.blocks)
        if marks > left:
            done.note("cache_control", group.seq)
            group.blocks = cache_marks.with_last(group.blocks, left)
        left -= min(marks, left)
