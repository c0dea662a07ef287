"""Conversations, V0: made, listed, renamed, deleted, started and stopped, and read. They work on V1's ids too."""

from typing import Annotated, Any, Final

from fastapi import APIRouter, Path, Query, Request, Response
from pydantic import BaseModel, ConfigDict
from uuid_utils import uuid7

from services.relay import chat, conversations, events
from services.relay.conversation_input import NewTitle, V0Message, V0Start
from services.relay.conversation_lists import Filter
from services.relay.conversing import sandbox_status, v0_status
from services.relay.errors import InvalidRequest, NotPermitted, RelayError
from services.relay.event_frames import v0
from services.relay.events import Event
from services.relay.routes import files
from services.relay.routes.conversation_access import (
    Conversations,
    Either,
    EitherRoute,
    Limit,
    Owned,
    PageId,
    UserKey,
    Wanted,
    base_url,
    owned,
)
from services.relay.routes.conversations_v1 import page_of
from services.relay.routes.multipart import files_of
from services.relay.routes.parameters import AppState
from services.relay.starting import Wish
from services.relay.state import State
from shared.door import answer

router = APIRouter(prefix="/api/conversations", tags=["conversations V0"], route_class=EitherRoute)

_START_SECONDS: Final = 10.0
_PAGE: Final = 500
_MOST_EVENTS: Final = 100

AnyId = Annotated[str, Path()]


