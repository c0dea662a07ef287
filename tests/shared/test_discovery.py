"""Finding instances through a real Consul agent, through its restarts, and without it."""

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, suppress
from itertools import pairwise
from pathlib import Path

import pytest

from shared.discovery import Consul, Instances, Registration, Watch
from tests.processes import Process, free_port, start_consul
from tests.shared.servers import answer, serving

HEALTHY = answer(200, b"{}")


async def until(is_so: Callable[[], bool], seconds: float) -> float:
    """Waits until it is so; how long that took."""
    began = time.monotonic()
    while not is_so():
        assert time.monotonic() - began < seconds
        await asyncio.sleep(0.02)
    return time.monotonic() - began


@asynccontextmanager
async def running(*forever: object) -> AsyncIterator[list["asyncio.Task[None]"]]:
    tasks = [asyncio.ensure_future(each) for each in forever]  # type: ignore[call-overload]
    try:
        yield tasks
        assert not any(task.done() for task in tasks)
    finally:
        for task in tasks:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task


@asynccontextmanager
async def agent_at(port: int) -> AsyncIterator[Consul]:
    agent = Consul("127.0.0.1", port)
    try:
        yield agent
    finally:
        await agent.close()


async def test_registered_watched_deregistered(consul: Process) -> None:
    instances = Instances()
    async with AsyncExitStack() as stack:
        agent = await stack.enter_async_context(agent_at(consul.port))
        servers = [await stack.enter_async_context(serving(HEALTHY)) for _ in range(2)]
        one, two = [Registration(agent, "svc-a", "127.0.0.1", server.port) for server in servers]
        await stack.enter_async_context(running(Watch(agent, "svc-a", instances).run()))
        first = asyncio.create_task(instances.first(10))
        await asyncio.sleep(0.1)
        assert not first.done()
        await one.register()
        await asyncio.wait_for(first, 2)
        await until(lambda: instances.urls == [servers[0].url], 2)
        await two.register()
        assert await until(lambda: instances.urls == sorted(each.url for each in servers), 2) < 1
        services = await agent.agent.services()
        assert services[one.service_id]["Service"] == "svc-a"
        assert one.service_id == f"svc-a-127.0.0.1-{servers[0].port}"
        await one.deregister()
        assert await until(lambda: instances.urls == [servers[1].url], 2) < 1
        await two.deregister()
        await asyncio.sleep(0.3)
        assert instances.urls == [servers[1].url]  # none at all is not believed at once
        await one.register()
        await until(lambda: instances.urls == [servers[0].url], 2)
        assert one.service_id in await agent.agent.services()
        await one.deregister()


async def test_what_is_not_passing_is_left_out(consul: Process) -> None:
    instances = Instances()
    async with AsyncExitStack() as stack:
        agent = await stack.enter_async_context(agent_at(consul.port))
        good = await stack.enter_async_context(serving(HEALTHY))
        registration = Registration(agent, "svc-b", "127.0.0.1", good.port)
        await registration.register()
        await agent.agent.service.register(
            "svc-b", service_id="ill", address="127.0.0.1", port=1, check={"TTL": "1h", "Status": "critical"}
        )
        await stack.enter_async_context(running(Watch(agent, "svc-b", instances).run()))
        await until(lambda: instances.urls == [good.url], 3)
        await agent.agent.check.ttl_pass("service:ill")
        await until(lambda: len(instances.urls) == 2, 2)
        await agent.agent.check.ttl_fail("service:ill")
        await until(lambda: instances.urls == [good.url], 2)
        for each in (registration.service_id, "ill"):
            await agent.agent.service.deregister(each)


async def forgotten(consul: Process) -> None:
    """An agent that forgets an instance gets it again, without anyone's doing."""
    async with AsyncExitStack() as stack:
        agent = await stack.enter_async_context(agent_at(consul.port))
        server = await stack.enter_async_context(serving(HEALTHY))
        registration = Registration(agent, "svc-c", "127.0.0.1", server.port)
        instances = Instances()
        await stack.enter_async_context(running(registration.keep(), Watch(agent, "svc-c", instances).run()))
        await until(lambda: instances.urls == [server.url], 3)
        await agent.agent.service.deregister(registration.service_id)
        began = time.monotonic()
        while registration.service_id not in await agent.agent.services():
            assert time.monotonic() - began < 12
            assert instances.urls == [server.url]
            await asyncio.sleep(0.1)
        await registration.deregister()


async def restarted(scratch: Path) -> None:
    """Consul comes late, is killed, and comes back empty with its index begun anew; the instances stay in use."""
    port = free_port()
    instances = Instances()
    async with AsyncExitStack() as stack:
        agent = await stack.enter_async_context(agent_at(port))
        one, two = [await stack.enter_async_context(serving(HEALTHY)) for _ in range(2)]
        kept = Registration(agent, "svc-d", "127.0.0.1", one.port)
        await stack.enter_async_context(running(kept.keep(), Watch(agent, "svc-d", instances).run()))
        await asyncio.sleep(0.3)
        assert instances.urls == []
        first_life = ExitStack()
        process = await asyncio.to_thread(first_life.enter_context, start_consul(scratch, port))
        await until(lambda: instances.urls == [one.url], 4)
        for number in range(30):  # so that its index is ahead of the next life's
            await agent.kv.put(f"key-{number}", "x")
        await Registration(agent, "svc-d", "127.0.0.1", two.port).register()
        await until(lambda: len(instances.urls) == 2, 3)
        process.kill()
        first_life.close()
        await asyncio.sleep(1.5)
        assert len(instances.urls) == 2
        began = time.monotonic()
        await kept.deregister()  # to nobody: it gives up, and raises nothing
        assert time.monotonic() - began < 4
        second_life = ExitStack()
        await asyncio.to_thread(second_life.enter_context, start_consul(scratch, port))
        seen = []
        while instances.urls != [one.url]:  # the other is not there any more, and nobody keeps it
            assert time.monotonic() - began < 25
            seen.append(len(instances.urls))
            await asyncio.sleep(0.05)
        assert 0 not in seen
        await Registration(agent, "svc-d", "127.0.0.1", two.port).register()
        assert await until(lambda: len(instances.urls) == 2, 3) < 2
        await asyncio.to_thread(second_life.close)


