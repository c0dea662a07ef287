"""The cut test: the same clients and the same checks, with bad links instead of kills."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from tests.fire.audit import audit
from tests.fire.clients import Doors
from tests.fire.kill import make_clients, until_all_go_on
from tests.fire.link import DEAF, Link
from tests.fire.report import Report
from tests.fire.world import World, world
from tests.processes import ROOT

CUT = "links stall, reset, cut half-way"
UNHEARD = "links cut after the work is done and before it is heard"
RATES = {
    "clients-store": 0.06,
    "clients-relay": 0.08,
    "relay-store": 0.03,
    "services-postgres": 0.004,
    "relay-upstream": 0.03,
}


async def run(
    report: Report,
    *,
    seconds: float = 60,
    clients: int = 32,
    seed: int = 0,
    source: Path = ROOT,
    rates: dict[str, float] | None = None,
    in_a_hurry: bool = False,
    migrated: Path | None = None,
) -> None:
    """Links go wrong for so many seconds. `in_a_hurry`: what is held in the end is not waited for."""
    async with bad_links() as links:

        async def prepare(made: World) -> None:
            await lay(made, links, f"{seed}")

        async with world(prepare=prepare, source=source, migrated=migrated) as made:
            doors = Doors([links["clients-store"].url], [links["clients-relay"].url], made.store_headers)
            cast = await make_clients(made, doors, report, clients, f"{seed}")
            over = asyncio.Event()
            running = [asyncio.create_task(client.run(over)) for client in cast]
            try:
                for name, rate in (RATES if rates is None else rates).items():
                    links[name].rate = rate
                for _ in range(int(seconds)):
                    await asyncio.sleep(1)
                    told = sum(client.done for client in cast)
                    report.say(f"{sum(link.faults.total() for link in links.values())} faults, {told} acknowledged")
                for link in links.values():
                    link.rate = 0
                await until_all_go_on(cast, report)
            finally:
                over.set()
                await asyncio.gather(*running)
            count_faults(links, report)
            await audit(made, cast, report, held=not in_a_hurry)


@asynccontextmanager
async def bad_links() -> AsyncIterator[dict[str, Link]]:
    links: dict[str, Link] = {}
    try:
        yield links
    finally:
        for link in links.values():
            with contextlib.suppress(AttributeError):
                await link.close()


async def lay(made: World, links: dict[str, Link], seed: str = "") -> None:
    """Puts a link before everything that has an address."""
    postgres = parse_qs(urlsplit(made.sql_url).query)
    socket = f"{postgres['host'][0]}/.s.PGSQL.{postgres['port'][0]}"
    links |= {
        "clients-store": Link("clients-store", seed=seed, port=made.store_ports[0]),
        "clients-relay": Link("clients-relay", seed=seed, port=made.relay_ports[0]),
        "relay-store": Link("relay-store", seed=seed, port=made.store_ports[0]),
        "services-postgres": Link("services-postgres", seed=seed, path=socket),
        "relay-upstream": Link("relay-upstream", seed=seed, port=urlsplit(made.upstream.url).port or 0),
    }
    for link in links.values():
        await link.open()
    made.store_url = links["relay-store"].url
    made.database_url = f"postgresql://postgres@127.0.0.1:{links['services-postgres'].port}/postgres"
    made.upstream_url = links["relay-upstream"].url


def count_faults(links: dict[str, Link], report: Report) -> None:
    total: Counter[str] = Counter()
    for name, link in links.items():
        total += link.faults
        report.note(UNHEARD, **{name: link.faults[DEAF]})
    report.trial(UNHEARD, total.pop(DEAF, 0))
    report.trial(CUT, total.total())
    report.note(CUT, **dict(total.items()))
