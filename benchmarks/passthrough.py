"""python -m benchmarks.passthrough: a bare FastAPI pass-through with our HTTP client, the yardstick for the relay.

It looks at nothing, stores nothing and knows no session: what comes in goes to $UPSTREAM_URL, what comes back goes
out as it comes.
"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse

from shared import http_client

url = os.environ["UPSTREAM_URL"] + "/v1/messages"


@asynccontextmanager
async def _client(app: FastAPI) -> AsyncIterator[None]:
    async with http_client.session() as app.state.client:
        yield


app = FastAPI(lifespan=_client)


@app.get("/ready")
async def ready() -> dict[str, bool]:
    return {"ready": True}


@app.post("/v1/messages")
async def messages(request: Request) -> Response:
    headers = {name: request.headers[name] for name in ("x-api-key", "anthropic-version", "content-type")}
    body = await request.body()
    client: aiohttp.ClientSession = request.app.state.client
    if b'"stream":true' not in body:
        async with client.post(url, data=body, headers=headers) as answer:
            return Response(await answer.read(), answer.status, media_type=answer.headers["content-type"])
    streamed = await client.post(url, data=body, headers=headers)

    async def pieces() -> AsyncIterator[bytes]:
        async with streamed:
            async for piece in streamed.content.iter_any():
                yield piece

    return StreamingResponse(pieces(), streamed.status, media_type=streamed.headers["content-type"])


if __name__ == "__main__":
    uvicorn.run(app, port=int(os.environ["PORT"]), access_log=False, log_level="warning")
