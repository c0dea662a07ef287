"""Who may do what with which conversation, and what the routes of both conversation APIs take from a request.

Its one invariant: a user sees the user's own conversations only, and a runtime key opens one conversation only.
"""

import base64
import binascii
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime
from typing import Annotated, Any, Final, cast
from urllib.parse import unquote_to_bytes

from fastapi import Depends, Path, Query, Request, Response
from pydantic import AfterValidator
from starlette.types import Scope

from services.relay import conversations
from services.relay.conversation_input import Uuid, hex_of
from services.relay.conversations import Conversation
from services.relay.conversing import Conversing
from services.relay.errors import BadConversationId, ConversationNotFound, WrongRuntimeKey
from services.relay.keys import Key
from services.relay.routes.addresses import address_of
from services.relay.routes.parameters import AppState, KeyedRoute, caller_or_anonymous
from services.relay.state import State
from shared import values
from shared.errors import ValidationFailed
from shared.strict_route import StrictRoute

RUNTIME_KEY: Final = "x-session-api-key"
_PREFIX: Final = (b"", b"api", b"conversations")
_ID_CHARACTERS: Final = 100
_user = caller_or_anonymous("conversations")


def _in_utc(moment: datetime) -> datetime:
    """Raises ValueError for a time that is before the first year there, or after the last."""
    if moment.tzinfo is None:
        return moment.replace(tzinfo=UTC)
    try:
        return moment.astimezone(UTC)
    except OverflowError:
        raise ValueError("must be a time of the years 1 to 9999") from None


Moment = Annotated[datetime | None, AfterValidator(lambda value: value and _in_utc(value))]
Ids = Annotated[list[Uuid], Query(min_length=1, max_length=100)]
Limit = Annotated[int, Query(ge=1, le=100)]
PageId = Annotated[str | None, Query(max_length=200)]
Wanted = Annotated[values.Storable | None, Query(max_length=500)]
"""What a text of the listed has to be, or to hold."""

UserKey = Annotated[Key, Depends(_user)]


async def _conversing(state: AppState) -> Conversing:
    state.require_ready()
    return state.conversing


Conversations = Annotated[Conversing, Depends(_conversing)]


async def _found(state: State, conversation_id: str) -> Conversation | None:
    digits = hex_of(conversation_id)
    return await conversations.find(state.database, digits) if digits else None


async def owned(state: State, key: Key, conversation_id: str) -> Conversation | None:
    """The user's conversation of this id, in either form; None for another's, as for one that is not there."""
    found = await _found(state, conversation_id)
    return found if found is not None and found.user_id == key.user_id else None


async def _owned(id: Annotated[str, Path()], state: AppState, key: UserKey) -> Conversation:  # noqa: A002
    found = await owned(state, key, id)
    if found is None:
        raise ConversationNotFound
    return found


async def by_runtime_key(state: State, conversation_id: str, secret: str | None) -> Conversation:
    """The conversation, for whoever shows its key; raises WrongRuntimeKey, ConversationNotFound."""
    if not secret:
        raise WrongRuntimeKey
    keyed = await state.conversing.by_runtime_key(secret)
    found = await _found(state, conversation_id)
    if found is None:
        raise ConversationNotFound
    if keyed is None or keyed.id != found.id:
        raise WrongRuntimeKey
    return found


async def _at_runtime(id: Annotated[str, Path()], request: Request, state: AppState) -> Conversation:  # noqa: A002
    state.require_ready()
    found: Conversation | None = getattr(request.state, "conversation", None)  # a route has asked already
    return found or await by_runtime_key(state, id, request.headers.get(RUNTIME_KEY))


async def _either(id: Annotated[str, Path()], request: Request, state: AppState) -> Conversation:  # noqa: A002
    """By the runtime key where one is shown, else by the user's login."""
    if RUNTIME_KEY in request.headers:
        return await _at_runtime(id, request, state)
    return await _owned(id, state, await _user(request, state))


async def _keyed_conversation(request: Request, state: AppState) -> Conversation:
    """The conversation that the runtime key names."""
    state.require_ready()
    if (asked := getattr(request.state, "conversation", None)) is not None:
        return cast("Conversation", asked)
    secret = request.headers.get(RUNTIME_KEY)
    found = await state.conversing.by_runtime_key(secret) if secret else None
    if found is None:
        raise WrongRuntimeKey
    return found


Owned = Annotated[Conversation, Depends(_owned)]
AtRuntime = Annotated[Conversation, Depends(_at_runtime)]
Either = Annotated[Conversation, Depends(_either)]
Keyed = Annotated[Conversation, Depends(_keyed_conversation)]


class UserRoute(KeyedRoute):
    """Knows its user before it looks at the body."""

    async def find(self, request: Request, state: State) -> Key:
        return await _user(request, state)


class RuntimeRoute(StrictRoute):
    """Knows the conversation before it looks at the body, by its key; with `takes_users` a user's login does too."""

    takes_users = False

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def guarded(request: Request) -> Response:
            state: State = request.app.state.relay
            if self.takes_users and RUNTIME_KEY not in request.headers:
                request.state.key = await _user(request, state)
            elif "id" in request.path_params:
                request.state.conversation = await _at_runtime(request.path_params["id"], request, state)
            else:
                request.state.conversation = await _keyed_conversation(request, state)
            return await handle(request)

        return guarded


class EitherRoute(RuntimeRoute):
    takes_users = True


def base_url(request: Request, state: State) -> str:
    """Where this client reaches the relay."""
    return state.settings.relay_public_url.rstrip("/") or address_of(request)


# ── ids in paths ────────────────────────────────────────────────────────────────────────────────

_RULES: Final[tuple[tuple[Callable[[str], bool], str], ...]] = (
    (lambda text: len(text) > _ID_CHARACTERS, "Conversation ID is too long"),
    (lambda text: "\0" in text, "Conversation ID contains invalid characters"),
    (lambda text: ".." in text or "/" in text or "\\" in text, "Conversation ID contains invalid path characters"),
    (
        lambda text: any(ord(character) < 32 or 127 <= ord(character) < 160 for character in text),
        "Conversation ID contains control characters",
    ),
)


def check_path(scope: Scope) -> None:
    """Refuses a conversation id that none can be, as it stands in the path as it was sent, before it is routed.

    Raises BadConversationId.
    """
    segments = scope.get("raw_path", b"").partition(b"?")[0].split(b"/")
    if len(segments) > len(_PREFIX) and tuple(segments[: len(_PREFIX)]) == _PREFIX:
        text = unquote_to_bytes(segments[len(_PREFIX)]).decode("utf-8", "replace")
        for is_broken, detail in _RULES:
            if is_broken(text):
                raise BadConversationId(detail)


# ── pages ───────────────────────────────────────────────────────────────────────────────────────


def page_id_of(moment: datetime, row_id: str) -> str:
    return base64.urlsafe_b64encode(f"{moment.isoformat()} {row_id}".encode()).decode().rstrip("=")


def place_of(page_id: str | None) -> tuple[datetime, str] | None:
    """The time and the id that a `page_id` stands for; raises ValidationFailed."""
    if page_id is None:
        return None
    try:
        text = base64.urlsafe_b64decode(page_id + "=" * (-len(page_id) % 4)).decode()
        moment, _, row_id = text.partition(" ")
        place = _in_utc(datetime.fromisoformat(moment)), row_id
    except (ValueError, binascii.Error):
        place = None
    if place is None or hex_of(place[1]) is None:
        raise ValidationFailed.at("query", "page_id", msg="Not a page_id of this listing")
    return place
