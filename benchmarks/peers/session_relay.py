"""Our own session_service over HTTP: python -m benchmarks.peers.session_relay URL."""

import asyncio
import sys

import httpx

from benchmarks.peers.driver import LAST, TEXT, serve
from shared.http_client import http_client


class SessionService:
    def __init__(self, url: str, client: httpx.AsyncClient) -> None:
        self._base = f"{url}/api/v1/sessions"
        self._client = client

    async def fill(self, session: str, count: int) -> None:
        for start in range(0, count, 500):
            messages = [{"role": "user", "content": TEXT}] * min(500, count - start)
            body = {"messages": messages, "create_session": {}}
            await self._post(f"{session}/messages/batch", body)

    async def append(self, session: str, text: str) -> None:
        await self._post(f"{session}/messages", {"role": "user", "content": text})

    async def last(self, session: str) -> list[str]:
        params: dict[str, str | int] = {"user_id": "peer", "before_seq": 2**31 - 1, "limit": LAST}
        answer = await self._client.get(f"{self._base}/{session}/messages", params=params)
        return [each["content"] for each in answer.raise_for_status().json()["messages"]]

    async def _post(self, path: str, body: object) -> None:
        answer = await self._client.post(f"{self._base}/{path}", params={"user_id": "peer"}, json=body)
        answer.raise_for_status()


async def main() -> None:
    async with http_client(read_seconds=60, connect_seconds=5) as client:
        await serve(SessionService(sys.argv[1], client))


if __name__ == "__main__":
    asyncio.run(main())
