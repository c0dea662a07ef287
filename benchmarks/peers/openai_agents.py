"""openai-agents' SQLAlchemySession: python -m benchmarks.peers.openai_agents URL."""

import asyncio
import sys

from agents.extensions.memory import SQLAlchemySession
from sqlalchemy.ext.asyncio import create_async_engine

from benchmarks.peers.driver import LAST, TEXT, serve


class Agents:
    def __init__(self, url: str) -> None:
        self._engine = create_async_engine(url.replace("postgresql:", "postgresql+asyncpg:", 1))
        self._sessions: dict[str, SQLAlchemySession] = {}

    def _session(self, session: str) -> SQLAlchemySession:
        if session not in self._sessions:
            self._sessions[session] = SQLAlchemySession(session, engine=self._engine, create_tables=True)
        return self._sessions[session]

    async def fill(self, session: str, count: int) -> None:
        for start in range(0, count, 500):
            await self._session(session).add_items([{"role": "user", "content": TEXT}] * min(500, count - start))

    async def append(self, session: str, text: str) -> None:
        await self._session(session).add_items([{"role": "user", "content": text}])

    async def last(self, session: str) -> list[str]:
        return [item["content"] for item in await self._session(session).get_items(limit=LAST)]


if __name__ == "__main__":
    asyncio.run(serve(Agents(sys.argv[1])))
