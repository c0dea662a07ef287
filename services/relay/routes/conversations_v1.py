"""Conversations, V1, for users: starting them, their start tasks, lists, and the sandboxes that they run in."""

from collections.abc import AsyncIterator
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Query, Request, Response
from starlette.responses import StreamingResponse

from services.relay import chat, conversation_lists, events, start_tasks
from services.relay.conversation_input import StartRequest, Uuid
from services.relay.conversation_lists import Filter
from services.relay.conversations import Conversation
from services.relay.errors import ConversationNotFound, NotPermitted, SandboxNotFound
from services.relay.keys import Key
from services.relay.routes.conversation_access import (
    Conversations,
    Ids,
    Limit,
    Moment,
    PageId,
    UserKey,
    UserRoute,
    Wanted,
    base_url,
    owned,
    page_id_of,
    place_of,
)
from services.relay.routes.parameters import AppState
from services.relay.start_tasks import SortOrder, StartTask
from services.relay.starting import Steps, Wish
from services.relay.state import State
from shared.door import answer
from shared.json import dumps

router = APIRouter(prefix="/api/v1", tags=["conversations V1"], route_class=UserRoute)

_HIDDEN = ("conversation_id", "user_id")
_SUCCESS = {"success": True}

SandboxIds = Annotated[list[Uuid], Query(alias="id", min_length=1, max_length=100)]
SandboxId = Annotated[Uuid, Path()]
ConversationId = Annotated[Uuid | None, Query(alias="conversation_id__eq")]


# ── starting ────────────────────────────────────────────────────────────────────────────────────


@router.post("/app-conversations")
async def start_conversation(
    request: Request, state: AppState, key: UserKey, wish: StartRequest | None = None
) -> Response:
    """Begins to start a conversation; how far that has come its start task tells."""
    task, _ = await _begun(request, state, key, wish or StartRequest())
    return answer(_task(task))


@router.post("/app-conversations/stream-start")
async def stream_start(request: Request, state: AppState, key: UserKey, wish: StartRequest | None = None) -> Response:
    """The same, as one JSON array that grows: the start task at each of its steps."""
    _, steps = await _begun(request, state, key, wish or StartRequest())
    return StreamingResponse(_array(steps), media_type="application/json")


async def _begun(request: Request, state: State, key: Key, wish: StartRequest) -> tuple[StartTask, Steps]:
    if wish.parent_conversation_id and await owned(state, key, wish.parent_conversation_id) is None:
        raise ConversationNotFound("Parent conversation not found")
    model = wish.llm_model or chat.default_model(state.pool, state.settings.relay_chat_model, key)
    if not key.may_ask(model):
        raise NotPermitted("llm_model: the API key may not ask this one")
    values = {
        **{name: getattr(wish, name) for name in ("selected_repository", "selected_branch", "git_provider", "trigger")},
        "user_id": key.user_id,
        "key_id": key.id,
        "title": (wish.title or "").strip() or None,
        "llm_model": wish.llm_model,
        "pr_number": wish.pr_number or [],
        "parent_id": wish.parent_conversation_id,
    }
    first = wish.initial_message
    planned = Wish(values, model, "V1", first.parts if first else [], bool(first and first.run), wish.sandbox_id)
    return await state.conversing.starts.begin(planned, wish.model_dump(), base_url=base_url(request, state))


async def _array(steps: Steps) -> AsyncIterator[bytes]:
    before = b"["
    async for task in steps.all():
        yield before + dumps(_task(task))
        before = b",\n"
    yield b"]"


def _task(task: StartTask) -> dict[str, Any]:
    shown = {name: value for name, value in asdict(task).items() if name not in _HIDDEN}
    return {"created_by_user_id": task.user_id, **shown}


# ── start tasks ─────────────────────────────────────────────────────────────────────────────────


@router.get("/app-conversations/start-tasks")
async def get_start_tasks(ids: Ids, state: AppState, key: UserKey) -> Response:
    """These start tasks in the order asked; null for one that is not there, or another user's."""
    found = await start_tasks.by_ids(state.database, key.user_id, ids)
    return answer([_task(found[each]) if each in found else None for each in ids])


@router.get("/app-conversations/start-tasks/search")
async def search_start_tasks(
    state: AppState,
    key: UserKey,
    conversation_id: ConversationId = None,
    created_from: Annotated[Moment, Query(alias="created_at__gte")] = None,
    sort_order: SortOrder = "CREATED_AT_DESC",
    page_id: PageId = None,
    limit: Limit = 100,
) -> Response:
    found = await start_tasks.search(
        state.database,
        key.user_id,
        conversation_id=conversation_id,
        created_from=created_from,
        order=sort_order,
        last=place_of(page_id),
        limit=limit + 1,
    )
    moment = "updated_at" if sort_order.startswith("UPDATED") else "created_at"
    last = found[limit - 1] if len(found) > limit else None
    next_page_id = page_id_of(getattr(last, moment), last.id) if last else None
    return answer({"items": [_task(each) for each in found[:limit]], "next_page_id": next_page_id})


