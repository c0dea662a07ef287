"""Runs scenarios and prints what held; the exit code is 1 when a promise was broken.

Its one invariant: a scenario that crashes counts as a broken promise, and the others still run.
"""

import argparse
import asyncio
import random
import sys
import traceback
from collections.abc import Awaitable, Callable
from pathlib import Path

from tests.fire import cuts, flood, hostile, kill, leaks, operations, rights, slow
from tests.fire.report import Report
from tests.fire.world import World, world

Scenario = Callable[[Report, argparse.Namespace], Awaitable[None]]

SCENARIOS: dict[str, tuple[str, Scenario]] = {
    "kill": (
        "every part killed at random while clients write and ask",
        lambda report, told: kill.run(report, kills=told.kills, seconds=told.seconds, seed=told.seed),
    ),
    "cuts": (
        "links that stall, reset and cut, above all after the work is done",
        lambda report, told: cuts.run(report, seconds=told.seconds or 60, seed=told.seed),
    ),
    "hostile": (
        "ten thousand requests that nobody should send, and calls made up from the descriptions",
        lambda report, told: _in_world(report, lambda report, made: hostile.run(report, made, seed=told.seed)),
    ),
    "flood": (
        "ten times what relay is set to serve, and a crowd at the store",
        lambda report, told: flood.run(report, seconds=told.seconds or 60),
    ),
    "slow": (
        "slow and broken clients, and 10,000 idle connections",
        lambda report, told: slow.run(report, idle=told.idle),
    ),
    "secrets": (
        "everything that has a secret fails, then it is looked for everywhere",
        lambda report, _: leaks.run(report),
    ),
    "rights": ("every route by every kind of caller", lambda report, _: _in_world(report, rights.run)),
    "rolling": (
        "instances restarted one after the other under load",
        lambda report, told: operations.run_rolling(report, clients=32, seed=told.seed),
    ),
    "clocks": ("clocks that jump by an hour", lambda report, _: operations.run_clocks(report)),
    "disk": ("no room for the spool", lambda report, _: operations.run_full_disk(report)),
}


async def _in_world(report: Report, run: Callable[[Report, World], Awaitable[None]]) -> None:
    async with world() as made:
        await run(report, made)


def _arguments() -> argparse.Namespace:
    listed = "\n".join(f"  {name:<9} {what}" for name, (what, _) in SCENARIOS.items())
    parser = argparse.ArgumentParser(
        prog="python -m tests.fire",
        description="Starts the real stack, breaks things, and checks promises. Scenarios:\n" + listed,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("scenario", nargs="*", help="which ones, in this order; none: all of them")
    parser.add_argument("--seconds", type=float, default=0, help="how long kill, cuts and flood last, each")
    parser.add_argument("--minutes", type=float, default=0, help="the same in minutes")
    parser.add_argument("--kills", type=int, default=60, help="kills of a kill run, at least (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="of all that is random")
    parser.add_argument("--idle", type=int, default=10_000, help="idle connections of slow (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the report there")
    told = parser.parse_args()
    told.seconds = told.seconds or told.minutes * 60
    told.scenario = told.scenario or list(SCENARIOS)
    if unknown := set(told.scenario) - set(SCENARIOS):
        parser.error(f"no such scenario: {', '.join(sorted(unknown))}")
    return told


async def _run(told: argparse.Namespace, report: Report) -> None:
    for name in told.scenario:
        try:
            with report.of(name):
                report.say(SCENARIOS[name][0])
                await SCENARIOS[name][1](report, told)
        except Exception:
            traceback.print_exc()


def main() -> int:
    told = _arguments()
    report = Report(seed=told.seed)
    print(f"seed {told.seed}", file=sys.stderr)
    try:
        asyncio.run(_run(told, report))
    except KeyboardInterrupt:
        report.violation("the scenario runs to its end", "interrupted")
    print(report.table())
    if told.json:
        told.json.write_text(report.as_json())
    again = f"python -m tests.fire {' '.join(told.scenario)} --seed {told.seed}"
    print("\nall promises were kept" if report.is_kept else f"\nBROKEN; the same again: {again}")
    return 0 if report.is_kept else 1


if __name__ == "__main__":
    sys.exit(main())
