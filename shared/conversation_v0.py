"""The calls of the V0 conversation API, for servers that have no V1."""

from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any, Final, Literal

import structlog

from shared.conversation_calls import (
    CONVERSATIONS,
    PAGE,
    Content,
    ConversationState,
    Http,
    Part,
    Started,
    Times,
    Wish,
    moment_of,
    parts_of,
    path_of,
)
from shared.conversation_errors import NotFound, Refused, StartFailed, Unsupported
from shared.conversation_events import Event, poll

log = structlog.get_logger(__name__)

_STATUSES: Final = {"STOPPED": "PAUSED", "ARCHIVED": "MISSING"}


class V0:
    """See V1, which has the same methods; what this API cannot do raises Unsupported."""

    name: Final[Literal["V0"]] = "V0"

    def __init__(self, http: Http) -> None:
        self._http = http

    async def begin(self, wish: Wish) -> Started:
        if wish.parent_id:
            raise Unsupported("V0 knows no parents of conversations")
        if wish.message is not None and not wish.run:
            raise Unsupported("V0 answers every message")
        if wish.model:
            log.warning("model_not_chosen", model=wish.model, reason="V0 answers with the server's model")
        parts = [] if wish.message is None else parts_of(wish.message)
        body = {"initial_user_msg": _text(parts) or None, "image_urls": _images(parts) or None}
        try:
            made = await self._http.call("POST", CONVERSATIONS, body=body)
        except Refused as error:
            if error.status == 400:
                raise StartFailed(error.detail, status=400) from error
            raise
        if wish.title:
            await self._http.call("PATCH", path_of(made["conversation_id"]), body={"title": wish.title})
        return _of_v0(made["conversation_status"], made["conversation_id"])

    async def look(self, task_id: str) -> Started:
        """A conversation is its own start task here."""
        return _of_v0((await self.get(task_id)).sandbox_status, task_id)

    async def get(self, conversation_id: str) -> ConversationState:
        info = await self._http.call("GET", path_of(conversation_id))
        if info is None:
            raise NotFound("The conversation is not there", status=404)
        return _state(info)

    async def page(self, page_id: str | None) -> tuple[list[ConversationState], str | None]:
        params = {"limit": PAGE} | ({"page_id": page_id} if page_id else {})
        page = await self._http.call("GET", CONVERSATIONS, params=params)
        return [_state(info) for info in page["results"]], page["next_page_id"]

    async def send(self, state: ConversationState, content: Content, *, run: bool) -> None:
        if not run:
            raise Unsupported("V0 answers every message")
        parts = parts_of(content)
        if images := _images(parts):
            arguments = {"content": _text(parts), "image_urls": images}
            await self._http.call("POST", path_of(state.id, "/events"), body={"action": "message", "args": arguments})
        else:
            await self._http.call("POST", path_of(state.id, "/message"), body={"message": _text(parts)})

    async def pause(self, state: ConversationState) -> None:
        await self._http.call("POST", path_of(state.id, "/stop"))

    async def run(self, state: ConversationState) -> None:
        await self.resume(state)
        goes_on = {"action": "change_agent_state", "args": {"agent_state": "running"}}
        await self._http.call("POST", path_of(state.id, "/events"), body=goes_on)

    async def resume(self, state: ConversationState) -> None:
        await self._http.call("POST", path_of(state.id, "/start"), body={})

    def events(self, state: ConversationState, times: Times, *, after: str | None) -> AsyncGenerator[Event, None]:
        async def page_from(number: int, limit: int) -> Mapping[str, Any]:
            page: Mapping[str, Any] = await self._http.call(
                "GET", path_of(state.id, "/events"), params={"start_id": number, "limit": limit}
            )
            return page

        return poll(page_from, times, after=after)

    async def upload(self, state: ConversationState, path: str, content: bytes) -> str:
        told = await self._http.call("POST", path_of(state.id, "/upload-files"), files=[("files", (path, content))])
        for skipped in told["skipped_files"]:
            raise Refused(f"{skipped['name']}: {skipped['reason']}")
        (stored,) = told["uploaded_files"]
        return str(stored)

    async def download(self, state: ConversationState, path: str) -> bytes:
        raise Unsupported("V0 gives no files")


def _of_v0(status: str, conversation_id: str) -> Started:
    if status == "ERROR":
        raise StartFailed("The conversation could not be started")
    return Started(status, conversation_id, None if status == "STARTING" else conversation_id)


def _text(parts: Sequence[Part]) -> str:
    return "".join(part["text"] for part in parts if part["type"] == "text")


def _images(parts: Sequence[Part]) -> list[str]:
    single = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
    return single + [url for part in parts if part["type"] == "image" for url in part["image_urls"]]


def _state(info: Mapping[str, Any]) -> ConversationState:
    return ConversationState(
        id=info["conversation_id"],
        title=info["title"],
        sandbox_status=_STATUSES.get(info["status"], info["status"]),
        execution_status="error" if info["runtime_status"] == "STATUS$ERROR" else None,
        created_at=moment_of(info["created_at"]),
        updated_at=moment_of(info["last_updated_at"]),
        session_api_key=info["session_api_key"],
        raw=info,
    )
