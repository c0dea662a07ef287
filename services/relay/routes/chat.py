"""The chat door: messages with a conversation's id, plain or streamed, and the conversations there are."""

import json
from collections.abc import AsyncIterator
from typing import Annotated, Any, Final

from fastapi import APIRouter, Depends, Query, Request, Response

from services.relay import chat, replays
from services.relay.chat import ChatMessage, Translation
from services.relay.errors import NotPermitted
from services.relay.keys import Key
from services.relay.parts import Caller, Reply
from services.relay.pipe import Pipe
from services.relay.routes.parameters import AppState, KeyedRoute, SessionId, caller_or_anonymous
from services.relay.routes.rendering import request_id_of
from services.relay.routes.replies import Begun, EventStream, begun
from services.relay.session_ids import decoded
from services.relay.state import State
from services.relay.turn import Turn
from services.relay.upstream import encode_body
from shared import wire
from shared.door import answer
from shared.errors import SessionNotFound
from shared.session_client import SessionKey

_PING: Final = b": ping\n\n"
_DELETED: Final = "会话已删除"
_PASSED_HEADERS: Final = ("idempotency-key", "x-session-busy", "x-session-store")
_caller_key = caller_or_anonymous("chat")


class ChatRoute(KeyedRoute):
    async def find(self, request: Request, state: State) -> Key:
        return await _caller_key(request, state)


ChatKey = Annotated[Key, Depends(_caller_key)]
router = APIRouter(prefix="/api", tags=["chat"], route_class=ChatRoute)


@router.post("/chat")
async def create_chat(message: ChatMessage, request: Request, state: AppState, key: ChatKey) -> Response:
    """An answer within a conversation."""
    turn = _turn(message, request, state, key, stream=False)
    seen = await begun(turn, request)
    if (end := _early_end(seen, request)) is not None:
        return end
    told = await _told(state, key, turn, json.loads(_bytes_of(seen.reply)))
    return seen.plain(encode_body(told), _headers(seen.reply, request) | {"content-type": "application/json"})


@router.post("/chat/stream", responses={200: {"content": {"text/event-stream": {}}}})
async def create_chat_stream(message: ChatMessage, request: Request, state: AppState, key: ChatKey) -> Response:
    """The same as it is written: `content` events, then one of type `done`, or `error`."""
    turn = _turn(message, request, state, key, stream=True)
    seen = await begun(turn, request)
    if (end := _early_end(seen, request)) is not None:
        return end
    headers = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"}
    return EventStream(_events(state, key, turn), seen, headers=_headers(seen.reply, request) | headers)


@router.get("/sessions")
async def list_sessions(
    state: AppState,
    key: ChatKey,
    page: Annotated[int, Query(ge=1, le=1_000_000)] = 1,
    page_size: Annotated[int, Query(ge=1, le=100)] = 50,
) -> Response:
    """The caller's conversations that go on, the one used last first."""
    found = await state.sessions.list_sessions(key.user_id, status="active", page=page, page_size=page_size)
    told = {"sessions": [_shown(each) for each in found.sessions], "total": found.total}
    return answer({**told, "page": found.page, "page_size": found.page_size})


@router.get("/sessions/{session_id}")
async def get_session(session_id: SessionId, state: AppState, key: ChatKey) -> Response:
    return answer(_shown(await _active(state, SessionKey(key.user_id, session_id))))


@router.delete("/sessions/{session_id}")
async def delete_session(session_id: SessionId, state: AppState, key: ChatKey) -> Response:
    """Ends the conversation: it is no longer found here, and its id begins anew. Its history stays stored."""
    session = SessionKey(key.user_id, session_id)
    await _active(state, session)
    await state.sessions.end_session(session)
    state.session_limit.closed()
    return answer({"message": _DELETED, "session_id": session_id})


async def _active(state: State, key: SessionKey) -> wire.Session:
    session = await state.sessions.get_session(key)
    if not session.is_active:
        raise SessionNotFound
    return session


def _shown(session: wire.Session) -> dict[str, Any]:
    return {
        "session_id": session.session_id,
        "created_at": session.created_at,
        "last_accessed": session.last_activity,
        "message_count": session.message_count,
    }


# ── a turn ──────────────────────────────────────────────────────────────────────────────────────


def _turn(message: ChatMessage, request: Request, state: State, key: Key, *, stream: bool) -> Turn:
    settings = state.settings
    asked = chat.request_of(
        message,
        default_model=chat.default_model(state.pool, settings.relay_chat_model, key),
        max_tokens=settings.relay_default_max_tokens,
        stream=stream,
    )
    if not key.may_ask(asked.model):
        raise NotPermitted("model: the API key may not ask this one")
    headers = {name: request.headers[name] for name in _PASSED_HEADERS if name in request.headers}
    return state.turns.begin(Caller(key, headers, "", request_id_of(request.scope)), asked)


def _early_end(seen: Begun, request: Request) -> Response | None:
    """The response that ends it before there is an answer: an error, or upstream's refusal, passed on as it is."""
    if (end := seen.early_end(request)) is not None or seen.reply.status == 200:
        return end
    return seen.plain(_bytes_of(seen.reply), {"request-id": request_id_of(request.scope)} | seen.reply.headers)


def _bytes_of(reply: Reply) -> bytes:
    return reply.content if isinstance(reply.content, bytes) else b""


def _headers(reply: Reply, request: Request) -> dict[str, str]:
    kept = {name: value for name, value in reply.headers.items() if name.startswith(("x-", "idempotent-"))}
    return {"request-id": request_id_of(request.scope)} | kept


async def _told(state: State, key: Key, turn: Turn, message: dict[str, Any]) -> dict[str, Any]:
    """What a chat's end tells of it."""
    headers, kept = turn.reply.result().headers, turn.kept
    session_id = decoded(headers.get("x-session-id", "")) or None
    if kept is None and session_id is not None and "idempotent-replayed" in headers:
        kept = await replays.kept(state.sessions, SessionKey(key.user_id, session_id), headers["x-turn-id"])
    return {
        "conversation_id": session_id,
        "session_id": session_id,
        "message_id": kept and kept.message_id,
        "response": chat.text_of(message),
        "model": message.get("model"),
        "usage": message.get("usage") or (kept and kept.usage),
        "message_count": kept and kept.message_count,
    }


async def _events(state: State, key: Key, turn: Turn) -> AsyncIterator[bytes]:
    translation, reply = Translation(), turn.reply.result()
    async for piece in _pieces(reply, state.settings.relay_ping_seconds):
        if piece is None:
            yield _PING
            continue
        for text in translation.feed(piece):
            yield chat.event("content", content=text)
    if translation.error is not None:
        yield chat.event("error", error=translation.error, message=translation.error.get("message"))
        return
    yield chat.event("done", **await _told(state, key, turn, translation.whole))


async def _pieces(reply: Reply, ping_seconds: float) -> AsyncIterator[bytes | None]:
    """A stream's bytes, None where it says nothing for so long; also of an answer that came as a whole."""
    if isinstance(reply.content, Pipe):
        while (piece := await reply.content.get(ping_seconds)) != b"":
            yield piece
    else:
        for piece in replays.stream_of(reply.content):
            yield piece
