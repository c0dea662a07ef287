"""Conversations at several relays: one history, one run, events for whoever watches; and relays that go."""

import asyncio
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from random import Random

import asyncpg
import httpx
import pytest
import pytest_asyncio
from websockets.exceptions import ConnectionClosed

from tests.processes import Process, ServiceProcess
from tests.relay.calls import MODEL, start_relay, upstream_settings
from tests.relay.conftest import MakeUser, user_at
from tests.relay.conversing import Conversation, Json, User, fine, say, told_by, until
from tests.upstream.client import TestUpstream

SLOW = {"text": "one two three four five six seven eight nine ten", "event_delay_ms": 100, "delta_characters": 5}
NO_NOTICE = "postgresql://nobody@127.0.0.1:1/none"


@dataclass
class Relays:
    """Two relays on one database, and a user with a client at each."""

    folder: Path
    first: Process
    second: Process
    user: User
    there: User

    def at_second(self, mine: Conversation) -> Conversation:
        return replace(mine, user=self.there)


@asynccontextmanager
async def started(
    database_url: str,
    sessions: httpx.AsyncClient,
    store_url: str,
    upstream_url: str,
    folder: Path,
    second: dict[str, str],
) -> AsyncIterator[Relays]:
    """Two relays, the second with these settings too, and a user of both."""
    settings = upstream_settings(upstream_url) | {"RELAY_LEASE_SECONDS": "5"}
    with ExitStack() as running:
        here = running.enter_context(start_relay(database_url, store_url, folder, settings))
        there = running.enter_context(start_relay(database_url, store_url, folder, settings | second))
        async with user_at(here, folder, sessions) as user:
            headers = {"x-api-key": user.http.headers["x-api-key"]}
            async with httpx.AsyncClient(base_url=there.url, headers=headers, trust_env=False, timeout=30) as http:
                yield Relays(folder, here, there, user, replace(user, http=http))


@pytest_asyncio.fixture(params=["heard", "polled"], scope="module", loop_scope="session")
async def relays(
    request: pytest.FixtureRequest,
    make_database: Callable[[], str],
    sessions: httpx.AsyncClient,
    session_service: ServiceProcess,
    upstream_process: TestUpstream,
    scratch: Path,
) -> AsyncIterator[Relays]:
    """The second relay hears notifications, or has to look."""
    second = {"LISTEN_DATABASE_URL": NO_NOTICE} if request.param == "polled" else {}
    places = (session_service.url, upstream_process.url, scratch / "conversing-relays")
    async with started(make_database(), sessions, *places, second) as both:
        yield both


@pytest_asyncio.fixture(loop_scope="session")
async def mortal(
    own_database: str,
    sessions: httpx.AsyncClient,
    session_service: ServiceProcess,
    upstream: TestUpstream,
    scratch: Path,
) -> AsyncIterator[Relays]:
    """Relays of a test's own."""
    places = (session_service.url, upstream.url, scratch / "mortal-relays")
    async with started(own_database, sessions, *places, {}) as both:
        yield both


only_heard = pytest.mark.parametrize("relays", ["heard"], indirect=True)


async def test_events_reach_sockets_at_the_other_relay(relays: Relays, upstream: TestUpstream) -> None:
    mine = await relays.user.conversation()
    upstream.script({"text": "A1"}, {"text": "A2"})
    async with mine.socket(relays.second) as there, mine.socket() as here:
        for socket in (here, there):
            await socket.next()
        await mine.say("Q1")
        for socket in (here, there):
            await socket.until_status("finished")
        await there.say("Q2")
        for socket in (here, there):
            await socket.until_status("finished")
        assert (
            here.told
            == there.told
            == [
                *(("user", "Q1"), ("status", "running"), ("agent", "A1"), ("status", "finished")),
                *(("user", "Q2"), ("status", "running"), ("agent", "A2"), ("status", "finished")),
            ]
        )
        assert [frame["id"] for frame in here.frames[1:]] == [frame["id"] for frame in there.frames[1:]]


async def test_a_run_is_known_and_paused_at_the_other_relay(relays: Relays, upstream: TestUpstream) -> None:
    mine = await relays.user.conversation()
    there = relays.at_second(mine)
    upstream.script(SLOW, {"text": "rest"})
    await mine.say("Count")
    await upstream.until(lambda state: state["running"] > 0)
    await asyncio.sleep(0.8)
    assert (await there.call("run")).status_code == 409
    fine(await there.call("pause"))
    assert (await there.app())["execution_status"] == "paused"
    stored = await mine.stored()
    assert [role for role, _ in stored] == ["user", "assistant"]
    assert str(SLOW["text"]).startswith(stored[1][1])
    fine(await there.call("run"))
    await mine.until_status("finished")
    assert (await mine.stored())[-1][1].endswith("rest")


