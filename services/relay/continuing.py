"""What a session's next turn is when nobody says anything new: the last question, or an answer that was broken off.

Its one invariant: an answer that was broken off is gone on with where it ends, or put back as it was.
"""

from collections.abc import Sequence
from typing import Any, Final

from services.relay.request import Continuation, Enrich
from shared import wire
from shared.canonical import speaker
from shared.session_client import SessionClient, SessionKey

_LAST_MESSAGES: Final = 20
_LAST_TURNS: Final = 20

Block = dict[str, Any]


async def continuation(
    sessions: SessionClient, key: SessionKey, session: wire.Session, enriched: Enrich
) -> Continuation | None:
    """How the session, as it was seen, is gone on with; None where the last answer is whole, or nothing was said."""
    newest = await sessions.list_messages(key, order="desc", limit=_LAST_MESSAGES, page_size=_LAST_MESSAGES)
    last = next((message for message in newest.messages if message.role != "system"), None)
    if last is None:
        return None
    if speaker(last.role) == "user":
        return Continuation(key.session_id, session.version, enriched)
    turns = (await sessions.list_turns(key, limit=_LAST_TURNS)).turns
    told = next((turn for turn in turns if turn.output_to_seq == last.seq), None)
    if told is None or told.status == "completed":
        return None
    to_seq = (told.output_from_seq or last.seq) - 1
    if to_seq == 0:
        return None
    broken_off = tuple(last.content_blocks or [{"type": "text", "text": last.content}])
    return Continuation(key.session_id, session.version, enriched, to_seq, _prefill(broken_off), broken_off)


def _prefill(blocks: Sequence[Block]) -> tuple[Block, ...]:
    """The text that was broken off, as an answer's beginning; nothing where it holds more than text.

    An answer's beginning must not end with blanks (Claude Messages API, prefill).
    """
    if any(block.get("type") != "text" for block in blocks):
        return ()
    text = "".join(block["text"] for block in blocks).rstrip()
    return ({"type": "text", "text": text},) if text else ()
