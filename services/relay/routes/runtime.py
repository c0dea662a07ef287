"""A conversation at run time: paused, gone on with, spoken to; by its own key."""

from typing import Any, Final

from fastapi import APIRouter, Request, Response
from pydantic import ValidationError

from services.relay.conversation_input import Confirmation, UserMessage
from services.relay.routes.conversation_access import AtRuntime, Conversations, Either, EitherRoute, Keyed, RuntimeRoute
from shared import json
from shared.door import answer
from shared.errors import ValidationFailed
from shared.strict_route import validation_failed

router = APIRouter(prefix="/api", tags=["conversations at run time"], route_class=RuntimeRoute)
either = APIRouter(prefix="/api", tags=["conversations at run time"], route_class=EitherRoute)

_SUCCESS: Final = {"success": True}
_PAUSING: Final = frozenset({"paused", "stopped"})


@router.post("/conversations/{id}/pause")
async def pause(conversation: AtRuntime, all_: Conversations) -> Response:
    """Stops the run after the piece of the answer that has come, which is kept; of one that is paused nothing."""
    await all_.runs.pause(conversation.id)
    return answer(_SUCCESS)


@router.post("/conversations/{id}/run")
async def run(conversation: AtRuntime, all_: Conversations) -> Response:
    """Goes on, and answers at once; 409 while it runs already."""
    await all_.there([conversation])
    await all_.runs.start(conversation.id)
    return answer(_SUCCESS)


@either.post("/conversations/{id}/events")
async def add_event(conversation: Either, request: Request, all_: Conversations) -> Response:
    """A message of the user, or an event of the V0 API: a message, a change of the agent's state, or any other."""
    body = json.parse(await request.body())
    if not isinstance(body, dict):
        raise ValidationFailed.at("body", msg="The body is a JSON object", type="dict_type")
    if "action" not in body and "observation" not in body:
        message = _message(body)
        await all_.posting.post(conversation, message.parts, run=message.run)
        return answer({**_SUCCESS, "role": message.role, "content": message.parts})
    args = body.get("args")
    arguments: dict[str, Any] = args if isinstance(args, dict) else {}
    if body.get("action") == "message":
        message = _message({"content": _v0_parts(arguments), "run": True})
        await all_.posting.post(conversation, message.parts, run=True)
        return answer({**_SUCCESS, "role": "user", "content": message.parts})
    if body.get("action") == "change_agent_state" and arguments.get("agent_state") in _PAUSING:
        await all_.runs.pause(conversation.id)
    elif body.get("action") == "change_agent_state" and arguments.get("agent_state") == "running":
        await all_.runs.start(conversation.id, if_running=True)
    else:
        await all_.posting.note(conversation, body)
    return answer({**_SUCCESS, "role": "user", "content": []})


def _message(body: dict[str, Any]) -> UserMessage:
    try:
        return UserMessage.model_validate(body)
    except ValidationError as error:
        raise validation_failed(error.errors(include_url=False, include_input=False), ("body",)) from None


def _v0_parts(arguments: dict[str, Any]) -> list[Any]:
    parts: list[Any] = [{"type": "text", "text": arguments.get("content", "")}]
    if arguments.get("image_urls"):
        parts.append({"type": "image", "image_urls": arguments["image_urls"]})
    return parts


@router.post("/conversations/{id}/events/respond_to_confirmation")
async def respond_to_confirmation(conversation: AtRuntime, answered: Confirmation, all_: Conversations) -> Response:
    """What a user says to an action that waits for it; runs here take none, so it is only kept as an event."""
    await all_.posting.note(conversation, {"action": "confirmation", "args": answered.model_dump()})
    return answer(_SUCCESS)


@router.get("/vscode/url")
async def vscode_url(_: Keyed) -> Response:
    """There is no editor here."""
    return answer({"url": None})
