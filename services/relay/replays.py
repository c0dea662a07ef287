"""Answers given again: found by the turn of an earlier try, and written as a stream.

Its one invariant: nothing here asks upstream or writes; what is given was answered before, or is None.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Final

from services.relay.assembly import storable
from services.relay.idempotency import Earlier
from services.relay.sse import format_event
from services.relay.upstream import encode_body
from shared import wire
from shared.errors import IdempotencyInProgress, NotFound, ServiceError
from shared.json import dumps, equal
from shared.session_client import SessionClient, SessionKey

_ENDS: Final = ("stop_reason", "stop_sequence", "stop_details")
_TOOL_CALLS: Final = frozenset({"tool_use", "server_tool_use", "mcp_tool_use"})
_MARKS_OF_BROKEN_INPUT: Final = frozenset({"partial_json", "incomplete"})
_BUSY_SECONDS: Final = 1.0
_MOST_LISTED: Final = 1000

Block = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Kept:
    """A turn's answer in the store. `message_count` is the session's, the visible ones, after it."""

    message_id: str | None
    message_count: int
    usage: dict[str, Any] | None

    @classmethod
    def of(cls, before: wire.Session, completed: wire.CompleteTurn) -> "Kept":
        """What becomes of a session that was like this when the turn was open."""
        messages = completed.messages
        count = before.message_count + len(messages)
        return cls(messages[-1].message_id if messages else None, count, completed.usage)


# ── from the store ──────────────────────────────────────────────────────────────────────────────


async def opened_last(sessions: SessionClient, user_id: str, earlier: Earlier) -> Earlier:
    """The latest of the earlier tries whose turn was really opened: that one has taken the place of those before it."""
    for turn_id in (earlier.turn_id, *earlier.before) if earlier.before else ():
        try:
            await sessions.get_turn(SessionKey(user_id, earlier.session_id), turn_id)
        except NotFound:
            continue
        return replace(earlier, turn_id=turn_id, before=())
    return earlier


async def earlier_answer(
    sessions: SessionClient, user_id: str, earlier: Earlier, *, prefill: list[Block]
) -> bytes | None:
    """The answer of the earlier try when its turn is completed, also one that was taken back since; else None.

    Raises IdempotencyInProgress while the turn is open and leased: it may still be answered. One whose lease has
    run out, by this machine's clock, is as good as failed: whether it is, the store decides when the next turn opens.
    """
    key = SessionKey(user_id, earlier.session_id)
    turn = await _turn(sessions, key, earlier.turn_id)
    if turn is None or turn.status != "completed":
        return None
    if turn.output_from_seq is None:
        return message_of_turn(turn, None, prefill)
    place = {"after_seq": turn.output_from_seq - 1, "limit": 1, "include_superseded": True}
    listed = await sessions.list_messages(key, **place)
    return message_of_turn(turn, listed.messages[0], prefill) if listed.messages else None


async def kept(sessions: SessionClient, key: SessionKey, turn_id: str) -> Kept | None:
    """What the store has of an answer that is given again, and of its session now; None where it does not say."""
    try:
        turn, session = await sessions.get_turn(key, turn_id), await sessions.get_session(key)
        from_seq = turn.output_from_seq
        place = {"after_seq": (from_seq or 1) - 1, "limit": 1, "include_superseded": True}
        listed = (await sessions.list_messages(key, **place)).messages if from_seq is not None else []
    except ServiceError:
        return None
    return Kept(listed[0].message_id if listed else None, session.message_count, turn.usage)


async def rewind_for(sessions: SessionClient, user_id: str, earlier: Earlier) -> int | None:
    """The seq to rewind the session to, so that the messages of the earlier, unanswered try go away.

    None when it left none, or when something else was written after them: then they stay. Raises
    IdempotencyInProgress while its turn is open and leased, and when it was completed after all: ask again.
    """
    key = SessionKey(user_id, earlier.session_id)
    turn = await _turn(sessions, key, earlier.turn_id)
    if turn is None:
        return None
    if turn.status == "completed":
        raise IdempotencyInProgress(retry_after_seconds=_BUSY_SECONDS)
    from_seq = turn.output_from_seq if turn.input_from_seq is None else turn.input_from_seq
    if from_seq is None or turn.status == "refused":  # a refused turn's messages were taken back when it ended
        return None
    outputs = _seqs(turn.output_from_seq, turn.output_to_seq)
    # The turn's own messages stand together; only before and after its answer there can be another's.
    after_seq = from_seq - 1 if turn.input_to_seq is None else turn.input_to_seq
    limit = min(len(outputs) + 1, _MOST_LISTED)
    listed = await sessions.list_messages(key, after_seq=after_seq, limit=limit)
    if listed.has_more or any(message.seq not in outputs for message in listed.messages):
        return None
    return from_seq - 1


async def _turn(sessions: SessionClient, key: SessionKey, turn_id: str) -> wire.Turn | None:
    """The turn, when it is known; raises IdempotencyInProgress while it is open and leased."""
    try:
        turn = await sessions.get_turn(key, turn_id)
    except NotFound:
        return None
    if turn.status == "open" and turn.lease_expires_at is not None:
        left_seconds = (turn.lease_expires_at - datetime.now(UTC)).total_seconds()
        if left_seconds > 0:
            raise IdempotencyInProgress(retry_after_seconds=left_seconds)
    return turn


def _seqs(first: int | None, last: int | None) -> range:
    return range(0) if first is None or last is None else range(first, last + 1)


def message_of_turn(turn: wire.Turn, message: wire.Message | None, prefill: list[Block]) -> bytes:
    """The Claude message that a completed turn answered with, from what the store keeps of it, without the prefill.

    The store keeps neither upstream's id of it nor the stop sequence; None stands for an answer without blocks.
    """
    stored: list[Block] = []
    if message is not None:
        stored = message.content_blocks or [{"type": "text", "text": message.content}]
    return dumps(
        {
            "id": f"msg_{turn.turn_id.replace('-', '')}",
            "type": "message",
            "role": "assistant",
            "model": turn.model,
            "content": _without(prefill, stored),
            "stop_reason": turn.stop_reason,
            "stop_sequence": None,
            "usage": turn.usage or {},
        }
    )


def _without(prefill: list[Block], blocks: list[Block]) -> list[Block]:
    """What follows the prefill in a stored answer; the whole of one that does not begin with it."""
    if not prefill:
        return blocks
    *before, last = storable(prefill)[0]
    if len(blocks) < len(prefill) or not equal(before, blocks[: len(before)]):
        return blocks
    joint, *rest = blocks[len(before) :]
    if equal(last, joint):
        return rest
    begun = last.get("text")
    if last["type"] == joint["type"] == "text" and isinstance(begun, str) and joint["text"].startswith(begun):
        text = joint["text"][len(begun) :]
        return [{**joint, "text": text}, *rest] if text else rest
    return blocks


# ── as a stream ─────────────────────────────────────────────────────────────────────────────────


def stream_of(message: bytes) -> Iterator[bytes]:
    """The events of a stream that holds this message, in one delta for each text, thought and tool input."""
    whole = json.loads(message)
    ends = {name: whole[name] for name in _ENDS if name in whole}
    yield _event("message_start", message={**whole, "content": [], **dict.fromkeys(ends)})
    for index, block in enumerate(whole["content"]):
        start, deltas = _streamed(block)
        yield _event("content_block_start", index=index, content_block=start)
        for delta in deltas:
            yield _event("content_block_delta", index=index, delta=delta)
        yield _event("content_block_stop", index=index)
    usage = whole.get("usage")
    yield _event("message_delta", delta=ends, **({"usage": usage} if isinstance(usage, dict) else {}))
    yield _event("message_stop")


def _event(kind: str, **fields: Any) -> bytes:
    return format_event(kind, {"type": kind, **fields})


def _streamed(block: Any) -> tuple[Any, list[Block]]:
    """A block's start, and the deltas that make it whole; what has no deltas starts whole."""
    match block:
        case {"type": "text", "text": str(text)}:
            start, deltas = {**block, "text": ""}, [{"type": "text_delta", "text": text}]
            if citations := block.get("citations"):
                start["citations"] = []
                deltas += [{"type": "citations_delta", "citation": each} for each in citations]
            return start, deltas
        case {"type": "thinking", "thinking": str(thought)}:
            start, deltas = {**block, "thinking": ""}, [{"type": "thinking_delta", "thinking": thought}]
            if signature := block.get("signature"):
                start["signature"] = ""
                deltas.append({"type": "signature_delta", "signature": signature})
            return start, deltas
        case {"type": kind, "input": dict(value)} if kind in _TOOL_CALLS:
            return _streamed_call(block, value)
    return block, []


def _streamed_call(block: Block, value: dict[str, Any]) -> tuple[Block, list[Block]]:
    """A tool call; of one that upstream broke off in its input, the text of that as it came."""
    if block.get("incomplete") and isinstance(block.get("partial_json"), str):
        start = {name: below for name, below in block.items() if name not in _MARKS_OF_BROKEN_INPUT}
        return start, [{"type": "input_json_delta", "partial_json": block["partial_json"]}]
    text = encode_body(value).decode() if value else ""
    return {**block, "input": {}}, [{"type": "input_json_delta", "partial_json": text}]