async def test_forgotten_and_restarted(consul: Process, scratch: Path) -> None:
    """Both take as long as the reconciling does; so they run side by side."""
    await asyncio.gather(forgotten(consul), restarted(scratch))


async def test_none_at_all_is_believed_after_a_while_if_nobody_answers() -> None:
    async with serving(HEALTHY) as alive, agent_at(1) as agent:
        dead = f"http://127.0.0.1:{free_port()}"
        for urls, expected in (
            ([dead], []),
            ([alive.url], [alive.url]),
            ([dead, alive.url], sorted([dead, alive.url])),
        ):
            instances = Instances(urls)
            watch = Watch(agent, "svc", instances)
            await watch._take([])
            assert instances.urls == sorted(urls)
            assert watch._empty_since is not None
            watch._empty_since -= 31
            await watch._take([])
            assert instances.urls == expected


async def test_an_index_that_goes_backwards_is_forgotten() -> None:
    """A Consul whose state was restored: waiting for more than the old index would be waiting for ever."""

    def told(index: int, port: int) -> bytes:
        nodes = [{"Node": {"Address": "127.0.0.1"}, "Service": {"Address": "127.0.0.1", "Port": port}, "Checks": []}]
        return answer(200, json.dumps(nodes).encode(), x_consul_index=str(index))

    instances = Instances()
    async with (
        serving(told(100, 1), told(120, 2), told(7, 3), told(8, 4)) as restored,
        agent_at(restored.port) as agent,
        running(Watch(agent, "svc", instances).run()),
    ):
        await until(lambda: instances.urls == ["http://127.0.0.1:4"], 3)
    indexes = [re.findall(r"[?&]index=(\d+)", line) for line in restored.requests[:4]]
    assert indexes == [[], ["100"], ["120"], []]
    assert all("passing=1" in line or "passing=true" in line.lower() for line in restored.requests)


async def test_addresses_of_nodes() -> None:
    async with agent_at(1) as agent:
        instances = Instances()
        nodes = [
            {"Node": {"Address": "10.0.0.1"}, "Service": {"Address": "", "Port": 1}},
            {"Node": {"Address": "10.0.0.1"}, "Service": {"Address": "10.0.0.2", "Port": 2}},
            {"Node": {"Address": "10.0.0.1"}, "Service": {"Address": "::1", "Port": 3}},
            {"Node": {"Address": "10.0.0.1"}, "Service": {"Address": "host.local", "Port": 4}},
        ]
        await Watch(agent, "svc", instances)._take(nodes)
        assert instances.urls == ["http://10.0.0.1:1", "http://10.0.0.2:2", "http://[::1]:3", "http://host.local:4"]


# ── the set of instances by itself ──────────────────────────────────────────────────────────────


def test_calls_are_spread_in_turn() -> None:
    urls = [f"http://h{number}" for number in range(3)]
    instances = Instances(urls)
    firsts = [instances.in_order()[0].url for _ in range(9)]
    assert {url: firsts.count(url) for url in urls} == dict.fromkeys(urls, 3)
    assert all(sorted(each.url for each in instances.in_order()) == urls for _ in range(5))
    assert Instances().in_order() == []


def test_one_that_failed_rests_longer_each_time_and_comes_last() -> None:
    instances = Instances(["http://a", "http://b"])
    bad = instances.in_order()[0]
    rests = []
    for _ in range(6):
        instances.failed(bad)
        rests.append(bad.rests_until - time.monotonic())
        assert [instances.in_order()[-1].url for _ in range(4)] == [bad.url] * 4
    assert all(later > earlier + 1 for earlier, later in pairwise(rests[:4]))
    assert 1 < rests[0] < rests[-1] <= 60
    instances.worked(bad)
    assert {instances.in_order()[0].url for _ in range(4)} == {"http://a", "http://b"}


def test_what_is_known_of_those_that_stay_is_kept() -> None:
    instances = Instances(["http://a", "http://b"])
    bad = instances.in_order()[0]
    instances.failed(bad)
    instances.replace([bad.url, "http://c"])
    assert instances.urls == sorted([bad.url, "http://c"])
    assert [instances.in_order()[0].url for _ in range(4)] == ["http://c"] * 4
    instances.replace([])
    assert instances.in_order() == []


@pytest.mark.parametrize("known", [False, True])
async def test_waiting_for_the_first(known: bool) -> None:
    instances = Instances(["http://a"] if known else None)
    began = time.monotonic()
    await instances.first(0.2)
    assert (time.monotonic() - began > 0.15) is not known
