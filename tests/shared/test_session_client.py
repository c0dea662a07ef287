"""The client of session_service: what it repeats and what it must not, and errors as they were raised."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from shared import errors, wire
from shared.canonical import message_hash
from shared.discovery import Instances
from shared.json import dumps
from shared.session_client import SessionClient, SessionKey
from tests.processes import ServiceProcess, free_port, start_session_service
from tests.relay.stack import frozen
from tests.session_service.calls import new_user_id
from tests.shared.servers import answer, serving


@asynccontextmanager
async def client_of(*urls: str, instances: Instances | None = None) -> AsyncIterator[SessionClient]:
    client = SessionClient(instances or Instances(list(urls)), timeout_seconds=5, connect_timeout_seconds=1)
    try:
        yield client
    finally:
        await client.close()


def said(content: str, role: wire.Role = "user") -> wire.NewMessage:
    return wire.NewMessage(role=role, content=content)


def new_key(session_id: str = "s") -> SessionKey:
    return SessionKey(new_user_id(), session_id)


OPEN = wire.OpenTurn(messages=[said("q")], create_session=wire.CreateSessionInTurn(title="T"))


@pytest.mark.parametrize("session_id", ["s", "a b", "é?#%&=+", "%2F", "😀", "...", "a\\b"])
async def test_a_whole_conversation(session_service: ServiceProcess, session_id: str) -> None:
    async with client_of(session_service.url) as client:
        key = new_key(session_id)
        opened = await client.open_turn(key, OPEN)
        assert (opened.session.session_id, opened.session.title) == (session_id, "T")
        assert (await client.renew_turn(key, opened.turn_id, opened.lease_token)).turn_id == opened.turn_id
        result = wire.CompleteTurn(
            lease_token=opened.lease_token,
            status="completed",
            messages=[said("r", "assistant")],
            usage={"output_tokens": 3},
            cost_usd=0.25,  # type: ignore[arg-type]
            upstream={"a": None},
        )
        done = await client.complete_turn(key, opened.turn_id, result)
        assert (done.turn.status, done.turn.cost_usd, done.messages[0].tokens_used) == ("completed", 0.25, 3)
        assert done.turn.upstream == {"a": None}
        assert await client.complete_turn(key, opened.turn_id, result) == done
        hashes = [
            message_hash("user", "q").hex(),
            message_hash("assistant", "r").hex(),
            message_hash("user", "x").hex(),
        ]
        aligned = await client.align(key, hashes)
        assert (aligned.matched, aligned.seq, aligned.version) == (2, 2, done.session.version)
        assert [each.content for each in (await client.list_messages(key, order="desc", limit=5)).messages] == [
            "r",
            "q",
        ]
        changed = await client.update_session(key, wire.UpdateSession(metadata={"n": None}))
        assert changed.metadata == {"n": None}
        await client.end_session(key)
        assert (await client.get_session(key)).ended_reason == "user"


async def test_errors_come_back_as_they_were_raised(session_service: ServiceProcess) -> None:
    async with client_of(session_service.url) as client:
        key = new_key()
        with pytest.raises(errors.SessionNotFound):
            await client.get_session(key)
        await client.create_session(wire.CreateSession(user_id=key.user_id, session_id="s"))
        with pytest.raises(errors.SessionExists):
            await client.create_session(wire.CreateSession(user_id=key.user_id, session_id="s"))
        opened = await client.open_turn(key, OPEN)
        with pytest.raises(errors.TurnInProgress) as busy:
            await client.open_turn(key, OPEN)
        assert busy.value.data == {"turn_id": opened.turn_id}
        assert (busy.value.retry_after_seconds or 0) > 1
        with pytest.raises(errors.LeaseLost):
            await client.renew_turn(key, opened.turn_id, "x")
        with pytest.raises(errors.TurnNotFound):
            await client.renew_turn(key, "nothing", "x")
        with pytest.raises(errors.ValidationFailed) as invalid:
            await client.list_messages(key, page=0)
        assert isinstance(invalid.value.detail, list)
        assert invalid.value.detail[0]["loc"] == ["query", "page"]
        too_small = OPEN.model_copy(update={"context": wire.ContextOptions(max_tokens=1)})
        with pytest.raises(errors.ContextTooSmall) as small:
            await client.open_turn(new_key(), too_small)
        assert small.value.data["over_by_tokens"] > 0


async def test_an_instance_that_is_gone_is_left_alone(session_service: ServiceProcess) -> None:
    dead = f"http://127.0.0.1:{free_port()}"
    instances = Instances([dead, session_service.url])
    async with client_of(instances=instances) as client:
        for _ in range(4):  # creations as well: nothing was sent to the one that is gone
            key = new_key()
            await client.create_session(wire.CreateSession(user_id=key.user_id, session_id="s"))
            await client.open_turn(key, OPEN)
            await client.get_session(key)
        assert instances.in_order()[-1].url == dead
        assert instances.in_order()[-1].failures == 1


async def test_what_may_have_been_applied_is_not_sent_again(session_service: ServiceProcess) -> None:
    for hangs_up in (b"", b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{"):
        async with serving(hangs_up) as bad:
            for creates in (True, False):
                async with client_of(bad.url, session_service.url) as client:
                    key = new_key()
                    new = wire.CreateSession(user_id=key.user_id, session_id="s")
                    call = client.create_session(new) if creates else client.open_turn(key, OPEN)
                    with pytest.raises(errors.SessionServiceUnavailable) as raised:
                        await call
                    assert raised.value.headers() == {"retry-after": "1"}
                    with pytest.raises(errors.SessionNotFound):
                        await client.get_session(key)
            assert len(bad.requests) == 2


async def test_what_is_the_same_twice_as_once_is_sent_again(session_service: ServiceProcess) -> None:
    key = new_key()
    async with client_of(session_service.url) as client:
        opened = await client.open_turn(key, OPEN)
    result = wire.CompleteTurn(lease_token=opened.lease_token, status="completed", messages=[said("r", "assistant")])
    async with serving(b"") as bad:
        for number in range(6):
            heard = len(bad.requests)
            async with client_of(bad.url, session_service.url) as client:
                match number:
                    case 0:
                        await client.get_session(key)
                    case 1:
                        await client.renew_turn(key, opened.turn_id, opened.lease_token)
                    case 2:
                        await client.update_session(key, wire.UpdateSession(title="x"))
                    case 3:
                        await client.align(key, [])
                    case 4:
                        await client.complete_turn(key, opened.turn_id, result)
                    case _:
                        await client.list_messages(key)
            assert len(bad.requests) > heard  # it was asked, and the other one after it


def unavailable(code: str) -> bytes:
    return answer(503, dumps({"detail": "d", "code": code}), retry_after="7")


async def test_an_instance_that_is_starting_is_passed_over_even_by_creations(session_service: ServiceProcess) -> None:
    async with (
        serving(unavailable("not_initialized")) as starting,
        client_of(starting.url, session_service.url) as client,
    ):
        key = new_key()
        await client.create_session(wire.CreateSession(user_id=key.user_id, session_id="s"))
        assert len(starting.requests) == 1
    async with serving(unavailable("not_initialized")) as starting, client_of(starting.url) as client:
        with pytest.raises(errors.NotInitialized) as raised:
            await client.create_session(wire.CreateSession(user_id=key.user_id))
        assert raised.value.retry_after_seconds == 7


async def test_without_its_database_an_instance_may_have_applied_a_creation(session_service: ServiceProcess) -> None:
    async with serving(unavailable("database_unavailable")) as bad, client_of(bad.url, session_service.url) as client:
        key = new_key()
        with pytest.raises(errors.DatabaseUnavailable):
            await client.create_session(wire.CreateSession(user_id=key.user_id))
        with pytest.raises(errors.SessionNotFound):
            await client.get_session(key)
        await client.update_session(await _made(client, key), wire.UpdateSession(title="x"))


async def _made(client: SessionClient, key: SessionKey) -> SessionKey:
    for _ in range(2):
        try:
            await client.create_session(wire.CreateSession(user_id=key.user_id, session_id=key.session_id))
        except errors.Unavailable:
            continue
        return key
    raise AssertionError("neither instance made it")


@pytest.mark.parametrize(
    ("said_back", "expected"),
    [
        (answer(200, b"{}"), errors.SessionServiceUnavailable),
        (answer(200, b"not json"), errors.SessionServiceUnavailable),
        (answer(502, b"<html>bad gateway</html>", "text/html"), errors.Unavailable),
        (answer(503, b""), errors.Unavailable),
        (answer(500, b"oops", "text/plain"), errors.SessionServiceUnavailable),
        (answer(500, b'{"detail":"Internal error","code":"internal_error"}'), errors.SessionServiceUnavailable),
        (answer(401, b'{"detail":"Unauthorized","code":"unauthorized"}'), errors.SessionServiceUnavailable),
        (answer(404, b"{}"), errors.SessionServiceUnavailable),
        (answer(429, b'{"detail":"slow down","code":"unknown"}', retry_after="3"), errors.SessionServiceUnavailable),
        (answer(302, b"", location="http://127.0.0.1:1/"), errors.SessionServiceUnavailable),
        (b"garbage\r\n\r\n", errors.SessionServiceUnavailable),
    ],
)
async def test_answers_that_are_not_in_the_contract(said_back: bytes, expected: type[errors.ServiceError]) -> None:
    async with serving(said_back) as strange, client_of(strange.url) as client:
        with pytest.raises(errors.ServiceError) as raised:
            await client.get_session(new_key())
        assert isinstance(raised.value, expected)


async def test_nobody_there_yet(session_service: ServiceProcess) -> None:
    instances = Instances()
    async with client_of(instances=instances) as client:
        key = new_key()
        call = asyncio.create_task(client.create_session(wire.CreateSession(user_id=key.user_id, session_id="s")))
        await asyncio.sleep(0.2)
        instances.replace([session_service.url])
        assert (await call).session_id == "s"


async def test_nobody_there_at_all() -> None:
    async with client_of(instances=Instances()) as client:
        began = time.monotonic()
        with pytest.raises(errors.SessionServiceUnavailable):
            await client.get_session(new_key())
        assert time.monotonic() - began < 5


@asynccontextmanager
async def impatient_client(*urls: str) -> AsyncIterator[SessionClient]:
    """It soon asks an instance that gives no answer whether it lives."""
    client = SessionClient(Instances(list(urls)), quiet_seconds=0.2)
    try:
        yield client
    finally:
        await client.close()


async def test_an_instance_that_hangs_is_not_waited_for(
    database_url: str, scratch: Path, session_service: ServiceProcess
) -> None:
    """What may be asked twice is asked of another one."""
    with start_session_service(database_url, scratch, free_port()) as hung, frozen(hung.pid):
        key = new_key()
        async with asyncio.timeout(5):
            async with impatient_client(hung.url, session_service.url) as client:
                with pytest.raises(errors.SessionServiceUnavailable) as raised:
                    await client.open_turn(key, OPEN.model_copy(update={"wait_seconds": 60}))
                assert raised.value.headers() == {"retry-after": "1"}
            async with impatient_client(hung.url, session_service.url) as client:
                with pytest.raises(errors.SessionNotFound):
                    await client.get_session(key)


async def test_an_instance_that_takes_no_more_connections_still_answers() -> None:
    """As one does that stops."""
    is_asked = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        is_asked.set()
        await asyncio.sleep(1)
        writer.write(answer(404, b'{"detail":"Session not found","code":"session_not_found"}'))
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with impatient_client(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}") as client:
        call = asyncio.create_task(client.get_session(new_key()))
        await is_asked.wait()
        server.close()
        with pytest.raises(errors.SessionNotFound):
            await call


async def test_a_wait_for_a_busy_session_may_take_longer_than_a_call(session_service: ServiceProcess) -> None:
    client = SessionClient(Instances([session_service.url]), timeout_seconds=1, quiet_seconds=0.2)
    key = new_key()
    opened = await client.open_turn(key, OPEN)
    waiting = asyncio.create_task(client.open_turn(key, OPEN.model_copy(update={"wait_seconds": 10})))
    await asyncio.sleep(1.3)
    assert not waiting.done()
    await client.complete_turn(key, opened.turn_id, wire.CompleteTurn(lease_token=opened.lease_token, status="failed"))
    assert (await waiting).session.message_count == 2
    await client.close()
