"""google-adk's DatabaseSessionService: python -m benchmarks.peers.google_adk URL."""

import asyncio
import sys

from google.adk.events import Event
from google.adk.sessions import DatabaseSessionService, Session
from google.adk.sessions.base_session_service import GetSessionConfig
from google.genai import types

from benchmarks.peers.driver import LAST, TEXT, serve

_APP, _USER = "bench", "peer"


class Adk:
    def __init__(self, url: str) -> None:
        self._service = DatabaseSessionService(db_url=url.replace("postgresql:", "postgresql+asyncpg:", 1))
        self._sessions: dict[str, Session] = {}

    async def fill(self, session: str, count: int) -> None:
        made = await self._service.create_session(app_name=_APP, user_id=_USER, session_id=session)
        self._sessions[session] = made
        for _ in range(count):
            await self.append(session, TEXT)

    async def append(self, session: str, text: str) -> None:
        content = types.Content(role="user", parts=[types.Part(text=text)])
        await self._service.append_event(self._sessions[session], Event(author="user", content=content))

    async def last(self, session: str) -> list[str]:
        config = GetSessionConfig(num_recent_events=LAST)
        found = await self._service.get_session(app_name=_APP, user_id=_USER, session_id=session, config=config)
        return [event.content.parts[0].text for event in found.events]


if __name__ == "__main__":
    asyncio.run(serve(Adk(sys.argv[1])))
