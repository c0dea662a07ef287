"""The async client of session_service: finds an instance, calls it, decodes answers and errors.

Its one invariant: a call is sent a second time only when the first certainly was not applied, or when applying
it twice is the same as once.
"""

from dataclasses import dataclass
from typing import Any, Final, TypeVar
from urllib.parse import quote, urlencode

import aiohttp
import structlog
from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from yarl import URL

from shared import http_client, wire
from shared.discovery import Instance, Instances
from shared.errors import Internal, NotInitialized, ServiceError, SessionServiceUnavailable, Unauthorized, decode
from shared.http_client import FAULTS, exchange, was_not_sent
from shared.json import dumps
from shared.liveness import QUIET_SECONDS, WhileAlive

log = structlog.get_logger(__name__)

_FIRST_INSTANCE_SECONDS: Final = 3.0
_MAX_TRIES: Final = 3
_NOT_THE_CALLERS: Final = frozenset({ServiceError, Internal, Unauthorized})

Answer = TypeVar("Answer", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class SessionKey:
    """A session of a user."""

    user_id: str
    session_id: str

    @property
    def path(self) -> str:
        return f"/api/v1/sessions/{quote(self.session_id, safe='')}"


class SessionClient:
    """Calls of session_service; each raises the ServiceError that the service answered with.

    Raises SessionServiceUnavailable when no instance can be reached.
    """

    def __init__(
        self,
        instances: Instances,
        *,
        token: str = "",
        timeout_seconds: float = 30,
        connect_timeout_seconds: float = 2,
        quiet_seconds: float = QUIET_SECONDS,
    ) -> None:
        self._instances = instances
        self._http: aiohttp.ClientSession | None = None
        self._timeout_seconds = timeout_seconds
        self._connect_timeout_seconds = connect_timeout_seconds
        self._quiet_seconds = quiet_seconds
        self._headers = {"content-type": "application/json"}
        if token:
            self._headers["authorization"] = f"Bearer {token}"

    async def close(self) -> None:
        if self._http is not None:
            await self._http.close()

    # ── sessions ────────────────────────────────────────────────────────────────────────────────

    async def create_session(self, new: wire.CreateSession) -> wire.Session:
        return await self._call(wire.Session, "POST", "/api/v1/sessions", body=new)

    async def get_session(self, key: SessionKey) -> wire.Session:
        return await self._call(wire.Session, "GET", key.path, key, repeatable=True)

    async def list_sessions(self, user_id: str, **params: Any) -> wire.SessionList:
        """Parameters as in the HTTP call: active_only, status, page, page_size, order, cursor, session_id."""
        return await self._call(
            wire.SessionList, "GET", "/api/v1/sessions", params={"user_id": user_id, **params}, repeatable=True
        )

    async def update_session(
        self, key: SessionKey, change: wire.UpdateSession, *, if_match: int | None = None
    ) -> wire.Session:
        """`if_match` is the version that the session must have: VersionMismatch for any other."""
        headers = _if_match(if_match)
        return await self._call(wire.Session, "PUT", key.path, key, body=change, headers=headers, repeatable=True)

    async def end_session(self, key: SessionKey) -> None:
        await self._call(wire.Notice, "DELETE", key.path, key, repeatable=True)

    async def fork_session(self, key: SessionKey, wanted: wire.Fork) -> wire.Session:
        """A new session with the visible messages up to `wanted.at_seq`."""
        return await self._call(wire.Session, "POST", f"{key.path}/fork", key, body=wanted)

    async def list_messages(self, key: SessionKey, **params: Any) -> wire.MessageList:
        """Parameters as in the HTTP call: page, page_size, after_seq, before_seq, limit, order …"""
        return await self._call(wire.MessageList, "GET", f"{key.path}/messages", key, params=params, repeatable=True)

    async def append_message(self, key: SessionKey, message: wire.NewMessage) -> wire.Message:
        """`message.message_id` must be given: it makes appending twice the same as once."""
        path = f"{key.path}/messages"
        return await self._call(wire.Message, "POST", path, key, body=message, repeatable=True)

    async def get_stats(self) -> wire.Stats:
        """Totals of all users, at most five seconds old."""
        return await self._call(wire.Stats, "GET", "/api/v1/sessions/stats", repeatable=True)

    # ── turns ───────────────────────────────────────────────────────────────────────────────────

    async def align(self, key: SessionKey, hashes: list[str]) -> wire.Aligned:
        body = wire.Align(hashes=hashes)
        return await self._call(wire.Aligned, "POST", f"{key.path}/align", key, body=body, repeatable=True)

    async def open_turn(
        self,
        key: SessionKey,
        request: wire.OpenTurn,
        *,
        idempotency_key: str | None = None,
        if_match: int | None = None,
    ) -> wire.TurnOpened:
        """`if_match` is the version that the session must have: VersionMismatch for any other."""
        headers = {"idempotency-key": idempotency_key} if idempotency_key else {}
        headers |= _if_match(if_match)
        return await self._call(
            wire.TurnOpened,
            "POST",
            f"{key.path}/turns",
            key,
            body=request,
            headers=headers,
            extra_seconds=request.wait_seconds,
        )

    async def renew_turn(self, key: SessionKey, turn_id: str, lease_token: str) -> wire.TurnRenewed:
        path = f"{key.path}/turns/{turn_id}/renew"
        body = wire.RenewTurn(lease_token=lease_token)
        return await self._call(wire.TurnRenewed, "POST", path, key, body=body, repeatable=True)

    async def complete_turn(self, key: SessionKey, turn_id: str, answer: wire.CompleteTurn) -> wire.TurnCompleted:
        path = f"{key.path}/turns/{turn_id}/complete"
        return await self._call(wire.TurnCompleted, "POST", path, key, body=answer, repeatable=True)

    async def get_turn(self, key: SessionKey, turn_id: str) -> wire.Turn:
        return await self._call(wire.Turn, "GET", f"{key.path}/turns/{turn_id}", key, repeatable=True)

    async def list_turns(self, key: SessionKey, *, limit: int) -> wire.TurnList:
        """The newest turns, the newest first."""
        return await self._call(
            wire.TurnList, "GET", f"{key.path}/turns", key, params={"limit": limit}, repeatable=True
        )

    async def find_turn(self, user_id: str, turn_id: str) -> wire.Turn:
        """The user's turn of this id, whatever its session. Raises TurnNotFound."""
        path = f"/api/v1/turns/{quote(turn_id, safe='')}"
        return await self._call(wire.Turn, "GET", path, params={"user_id": user_id}, repeatable=True)

    # ── one call ────────────────────────────────────────────────────────────────────────────────

    async def _call(
        self,
        model: type[Answer],
        method: str,
        path: str,
        key: SessionKey | None = None,
        *,
        body: BaseModel | None = None,
        params: dict[str, Any] | None = None,
        headers: dict[str, str] | None = None,
        repeatable: bool = False,
        extra_seconds: float = 0,
    ) -> Answer:
        await self._instances.first(_FIRST_INSTANCE_SECONDS)
        query = {**(params or {}), **({"user_id": key.user_id} if key else {})}
        target = f"{path}?{urlencode(_pairs(query))}" if query else path
        content = b"" if body is None else dumps(body.model_dump(exclude_none=True))
        timeout = aiohttp.ClientTimeout(
            sock_connect=self._connect_timeout_seconds, sock_read=self._timeout_seconds + extra_seconds
        )
        failure: ServiceError = SessionServiceUnavailable(retry_after_seconds=1)
        for instance in self._instances.in_order()[:_MAX_TRIES]:
            url, over = URL(instance.url + target, encoded=True), self._over()
            sent = {**self._headers, **(headers or {})}
            try:
                async with WhileAlive(over, instance.url, self._quiet_seconds):
                    answer = await exchange(over, method, url, headers=sent, content=content, timeout=timeout)
            except FAULTS as error:
                self._instances.failed(instance)
                log.warning("session_service_call_failed", instance=instance.url, error=type(error).__name__)
                if repeatable or was_not_sent(error):
                    continue
                raise SessionServiceUnavailable(retry_after_seconds=1) from error
            if 200 <= answer.status < 300:
                self._instances.worked(instance)
                return _decoded(model, answer)
            failure = _failure(answer, instance)
            if answer.status != 503 or not (repeatable or isinstance(failure, NotInitialized)):
                raise failure
        raise failure

    def _over(self) -> aiohttp.ClientSession:
        if self._http is None:
            self._http = http_client.session()
        return self._http


def _pairs(query: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        (name, str(each).lower() if isinstance(each, bool) else str(each))
        for name, value in query.items()
        for each in (value if isinstance(value, list) else [value])
        if each is not None
    ]


def _if_match(version: int | None) -> dict[str, str]:
    return {} if version is None else {"if-match": f'"{version}"'}


def _failure(answer: http_client.Answer, instance: Instance) -> ServiceError:
    """The error that the answer tells; one that is about the service itself, or not in the contract, is an outage."""
    try:
        body = from_json(answer.content)
    except ValueError:
        log.warning("session_service_answer_unreadable", instance=instance.url, status=answer.status)
        body = None
    error = decode(answer.status, body, answer.headers.get("retry-after"))
    if type(error) in _NOT_THE_CALLERS:
        log.error("session_service_failed", instance=instance.url, status=answer.status, code=error.code)
        return SessionServiceUnavailable(retry_after_seconds=1)
    return error


def _decoded(model: type[Answer], answer: http_client.Answer) -> Answer:
    try:
        return model.model_validate_json(answer.content)
    except ValidationError as error:
        raise SessionServiceUnavailable("session_service gave an answer that is not in the contract") from error
