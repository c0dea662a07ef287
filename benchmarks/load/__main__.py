"""python -m benchmarks.load: reads a plan (JSON) from standard input, writes its result (JSON) to standard output.

Exit code 1, and the reason on standard error, when an answer was not right.
"""

import gc
import json
import sys
from typing import Any

import uvloop

from benchmarks.load import WrongAnswer, chat, store
from benchmarks.load.http import Connections
from benchmarks.load.loops import closed, opened

WORKS: dict[str, Any] = {
    "appends": store.Appends,
    "turns": store.Turns,
    "prefill": store.Prefill,
    "contexts": store.Contexts,
    "creates": store.Creates,
    "gets": store.Gets,
    "plain": chat.Plain,
    "stream": chat.Stream,
}


async def _run(plan: dict[str, Any]) -> dict[str, Any]:
    work = WORKS[plan["work"]](plan)
    connections = Connections(plan["url"])
    await work.prepare(connections)
    # Nothing of what a run holds is garbage, and a collection would be taken for a slow service.
    gc.collect()
    gc.disable()
    pace = {name: plan[name] for name in ("workers", "seconds", "rate", "count") if plan.get(name) is not None}
    result = await (opened if "rate" in plan else closed)(work.step, connections, **pace)
    await work.verify(connections)
    connections.close()
    return result | {"extra": work.extra}


def main() -> int:
    plan = json.load(sys.stdin)
    try:
        result = uvloop.run(_run(plan))
    except (WrongAnswer, ConnectionError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    json.dump(result, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
