"""The processes themselves: memory while many turns pass, and starting."""

from contextlib import ExitStack
from time import monotonic

from benchmarks import load
from benchmarks.figures import Findings, alone, at_most, share
from benchmarks.stack import QUIET, Stack, memory_bytes
from benchmarks.ways import Ways, shared
from tests.processes import Process, free_port, start_session_service
from tests.relay.calls import start_relay

_MIB = 2**20
_STEPS = 10
_SETTLED_AFTER = 2
"""Of the steps: the first fifth of the turns fills caches and pools."""


def memory(stack: Stack) -> Findings:
    """Memory of both services, idle and while many turns pass through them."""
    found = Findings()
    with ExitStack() as started:
        ways = Ways(stack, started)
        services: dict[str, Process] = {"session_service": ways.store, "relay": ways.relay}
        sizes = {name: [memory_bytes(process) / _MIB] for name, process in services.items()}
        for _ in range(_STEPS):
            ways.stored("plain", workers=16, seconds=1200, count=stack.pace.turns // _STEPS)
            for name, process in services.items():
                sizes[name].append(memory_bytes(process) / _MIB)
    for name, taken in sizes.items():
        found.add(alone(f"{name}, memory idle", "MiB", taken[0]))
        growth = (taken[-1] / taken[_SETTLED_AFTER] - 1) * 100
        what = f"{name}, growth from {stack.pace.turns // 5:,} to {stack.pace.turns:,} turns"
        found.add(alone(what, "%", growth, at_most(10)))
        found.curves[f"memory of {name}"] = [(step / _STEPS, size) for step, size in enumerate(taken)]
    return found


def start(stack: Stack) -> Findings:
    """Starting both services at once, on a database that is there, until both are ready."""
    found = Findings()
    database_url = stack.database()
    port = free_port()
    took = []
    for _ in range(stack.pace.rounds + 1):  # the first one may have to read the program from disk
        with ExitStack() as started:
            began = monotonic()
            service = start_session_service(database_url, stack.folder, port, False)
            store = started.enter_context(service)
            folder = stack.folder / "started"
            started.enter_context(start_relay(database_url, store.url, folder, QUIET))
            store.wait_until("/health/ready")
            took.append(monotonic() - began)
    found.add(alone("start of both services, warm", "s", min(took[1:]), at_most(8)))
    return found


def indexing(stack: Stack) -> Findings:
    """Does indexing for search, beside the request path, slow appends?"""
    found = Findings()
    with_index = shared(stack).store
    ours: list[float] = []
    theirs: list[float] = []
    with stack.store(stack.database(), NEWS_INTERVAL_SECONDS="0") as without:
        load.run("appends", without.url, workers=32, seconds=60, count=500)
        for _ in range(stack.pace.rounds):
            for service, rates in ((with_index, ours), (without, theirs)):
                rates.append(load.run("appends", service.url, workers=32, seconds=stack.pace.seconds).rate)
    found.add(share("appends while search is indexed", "/s", ours, "no indexing", theirs))
    return found
