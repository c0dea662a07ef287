"""python -m benchmarks.thin: a thin FastAPI + asyncpg service, the yardstick for creating and getting.

It runs session_service's statements, with Pydantic models in and out, and has no rule beside them: no ids checked,
no errors told apart, no door, no log.
"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any

import asyncpg
import orjson
import uvicorn
from fastapi import FastAPI, Request
from pydantic import BaseModel

from services.session_service import creation, history, sessions
from shared.database import Compiled, compile_statement

SCHEMA = "dev"
CREATE = compile_statement(creation.CREATE, SCHEMA)
GET = compile_statement(sessions.GET, SCHEMA)
PAGE = compile_statement(history.page_statement(history.Filter(), "asc"), SCHEMA)


class NewSession(BaseModel):
    user_id: str
    session_id: str
    title: str | None = None
    metadata: dict[str, Any] | None = None
    conversation_data: dict[str, Any] | None = None
    idle_timeout_seconds: int | None = None


class Session(BaseModel):
    session_id: str
    user_id: str
    title: str | None
    status: str
    conversation_data: dict[str, Any]
    metadata: dict[str, Any]
    is_active: bool
    message_count: int
    total_tokens: int
    total_cost: float
    session_summary: str
    created_at: datetime
    updated_at: datetime
    last_activity: datetime
    version: int


class Message(BaseModel):
    message_id: str
    session_id: str
    user_id: str
    seq: int
    role: str
    content: str
    content_blocks: list[dict[str, Any]] | None
    message_type: str
    metadata: dict[str, Any]
    tokens_used: int
    cost_usd: float
    created_at: datetime


class Messages(BaseModel):
    messages: list[Message]
    total: int


async def _codecs(connection: Any) -> None:
    for name in ("json", "jsonb"):
        await connection.set_type_codec(
            name, schema="pg_catalog", encoder=lambda value: orjson.dumps(value).decode(), decoder=orjson.loads
        )


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with asyncpg.create_pool(os.environ["DATABASE_URL"], min_size=2, max_size=16, init=_codecs) as pool:
        app.state.pool = pool
        yield


app = FastAPI(lifespan=lifespan)


async def _rows(request: Request, statement: Compiled, **values: Any) -> list[Any]:
    async with request.app.state.pool.acquire() as connection:
        found: list[Any] = await connection.fetch(statement.sql, *statement.arguments(values))
        return found


@app.get("/ready")
async def ready() -> dict[str, bool]:
    return {"ready": True}


@app.post("/api/v1/sessions")
async def create(new: NewSession, request: Request) -> Session:
    rows = await _rows(request, CREATE, **new.model_dump())
    return Session(**dict(rows[0]))


@app.get("/api/v1/sessions/{session_id}")
async def get(session_id: str, user_id: str, request: Request) -> Session:
    rows = await _rows(request, GET, user_id=user_id, session_id=session_id)
    return Session(**dict(rows[0]))


@app.get("/api/v1/sessions/{session_id}/messages")
async def page(session_id: str, user_id: str, page_size: int, request: Request) -> Messages:
    key = {"user_id": user_id, "session_id": session_id}
    session = await _rows(request, GET, **key)
    rows = await _rows(request, PAGE, **key, limit=page_size, offset=0)
    return Messages(messages=[Message(**dict(row)) for row in rows], total=session[0]["message_count"])


if __name__ == "__main__":
    uvicorn.run(app, port=int(os.environ["PORT"]), access_log=False, log_level="warning")
