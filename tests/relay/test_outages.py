"""Parts that fail while clients talk: what these were told stays, nothing is there twice, and they can go on."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic

import httpx
import pytest
import pytest_asyncio

from shared import embedded_postgres
from tests.conftest import migrate
from tests.processes import start_consul
from tests.relay.calls import Chat, admin_headers, error_of, streamed_text, text_of
from tests.relay.stack import Stack, stack_of
from tests.session_service.test_outages import frozen as frozen_postgres
from tests.upstream.client import TestUpstream

PATH = "/v1/messages"
LONG = "word " * 60
LONGEST_SECONDS = 40
SHORT = {
    "DATABASE_TIMEOUT_SECONDS": "1",
    "DATABASE_CONNECT_TIMEOUT_SECONDS": "1",
    "RELAY_COMPLETE_TIMEOUT_SECONDS": "1",
    "RELAY_RETRY_WAIT_SECONDS": "0",
}
HELD = "SELECT count(*) FROM dev.relay_slots WHERE expires_at > now()"


@pytest.fixture(scope="module")
def postgres(scratch: Path) -> Iterator[Path]:
    """A Postgres of this file alone, to be ill-treated."""
    path = scratch / "relay-outages"
    migrate(embedded_postgres.start(path))
    yield path
    embedded_postgres.start(path)
    embedded_postgres.stop(path)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def own_stack(postgres: Path, upstream_process: TestUpstream, scratch: Path) -> AsyncIterator[Stack]:
    """In the end, whatever the tests did, its record agrees with itself and nothing waits."""
    url = embedded_postgres.url(postgres)
    async with stack_of(url, upstream_process, scratch / "outages-of-relay", **SHORT) as stack:
        yield stack
        await stack.check()


@pytest_asyncio.fixture(loop_scope="session")
async def stack(own_stack: Stack, upstream: TestUpstream) -> AsyncIterator[Stack]:
    """A stack whose services run before and after."""
    yield own_stack
    own_stack.revive()


# ── clients who talk ────────────────────────────────────────────────────────────────────────────


@dataclass
class Talk:
    """A client that asks one question after the other, each once, or under a key until it is answered.

    `told` are the questions that it was answered, with the answers.
    """

    chat: Chat
    streams: bool
    insists: bool
    asked: list[str] = field(default_factory=list)
    told: dict[str, str] = field(default_factory=dict)
    refusal: str = ""

    async def run(self, over: asyncio.Event) -> None:
        while not over.is_set():
            question = f"{self.chat.session_id} {len(self.asked)}"
            self.asked.append(question)
            key = str(uuid.uuid4())
            answer = await self._ask(question, key)
            deadline = monotonic() + LONGEST_SECONDS
            while answer is None and self.insists:
                assert monotonic() < deadline, self.refusal
                await asyncio.sleep(0.05)
                answer = await self._ask(question, key)
            if answer is None:
                await asyncio.sleep(0.05)
            else:
                self.told[question] = answer

    async def _ask(self, question: str, key: str) -> str | None:
        headers = {"idempotency-key": key} if self.insists else {}
        try:
            answer = await self.chat.ask(question, headers=headers, stream=self.streams)
        except httpx.HTTPError:
            return None
        if answer.status_code != 200:
            assert answer.status_code in {409, 529}, answer.text
            assert int(answer.headers["retry-after"]) >= 1
            self.refusal = answer.text
            return None
        if not self.streams:
            return text_of(answer.json())
        return streamed_text(answer.content) if b"event: message_stop" in answer.content else None

    async def check(self) -> None:
        """What was told is stored, once, each answer behind its question; of the rest nothing is there twice."""
        history = await self.chat.history()
        questions = [content for role, content in history if role == "user"]
        assert questions == [each for each in self.asked if each in questions]
        for question, answer in self.told.items():
            assert history[history.index(("user", question)) + 1] == ("assistant", answer)
        if self.insists:
            assert questions == self.asked
            assert [role for role, _ in history] == ["user", "assistant"] * len(questions)
        assert all(turn["status"] != "open" for turn in await self.chat.turns())


async def until_all_were_told(talks: list[Talk], more: int) -> None:
    """Returns once everyone was told so many more answers than now."""
    wanted = [len(talk.told) + more for talk in talks]
    deadline = monotonic() + LONGEST_SECONDS
    while any(len(talk.told) < least for talk, least in zip(talks, wanted, strict=True)):
        assert monotonic() < deadline, [(len(talk.told), len(talk.asked)) for talk in talks]
        await asyncio.sleep(0.02)


@asynccontextmanager
async def talking(stack: Stack) -> AsyncIterator[list[Talk]]:
    """Eight clients who talk while inside, and go on talking; in the end everything is there, and only once."""
    stack.upstream.script({"event_delay_ms": 15, "delay_ms": 30, "repeat": -1})
    talks = [Talk(stack.chat(), streams=number % 2 == 0, insists=number < 4) for number in range(8)]
    over = asyncio.Event()
    running = asyncio.gather(*(talk.run(over) for talk in talks))
    try:
        await until_all_were_told(talks, 1)
        yield talks
        await until_all_were_told(talks, 2)
    finally:
        over.set()
        await running
    for talk in talks:
        await talk.check()
    assert stack.spooled() == []


async def test_postgres_frozen(stack: Stack, postgres: Path) -> None:
    async with talking(stack):
        with frozen_postgres(postgres):
            await asyncio.sleep(2)


async def test_postgres_stopped(stack: Stack, postgres: Path) -> None:
    async with talking(stack):
        await asyncio.to_thread(embedded_postgres.stop, postgres)
        try:
            await asyncio.sleep(1)
        finally:
            await asyncio.to_thread(embedded_postgres.start, postgres)


async def test_the_store_killed(stack: Stack) -> None:
    async with talking(stack):
        stack.store.kill()
        await asyncio.sleep(0.5)
        await asyncio.to_thread(stack.start_store)


async def test_the_relay_killed(stack: Stack) -> None:
    """Its open turns hold their sessions until their leases have run out; then these go on."""
    async with talking(stack) as talks:
        stack.relay.kill()
        await stack.keys_run_out()
        await asyncio.to_thread(stack.start_relay)
    statuses = {turn["status"] for talk in talks for turn in await talk.chat.turns()}
    assert statuses == {"completed", "expired"}


async def test_store_and_relay_killed_with_completions_on_disk(stack: Stack) -> None:
    async with talking(stack):
        await stack.upstream.until(lambda state: state["running"] > 2)
        stack.store.kill()
        async with asyncio.timeout(10):
            while not stack.spooled():
                await asyncio.sleep(0.01)
        stack.relay.kill()
        await stack.keys_run_out()
        await asyncio.to_thread(stack.start_relay)
        assert stack.spooled()
        await asyncio.to_thread(stack.start_store)


def limit_account(stack: Stack, max_concurrency: int | None) -> None:
    url = f"{stack.relay.url}/admin/accounts/anthropic"
    change = {"max_concurrency": max_concurrency}
    httpx.patch(url, json=change, headers=admin_headers(stack.folder), trust_env=False).raise_for_status()


async def test_slots_of_a_killed_relay_are_free_once_their_lease_is_over(stack: Stack, upstream: TestUpstream) -> None:
    limit_account(stack, 2)
    upstream.script({"text": LONG, "hang_seconds": 60, "after_events": 6, "repeat": 2})
    doomed = [stack.chat(), stack.chat()]
    streams = [asyncio.create_task(each.stream_whole("Hello")) for each in doomed]
    await upstream.until(lambda state: state["running"] == 2)
    stack.relay.kill()
    for stream in streams:
        with pytest.raises(httpx.HTTPError):
            await stream
    await asyncio.to_thread(stack.start_relay)
    async with stack.sql() as sql:
        assert await sql.fetchval(HELD) == 2
        full = await stack.chat().ask("Hello")
        error_of(full, 529, "overloaded_error")
        await stack.leases_run_out()
        await asyncio.sleep(int(full.headers["retry-after"]))
        for each in doomed:
            answer = await each.say("Again")
            assert await each.history() == [("user", "Hello"), ("user", "Again"), ("assistant", answer)]
            assert [turn["status"] for turn in await each.turns()] == ["completed", "expired"]
        async with asyncio.timeout(10):
            while await sql.fetchval(HELD):
                await asyncio.sleep(0.02)
    limit_account(stack, None)


async def test_a_key_without_the_database(stack: Stack, postgres: Path, upstream: TestUpstream) -> None:
    """What could not be kept is not begun; what needs nothing kept goes on."""
    chat = stack.chat()
    await chat.say("so that the API key is known")
    upstream.reset()
    body = chat.body("Hello")
    headers = {"x-session-id": "none", "idempotency-key": str(uuid.uuid4())}
    await asyncio.to_thread(embedded_postgres.stop, postgres)
    try:
        for path in (PATH, "/claude-kiro-oauth/v1/messages"):
            answer = await chat.http.post(path, json=body, headers=headers)
            assert answer.status_code == (529 if path == PATH else 503), answer.text
            assert int(answer.headers["retry-after"]) >= 1
        assert upstream.requests() == []
        del headers["idempotency-key"]
        assert (await chat.http.post(PATH, json=body, headers=headers)).status_code == 200
    finally:
        await asyncio.to_thread(embedded_postgres.start, postgres)
    assert await chat.say("Hello again")


async def test_consul_killed(postgres: Path, upstream: TestUpstream, scratch: Path) -> None:
    """The last known instances go on being used, and an agent that comes back knowing none does not change that."""
    url, folder = embedded_postgres.url(postgres), scratch / "without-consul"
    with start_consul(scratch) as agent:
        settings = SHORT | {"CONSUL_HOST": "127.0.0.1", "CONSUL_PORT": str(agent.port)}
        async with stack_of(url, upstream, folder, **settings) as stack, talking(stack) as talks:
            agent.kill()
            await until_all_were_told(talks, 1)
            assert sum(len(talk.asked) - len(talk.told) for talk in talks) <= len(talks)  # those that go on
            with start_consul(scratch, agent.port):
                await until_all_were_told(talks, 1)
                assert sum(len(talk.asked) - len(talk.told) for talk in talks) <= len(talks)
