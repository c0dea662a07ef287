"""What both conversation APIs are called with, and what they answer, for clients.

Its one invariant: a call is sent once; who cannot know whether it arrived is told so by Unavailable.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final
from urllib.parse import quote

import httpx

from shared.conversation_errors import ConversationError, Unavailable, from_response
from shared.http_client import http_client
from shared.json import dumps, loads

Part = Mapping[str, Any]
Content = str | Sequence[Part]

_CONNECT_SECONDS: Final = 10.0
PAGE: Final = 100
CONVERSATIONS: Final = "/api/conversations"


@dataclass(frozen=True, slots=True)
class ConversationState:
    """A conversation as it was when the server was asked. V0 tells no session, sandbox, model or execution status."""

    id: str
    title: str | None
    sandbox_status: str
    execution_status: str | None
    created_at: datetime
    updated_at: datetime
    session_id: str | None = None
    sandbox_id: str | None = None
    model: str | None = None
    session_api_key: str | None = field(default=None, repr=False)
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True)
class Times:
    """As the client's parameters of these names."""

    poll_seconds: float
    keepalive_seconds: float
    patience_seconds: float


@dataclass(frozen=True, slots=True)
class Wish:
    """A conversation to be made."""

    message: Content | None
    run: bool
    model: str | None
    title: str | None
    parent_id: str | None


@dataclass(frozen=True, slots=True)
class Started:
    """How far a start has come; `conversation_id` once it is READY."""

    status: str
    task_id: str
    conversation_id: str | None


class Http:
    """Calls of one server, each with the caller's API key, or with a conversation's."""

    def __init__(self, base_url: str, api_key: str | None, *, timeout_seconds: float) -> None:
        self.base_url = base_url.rstrip("/")
        if httpx.URL(self.base_url).scheme not in {"http", "https"}:
            raise ValueError(f"base_url must begin with http:// or https://: {base_url}")
        self._user = {"x-api-key": api_key} if api_key else {}
        self._client = http_client(read_seconds=timeout_seconds, connect_seconds=min(timeout_seconds, _CONNECT_SECONDS))

    async def close(self) -> None:
        await self._client.aclose()

    async def call(self, method: str, path: str, *, secret: str | None = None, body: Any = None, **more: Any) -> Any:
        """The answer's JSON; `secret` is a conversation's key."""
        if body is not None:
            more |= {"content": dumps(body)}
        headers = {"content-type": "application/json"} if body is not None else {}
        response = await self.send(method, path, secret=secret, headers=headers, **more)
        try:
            return loads(response.content)
        except ValueError:
            raise ConversationError("The server's answer is no JSON", status=response.status_code) from None

    async def send(
        self, method: str, path: str, *, secret: str | None, headers: Mapping[str, str] | None = None, **more: Any
    ) -> httpx.Response:
        """A successful answer; raises the ConversationError of any other."""
        who = {"x-session-api-key": secret} if secret else self._user
        try:
            response = await self._client.request(
                method, self.base_url + path, headers={**who, **(headers or {})}, **more
            )
        except (httpx.HTTPError, OSError) as error:
            raise Unavailable(f"{method} {path}: {type(error).__name__} {error}") from error
        if not response.is_success:
            raise from_response(response)
        return response


def path_of(conversation_id: str, call: str = "") -> str:
    return f"{CONVERSATIONS}/{quote(conversation_id, safe='')}{call}"


def parts_of(content: Content) -> list[Part]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)


def moment_of(text: str) -> datetime:
    return datetime.fromisoformat(text)


async def delete(http: Http, conversation_id: str) -> bool:
    """Both APIs' way: whether it was there."""
    return bool(await http.call("DELETE", path_of(conversation_id)))