class ProvidersSet(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", hide_input_in_errors=True)

    providers_set: list[str] | None = None


class Feedback(BaseModel):
    """Anything."""

    model_config = ConfigDict(extra="allow")


@router.post("")
async def create_conversation(request: Request, state: AppState, key: UserKey, wish: V0Start | None = None) -> Response:
    """A conversation, started; it answers the first message, if there is one."""
    wish = wish or V0Start()
    model = chat.default_model(state.pool, state.settings.relay_chat_model, key)
    if not key.may_ask(model):
        raise NotPermitted("model: the API key may not ask this one")
    values = {
        "user_id": key.user_id,
        "key_id": key.id,
        "instructions": wish.conversation_instructions,
        "selected_repository": wish.repository,
        "selected_branch": wish.selected_branch,
        "git_provider": wish.git_provider,
        "trigger": wish.trigger,
    }
    planned = Wish(values, model, "V0", wish.first_message, runs=True)
    try:
        started = await state.conversing.starts.start_v0(
            planned, base_url=base_url(request, state), wait_seconds=_START_SECONDS
        )
    except RelayError as error:
        told = {"status": "error", "message": str(error.detail), "msg_id": f"STATUS${error.code.upper()}"}
        return answer(told, status=400)
    return answer({"status": "ok", "conversation_id": started.id, "message": None, "conversation_status": "RUNNING"})


@router.get("")
async def list_conversations(
    request: Request,
    state: AppState,
    key: UserKey,
    limit: Limit = 20,
    page_id: PageId = None,
    selected_repository: Wanted = None,
    conversation_trigger: Wanted = None,
) -> Response:
    """All conversations of the user, of both APIs, the newest first."""
    wanted = Filter(repository=selected_repository, trigger=conversation_trigger)
    found, next_page_id = await page_of(state, key, wanted, page_id, limit)
    results = await state.conversing.infos(key.user_id, found, base_url(request, state))
    return answer({"results": results, "next_page_id": next_page_id})


@router.get("/{id}")
async def get_conversation(id: AnyId, request: Request, state: AppState, key: UserKey) -> Response:  # noqa: A002
    """The conversation; null when there is none."""
    found = await owned(state, key, id)
    if found is None:
        return answer(None)
    return answer((await state.conversing.infos(key.user_id, [found], base_url(request, state)))[0])


@router.patch("/{id}")
async def rename_conversation(conversation: Owned, new: NewTitle, state: AppState) -> Response:
    await conversations.rename(state.database, conversation.id, new.title)
    return answer(True)


@router.delete("/{id}")
async def delete_conversation(id: AnyId, state: AppState, key: UserKey) -> Response:  # noqa: A002
    """Ends the conversation and removes it with its files; its session's history stays stored."""
    found = await owned(state, key, id)
    if found is None:
        return answer(False)
    await state.conversing.remove(found)
    state.session_limit.closed()
    return answer(True)


# ── start and stop ──────────────────────────────────────────────────────────────────────────────


@router.post("/{id}/start")
async def start_conversation(conversation: Owned, state: AppState, _: ProvidersSet | None = None) -> Response:
    """Makes the conversation ready to go on."""
    await state.conversing.there([conversation])
    await state.conversing.runs.resume_sandbox(conversation)
    return answer(_told(conversation.id, None, "RUNNING"))


@router.post("/{id}/stop")
async def stop_conversation(conversation: Owned, state: AppState) -> Response:
    """Stops the conversation; the answer names the status before."""
    status = sandbox_status(conversation, await state.conversing.session_of(conversation))
    if status not in {"RUNNING", "STARTING"}:
        return answer(_told(conversation.id, "Conversation was not running", v0_status(status)))
    await state.conversing.runs.pause_sandbox(conversation)
    return answer(_told(conversation.id, "Conversation stopped successfully", v0_status(status)))


def _told(conversation_id: str, message: str | None, status: str) -> dict[str, Any]:
    return {"status": "ok", "conversation_id": conversation_id, "message": message, "conversation_status": status}


@router.get("/{id}/config")
async def get_config(conversation: Either) -> Response:
    return answer({"runtime_id": conversation.sandbox_id, "session_id": conversation.session_id})


# ── what was said ───────────────────────────────────────────────────────────────────────────────


@router.get("/{id}/trajectory")
async def get_trajectory(conversation: Either, state: AppState, all_: Conversations) -> Response:
    """All events."""
    await all_.log.settle(conversation)
    found: list[Event] = []
    while page := await _events(state, conversation.id, from_seq=found[-1].seq + 1 if found else 0, limit=_PAGE):
        found += page
    return answer({"trajectory": [v0(event) for event in found]})


@router.get("/{id}/events")
async def get_events(
    conversation: Either,
    state: AppState,
    all_: Conversations,
    start_id: Annotated[int, Query(ge=0, lt=2**62)] = 0,
    end_id: Annotated[int | None, Query(ge=0, lt=2**62)] = None,
    reverse: bool = False,
    limit: int = 20,
) -> Response:
    """Events by their numbers, both ends included; the newest first when reversed."""
    if not 1 <= limit <= _MOST_EVENTS:
        raise InvalidRequest.at("limit", f"must be between 1 and {_MOST_EVENTS}")
    await all_.log.settle(conversation)
    found = await _events(
        state, conversation.id, from_seq=start_id, to_seq=end_id, newest_first=reverse, limit=limit + 1
    )
    return answer({"events": [v0(event) for event in found[:limit]], "has_more": len(found) > limit})


async def _events(state: State, conversation_id: str, **wanted: Any) -> list[Event]:
    return await events.list_some(state.database, conversation_id, visible=True, **wanted)


@router.post("/{id}/message")
async def add_message(conversation: Either, said: V0Message, all_: Conversations) -> Response:
    """A message of the user, which is answered."""
    await all_.posting.post(conversation, [{"type": "text", "text": said.message}], run=True)
    return answer({"success": True})


# ── files ───────────────────────────────────────────────────────────────────────────────────────


@router.get("/{id}/list-files")
async def get_files(conversation: Either, state: AppState, path: Annotated[str, Query()] = "") -> Response:
    """The paths of the files in this folder and below it; of all when it is empty."""
    return answer(await files.list_files(state.database, conversation.session, path))


@router.post("/{id}/upload-files")
async def upload_files(request: Request, conversation: Either, state: AppState) -> Response:
    """Stores the body's `files`; says which were taken, and why the others were not."""
    found = await files_of(request, "files")
    return answer(await files.upload_files(state.uploads, conversation.session, found))


# ── what there is not ───────────────────────────────────────────────────────────────────────────


@router.get("/{id}/vscode-url")
async def get_vscode_url(_: Either) -> Response:
    return answer({"vscode_url": None})


@router.get("/{id}/web-hosts")
async def get_web_hosts(_: Either) -> Response:
    return answer({"hosts": {}})


@router.get("/{id}/microagents")
async def get_microagents(_: Either) -> Response:
    return answer({"microagents": []})


@router.post("/{id}/submit-feedback")
async def submit_feedback(conversation: Either, feedback: Feedback, state: AppState) -> Response:
    """Keeps what was said of the conversation."""
    feedback_id, body = str(uuid7()), feedback.model_dump()
    await conversations.keep_feedback(state.database, feedback_id, conversation.id, body)
    told = {"message": "Thank you for your feedback", "feedback_id": feedback_id, "password": ""}
    return answer({"statusCode": 200, "body": body | told})
