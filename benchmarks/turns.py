"""Turns opened and completed, contexts of long sessions, and creating and getting beside a service without rules."""

import asyncio
import uuid
from time import monotonic

import asyncpg
import httpx

from benchmarks import load, pgbench
from benchmarks.appends import CONNECTIONS, NEXT_ID, recorded
from benchmarks.figures import Findings, at_least, at_most, curve, percentile, share
from benchmarks.load.store import TEXT, Turns
from benchmarks.stack import Stack
from benchmarks.statements import Recorder, Script, script_of
from benchmarks.ways import shared
from services.session_service import batches, completion, opening, sessions
from services.session_service.known import KnownSessions
from shared import wire

_CONTEXT_MESSAGES = 20
_OPENING = wire.OpenTurn(
    messages=[wire.NewMessage(role="user", content=TEXT)],
    context=wire.ContextOptions(max_messages=Turns.max_messages),
)
_VARIABLES = {
    "session_id": ":client_id",
    "message_id_array": "ARRAY[:message_id::TEXT]",
    "turn_id": ":turn_id",
}


def _answer(lease_token: str) -> wire.CompleteTurn:
    return wire.CompleteTurn(
        lease_token=lease_token,
        status="completed",
        messages=[wire.NewMessage(role="assistant", content=[{"type": "text", "text": TEXT}])],
        usage={"input_tokens": 10, "output_tokens": 20},
        stop_reason="end_turn",
        model="test-model",
    )


def _script(url: str, user_id: str) -> Script:
    """One turn whose context has 20 messages, for as many clients as there are connections, a session each.

    The service knows the session from the turn before, so that what reads it is run once.
    """

    async def turn(recorder: Recorder) -> None:
        texts = [wire.NewMessage(role="assistant" if n % 2 else "user", content=TEXT) for n in range(Turns.prefilled)]
        batch = wire.Batch(messages=texts, create_session=wire.CreateSessionInTurn())
        for number in range(CONNECTIONS):
            await batches.append_batch(recorder, user_id, str(number), batch)
        known = KnownSessions(1)
        included = 0
        while abs(included - _CONTEXT_MESSAGES) > 1:  # windows have odd numbers of messages
            recorder.seen.clear()
            await sessions.look(recorder, user_id, "0")
            opened = await opening.open_turn(recorder, user_id, "0", _OPENING, default_max_tokens=100_000, known=known)
            included = len(opened.context.messages)
            answer = _answer(opened.lease_token)
            await completion.complete(recorder, user_id, "0", opened.turn_id, answer, known=known)

    before = (*NEXT_ID, "\\set turn_id :message_id")
    script = script_of(recorded(url, turn), _VARIABLES, before=before, reads_once=True)
    # The turn stores two messages.
    second = max(place for place, line in enumerate(script.lines) if ":message_id" in line)
    script.lines.insert(second, "\\set n :n + 1")
    script.lines.insert(second + 1, NEXT_ID[1])
    return script


def run(stack: Stack) -> Findings:
    """Turns opened and completed, with contexts of 20 messages."""
    found = Findings()
    url, store = shared(stack).database_url, shared(stack).store
    script = _script(url, "pgbench-turns")
    ours, theirs = [], []
    load.run("turns", store.url, workers=CONNECTIONS, seconds=60, count=200)  # warm
    for _ in range(stack.pace.rounds):
        ours.append(load.run("turns", store.url, workers=CONNECTIONS, seconds=stack.pace.seconds).rate)
        more = {"n": "0", "base": str(uuid.uuid4().int % 10**8)}
        theirs.append(
            pgbench.run(url, script, stack.folder, clients=CONNECTIONS, seconds=stack.pace.seconds, more=more)
        )
        asyncio.run(_check(url))
    found.add(share("turns opened and completed", "/s", ours, "pgbench, 32 clients", theirs, at_least(0.25)))
    return found


async def _check(url: str) -> None:
    """pgbench has done the same work: closed turns, and counters that are the rows' sums."""
    connection = await asyncpg.connect(url)
    try:
        wrong = await connection.fetchval(
            "SELECT count(*) FROM dev.sessions AS s WHERE last_seq <> (SELECT count(*) FROM dev.session_messages AS m "
            "WHERE (m.user_id, m.session_id) = (s.user_id, s.session_id))"
        )
        left_open = await connection.fetchval("SELECT count(*) FROM dev.session_turns WHERE status = 'open'")
    finally:
        await connection.close()
    # pgbench is stopped in the middle of its last turns.
    if wrong or left_open > CONNECTIONS:
        raise load.WrongAnswer(f"{wrong} sessions have lost count, {left_open} turns are open")


def contexts(stack: Stack) -> Findings:
    """The context of the last 20 messages, in sessions of three lengths, read one after the other."""
    found = Findings()
    store = shared(stack).store
    lengths = (20, min(1_000, stack.pace.long_session // 2), stack.pace.long_session)
    for length in lengths:
        plan = {"workers": 1, "seconds": 0, "user_id": "reader", "session_id": f"c{length}", "messages": length}
        load.run("prefill", store.url, **plan)
    ms: dict[int, list[float]] = {length: [] for length in lengths}
    medians: dict[int, list[float]] = {length: [] for length in lengths}
    reads = 100 if stack.pace.rounds == 1 else 200
    with httpx.Client(base_url=store.url, trust_env=False, timeout=30) as client:
        for number in range(-1, stack.pace.rounds * 2):
            for _ in range(reads // 2):
                for length in lengths:
                    taken = _read_ms(client, length)
                    if number >= 0:
                        ms[length].append(taken)
            if number >= 0:
                for length in lengths:
                    medians[length].append(percentile(ms[length][-reads // 2 :], 0.5))
    for length in lengths[1:]:
        what = f"context of the last 20 of {length:,} messages, p50"
        found.add(share(what, "ms", medians[length], "of 20 messages", medians[20], at_most(1.3)))
    found.curves |= {f"context, {length:,} messages": curve(ms[length]) for length in lengths}
    return found


def _read_ms(client: httpx.Client, length: int) -> float:
    params: dict[str, str | int] = {"user_id": "reader", "max_messages": 20}
    began = monotonic()
    answer = client.get(f"/api/v1/sessions/c{length}/context", params=params)
    ended = monotonic()
    included = answer.json()["receipt"]["included"]
    if included != [[length - 19, length]]:
        raise load.WrongAnswer(f"of {length} messages the context has {included}")
    return (ended - began) * 1000


def creates(stack: Stack) -> Findings:
    """Creating sessions, and getting one with 20 messages, over HTTP."""
    found = Findings()
    ways = shared(stack)
    store, thin = ways.store, ways.thin
    plan = {"workers": 1, "seconds": 0, "user_id": "reader", "session_id": "twenty", "messages": 20}
    load.run("prefill", store.url, **plan)
    for work, what in (("creates", "sessions created"), ("gets", "20 messages of a session, read")):
        ours, theirs = [], []
        plan = {"workers": CONNECTIONS, "seconds": stack.pace.seconds}
        if work == "gets":
            plan |= {"user_id": "reader", "session_id": "twenty"}
        for service in (store, thin):  # warm
            load.run(work, service.url, **plan | {"seconds": 60, "count": 200})
        for _ in range(stack.pace.rounds):
            ours.append(load.run(work, store.url, **plan).rate)
            theirs.append(load.run(work, thin.url, **plan).rate)
        found.add(share(what, "/s", ours, "thin service", theirs, at_least(0.75)))
    return found
