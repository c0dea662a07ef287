"""The async client of the conversation APIs: V1, and V0 where a server has no V1.

    async with ConversationClient(base_url, api_key) as client:
        conversation = await client.create("Hello", model="claude-sonnet-5")
        async for event in conversation.events():
            if event.role == "assistant":
                print(event.text)
            if event.status == "finished":
                break

Its one invariant: whatever the server or the way to it does wrong is a ConversationError, whose tree is drawn in
shared/conversation_errors.py.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from math import inf
from types import TracebackType
from typing import Final, Literal, Self, TypeVar

from shared import conversation_calls
from shared.conversation import Conversation
from shared.conversation_calls import Content, ConversationState, Http, Started, Times, Wish
from shared.conversation_errors import (
    Conflict,
    ConversationError,
    FileTooLarge,
    NotFound,
    Refused,
    StartFailed,
    StartTimeout,
    Unauthorized,
    Unavailable,
    Unsupported,
)
from shared.conversation_events import Event, Patience
from shared.conversation_v0 import V0
from shared.conversation_v1 import V1

__all__ = [
    "Conflict",
    "Conversation",
    "ConversationClient",
    "ConversationError",
    "ConversationState",
    "Event",
    "FileTooLarge",
    "NotFound",
    "Refused",
    "StartFailed",
    "StartTimeout",
    "Unauthorized",
    "Unavailable",
    "Unsupported",
]

_LONGEST_WAIT: Final = 10  # times poll_seconds
_T = TypeVar("_T")


class ConversationClient:
    """A server, for one user. `api_key` None: as anonymous, which a server in development lets in.

    `poll_seconds`: between looks at a start. `keepalive_seconds`: a connection for events that is silent to a ping
    for so long is lost. `patience_seconds`: how long events are waited for while the server cannot be reached.
    `timeout_seconds`: the longest silence of any other answer.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str | None = None,
        *,
        poll_seconds: float = 3.0,
        keepalive_seconds: float = 20.0,
        patience_seconds: float = 300.0,
        timeout_seconds: float = 30.0,
    ) -> None:
        self._http = Http(base_url, api_key, timeout_seconds=timeout_seconds)
        self._times = Times(poll_seconds, keepalive_seconds, patience_seconds)
        self._api: V1 | V0 | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.close()

    @property
    def api(self) -> Literal["V1", "V0"] | None:
        """Which API is used; None until the first call has shown what the server has."""
        return self._api.name if self._api else None

    async def create(
        self,
        message: Content | None = None,
        *,
        run: bool = True,
        model: str | None = None,
        title: str | None = None,
        parent_id: str | None = None,
        timeout_seconds: float = 150.0,
    ) -> Conversation:
        """Starts a conversation and waits until it is ready; with `run` it answers the message.

        Looks after a tenth of `poll_seconds`, then every `poll_seconds`, less often while the server cannot be
        reached. V0 has no choice of a model. Raises StartFailed, StartTimeout, and what else a call does.
        """
        start = _Start(self._times.poll_seconds)
        try:
            async with asyncio.timeout(timeout_seconds):
                api, started = await self._begun(Wish(message, run, model, title, parent_id))
                return Conversation(self._http, api, self._times, await start.ready(api, started))
        except TimeoutError:
            raise start.timeout(timeout_seconds) from start.failure

    async def get(self, conversation_id: str) -> Conversation:
        """Raises NotFound."""
        api = await self._known_api()
        return Conversation(self._http, api, self._times, await api.get(conversation_id))

    async def list(self) -> AsyncIterator[Conversation]:
        """All of the user's, the newest first."""
        api, page_id = await self._known_api(), None
        while True:
            states, page_id = await api.page(page_id)
            for state in states:
                yield Conversation(self._http, api, self._times, state)
            if page_id is None:
                return

    async def delete(self, conversation_id: str) -> bool:
        """Whether it was there."""
        return await conversation_calls.delete(self._http, conversation_id)

    async def _begun(self, wish: Wish) -> tuple[V1 | V0, Started]:
        if not isinstance(self._api, V0):
            api = V1(self._http)
            try:
                started = await api.begin(wish)
            except ConversationError as error:
                if error.status not in {404, 405} or (wish.parent_id and await api.is_there()):
                    raise
            else:
                self._api = api
                return api, started
        self._api = V0(self._http)
        return self._api, await self._api.begin(wish)

    async def _known_api(self) -> V1 | V0:
        if self._api is None:
            v1 = V1(self._http)
            self._api = v1 if await v1.is_there() else V0(self._http)
        return self._api


class _Start:
    """A start that is waited for."""

    def __init__(self, poll_seconds: float) -> None:
        self._poll_seconds = poll_seconds
        self._seen: Started | None = None
        self.failure: Unavailable | None = None

    async def ready(self, api: V1 | V0, begun: Started) -> ConversationState:
        """The conversation, once it is READY."""
        self._seen = begun
        pause_seconds = self._poll_seconds / 10
        while (conversation_id := self._seen.conversation_id) is None:
            await asyncio.sleep(pause_seconds)
            pause_seconds = self._poll_seconds
            self._seen = await self._patiently(partial(api.look, begun.task_id))
        return await self._patiently(partial(api.get, conversation_id))

    async def _patiently(self, call: Callable[[], Awaitable[_T]]) -> _T:
        """The call's answer, asked for until there is one."""
        longest_seconds = self._poll_seconds * _LONGEST_WAIT
        patience = Patience(inf, first_wait_seconds=self._poll_seconds, longest_wait_seconds=longest_seconds)
        while True:
            try:
                answer = await call()
            except Unavailable as error:
                self.failure = error
                await patience.wait(error)
            else:
                self.failure = None
                return answer

    def timeout(self, seconds: float) -> StartTimeout:
        status = self._seen.status if self._seen else "not begun"
        last = f"; at last: {self.failure.detail}" if self.failure else ""
        return StartTimeout(
            f"The conversation was not ready after {seconds:g} s, last status: {status}{last}",
            last_status=status,
            task_id=self._seen.task_id if self._seen else None,
        )
