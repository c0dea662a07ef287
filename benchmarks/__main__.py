"""python -m benchmarks: measures the real stack on this machine; nothing here passes or fails by a time."""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import appends, lists, pages, plots, process, relay, turns
from benchmarks.conditions import conditions_of
from benchmarks.figures import Figure, Findings, markdown, table
from benchmarks.load import WrongAnswer
from benchmarks.pgbench import PgbenchFailed
from benchmarks.stack import LONG, NORMAL, QUICK, Stack, stack_of

BENCHMARKS: dict[str, Callable[[Stack], Findings]] = {
    "appends": appends.run,
    "turns": turns.run,
    "contexts": turns.contexts,
    "creates": turns.creates,
    "latency": relay.added_latency,
    "streams": relay.streams,
    "closed": relay.closed_loop,
    "held": relay.held_streams,
    "lists": lists.run,
    "memory": process.memory,
    "start": process.start,
    "indexing": process.indexing,
}
"""By name, in the order in which they run."""


def _arguments() -> argparse.Namespace:
    told = "\n".join(f"  {name:10} {_told(run)}" for name, run in BENCHMARKS.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        epilog=f"benchmarks:\n{told}\n\nWhat the figures mean stands in docs/performance.md.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="which benchmarks (default: all)")
    pace = parser.add_mutually_exclusive_group()
    pace.add_argument("--quick", action="store_true", help="a minute in all: shows that it works")
    pace.add_argument("--long", action="store_true", help="half an hour in all: a million sessions, 100,000 turns")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out"), help="folder of results (%(default)s)")
    parser.add_argument("--write", action="store_true", help="put the result on the page docs/performance.md")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - BENCHMARKS.keys():
        parser.error(f"no such benchmark: {', '.join(sorted(unknown))}")
    return arguments


def _told(run: Callable[[Stack], Findings]) -> str:
    return (run.__doc__ or "").splitlines()[0]


def _measure(name: str, stack: Stack, figures: list[Figure], curves: dict[str, Any]) -> None:
    started_at = time.monotonic()
    found = BENCHMARKS[name](stack)
    for figure in found.figures:
        figure.benchmark = name
    figures += found.figures
    curves |= found.curves
    print(f"{name}: {time.monotonic() - started_at:.0f} s", file=sys.stderr)
    print(table(found.figures) + "\n", file=sys.stderr, flush=True)


def main() -> int:
    arguments = _arguments()
    pace = QUICK if arguments.quick else LONG if arguments.long else NORMAL
    figures: list[Figure] = []
    curves: dict[str, Any] = {}
    started_at = time.monotonic()
    try:
        with stack_of(pace) as stack:
            conditions = conditions_of(pace, stack.run_sql("SHOW server_version"))
            for name in arguments.names or BENCHMARKS:
                _measure(name, stack, figures, curves)
    except (WrongAnswer, PgbenchFailed) as error:
        print(f"there is no result: {error}", file=sys.stderr)
        return 1
    conditions["seconds"] = round(time.monotonic() - started_at)
    result = {"conditions": conditions, "figures": [each.wire() for each in figures], "curves": curves}
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "result.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    (arguments.out / "result.md").write_text(markdown(figures))
    if arguments.write:
        pages.write("performance.md", markdown(figures), conditions)
    drawn = plots.draw(result, arguments.out)
    print(table(figures))
    print(f"\n{arguments.out}: result.json, result.md, {', '.join(path.name for path in drawn)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
