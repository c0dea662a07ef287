"""The Claude Messages API: messages, their tokens counted, and the models there are."""

from typing import Any

from fastapi import APIRouter, Request, Response

from services.relay import request as requests
from services.relay.accounts import DEMO_MODEL
from services.relay.counting import count
from services.relay.parts import Caller
from services.relay.routes.parameters import AppState, CallerKey
from services.relay.routes.rendering import KIRO_PREFIX, request_id_of
from services.relay.routes.replies import reply_of
from shared.door import answer

router = APIRouter(tags=["claude"])

PREFIXES = ("", "/api", KIRO_PREFIX, f"/api/v1{KIRO_PREFIX}")


async def create_message(request: Request, state: AppState, key: CallerKey) -> Response:
    """A message from a model, plain or streamed, in the session that the request belongs to."""
    content = requests.read(await request.body(), default_max_tokens=state.settings.relay_default_max_tokens)
    turn = state.turns.begin(_caller(request, key), content)
    return await reply_of(turn, request, ping_seconds=state.settings.relay_ping_seconds)


async def count_tokens(request: Request, state: AppState, key: CallerKey) -> Response:
    """The tokens of a request, as upstream counts them; nothing is stored."""
    content = requests.read(await request.body(), default_max_tokens=None)
    ended = await count(state.accounts, _caller(request, key), content)
    return Response(ended.content, ended.status, {"request-id": request_id_of(request.scope)} | ended.headers)


async def list_models(state: AppState, _key: CallerKey) -> Response:
    """The models that the relay knows by name."""
    names = [DEMO_MODEL for account in state.accounts if account.provider == "demo"]
    return answer(
        {
            "data": [_model(name) for name in names],
            "has_more": False,
            "first_id": names[0] if names else None,
            "last_id": names[-1] if names else None,
        }
    )


def _model(name: str) -> dict[str, Any]:
    return {"type": "model", "id": name, "display_name": name, "created_at": "1970-01-01T00:00:00Z"}


def _caller(request: Request, key: CallerKey) -> Caller:
    headers: dict[str, str] = {}
    for name, value in request.headers.items():
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return Caller(key, headers, request.url.query, request_id_of(request.scope))


for prefix in PREFIXES:
    shown = not prefix
    router.add_api_route(f"{prefix}/v1/messages", create_message, methods=["POST"], include_in_schema=shown)
    router.add_api_route(f"{prefix}/v1/messages/count_tokens", count_tokens, methods=["POST"], include_in_schema=shown)
    router.add_api_route(f"{prefix}/v1/models", list_models, methods=["GET"], include_in_schema=shown)
