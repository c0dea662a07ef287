"""The test upstream itself: the Claude Messages protocol, and the control endpoints beside it.

Its one invariant: without a script every valid request gets a whole, valid answer that depends on nothing
but the request.
"""

import asyncio
import itertools
import json
from time import monotonic
from typing import Any

from pydantic import ValidationError

from tests.upstream import answers, rules
from tests.upstream.answers import DEFAULT_STEP, error_body
from tests.upstream.log import Entry, Log
from tests.upstream.script import Script, Step, exact_bytes
from tests.upstream.wire import ClientGone, Connection, Exchange

_MODELS = ("test-model", "claude-sonnet-4-5", "claude-haiku-4-5")
_JSON = {"content-type": "application/json"}


class Server:
    """One test upstream; `connect` makes the protocol of a new connection."""

    def __init__(self, *, log_limit: int = 10_000) -> None:
        self._script = Script()
        self._log_limit = log_limit
        self._log = Log(log_limit)
        self._connections: set[Connection] = set()
        self._running = 0
        self._request_ids = itertools.count(1)

    def connect(self) -> Connection:
        return Connection(self._serve, self._connections)

    async def _serve(self, exchange: Exchange) -> None:
        if exchange.path.startswith("/control/"):
            await self._control(exchange)
            return
        exchange.connection.control_only = False
        parsed = _parsed(exchange.body)
        entry = self._log.add(exchange, parsed)
        self._running += 1
        try:
            await self._answer(exchange, entry, parsed)
            entry.end("finished" if exchange.keep_alive else "cut", exchange.bytes_sent)
        except ClientGone:
            gone_at = exchange.connection.gone_at
            entry.end("disconnected" if gone_at else "cut", exchange.bytes_sent, gone_at)
            raise
        finally:
            self._running -= 1

    # ── the protocol ────────────────────────────────────────────────────────────────────────────

    async def _answer(self, exchange: Exchange, entry: Entry, parsed: Any) -> None:
        step = self._script.take(_route(exchange), exchange.headers, bytes(exchange.body), parsed) or DEFAULT_STEP
        entry.step = step.name
        if step.delay_ms:
            await exchange.pause(step.delay_ms / 1000)
        if await self._misbehave(exchange, step):
            return
        if step.redirect is not None:
            await self._send(exchange, entry, 307, {}, b"", {"location": step.redirect})
        elif step.status != 200 or step.body is not None:
            body = error_body(step.status, "scripted", self._request_id()) if step.body is None else step.body
            content = exact_bytes(body) if isinstance(body, str) else _dump(body)
            await self._send(exchange, entry, step.status, _JSON, content, step.headers)
        elif refusal := _refusal(exchange, parsed):
            status, text = refusal
            body = _dump(error_body(status, text, self._request_id()))
            await self._send(exchange, entry, status, _JSON, body, {})
        else:
            await self._succeed(exchange, entry, step, parsed)

    async def _misbehave(self, exchange: Exchange, step: Step) -> bool:
        """Steps that are no HTTP answer at all; true when that was it."""
        if step.garbage is not None:
            await exchange.send_raw(exact_bytes(step.garbage))
        elif step.hang_seconds is not None and step.after_events is None:
            await exchange.pause(step.hang_seconds)
        elif not step.close:
            return False
        exchange.close()
        return True

    async def _succeed(self, exchange: Exchange, entry: Entry, step: Step, parsed: Any) -> None:
        if _route(exchange) == "/v1/models":
            await self._send(exchange, entry, 200, _JSON, _dump(_models()), step.headers)
        elif _route(exchange) == "/v1/messages/count_tokens":
            body = _dump({"input_tokens": answers.count_tokens(parsed)} | step.message)
            await self._send(exchange, entry, 200, _JSON, body, step.headers)
        elif parsed.get("stream") is True:
            await self._stream(exchange, entry, step, answers.message(parsed, step))
        else:
            await self._send(exchange, entry, 200, _JSON, _dump(answers.message(parsed, step)), step.headers, step)

    async def _send(
        self,
        exchange: Exchange,
        entry: Entry,
        status: int,
        kind: dict[str, str],
        body: bytes,
        headers: dict[str, Any],
        step: Step = DEFAULT_STEP,
    ) -> None:
        entry.status = status
        await exchange.start(status, {"request-id": self._request_id(), **kind, **headers}, len(body))
        if step.cut_after_bytes is not None and step.cut_after_bytes < len(body):
            await exchange.send(body[: step.cut_after_bytes])
            exchange.close(reset=step.cut == "reset")
        else:
            await exchange.send(body)

    async def _stream(self, exchange: Exchange, entry: Entry, step: Step, message: dict[str, Any]) -> None:
        entry.status = 200
        kind = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"}
        await exchange.start(200, {"request-id": self._request_id(), **kind, **step.headers})
        for event in answers.events(message, step):
            if step.event_delay_ms:
                await exchange.pause(step.event_delay_ms / 1000)
            if step.stamped:
                event = event.replace(b"data: {", b'data: {"sent_at":%.6f,' % monotonic(), 1)
            if step.hang_seconds is not None and entry.events_sent == step.after_events:
                await exchange.pause(step.hang_seconds)
            if entry.events_sent == step.cut_after_events:
                await self._cut(exchange, step)
                return
            if step.cut_after_bytes is not None and exchange.bytes_sent + len(event) > step.cut_after_bytes:
                await exchange.send(event[: step.cut_after_bytes - exchange.bytes_sent])
                await self._cut(exchange, step)
                return
            await self._send_event(exchange, event, step.chunk_bytes)
            entry.events_sent += 1
            entry.bytes_sent = exchange.bytes_sent
        await exchange.finish()

    async def _cut(self, exchange: Exchange, step: Step) -> None:
        if step.cut == "end":
            await exchange.finish()
        else:
            exchange.close(reset=step.cut == "reset")

    async def _send_event(self, exchange: Exchange, event: bytes, chunk_bytes: int | None) -> None:
        if chunk_bytes is None:
            await exchange.send(event)
            return
        for start in range(0, len(event), chunk_bytes):
            await exchange.send(event[start : start + chunk_bytes])
            await asyncio.sleep(0)

    def _request_id(self) -> str:
        return f"req_test{next(self._request_ids):08}"

    # ── control ─────────────────────────────────────────────────────────────────────────────────

    async def _control(self, exchange: Exchange) -> None:
        call = f"{exchange.method} {exchange.path}"
        status = 200
        answer: dict[str, Any] = {"ok": True}
        if call == "POST /control/script":
            status, answer = self._add_steps(_parsed(exchange.body))
        elif call == "GET /control/requests":
            answer = {"requests": [entry.wire() for entry in self._log.entries]}
        elif call == "GET /control/state":
            answer = self._state()
        elif call == "POST /control/reset":
            self._reset()
        else:
            status, answer = 404, {"error": "see python -m tests.upstream --help"}
        body = _dump(answer)
        await exchange.start(status, _JSON, len(body))
        await exchange.send(body)

    def _add_steps(self, value: Any) -> tuple[int, dict[str, Any]]:
        try:
            steps = [Step.model_validate(step) for step in (value if isinstance(value, list) else [value])]
        except ValidationError as error:
            return 400, {"error": str(error)}
        self._script.steps += steps
        return 200, {"steps": len(self._script.steps)}

    def _state(self) -> dict[str, Any]:
        return {
            "connections": sum(not connection.control_only for connection in self._connections),
            "running": self._running,
            "requests": self._log.count,
            "steps": [step.model_dump(exclude_defaults=True) for step in self._script.steps],
        }

    def _reset(self) -> None:
        """Forgets script and log, and ends all connections but those that only control."""
        self._script = Script()
        self._log = Log(self._log_limit)
        for connection in [one for one in self._connections if not one.control_only]:
            connection.close(reset=False)


