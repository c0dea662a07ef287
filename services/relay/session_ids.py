"""Which session a request belongs to, by what it says and what its client sends of its own accord.

Its one invariant: an id that is chosen here follows session_service's rules.
"""

import contextlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal
from urllib.parse import quote, unquote

from pydantic import TypeAdapter, ValidationError
from uuid_utils import uuid7

from services.relay.errors import InvalidRequest
from services.relay.request import ClaudeRequest
from shared import values

HEADER: Final = "x-session-id"
NO_SESSION: Final = "none"
_IMPLIED_HEADERS: Final = ("x-claude-code-session-id", "session-id", "x-openwebui-chat-id")
_AFFINITY: Final = "x-session-affinity"  # opencode sends its id in both headers, whoever asks
_AGENT_HEADER: Final = "x-claude-code-agent-id"
_TRAILING_SESSION: Final = re.compile(
    r"(?<![0-9a-z])session_([0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12})$", re.IGNORECASE
)
_RULES: Final[TypeAdapter[str]] = TypeAdapter(values.SessionId)


@dataclass(frozen=True, slots=True)
class Choice:
    """`named` by the caller, `implied` by what its client sends anyway, or `fresh`: made here for this request.

    `bound` is that of a conversation, which goes on in it and in no other.

    `agent_id` names the part of the client that speaks, when it is not the main one.
    """

    session_id: str
    kind: Literal["named", "implied", "fresh", "bound"]
    agent_id: str | None = None


def choose(request: ClaudeRequest, headers: Mapping[str, str]) -> Choice | None:
    """The session of this request; None when it wants none. Raises InvalidRequest naming where the id stood."""
    if request.continuation is not None:
        return Choice(request.continuation.session_id, "bound")
    in_header = decoded(headers.get(HEADER, ""))
    if in_header == NO_SESSION:
        return None
    if request.session_id is not None:
        return Choice(_checked(request.session_id, "metadata.session_id"), "named")
    if in_header and headers.get(_AFFINITY) != headers[HEADER]:
        return Choice(_checked(in_header, "X-Session-Id"), "named")
    implied = [in_header, *(_implied(headers.get(name, "")) for name in _IMPLIED_HEADERS)]
    implied.append(_in_user_id(request.user_id or ""))
    for session_id in implied:
        # Its client did not mean it for us: an id that is none is no reason to refuse a valid request.
        if session_id and keeps_rules(session_id):
            return Choice(session_id, "implied", _implied(headers.get(_AGENT_HEADER, "")))
    return Choice(str(uuid7()), "fresh")


def encoded(session_id: str) -> str:
    """The id as a header carries it: percent-encoded UTF-8 where it could not be read back otherwise."""
    return session_id if session_id.isascii() and "%" not in session_id else quote(session_id, safe=" ")


def decoded(value: str) -> str:
    """The id that a header carries, percent-encoded or as bare UTF-8 bytes; raises InvalidRequest for other bytes."""
    try:
        return unquote(value.encode("latin-1").decode("utf-8"), errors="strict")
    except UnicodeError:  # two of them must not become one id
        raise InvalidRequest.at("X-Session-Id", "is not UTF-8") from None


def _implied(value: str) -> str | None:
    """The id in a header that its client did not mean for us; None where there is none."""
    with contextlib.suppress(InvalidRequest):
        return decoded(value) or None
    return None


def _in_user_id(user_id: str) -> str | None:
    """The session in Claude Code's metadata.user_id: `…_session_<uuid>`, or JSON with a `session_id`."""
    if found := _TRAILING_SESSION.search(user_id):
        return found[1]
    if user_id.lstrip().startswith("{"):
        try:
            session_id = json.loads(user_id).get("session_id")
        except (ValueError, RecursionError):
            return None
        return session_id if isinstance(session_id, str) and session_id else None
    return None


def keeps_rules(session_id: str) -> bool:
    """Whether session_service would take the id."""
    try:
        _checked(session_id, "")
    except InvalidRequest:
        return False
    return True


def _checked(session_id: str, where: str) -> str:
    try:
        return _RULES.validate_python(session_id, strict=True)
    except ValidationError as error:
        raise InvalidRequest.at(where, error.errors()[0]["msg"]) from None
