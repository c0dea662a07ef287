"""/v1/turns/{turn_id}: what became of a turn, when its answer is gone or its stream broke off."""

from dataclasses import asdict

from fastapi import APIRouter, Response

from services.relay import turn_status
from services.relay.routes.claude import PREFIXES
from services.relay.routes.parameters import AppState, CallerKey, TurnId
from shared.door import answer

router = APIRouter(tags=["turns"])


async def get_turn(turn_id: TurnId, state: AppState, key: CallerKey) -> Response:
    """How a turn ended, and whether its answer is stored: `persisted` is pending, deferred, yes or none."""
    return answer(asdict(await turn_status.get(state.sessions, state.spool, key.user_id, turn_id)))


for prefix in PREFIXES:
    router.add_api_route(f"{prefix}/v1/turns/{{turn_id}}", get_turn, methods=["GET"], include_in_schema=not prefix)