def _route(exchange: Exchange) -> str:
    """The path from /v1 on: a base URL may have a path before it."""
    before, slash, after = exchange.path.partition("/v1/")
    return slash + after if slash else before


def _parsed(body: bytes | bytearray) -> Any:
    try:
        return json.loads(body) if body else None
    except ValueError:
        return None


def _dump(value: Any) -> bytes:
    try:
        return json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return json.dumps(value).encode()


def _models() -> dict[str, Any]:
    models = [
        {"type": "model", "id": name, "display_name": name, "created_at": "2025-01-01T00:00:00Z"} for name in _MODELS
    ]
    return {"data": models, "has_more": False, "first_id": _MODELS[0], "last_id": _MODELS[-1]}


def _refusal(exchange: Exchange, parsed: Any) -> tuple[int, str] | None:
    """What a strict upstream says to a request that it does not take."""
    headers = exchange.headers
    calls = {"/v1/messages": "POST", "/v1/messages/count_tokens": "POST", "/v1/models": "GET"}
    route = _route(exchange)
    if route not in calls:
        return 404, "Not found"
    if exchange.method != calls[route]:
        return 405, "Method Not Allowed"
    if not headers.get("x-api-key") and not headers.get("authorization", "").startswith("Bearer "):
        return 401, "x-api-key header is required"
    if "anthropic-version" not in headers:
        return 400, "anthropic-version: header is required"
    if exchange.method == "POST":
        problem = rules.problem(parsed, counting=route.endswith("count_tokens"))
        if problem is not None:
            return 400, problem
    return None