@router.get("/app-conversations/start-tasks/count")
async def count_start_tasks(
    state: AppState,
    key: UserKey,
    conversation_id: ConversationId = None,
    created_from: Annotated[Moment, Query(alias="created_at__gte")] = None,
) -> Response:
    found = await start_tasks.count(
        state.database, key.user_id, conversation_id=conversation_id, created_from=created_from
    )
    return answer(found)


# ── conversations ───────────────────────────────────────────────────────────────────────────────


@router.get("/app-conversations")
async def get_conversations(ids: Ids, request: Request, state: AppState, key: UserKey) -> Response:
    """These conversations in the order asked; null for one that is not there, or another user's."""
    found = await conversation_lists.by_ids(state.database, key.user_id, ids)
    shown = await state.conversing.apps(key.user_id, list(found.values()), base_url(request, state))
    by_id = {each["id"]: each for each in shown}
    return answer([by_id.get(each) for each in ids])


async def _filter(
    title: Annotated[Wanted, Query(alias="title__contains")] = None,
    created_from: Annotated[Moment, Query(alias="created_at__gte")] = None,
    created_before: Annotated[Moment, Query(alias="created_at__lt")] = None,
    updated_from: Annotated[Moment, Query(alias="updated_at__gte")] = None,
    updated_before: Annotated[Moment, Query(alias="updated_at__lt")] = None,
    include_sub_conversations: bool = False,
) -> Filter:
    return Filter(
        title, created_from, created_before, updated_from, updated_before, with_children=include_sub_conversations
    )


Filtered = Annotated[Filter, Depends(_filter)]


@router.get("/app-conversations/search")
async def search_conversations(
    request: Request,
    state: AppState,
    key: UserKey,
    wanted: Filtered,
    page_id: PageId = None,
    limit: Limit = 100,
) -> Response:
    """The newest first."""
    found, next_page_id = await page_of(state, key, wanted, page_id, limit)
    items = await state.conversing.apps(key.user_id, found, base_url(request, state))
    return answer({"items": items, "next_page_id": next_page_id})


@router.get("/app-conversations/count")
async def count_conversations(
    state: AppState,
    key: UserKey,
    wanted: Filtered,
) -> Response:
    return answer(await conversation_lists.count(state.database, key.user_id, wanted))


async def page_of(
    state: State, key: Key, wanted: Filter, page_id: str | None, limit: int
) -> tuple[list[Conversation], str | None]:
    """A page of the user's conversations, and the id of the next one."""
    found = await conversation_lists.search(
        state.database, key.user_id, wanted, below=place_of(page_id), limit=limit + 1
    )
    page = found[:limit]
    return page, page_id_of(page[-1].created_at, page[-1].id) if len(found) > limit else None


@router.get("/events/count")
async def count_events(
    state: AppState, key: UserKey, conversation_id: Annotated[Uuid, Query(alias="conversation_id__eq")]
) -> Response:
    """How many events there are of a conversation."""
    found = await owned(state, key, conversation_id)
    if found is None:
        raise ConversationNotFound
    await state.conversing.log.settle(found)
    return answer(await events.count(state.database, found.id))


# ── sandboxes ───────────────────────────────────────────────────────────────────────────────────


@router.get("/sandboxes")
async def get_sandboxes(
    ids: SandboxIds, request: Request, state: AppState, key: UserKey, all_: Conversations
) -> Response:
    """These sandboxes in the order asked; null for one that is not there, or another user's."""
    found = await conversation_lists.by_sandboxes(state.database, key.user_id, ids)
    shown = await all_.sandboxes(found, base_url(request, state))
    return answer([shown.get(each) for each in ids])


@router.post("/sandboxes/{sandbox_id}/pause")
async def pause_sandbox(sandbox_id: SandboxId, state: AppState, key: UserKey) -> Response:
    """Stops what runs in it, keeps what has come, and gives its place up."""
    for each in await _in_sandbox(state, key, sandbox_id):
        await state.conversing.runs.pause_sandbox(each)
    return answer(_SUCCESS)


@router.post("/sandboxes/{sandbox_id}/resume")
async def resume_sandbox(sandbox_id: SandboxId, state: AppState, key: UserKey) -> Response:
    """Makes its conversations ready to go on; a run goes on when it is asked to."""
    for each in await state.conversing.there(await _in_sandbox(state, key, sandbox_id)):
        await state.conversing.runs.resume_sandbox(each)
    return answer(_SUCCESS)


async def _in_sandbox(state: State, key: Key, sandbox_id: str) -> list[Conversation]:
    found = (await conversation_lists.by_sandboxes(state.database, key.user_id, [sandbox_id])).get(sandbox_id)
    if not found:
        raise SandboxNotFound
    return found
