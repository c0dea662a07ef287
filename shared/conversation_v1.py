"""The calls of the V1 conversation API."""

from collections.abc import AsyncGenerator, Mapping
from typing import Any, Final, Literal
from urllib.parse import quote, urlencode

from shared.conversation_calls import (
    PAGE,
    Content,
    ConversationState,
    Http,
    Started,
    Times,
    Wish,
    moment_of,
    parts_of,
    path_of,
)
from shared.conversation_errors import Conflict, ConversationError, NotFound, StartFailed
from shared.conversation_events import Event, follow

_APPS: Final = "/api/v1/app-conversations"


class V1:
    """See V0, which has the same methods."""

    name: Final[Literal["V1"]] = "V1"

    def __init__(self, http: Http) -> None:
        self._http = http

    async def is_there(self) -> bool:
        try:
            await self._http.call("GET", f"{_APPS}/count")
        except ConversationError as error:
            if error.status not in {404, 405}:
                raise
            return False
        return True

    async def begin(self, wish: Wish) -> Started:
        body: dict[str, Any] = {"llm_model": wish.model, "title": wish.title, "parent_conversation_id": wish.parent_id}
        if wish.message is not None:
            body["initial_message"] = {"role": "user", "content": parts_of(wish.message), "run": wish.run}
        return _started(await self._http.call("POST", _APPS, body=body))

    async def look(self, task_id: str) -> Started:
        (task,) = await self._http.call("GET", f"{_APPS}/start-tasks", params={"ids": task_id})
        if task is None:
            raise NotFound("The start task is not there", status=404)
        return _started(task)

    async def get(self, conversation_id: str) -> ConversationState:
        (app,) = await self._http.call("GET", _APPS, params={"ids": conversation_id})
        if app is None:
            raise NotFound("The conversation is not there", status=404)
        return _state(app)

    async def page(self, page_id: str | None) -> tuple[list[ConversationState], str | None]:
        params = {"limit": PAGE, "include_sub_conversations": "true"} | ({"page_id": page_id} if page_id else {})
        page = await self._http.call("GET", f"{_APPS}/search", params=params)
        return [_state(app) for app in page["items"]], page["next_page_id"]

    async def send(self, state: ConversationState, content: Content, *, run: bool) -> None:
        body = {"role": "user", "content": parts_of(content), "run": run}
        await self._http.call("POST", path_of(state.id, "/events"), secret=state.session_api_key, body=body)

    async def pause(self, state: ConversationState) -> None:
        if state.session_api_key:  # without one there is nothing that runs
            await self._http.call("POST", path_of(state.id, "/pause"), secret=state.session_api_key, body={})

    async def run(self, state: ConversationState) -> None:
        await self._http.call("POST", path_of(state.id, "/run"), secret=_secret(state), body={})

    async def resume(self, state: ConversationState) -> None:
        await self._http.call("POST", f"/api/v1/sandboxes/{state.sandbox_id}/resume", body={})

    def events(self, state: ConversationState, times: Times, *, after: str | None) -> AsyncGenerator[Event, None]:
        base = f"ws{self._http.base_url.removeprefix('http')}/sockets/events/{state.id}"
        secret = _secret(state)

        def url_after(event_id: str | None) -> str:
            begin = {"last_event_id": event_id} if event_id else {}
            return f"{base}?{urlencode({'session_api_key': secret, 'resend_all': 'true'} | begin)}"

        return follow(url_after, times, after=after)

    async def upload(self, state: ConversationState, path: str, content: bytes) -> str:
        url = f"/api/file/upload/{quote(path, safe='')}"
        await self._http.call("POST", url, secret=_secret(state), files={"file": (path.rpartition("/")[2], content)})
        return path

    async def download(self, state: ConversationState, path: str) -> bytes:
        url = f"/api/file/download/{quote(path, safe='')}"
        return (await self._http.send("GET", url, secret=_secret(state))).content


def _started(task: Mapping[str, Any]) -> Started:
    if task["status"] == "ERROR":
        raise StartFailed(task["detail"] or "The start failed")
    return Started(task["status"], task["id"], task["app_conversation_id"] if task["status"] == "READY" else None)


def _secret(state: ConversationState) -> str:
    if state.session_api_key is None:
        raise Conflict(f"The conversation is {state.sandbox_status}: resume it first", status=409)
    return state.session_api_key


def _state(app: Mapping[str, Any]) -> ConversationState:
    return ConversationState(
        id=app["id"],
        title=app["title"],
        sandbox_status=app["sandbox_status"],
        execution_status=app["execution_status"],
        created_at=moment_of(app["created_at"]),
        updated_at=moment_of(app["updated_at"]),
        session_id=app.get("session_id"),
        sandbox_id=app["sandbox_id"],
        model=app["llm_model"],
        session_api_key=app["session_api_key"],
        raw=app,
    )
