"""python -m benchmarks.passthrough: a bare FastAPI pass-through with our HTTP client, the yardstick for the relay.

It looks at nothing, stores nothing and knows no session: what comes in goes to $UPSTREAM_URL, what comes back goes
out as it comes.
"""

import os
from collections.abc import AsyncIterator

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse

from shared.http_client import http_client

app = FastAPI()
client = http_client(read_seconds=60, connect_seconds=5)
url = os.environ["UPSTREAM_URL"] + "/v1/messages"


@app.get("/ready")
async def ready() -> dict[str, bool]:
    return {"ready": True}


@app.post("/v1/messages")
async def messages(request: Request) -> Response:
    headers = {name: request.headers[name] for name in ("x-api-key", "anthropic-version", "content-type")}
    body = await request.body()
    if b'"stream":true' not in body:
        answer = await client.post(url, content=body, headers=headers)
        return Response(answer.content, answer.status_code, media_type=answer.headers["content-type"])
    asked = client.build_request("POST", url, content=body, headers=headers)
    streamed = await client.send(asked, stream=True)

    async def pieces() -> AsyncIterator[bytes]:
        try:
            async for piece in streamed.aiter_raw():
                yield piece
        finally:
            await streamed.aclose()

    return StreamingResponse(pieces(), streamed.status_code, media_type=streamed.headers["content-type"])


if __name__ == "__main__":
    uvicorn.run(app, port=int(os.environ["PORT"]), access_log=False, log_level="warning")
