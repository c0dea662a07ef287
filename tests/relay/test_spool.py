"""The spool against the real store, which is away when its address is not known."""

import asyncio
import os
import time
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from services.relay.spool import Spool
from shared import wire
from shared.discovery import Instances
from shared.errors import SessionServiceUnavailable
from shared.session_client import SessionClient, SessionKey
from tests.processes import ServiceProcess, free_port


class Store:
    """session_service as one relay sees it: `away`, or `back`."""

    def __init__(self, url: str, folder: Path) -> None:
        self._url = url
        self._instances = Instances([url])
        self.folder = folder
        self.client = SessionClient(self._instances)
        self.spool = self.new_spool()

    def away(self) -> None:
        self._instances.replace([f"http://127.0.0.1:{free_port()}"])

    def back(self) -> None:
        self._instances.replace([self._url])

    def new_spool(self) -> Spool:
        """A spool as the next relay on this folder has it."""
        spool = Spool(self.folder, self.client, timeout_seconds=2)
        spool.load()
        return spool

    async def open(self, key: SessionKey) -> wire.TurnOpened:
        self.back()
        request = wire.OpenTurn(
            messages=[wire.NewMessage(role="user", content="Hi")], create_session=wire.CreateSessionInTurn()
        )
        return await self.client.open_turn(key, request)

    async def contents(self, key: SessionKey) -> list[str]:
        self.back()
        return [message.content for message in (await self.client.list_messages(key)).messages]

    def entries(self) -> list[str]:
        return sorted(path.name for path in self.folder.glob("*.json"))


@pytest_asyncio.fixture(loop_scope="session")
async def store(session_service: ServiceProcess, tmp_path: Path) -> AsyncIterator[Store]:
    store = Store(session_service.url, tmp_path / "spool")
    yield store
    await store.client.close()


@pytest.fixture
def key() -> SessionKey:
    return SessionKey("spooler", uuid.uuid4().hex)


def answer(turn: wire.TurnOpened, text: str) -> wire.CompleteTurn:
    message = wire.NewMessage(role="assistant", content=[{"type": "text", "text": text}])
    return wire.CompleteTurn(
        lease_token=turn.lease_token, status="completed", messages=[message], usage={"output_tokens": 3}
    )


async def test_what_the_store_takes_is_not_kept(store: Store, key: SessionKey) -> None:
    turn = await store.open(key)
    assert await store.spool.complete(key, turn.turn_id, answer(turn, "a")) == "yes"
    assert store.entries() == []
    await store.spool.settle(key)


async def test_what_waits_is_delivered_before_the_session_is_used(store: Store, key: SessionKey) -> None:
    turn = await store.open(key)
    store.away()
    assert await store.spool.complete(key, turn.turn_id, answer(turn, "a")) == "deferred"
    assert len(store.entries()) == 1
    assert store.spool.count == 1
    assert store.spool.oldest_age_seconds > 0
    with pytest.raises(SessionServiceUnavailable):
        await store.spool.settle(key)
    store.back()
    await store.spool.settle(key)
    assert store.entries() == []
    assert store.spool.count == 0
    assert await store.contents(key) == ["Hi", "a"]


async def test_it_survives_a_restart_and_is_applied_once(store: Store, key: SessionKey) -> None:
    turn = await store.open(key)
    store.away()
    await store.spool.complete(key, turn.turn_id, answer(turn, "a"))
    next_one, another = store.new_spool(), store.new_spool()
    store.back()
    await asyncio.gather(next_one.settle(key), another.settle(key), store.spool.settle(key))
    assert await store.contents(key) == ["Hi", "a"]
    assert store.entries() == []


async def test_it_is_delivered_by_itself(store: Store, key: SessionKey) -> None:
    turn = await store.open(key)
    delivering = asyncio.create_task(store.spool.keep_delivering())
    store.away()
    await store.spool.complete(key, turn.turn_id, answer(turn, "a"))
    await asyncio.sleep(0.1)
    assert store.spool.count == 1
    store.back()
    async with asyncio.timeout(5):
        while store.spool.count:
            await asyncio.sleep(0.02)
    delivering.cancel()
    assert await store.contents(key) == ["Hi", "a"]


async def test_what_the_store_refuses_for_good_is_set_aside(store: Store, key: SessionKey) -> None:
    turn = await store.open(key)
    store.away()
    wrong = wire.CompleteTurn(lease_token="of somebody else", status="completed")
    assert await store.spool.complete(key, turn.turn_id, wrong) == "deferred"
    name = store.entries()[0]
    store.back()
    await store.spool.settle(key)
    assert store.entries() == []
    assert (store.folder / "refused" / name).exists()
    assert await store.spool.complete(key, turn.turn_id, wrong) == "none"


async def test_a_relay_that_stops_in_mid_completion_leaves_it_on_disk(store: Store, key: SessionKey) -> None:
    turn = await store.open(key)
    over = asyncio.Event()

    async def say_nothing(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await over.wait()
        writer.close()

    server = await asyncio.start_server(say_nothing, "127.0.0.1", 0)
    store._instances.replace([f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"])
    completing = asyncio.create_task(store.spool.complete(key, turn.turn_id, answer(turn, "a")))
    await asyncio.sleep(0.1)
    completing.cancel()
    await asyncio.gather(completing, return_exceptions=True)
    over.set()
    server.close()
    await server.wait_closed()
    assert len(store.entries()) == 1
    store.back()
    await store.new_spool().settle(key)
    assert await store.contents(key) == ["Hi", "a"]


async def test_a_damaged_entry_is_set_aside(store: Store, key: SessionKey) -> None:
    (store.folder / "0.json").write_text('{"user_id": "half')
    spool = store.new_spool()
    assert spool.count == 0
    assert (store.folder / "refused" / "0.json").exists()


async def test_drafts_of_relays_that_were_killed_do_not_pile_up(store: Store) -> None:
    old, young = (store.folder / f"{name}.part" for name in ("old", "young"))
    for draft in (old, young):
        draft.write_text('{"user_id": "half')
    os.utime(old, (time.time() - 7200, time.time() - 7200))
    spool = store.new_spool()
    assert spool.count == 0
    assert list(store.folder.iterdir()) == [young]  # of a relay on the same folder, perhaps


async def test_a_folder_that_cannot_be_written_is_no_persistence(store: Store, key: SessionKey) -> None:
    turn = await store.open(key)
    store.away()
    store.folder.rename(store.folder.with_name("gone"))
    assert await store.spool.complete(key, turn.turn_id, answer(turn, "a")) == "none"
