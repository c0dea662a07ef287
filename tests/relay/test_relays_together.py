"""Several relays on one database: what one knows of the accounts the others know, and so it is after a restart."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime
from typing import Any

import asyncpg
import pytest
import pytest_asyncio

from tests.relay.calls import Chat, Json
from tests.relay.stage import Operator, Stage, staged, until
from tests.upstream.client import TestUpstream

SOON_SECONDS = 2.5  # a second by the contract, and room for a busy machine


@pytest_asyncio.fixture(loop_scope="session")
async def stage(patient: Operator, upstream: TestUpstream) -> AsyncIterator[Stage]:
    async with staged(patient, upstream) as stage:
        yield stage


@pytest.fixture(params=["heard", "polled"])
def pair(request: pytest.FixtureRequest, stage: Stage, deaf: Operator) -> tuple[Stage, Stage]:
    """Where something is done, and the other relay: one that hears notifications, and one that does not."""
    there = stage.at(deaf)
    return (there, stage) if request.param == "heard" else (stage, there)


async def soon(condition: Callable[[], Awaitable[Any]]) -> None:
    await until(condition, SOON_SECONDS)


# ── what is done at one is known to the other ───────────────────────────────────────────────────


async def test_administrators_changes(pair: tuple[Stage, Stage]) -> None:
    """New, disabled, enabled, changed, deleted."""
    here, there = pair
    await here.add("other", models=["something-else"])
    await here.add("a")
    await soon(there.is_served)
    await here.post("a", "disable")
    await soon(lambda: answers(there, 529))
    await here.change("a", enabled=True)
    await soon(there.is_served)
    await here.change("a", models=["something-else"])
    await soon(lambda: answers(there, 404))
    await here.change("a", models={there.model: "their-name"}, api_key="another-key")
    await soon(there.is_served)
    entry = there.upstream.requests()[-1]
    assert (entry["json"]["model"], entry["headers"]["x-api-key"]) == ("their-name", "another-key")
    await here.delete("a")
    await soon(lambda: answers(there, 404))


async def answers(stage: Stage, status: int) -> bool:
    return (await stage.ask()).status_code == status


RESTS: dict[str, Json] = {
    "rate_limited": {"status": 429, "headers": {"retry-after": "300"}},
    "forbidden": {"status": 403},
    "failing": {"status": 500, "headers": {"retry-after": "300"}},
    "disabled": {"status": 401, "body": "Your organization was disabled"},
}


async def test_a_rest_is_for_all_relays(pair: tuple[Stage, Stage]) -> None:
    """Of each kind, and its end by an administrator too."""
    here, there = pair
    for reason, step in RESTS.items():
        await here.add(reason)
        here.script(reason, step)
    for _ in range(2):
        assert not await here.is_served()
    assert sorted(here.asked()) == sorted(RESTS)

    async def knows() -> bool:
        return all([(await there.get(reason))["ineligible_reason"] == reason for reason in RESTS])

    await soon(knows)
    same = ("state", "cooldown_until", "disabled_reason", "last_error", "enabled")
    for reason in RESTS:
        told, seen = await here.get(reason), await there.get(reason)
        assert told["ineligible_reason"] == reason
        assert {name: seen[name] for name in same} == {name: told[name] for name in same}
    assert not await there.is_served()
    assert len(here.asked()) == len(RESTS)
    await here.post("forbidden", "enable")
    await soon(there.is_served)


async def test_edits_in_the_database(stage: Stage, deaf: Operator, sql: asyncpg.Connection) -> None:
    """A row changed, made or deleted by hand is as good as an admin call, at relays that listen and that do not."""
    await stage.add("a", "b")
    await stage.add("other", models=["something-else"])
    both = (stage, stage.at(deaf))
    await sql.execute("UPDATE relay_accounts SET enabled = false WHERE id = $1", stage.id("a"))
    await sql.execute("UPDATE relay_accounts SET models = '[\"nothing\"]' WHERE id = $1", stage.id("b"))
    for each in both:
        await soon(lambda each=each: answers(each, 529))  # type: ignore[misc]
        assert (await each.get("a"))["state"] == "disabled"
    await sql.execute("UPDATE relay_accounts SET enabled = true WHERE id = $1", stage.id("a"))
    asked = len(stage.asked())
    for each in both:
        await soon(each.is_served)
    assert set(stage.asked()[asked:]) == {"a"}
    await sql.execute("DELETE FROM relay_accounts WHERE id = $1", stage.id("a"))
    for each in both:
        await soon(lambda each=each: answers(each, 404))  # type: ignore[misc]


# ── slots ───────────────────────────────────────────────────────────────────────────────────────


def most_at_once(entries: list[Json]) -> int:
    """How many of these requests ran at upstream at one time."""
    moments = sorted(
        [(entry["received_at"], 1) for entry in entries] + [(entry["ended_at"], -1) for entry in entries],
        key=lambda moment: (moment[0], moment[1]),
    )
    running = most = 0
    for _, change in moments:
        running += change
        most = max(most, running)
    return most


async def test_never_more_than_max_concurrency(stage: Stage, deaf: Operator, sql: asyncpg.Connection) -> None:
    """40 requests at two relays, plain and streamed, some that fail and some whose client hangs up."""
    await stage.add("a", max_concurrency=3)
    both = (stage, stage.at(deaf))

    async def is_known() -> bool:
        return (await both[1].operator.http.get(f"/v1/models/{stage.model}")).status_code == 200

    await until(is_known)
    stage.script("a", *({"delay_ms": 30 + 10 * (number % 4)} for number in range(36)), {"status": 400}, {"status": 413})

    async def one(number: int) -> int:
        return (await both[number % 2].ask(stream=number % 3 == 0)).status_code

    async def impatient(number: int) -> None:
        try:
            await asyncio.wait_for(one(number), 0.1 * number)
        except TimeoutError:
            return

    answers, _ = await asyncio.gather(
        asyncio.gather(*(one(number) for number in range(40))),
        asyncio.gather(*(impatient(number) for number in range(6))),
    )
    assert set(answers) <= {200, 400, 413}
    await stage.upstream.until(lambda state: state["running"] == 0)
    assert most_at_once(stage.entries()) == 3

    async def all_are_free() -> bool:
        """Slots are given back beside the answers."""
        slots = await sql.fetchrow(
            "SELECT count(*) AS made, count(*) FILTER (WHERE expires_at > now()) AS taken"
            " FROM relay_slots WHERE owner_id = $1",
            stage.id("a"),
        )
        return slots is not None and (slots["made"], slots["taken"]) == (3, 0)

    await until(all_are_free)
    await stage.change("a", max_concurrency=1)

    async def is_one() -> bool:
        return bool((await both[1].get("a"))["max_concurrency"] == 1)

    await soon(is_one)
    await asyncio.sleep(1.1)  # until the deaf one has read it too
    seen = len(stage.entries())
    stage.script("a", {"delay_ms": 30, "repeat": 10})
    assert set(await asyncio.gather(*(one(number) for number in range(10)))) == {200}
    assert most_at_once(stage.entries()[seen:]) == 1


async def test_figures_are_of_all_relays(stage: Stage, deaf: Operator) -> None:
    """in_flight, requests, failures, last_used_at: counted once each, also while administrators look on."""
    await stage.add("a")
    await stage.add("b", priority=1)
    both = (stage, stage.at(deaf))
    await until(both[1].is_served)

    async def both_know_b() -> bool:
        told = [(await each.operator.http.get("/queue/health")).json()["accounts"]["total"] for each in both]
        return bool(told[0] == told[1])

    await until(both_know_b)
    base = len(stage.asked())
    stage.script("a", {"repeat": 5, "hang_seconds": 30})
    tasks = [asyncio.create_task(both[number % 2].ask()) for number in range(5)]
    await stage.upstream.until(lambda state: state["running"] == 5)

    async def are(in_flight: int, requests: int, failures: int) -> bool:
        seen = [await each.get("a") for each in both]
        return all(
            (told["in_flight"], told["requests"] - base, told["failures"]) == (in_flight, requests, failures)
            for told in seen
        )

    await soon(lambda: are(5, 5, 0))
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await soon(lambda: are(0, 5, 0))

    async def look_on() -> None:
        for _ in range(15):
            await asyncio.gather(*(each.get("a") for each in both))

    await asyncio.gather(look_on(), *(both[number % 2].ask() for number in range(20)))
    await soon(lambda: are(0, 25, 0))
    stage.script("a", {"status": 429, "headers": {"retry-after": "100"}})
    asked_at = datetime.now(UTC)
    assert (await both[1].ask()).status_code == 200
    await soon(lambda: are(0, 26, 1))
    for name in ("a", "b"):
        used_at = datetime.fromisoformat((await stage.get(name))["last_used_at"])
        assert asked_at <= used_at <= datetime.now(UTC)
    assert (await stage.get("b"))["requests"] == 1


# ── relays that end ─────────────────────────────────────────────────────────────────────────────


async def test_state_survives_a_restart(start_operator: Any, pool_database: str, stage: Stage, sessions: Any) -> None:
    """Rests, disabled accounts, failures in a row, figures, and each session's account."""
    async with start_operator(pool_database, RELAY_RETRY_WAIT_SECONDS="0") as first:
        here = stage.at(first)
        await here.add("limited", "forbidden", "gone", "failing", "off", priority=-1)
        await here.add("a", "b")
        here.script("limited", {"status": 429, "headers": {"retry-after": "600"}})
        here.script("forbidden", {"status": 403})
        here.script("gone", {"status": 403, "body": "This account has been suspended"})
        here.script("failing", {"status": 503, "headers": {"retry-after": "600"}})
        await here.post("off", "disable")
        for _ in range(2):
            await here.ask()
        chats = [Chat(first.http, sessions) for _ in range(4)]
        for chat in chats:
            await chat.say("Hello", model=stage.model)
        served = here.asked()[-4:]
        before = {name: await here.get(name) for name in ("limited", "forbidden", "gone", "failing", "off", "a", "b")}
        reasons = [before[name]["ineligible_reason"] for name in ("limited", "forbidden", "gone", "failing", "off")]
        assert reasons == ["rate_limited", "forbidden", "disabled", "failing", "disabled"]
        assert sorted(served) == ["a", "a", "b", "b"]
    async with start_operator(pool_database, RELAY_RETRY_WAIT_SECONDS="0") as second:
        here = stage.at(second)
        for name, told in before.items():
            after = await here.get(name)
            assert {**after, "ineligible_seconds": 0} == {**told, "ineligible_seconds": 0}
            if told["ineligible_seconds"] is not None:
                assert 0 < after["ineligible_seconds"] <= told["ineligible_seconds"]
        order = sorted(range(4), key=lambda number: (served[number], number))
        for number in order:
            await Chat(second.http, sessions, chats[number].session_id).say("Again", model=stage.model)
        assert here.asked()[-4:] == sorted(served)


