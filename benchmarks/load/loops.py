"""The two ways of putting load on a service.

Closed: each connection sends its next request when it has its answer, so a slow service gets less to do. Open: work
falls due at fixed moments, whether or not earlier work is done, and its duration counts from the moment when it was
due; so waiting in a queue, in the service or in front of it, is part of the figure (no coordinated omission).
"""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from time import monotonic
from typing import Any

from benchmarks.load.http import Connections

Step = Callable[[Connections, int], Awaitable[None]]
"""Does one piece of work for the worker of this number."""


async def closed(
    step: Step, connections: Connections, *, workers: int, seconds: float, count: int | None = None
) -> dict[str, Any]:
    """So many workers, each at its next piece of work as soon as the last is done, for a time or a count in all."""
    await connections.warm(workers)
    ms: list[float] = []
    started = monotonic()
    until = started + seconds
    left = [count if count is not None else -1]

    async def work(worker: int) -> None:
        began = monotonic()
        while began < until and left[0]:
            left[0] -= 1
            await step(connections, worker)
            ended = monotonic()
            ms.append((ended - began) * 1000)
            began = ended

    await _all([work(worker) for worker in range(workers)])
    return {"done": len(ms), "seconds": monotonic() - started, "ms": ms}


async def opened(step: Step, connections: Connections, *, workers: int, seconds: float, rate: float) -> dict[str, Any]:
    """`rate` pieces of work a second; those of one worker may overlap, so a worker is a number and no more."""
    await connections.warm(min(workers, 32))
    loop = asyncio.get_running_loop()
    count = int(rate * seconds)
    ms = [0.0] * count
    tasks: list[asyncio.Task[None]] = []
    all_begun = asyncio.Event()
    started = monotonic() + 0.05

    async def work(number: int) -> None:
        due = started + number / rate
        await step(connections, number % workers)
        ms[number] = (monotonic() - due) * 1000

    def begin(number: int) -> None:
        tasks.append(asyncio.create_task(work(number)))
        if number == count - 1:
            all_begun.set()

    def tick() -> None:
        for number in range(count):
            # A thread wakes up to the moment; the timers of an event loop are a millisecond coarse.
            time.sleep(max(0.0, started + number / rate - monotonic()))
            loop.call_soon_threadsafe(begin, number)

    threading.Thread(target=tick, daemon=True).start()
    await all_begun.wait()
    await _all(tasks)
    return {"done": count, "seconds": monotonic() - started, "ms": ms}


async def _all(works: list[Any]) -> None:
    tasks = [asyncio.ensure_future(work) for work in works]
    done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    for task in pending:
        task.cancel()
    for task in done:
        task.result()