async def test_a_start_task_is_seen_at_the_other_relay(relays: Relays) -> None:
    task = await relays.user.start(llm_model=MODEL)
    assert (await relays.there.ended(task["id"]))["status"] == "READY"


@only_heard
async def test_parallel_runs_at_both_begin_one(relays: Relays, upstream: TestUpstream) -> None:
    mine = await relays.user.conversation(initial_message=say("Count", run=False))
    there = relays.at_second(mine)
    upstream.script(SLOW)
    answers = await asyncio.gather(*(each.call("run") for each in [mine, there] * 8))
    assert sorted(answer.status_code for answer in answers) == [200] + [409] * 15
    await mine.until_status("finished")
    assert len(await mine.stored()) == 2
    assert len(upstream.requests("/v1/messages")) == 1


async def test_a_killed_relays_run_becomes_an_error(mortal: Relays, upstream: TestUpstream) -> None:
    """And goes on when it is asked to; whoever watched at another relay sees each event once."""
    mine = await mortal.user.conversation()
    there = mortal.at_second(mine)
    upstream.script(SLOW, {"text": "All of it"})
    async with there.socket() as socket:
        await socket.next()
        await mine.say("Count")
        await socket.until_status("running")
        await upstream.until(lambda state: state["running"] > 0)
        mortal.first.kill()
        await socket.until_status("error")
        app = await there.app()
        assert (app["sandbox_status"], app["execution_status"]) == ("RUNNING", "error")
        fine(await there.call("run"))
        await socket.until_status("finished")
        assert [seen for seen in socket.told if seen[0] != "status"] == [("user", "Count"), ("agent", "All of it")]
        ids = [frame["id"] for frame in socket.frames]
        assert len(set(ids)) == len(ids)
    assert await there.stored() == [("user", "Count"), ("assistant", "All of it")]


async def test_a_stopped_relays_run_is_paused(mortal: Relays, upstream: TestUpstream) -> None:
    mine = await mortal.user.conversation()
    there = mortal.at_second(mine)
    upstream.script(SLOW, {"text": " rest"})
    await mine.say("Count")
    await upstream.until(lambda state: state["running"] > 0)
    await asyncio.sleep(0.8)
    assert mortal.first.stop() == 0
    await there.until_status("paused")
    partial = (await there.stored())[-1][1]
    assert str(SLOW["text"]).startswith(partial)
    fine(await there.call("run"))
    await there.until_status("finished")
    assert (await there.stored())[-1] == ("assistant", partial.rstrip() + " rest")


async def test_a_stopped_relay_sends_its_sockets_elsewhere(mortal: Relays) -> None:
    """1012: the service restarts. The process does not wait for those who only watch."""
    mine = await mortal.user.conversation()
    async with mine.socket() as socket, mortal.at_second(mine).socket() as other:
        await socket.next()
        await other.next()
        assert await asyncio.to_thread(mortal.first.stop, 10) == 0
        with pytest.raises(ConnectionClosed):
            await socket.connection.recv()
        assert socket.connection.close_code == 1012
        await mortal.at_second(mine).say("Still here", run=False)
        assert (await other.next())["kind"] == "MessageEvent"


async def test_a_stranded_start_becomes_an_error(mortal: Relays, upstream: TestUpstream) -> None:
    """Its relay is frozen in mid-start, so that the task can be caught, and killed."""
    busy = [await mortal.user.conversation(initial_message=say("Count")) for _ in range(5)]
    upstream.script({"text": "word " * 1000, "event_delay_ms": 100, "repeat": -1})
    for each in busy:
        await each.say("Go on")
    for each in busy:
        await each.until_status("running")
    task = await mortal.user.start(llm_model=MODEL)

    async def is_waiting() -> bool:
        return bool((await mortal.there.task(task["id"]))["status"] == "WAITING_FOR_SANDBOX")

    await until(is_waiting)
    mortal.first.popen.send_signal(signal.SIGKILL)
    ended = await mortal.there.ended(task["id"])
    assert ended["status"] == "ERROR"
    assert "gone" in ended["detail"]
    upstream.reset()


@only_heard
async def test_a_socket_that_comes_back_misses_nothing(relays: Relays, upstream: TestUpstream) -> None:
    """At this relay or at the other one, at any moment of the runs."""
    mine = await relays.user.conversation()
    upstream.script(*({"text": f"A{number}", "event_delay_ms": 20} for number in range(6)))
    seen: list[Json] = []
    is_over = asyncio.Event()

    async def watch() -> None:
        places = [relays.first, relays.second]
        while True:
            query = {"last_event_id": seen[-1]["id"]} if seen else {"resend_all": "true"}
            async with mine.socket(places[len(seen) % 2], **query) as socket:
                await socket.next()
                try:
                    seen.append(await socket.next(seconds=2))
                except TimeoutError:
                    if is_over.is_set():
                        return

    watching = asyncio.create_task(watch())
    for number in range(6):
        await mine.answered(f"Q{number}")
    is_over.set()
    await asyncio.wait_for(watching, 30)
    expected = [("status", "idle")]
    for number in range(6):
        expected += [("user", f"Q{number}"), ("status", "running"), ("agent", f"A{number}"), ("status", "finished")]
    assert [told_by(frame) for frame in seen if told_by(frame)] == expected
    assert len({frame["id"] for frame in seen}) == len(seen)


