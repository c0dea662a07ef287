"""Appends: to many sessions, to one, and how long they take at half of the highest rate."""

import asyncio
import statistics
import uuid
from collections.abc import Awaitable, Callable
from itertools import chain

import asyncpg

from benchmarks import load, pgbench
from benchmarks.figures import Findings, alone, at_least, at_most, curve, percentile, share
from benchmarks.load.store import TEXT
from benchmarks.stack import Stack
from benchmarks.statements import Recorder, Script, Seen, script_of
from benchmarks.ways import shared
from services.session_service import creation, messages
from shared import wire
from shared.json import dump_text, loads

CONNECTIONS = 32
_MESSAGE = wire.NewMessage(role="user", content=TEXT, tokens_used=5)
# A number that no other transaction has: ids may be any text.
NEXT_ID = ("\\set n :n + 1", "\\set message_id (:base + :client_id) * 100000000 + :n")


def recorded(url: str, work: Callable[[Recorder], Awaitable[object]]) -> list[Seen]:
    """The statements that `work` runs."""

    async def record() -> list[Seen]:
        connection = await asyncpg.connect(url)
        try:
            for name in ("json", "jsonb"):
                await connection.set_type_codec(name, schema="pg_catalog", encoder=dump_text, decoder=loads)
            recorder = Recorder(connection, "dev")
            await work(recorder)
            return recorder.seen
        finally:
            await connection.close()

    return asyncio.run(record())


def _script(url: str, user_id: str, sessions: int) -> Script:
    """The service's append, to one of so many sessions (each client has one, or all have the same)."""

    async def append(recorder: Recorder) -> None:
        for number in range(sessions):
            await creation.create(recorder, wire.CreateSession(user_id=user_id, session_id=str(number)))
        recorder.seen.clear()
        await messages.append(recorder, recorder.as_database(), user_id, "0", _MESSAGE)

    variables = {"session_id": ":session", "message_id_array": "ARRAY[:message_id::TEXT]"}
    return script_of(recorded(url, append), variables, before=(*NEXT_ID, f"\\set session :client_id % {sessions}"))


def _pgbench(stack: Stack, url: str, script: Script, clients: int) -> float:
    more = {"n": "0", "base": str(uuid.uuid4().int % 10**8)}
    return pgbench.run(url, script, stack.folder, clients=clients, seconds=stack.pace.seconds, more=more)


def run(stack: Stack) -> Findings:
    """Appends to many sessions, to one, and how long they take at half of the highest rate."""
    found = Findings()
    url, store = shared(stack).database_url, shared(stack).store
    scripts = {sessions: _script(url, f"pgbench-{sessions}", sessions) for sessions in (CONNECTIONS, 1)}
    many: tuple[list[float], list[float]] = ([], [])
    one: tuple[list[float], list[float]] = ([], [])
    load.run("appends", store.url, workers=CONNECTIONS, seconds=60, count=1_000)  # warm
    for _ in range(stack.pace.rounds):
        for (ours, theirs), sessions, clients in ((many, CONNECTIONS, CONNECTIONS), (one, 1, 1)):
            plan = {"workers": CONNECTIONS, "sessions": sessions, "seconds": stack.pace.seconds}
            ours.append(load.run("appends", store.url, **plan).rate)
            theirs.append(_pgbench(stack, url, scripts[sessions], clients))
    found.add(share("appends, 32 connections", "/s", many[0], "pgbench, 32 clients", many[1], at_least(0.30, aim=0.40)))
    found.add(
        share(
            "appends, 32 connections, one session", "/s", one[0], "pgbench, 1 client", one[1], at_least(0.40, aim=1.0)
        )
    )
    # What pgbench has appended is indexed by the service, too, and more of it than any client could send.
    stack.wait_for_index(url)
    rate = statistics.median(many[0]) / 2
    plan = {"workers": CONNECTIONS, "seconds": stack.pace.seconds, "rate": rate}
    paced = [load.run("appends", store.url, **plan).ms for _ in range(stack.pace.rounds)]
    for name, place, target in (("p50", 0.50, None), ("p99", 0.99, at_most(15))):
        value = statistics.median(percentile(ms, place) for ms in paced)
        found.add(alone(f"append, {name} at {rate:.0f}/s, open loop", "ms", value, target))
    found.curves["append"] = curve(list(chain(*paced)))
    return found
