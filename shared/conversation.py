"""One conversation at a server, for clients; conversation_client.py makes and finds them.

Its one invariant: whichever API the server has, the same methods do the same, or raise Unsupported.
"""

from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Final

from shared import conversation_calls
from shared.conversation_calls import Content, ConversationState, Http, Times
from shared.conversation_events import Event
from shared.conversation_v0 import V0
from shared.conversation_v1 import V1

_FOLDER: Final = "/workspace/"


class Conversation:
    """A conversation. `state` is what the server told last; `refresh` asks again."""

    def __init__(self, http: Http, api: V1 | V0, times: Times, state: ConversationState) -> None:
        self._http = http
        self._api = api
        self._times = times
        self.state = state

    def __repr__(self) -> str:
        return f"<Conversation {self.id} {self.state.sandbox_status} {self._api.name}>"

    @property
    def id(self) -> str:
        return self.state.id

    async def refresh(self) -> ConversationState:
        """Its state now. A key that is known stays known while the conversation is paused."""
        new = await self._api.get(self.id)
        self.state = replace(new, session_api_key=new.session_api_key or self.state.session_api_key)
        return self.state

    async def send(self, content: Content, *, run: bool = True) -> None:
        """A message of the user, a text or content parts; with `run` it is answered, else only stored.

        Raises Unavailable when it is not known whether the message arrived; V0 answers always.
        """
        await self._api.send(self.state, content, run=run)

    def events(self, *, after: str | None = None) -> AsyncGenerator[Event, None]:
        """All events from the start, or those after the one with this id; then what happens. Never ends by itself.

        Each comes once and in order, also over lost connections. Raises NotFound once the conversation is gone,
        Unauthorized for a wrong key, Unavailable when the server cannot be reached for too long, Conflict when the
        conversation is stopped (V1).
        """
        return self._api.events(self.state, self._times, after=after)

    async def pause(self) -> None:
        """Stops what runs; what has come of the answer is kept."""
        await self._api.pause(await self._newest())

    async def run(self) -> None:
        """Goes on; a conversation that was stopped is resumed before. Raises Conflict when it runs already (V1)."""
        if (await self._newest()).session_api_key is None:
            await self.resume()
        await self._api.run(self.state)

    async def resume(self) -> None:
        """Makes a stopped conversation ready, so that it can be followed and gone on with; it does not run by that."""
        await self._api.resume(self.state)
        await self.refresh()

    async def upload(self, path: str, content: bytes) -> str:
        """Stores a file and gives its path; a relative path is one in /workspace/. Raises FileTooLarge, Refused."""
        return await self._api.upload(await self._newest(), path if path.startswith("/") else _FOLDER + path, content)

    async def download(self, path: str) -> bytes:
        """A file's bytes. Raises NotFound; Unsupported by V0."""
        return await self._api.download(await self._newest(), path if path.startswith("/") else _FOLDER + path)

    async def delete(self) -> bool:
        """Whether it was there."""
        return await conversation_calls.delete(self._http, self.id)

    async def _newest(self) -> ConversationState:
        """The state, asked for again where it lacks the conversation's key: somebody may have resumed it since."""
        return self.state if self.state.session_api_key else await self.refresh()
