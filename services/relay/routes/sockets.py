"""/sockets/events/{id}: a conversation's events as they happen, and messages for it, over a WebSocket.

Its one invariant: a socket is sent the events after the place where it begins, each once and in order. A refusal is
told by a close code after the connection was accepted, because browsers see nothing of one that was not.
"""

import asyncio
import contextlib
from datetime import UTC, datetime
from typing import Any, Final

import structlog
from fastapi import APIRouter, WebSocket
from pydantic import ValidationError
from starlette.websockets import WebSocketDisconnect
from uuid_utils import uuid7

from services.relay import conversations, event_frames, events
from services.relay.conversation_input import UserMessage, hex_of
from services.relay.conversations import Conversation, SandboxStatus
from services.relay.conversing import sandbox_status
from services.relay.errors import ConversationNotFound, RelayError, WrongRuntimeKey, message_of
from services.relay.routes.conversation_access import RUNTIME_KEY, by_runtime_key
from services.relay.state import State
from shared import json
from shared.errors import ServiceError, Unavailable, ValidationFailed
from shared.json import dump_text, rfc3339
from shared.strict_route import validation_failed

log = structlog.get_logger(__name__)
router = APIRouter()

_BAD_KEY: Final = 4001
_UNKNOWN: Final = 4004
_TRY_AGAIN: Final = 1013
_FIRST_PAGE: Final = 4
_LARGEST_PAGE: Final = 128
_PAGE_BYTES: Final = 128 * 2**10
_LOOK_SECONDS: Final = 60.0  # whatever changes wakes it; this is for what nobody has thought of
_TRUE: Final = frozenset({"1", "true", "yes", "on"})


@router.websocket("/sockets/events/{id:anything}")
async def watch(socket: WebSocket) -> None:
    """First the conversation's whole state, then what was asked for of its history, then what happens."""
    state: State = socket.app.state.relay
    await socket.accept()
    structlog.contextvars.clear_contextvars()
    structlog.contextvars.bind_contextvars(request_id=str(uuid7()))
    try:
        conversation = await _admitted(socket, state)
        await _serve(socket, state, conversation)
    except (WebSocketDisconnect, ConnectionError):
        return
    except WrongRuntimeKey as error:
        await _close(socket, _BAD_KEY, str(error.detail))
    except ConversationNotFound as error:
        await _close(socket, _UNKNOWN, str(error.detail))
    except ServiceError as error:
        await _close(socket, _TRY_AGAIN, error.code)
    except Exception:
        log.exception("socket_fault")
        await _close(socket, 1011, "internal_error")


async def _admitted(socket: WebSocket, state: State) -> Conversation:
    """Who has no key, or a wrong one, is told all the same that there is no such conversation."""
    state.require_ready()
    secret = socket.query_params.get("session_api_key") or socket.headers.get(RUNTIME_KEY)
    digits = hex_of(socket.path_params["id"])
    if digits is None or await conversations.find(state.database, digits) is None:
        raise ConversationNotFound
    return await by_runtime_key(state, digits, secret)


async def _close(socket: WebSocket, code: int, reason: str) -> None:
    with contextlib.suppress(RuntimeError, WebSocketDisconnect, ConnectionError):
        await socket.close(code, reason[:100])


async def _serve(socket: WebSocket, state: State, conversation: Conversation) -> None:
    """Sends and reads until the client has gone, or the conversation has."""
    connections = state.conversing.connections
    connections[conversation.id] += 1
    sending = asyncio.create_task(_send(socket, state, conversation))
    reading = asyncio.create_task(_read(socket, state, conversation.id))
    try:
        done, _ = await asyncio.wait({sending, reading}, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        connections[conversation.id] -= 1
        if not connections[conversation.id]:
            del connections[conversation.id]
        for task in (sending, reading):
            task.cancel()
        await asyncio.gather(sending, reading, return_exceptions=True)


# ── out ─────────────────────────────────────────────────────────────────────────────────────────


async def _send(socket: WebSocket, state: State, conversation: Conversation) -> None:
    database = state.database
    with state.conversing.live.watching(conversation.id) as news:
        is_missing = await _settled(state, conversation) == "MISSING"
        seen = await conversations.find(database, conversation.id)
        if seen is None:
            raise ConversationNotFound
        await socket.send_text(dump_text(_full_state(seen, is_missing=is_missing)))
        next_seq, page_size = await _start(socket, state, seen), _FIRST_PAGE
        while True:
            news.clear()
            while page := await events.list_some(database, seen.id, from_seq=next_seq, limit=page_size):
                sent_bytes = 0
                for event in page:
                    if event.superseded_at is None or event.seq >= seen.next_seq:
                        frame = dump_text(event_frames.v1(event))
                        await socket.send_text(frame)
                        sent_bytes += len(frame)
                next_seq = page[-1].seq + 1
                # A reader that is slow makes the relay hold a page: where events are large, pages are short.
                page_size = page_size // 2 if sent_bytes > _PAGE_BYTES else page_size * 2
                page_size = max(1, min(page_size, _LARGEST_PAGE))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(news.wait(), _LOOK_SECONDS)
            if await conversations.find(database, seen.id) is None:
                raise ConversationNotFound


async def _settled(state: State, conversation: Conversation) -> SandboxStatus:
    """While session_service is away a socket begins with what is known here, and hears the rest later."""
    try:
        return sandbox_status(conversation, await state.conversing.log.settle(conversation))
    except Unavailable:
        return conversation.sandbox_status


async def _start(socket: WebSocket, state: State, seen: Conversation) -> int:
    """The number of the first event to be sent: after the last that the client has, from the start, or what is new."""
    query = socket.query_params
    last_id = query.get("last_event_id") or query.get("latest_event_id")
    if last_id:
        seq = await events.seq_of(state.database, seen.id, last_id.replace("\0", "\ufffd"))  # no id of an event either
        return 0 if seq is None else seq + 1
    return 0 if query.get("resend_all", "").lower() in _TRUE else seen.next_seq


def _full_state(conversation: Conversation, *, is_missing: bool) -> dict[str, Any]:
    status = "MISSING" if is_missing else conversation.sandbox_status
    value = {
        "id": conversation.id,
        "title": conversation.shown_title,
        "sandbox_status": status,
        "execution_status": conversation.execution_status if status == "RUNNING" else None,
    }
    return event_frames.now("ConversationStateUpdateEvent", _now(), key="full_state", value=value)


def _now() -> str:
    return rfc3339(datetime.now(UTC))


# ── in ──────────────────────────────────────────────────────────────────────────────────────────


async def _read(socket: WebSocket, state: State, conversation_id: str) -> None:
    while True:
        received = await socket.receive()
        if received["type"] == "websocket.disconnect":
            return
        try:
            message = _message(received.get("text") or received.get("bytes") or b"")
            conversation = await conversations.find(state.database, conversation_id)
            if conversation is None:
                raise ConversationNotFound
            await state.conversing.posting.post(conversation, message.parts, run=True)
        except (RelayError, ServiceError) as error:
            told = {"code": error.code, "detail": message_of(error)}
            await socket.send_text(dump_text(event_frames.now("ConversationErrorEvent", _now(), **told)))


def _message(text: str | bytes) -> UserMessage:
    body = json.parse(text.encode() if isinstance(text, str) else text)
    if not isinstance(body, dict):
        raise ValidationFailed.at("body", msg="A message is a JSON object", type="dict_type")
    try:
        return UserMessage.model_validate(body)
    except ValidationError as error:
        raise validation_failed(error.errors(include_url=False, include_input=False), ("body",)) from None
