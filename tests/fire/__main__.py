"""Runs scenarios and prints what held; the exit code is 1 when a promise was broken.

Its one invariant: a scenario that crashes counts as a broken promise, and the others still run.
"""

import argparse
import asyncio
import random
import sys
import tempfile
import traceback
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path

from shared import embedded_postgres
from tests.conftest import migrate
from tests.fire import cuts, flood, hostile, kill, leaks, operations, rights, slow
from tests.fire.report import Report
from tests.fire.world import world


@dataclass(frozen=True)
class Size:
    """How much of it there is; `cases` are those of hostile for each service, 0: all, `parts` those restarted.

    `examples`: how many schemathesis makes up for each call, 0: it does not run.
    `in_a_hurry`: what a killed or cut-off part held is not waited for. `migrated` is a Postgres to copy.
    """

    migrated: Path
    seed: int
    clients: int = 32
    kills: int = 60
    kill_seconds: float = 0
    cut_seconds: float = 60
    flood_seconds: float = 60
    idle: int = 10_000
    cases: int = 0
    examples: int = 20
    parts: int = 4
    in_a_hurry: bool = False

    def within(self, minutes: float) -> "Size":
        """So much as takes about so long, with scenarios side by side."""
        is_short = minutes < 3
        return replace(
            self,
            clients=12 if is_short else 32,
            kills=max(1, round(12 * minutes)),
            cut_seconds=max(1, 15 * minutes - 10),
            flood_seconds=max(1, min(60, 15 * minutes - 10)),
            idle=min(10_000, round(2_000 * minutes)),
            cases=max(1, round(500 * minutes)),
            examples=0 if is_short else min(20, round(minutes)),
            parts=2 if is_short else 4,
            in_a_hurry=is_short,
        )


Scenario = Callable[[Report, Size], Awaitable[None]]


async def _kill(report: Report, size: Size) -> None:
    await kill.run(
        report,
        clients=size.clients,
        kills=size.kills,
        seconds=size.kill_seconds,
        seed=size.seed,
        in_a_hurry=size.in_a_hurry,
        migrated=size.migrated,
    )


async def _cuts(report: Report, size: Size) -> None:
    await cuts.run(report, seconds=size.cut_seconds, seed=size.seed, in_a_hurry=size.in_a_hurry, migrated=size.migrated)


async def _hostile(report: Report, size: Size) -> None:
    async with world(migrated=size.migrated) as made:
        await hostile.run(report, made, at_most=size.cases, seed=size.seed, examples=size.examples)


async def _rights(report: Report, size: Size) -> None:
    async with world(migrated=size.migrated) as made:
        await rights.run(report, made)


async def _rolling(report: Report, size: Size) -> None:
    order = ("store-0", "relay-0", "store-1", "relay-1")[: size.parts]
    await operations.run_rolling(report, clients=size.clients, seed=size.seed, order=order, migrated=size.migrated)


SCENARIOS: dict[str, tuple[str, Scenario]] = {
    "kill": ("every part killed at random while clients write and ask", _kill),
    "cuts": ("links that stall, reset and cut, above all after the work is done", _cuts),
    "hostile": ("ten thousand requests that nobody should send, and calls made up from the descriptions", _hostile),
    "flood": (
        "ten times what relay is set to serve, and a crowd at the store",
        lambda report, size: flood.run(report, seconds=size.flood_seconds, migrated=size.migrated),
    ),
    "slow": (
        "slow and broken clients, and thousands of idle connections",
        lambda report, size: slow.run(report, idle=size.idle, migrated=size.migrated),
    ),
    "secrets": (
        "everything that has a secret fails, then it is looked for everywhere",
        lambda report, size: leaks.run(report, migrated=size.migrated),
    ),
    "rights": ("every route by every kind of caller", _rights),
    "rolling": ("instances restarted one after the other under load", _rolling),
    "clocks": (
        "clocks that jump by an hour",
        lambda report, size: operations.run_clocks(report, migrated=size.migrated),
    ),
    "disk": ("no room for the spool", lambda report, size: operations.run_full_disk(report, migrated=size.migrated)),
}
LANES = (("kill", "hostile", "rights", "secrets", "slow"), ("rolling", "clocks", "disk", "cuts"))
ALONE = ("flood",)
"""What goes on side by side where there are only so many minutes, and what is measured and so goes on alone."""


def _arguments() -> argparse.Namespace:
    listed = "\n".join(f"  {name:<9} {what}" for name, (what, _) in SCENARIOS.items())
    parser = argparse.ArgumentParser(
        prog="python -m tests.fire",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Starts the real stack, breaks things, and checks promises. Scenarios:\n" + listed,
    )
    parser.add_argument("scenario", nargs="*", help="which ones, in this order; none: all of them")
    parser.add_argument("--without", action="append", default=[], metavar="SCENARIO", help="all but this one")
    parser.add_argument("--minutes", type=float, help="about so long in all, with scenarios side by side")
    parser.add_argument("--seconds", type=float, help="how long kill, cuts and flood last, each")
    parser.add_argument("--kills", type=int, help="kills of a kill run, at least (60, or 12 a minute)")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="of all that is random")
    parser.add_argument("--idle", type=int, help="idle connections of slow (10000, or 2000 a minute)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the report there")
    told = parser.parse_args()
    if told.minutes is not None and told.minutes <= 0:
        parser.error("--minutes must be above 0")
    if unknown := {*told.scenario, *told.without} - set(SCENARIOS):
        parser.error(f"no such scenario: {', '.join(sorted(unknown))}")
    told.scenario = [name for name in told.scenario or SCENARIOS if name not in told.without]
    return told


def _size(told: argparse.Namespace, migrated: Path) -> Size:
    size = Size(migrated, told.seed)
    if told.minutes is not None:
        size = size.within(told.minutes)
    if told.seconds is not None:
        size = replace(size, kill_seconds=told.seconds, cut_seconds=told.seconds, flood_seconds=told.seconds)
    if told.kills is not None:
        size = replace(size, kills=told.kills)
    return size if told.idle is None else replace(size, idle=told.idle)


async def _run(told: argparse.Namespace, report: Report, size: Size) -> None:
    async def one_by_one(names: list[str]) -> None:
        for name in names:
            try:
                with report.of(name):
                    report.say(SCENARIOS[name][0])
                    await SCENARIOS[name][1](report, size)
            except Exception:
                traceback.print_exc()

    if told.minutes is None:
        await one_by_one(told.scenario)
    else:
        lanes = [[name for name in lane if name in told.scenario] for lane in (*LANES, ALONE)]
        await asyncio.gather(*map(one_by_one, lanes[:-1]))
        await one_by_one(lanes[-1])


def main() -> int:
    told = _arguments()
    report = Report(seed=told.seed)
    print(f"seed {told.seed}", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="fire-") as folder:
        Path(folder).chmod(0o755)
        migrated = Path(folder, "migrated")
        try:
            migrate(embedded_postgres.start(migrated))
            embedded_postgres.stop(migrated)
            asyncio.run(_run(told, report, _size(told, migrated)))
        except KeyboardInterrupt:
            report.violation("the scenario runs to its end", "interrupted")
    print(report.table())
    if told.json:
        told.json.write_text(report.as_json())
    again = " ".join(sys.argv[1:] if "--seed" in sys.argv else [*sys.argv[1:], "--seed", str(told.seed)])
    print("\nall promises were kept" if report.is_kept else f"\nBROKEN; the same again: python -m tests.fire {again}")
    return 0 if report.is_kept else 1


if __name__ == "__main__":
    sys.exit(main())