async def test_a_killed_relays_slots_come_back(
    start_operator: Any, pool_database: str, stage: Stage, sql: asyncpg.Connection
) -> None:
    """After the lease of 30 s; its requests are no longer counted as running, what it had told before still is."""
    await stage.add("a", max_concurrency=2)
    async with start_operator(pool_database) as killed:
        stage.script("a", {"repeat": 2, "hang_seconds": 30})
        tasks = [asyncio.create_task(stage.at(killed).ask()) for _ in range(2)]
        await stage.upstream.until(lambda state: state["running"] == 2)

        async def is_told() -> bool:
            return bool((await stage.get("a"))["in_flight"] == 2)

        await until(is_told)
        killed.relay.kill()
        await asyncio.gather(*tasks, return_exceptions=True)
    left = "SELECT extract(epoch FROM min(expires_at) - now()) FROM relay_slots WHERE owner_id = $1"
    first = await sql.fetchval(left, stage.id("a"))
    assert 0 < first <= 30
    waiting = asyncio.create_task(stage.ask())
    await asyncio.sleep(0.5)
    assert not waiting.done()
    assert await sql.fetchval(left, stage.id("a")) < first
    # Half a minute later.
    await sql.execute("UPDATE relay_slots SET expires_at = expires_at - interval '30 seconds' WHERE expires_at > now()")
    assert (await asyncio.wait_for(waiting, 5)).status_code == 200
    await sql.execute("UPDATE relay_account_use SET updated_at = updated_at - interval '30 seconds'")

    async def is_forgotten() -> bool:
        told = await stage.get("a")
        return (told["in_flight"], told["requests"]) == (0, 3)

    await until(is_forgotten)


async def test_a_relay_that_stops_gives_its_slots_back(
    start_operator: Any, pool_database: str, stage: Stage, sql: asyncpg.Connection
) -> None:
    """At once: no lease has to run out."""
    await stage.add("a", max_concurrency=1)
    async with start_operator(pool_database, GRACEFUL_STOP_SECONDS="0.5") as stopped:
        stage.script("a", {"hang_seconds": 30, "after_events": 5})
        task = asyncio.create_task(stage.at(stopped).ask(stream=True))
        await stage.upstream.until(lambda state: state["running"] == 1)
        assert await asyncio.to_thread(stopped.relay.stop) == 0
        await asyncio.gather(task, return_exceptions=True)
    taken = "SELECT count(*) FROM relay_slots WHERE owner_id = $1 AND expires_at > now()"
    assert await sql.fetchval(taken, stage.id("a")) == 0
    assert await stage.is_served()
