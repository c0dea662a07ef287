"""The kill test: clients write and ask while every part is killed at random and started again."""

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

import asyncpg

from shared.embedded_postgres.account import EmbeddedPostgresFailed
from tests.fire.audit import audit
from tests.fire.clients import Appender, Client, Doors, Talker, Turner, User
from tests.fire.report import Report
from tests.fire.world import World, world
from tests.processes import ROOT

KILLED = "parts are killed by SIGKILL and started again"
WEIGHTS = {"store": 5, "relay": 3, "postgres": 4, "consul": 2}
Kinds = tuple[type[Appender], type[Turner] | None, type[Talker]]
_CRASHED = "a part that was not killed goes on"


async def run(
    report: Report,
    *,
    kills: int = 60,
    seconds: float = 0,
    clients: int = 32,
    seed: int = 0,
    source: Path = ROOT,
    only: tuple[str, ...] = (),
    instances: int = 2,
    prepare: Callable[[World], Awaitable[None]] | None = None,
    in_a_hurry: bool = False,
    migrated: Path | None = None,
) -> None:
    """Kills at least so many times, and for at least so many seconds.

    `in_a_hurry`: what a killed relay held runs out at once, and what is held in the end is not waited for.
    """
    async with world(
        prepare=prepare, stores=instances, relays=instances, with_consul=True, source=source, migrated=migrated
    ) as made:
        doors = Doors(
            [made.store(n) for n in range(instances)], [made.relay(n) for n in range(instances)], made.store_headers
        )
        cast = await make_clients(made, doors, report, clients, f"{seed}")
        over = asyncio.Event()
        running = [asyncio.create_task(client.run(over)) for client in cast]
        killer = Killer(made, report, random.Random(f"{seed} kills"), only, in_a_hurry=in_a_hurry)
        try:
            await killer.work(kills, seconds)
            await made.revive()
            await until_all_go_on(cast, report)
        finally:
            over.set()
            await asyncio.gather(*running)
        report.say(f"{sum(client.done for client in cast)} operations were acknowledged")
        await audit(made, cast, report, held=not in_a_hurry)
        report.note(KILLED, **killer.counts, acknowledged=sum(client.done for client in cast))


async def make_clients(
    made: World, doors: Doors, report: Report, count: int, seed: str, kinds: Kinds = (Appender, Turner, Talker)
) -> list[Client]:
    """Two clients a user. All users use the same session ids: what keeps them apart is whose they are."""
    appender, turner, talker = kinds
    cast: list[Client] = []
    http = made.http
    for number in range((count + 1) // 2):
        user = User(f"user-{number}")
        user.key = await made.make_key(user.id, concurrencyLimit=50, totalCostLimit=100_000)
        for place in range(2):
            if number % 3 == 0:
                cast.append(appender(http, doors, user, "log", report, f"{seed} {place}"))
            elif number % 6 == 1 and turner is not None:
                cast.append(turner(http, doors, user, f"turns-{place}", report, seed))
            else:
                one = talker(http, doors, user, f"talk-{place}", report, seed)
                one.streams, one.sends_everything = place == 0, number % 4 == 0
                cast.append(one)
    for client in cast:
        await client.prepare()
    return cast[:count]


async def until_all_go_on(cast: list[Client], report: Report, seconds: float = 90) -> None:
    """Everyone gets something done, now that nothing breaks any more."""
    before = [client.done for client in cast]
    promise = "everyone goes on once everything is back"
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while any(client.done <= was for client, was in zip(cast, before, strict=True)):
                if report.broken(report.scenario).keys() - {KILLED}:
                    break  # whoever has lost something may never go on
                await asyncio.sleep(0.1)
    for client, was in zip(cast, before, strict=True):
        report.check(promise, client.done > was, f"{client.user.id} {client.session_id} has stopped at {was}")


class Killer:
    """Kills parts at random; each comes back after a moment."""

    def __init__(
        self, made: World, report: Report, chance: random.Random, only: tuple[str, ...], *, in_a_hurry: bool
    ) -> None:
        self.counts: Counter[str] = Counter()
        self._world = made
        self._in_a_hurry = in_a_hurry
        self._report = report
        self._random = chance
        self._names = [name for name in ["postgres", *made.parts] if not only or name.split("-")[0] in only]
        self._reviving: set[asyncio.Task[None]] = set()

    async def work(self, kills: int, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        until = loop.time() + seconds
        while self.counts.total() < kills or loop.time() < until:
            await asyncio.sleep(self._random.uniform(0.3, 2.5))
            up = [name for name in self._names if self._world.is_up(name)]
            # A part that has ended by itself is down without anybody having killed it.
            down = {task.get_name() for task in self._reviving}
            for name in set(self._names) - set(up) - down:
                self._report.violation(_CRASHED, f"{name} has ended by itself")
                self._revive_later(name, 0)
            if not up:
                continue
            name = self._random.choices(up, [WEIGHTS[each.split("-")[0]] for each in up])[0]
            await asyncio.to_thread(self._world.kill, name)
            self.counts[name.split("-")[0]] += 1
            self._report.trial(KILLED)
            self._report.trial(_CRASHED)
            self._report.say(f"killed {name} ({self.counts.total()})")
            if self._in_a_hurry and name.startswith("relay"):
                with contextlib.suppress(OSError, asyncpg.PostgresError):
                    await self._world.leases_run_out()
            self._revive_later(name, self._random.uniform(0, 1.5))
        await asyncio.gather(*self._reviving)

    def _revive_later(self, name: str, seconds: float) -> None:
        async def revive() -> None:
            await asyncio.sleep(seconds)
            while not self._world.is_up(name):
                with contextlib.suppress(EmbeddedPostgresFailed):  # killed again while it started
                    await self._world.start(name, wait=False)

        task = asyncio.create_task(revive(), name=name)
        self._reviving.add(task)
        task.add_done_callback(self._reviving.discard)