async def test_a_stranded_start_of_v0_gives_its_place_back(caller: User, database_url: str) -> None:
    """Its relay was killed in the middle: nobody works on it any more, and no task says so."""
    mine = Conversation(caller, fine(await caller.http.post("/api/conversations", json={}))["conversation_id"], "")
    connection = await asyncpg.connect(database_url, server_settings={"search_path": "dev"})
    try:
        long_ago = "sandbox_status = 'STARTING', created_at = now() - interval '3 minutes'"
        await connection.execute(f"UPDATE relay_conversations SET {long_ago} WHERE id = $1", mine.id)
    finally:
        await connection.close()

    async def is_gone() -> bool:
        return fine(await caller.http.get(mine.path)) is None

    await until(is_gone)


@only_heard
async def test_starts_and_resumes_at_both_never_exceed_the_places(relays: Relays, make_user: MakeUser) -> None:
    here = await make_user(relays.first, relays.folder)
    headers = {"x-api-key": here.http.headers["x-api-key"]}
    async with httpx.AsyncClient(base_url=relays.second.url, headers=headers, trust_env=False, timeout=30) as http:
        both = [here, replace(here, http=http)]
        tasks = await asyncio.gather(*(both[number % 2].start(llm_model=MODEL) for number in range(10)))
        assert {(await here.ended(task["id"]))["status"] for task in tasks} == {"READY"}
        found = fine(await here.http.get("/api/v1/app-conversations/search"))["items"]
        most = 0
        for _ in range(4):
            answers = await asyncio.gather(
                *(
                    both[number % 2].http.post(f"/api/v1/sandboxes/{each['sandbox_id']}/resume", json={})
                    for number, each in enumerate(found)
                )
            )
            assert {answer.status_code for answer in answers} == {200}
            shown = fine(await here.http.get("/api/v1/app-conversations/search"))["items"]
            most = max(most, [each["sandbox_status"] for each in shown].count("RUNNING"))
        assert most == 5


@only_heard
async def test_everything_at_once_at_both(relays: Relays, upstream: TestUpstream) -> None:
    """Messages, runs, pauses, sandboxes: what was told is stored once, each run ends once, and it still answers."""
    mine = await relays.user.conversation()
    there = relays.at_second(mine)
    sandbox = f"/api/v1/sandboxes/{(await mine.app())['sandbox_id']}"
    upstream.script({"text": "answer", "event_delay_ms": 10, "repeat": -1})
    random = Random(7)
    told: list[str] = []

    async def one(number: int) -> None:
        await asyncio.sleep(number * 0.02)
        at = random.choice([mine, there])
        action = random.choice(["say", "say", "quiet", "run", "pause", "sleep", "wake"])
        if action in {"say", "quiet"}:
            said = f"{action}-{number}"
            fine(await at.call("events", say(said, run=action == "say")))
            told.append(said)
        elif action in {"run", "pause"}:
            assert (await at.call(action)).status_code in {200, 409}
        else:
            path = f"{sandbox}/{'pause' if action == 'sleep' else 'resume'}"
            assert (await at.user.http.post(path, json={})).status_code in {200, 409}

    async with mine.socket() as here, there.socket() as other:
        await asyncio.gather(here.next(), other.next())
        await asyncio.gather(*(one(number) for number in range(80)))
        fine(await relays.user.http.post(f"{sandbox}/resume", json={}))
        await mine.say("The end")
        for socket in (here, other):
            await socket.until(lambda frame: told_by(frame) == ("user", "The end"))
            await socket.until_status("finished")
    assert [frame["id"] for frame in here.frames[1:]] == [frame["id"] for frame in other.frames[1:]]
    stored = await mine.stored()
    asked = [said for role, said in stored if role == "user"]
    assert sorted(asked) == sorted([*told, "The end"])
    assert stored[-1] == ("assistant", "answer")
    assert sorted(await mine.trajectory()) == sorted(
        ("user" if role == "user" else "agent", said) for role, said in stored
    )
    statuses = [frame["value"] for frame in here.frames[1:] if frame.get("key") == "execution_status"]
    runs = [status for before, status in pairwise(["", *statuses]) if status != before]
    began = [number for number, status in enumerate(runs) if status == "running"]
    assert all(runs[number + 1] in {"finished", "paused"} for number in began)
