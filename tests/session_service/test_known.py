"""A turn whose session is remembered from the turn before: its context is the one that would have been read."""

import random
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import pytest
import pytest_asyncio

from services.session_service.drafts import draft
from services.session_service.known import Known, KnownSessions
from services.session_service.recent import stretch_of
from services.session_service.sessions import unmade
from shared import wire
from shared.http_client import http_client
from tests.processes import ServiceProcess, free_port, start_session_service
from tests.session_service.calls import Chat, Db, Json, Turn, User, check_counters, fine, new_user_id, refused, said

TURNS = 60
WORDS = ["ant", "bee", "你好", "cow ", "\n", "dog's"]


@pytest.fixture(scope="module")
def url(make_database: Callable[[], str]) -> str:
    return make_database()


@pytest.fixture(scope="module")
def services(url: str, scratch: Path) -> Iterator[list[ServiceProcess]]:
    """Two that remember sessions, and one that reads them each time."""
    with ExitStack() as stack:
        yield [
            stack.enter_context(start_session_service(url, scratch, free_port(), KNOWN_SESSIONS=most))
            for most in ("500", "500", "0")
        ]


@pytest_asyncio.fixture
async def clients(services: list[ServiceProcess]) -> AsyncIterator[list[httpx.AsyncClient]]:
    async with AsyncExitStack() as stack:
        found = []
        for service in services:
            client = await stack.enter_async_context(http_client(read_seconds=30, connect_seconds=10))
            client.base_url = httpx.URL(f"{service.url}/api/v1/")
            found.append(client)
        yield found


@pytest_asyncio.fixture
async def their_db(url: str) -> AsyncIterator[Db]:
    connection = await asyncpg.connect(url)
    yield connection
    await connection.close()


class Story:
    """What happens in a conversation, made up from a seed: the same one as often as it is told."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._calls = 0

    def words(self) -> str:
        return " ".join(
            self._random.choices(["ant", "bee", "你好", "cow ", "\n", "dog's"], k=self._random.randint(1, 30))
        )

    def asked(self) -> list[Json]:
        """A user's messages: words, an image, the result of the last call, sometimes a system message."""
        result = {"type": "tool_result", "tool_use_id": f"call_{self._calls}", "content": self.words()}
        image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aGVsbG8="}}
        text = {"type": "text", "text": self.words() + "."}
        messages = [said(self._random.choice([self.words() + "?", [text], [result, text], [text, image]]))]
        if self._random.random() < 0.1:
            messages.insert(0, said(self.words() + "!", "system"))
        return messages

    def answered(self) -> Json:
        text = {"type": "text", "text": self.words() + "."}
        thinking = {"type": "thinking", "thinking": self.words(), "signature": "s"}
        if self._random.random() < 0.4:
            self._calls += 1
            call = {"type": "tool_use", "id": f"call_{self._calls}", "name": "look", "input": {"at": self.words()}}
            return said(self._random.choice([[call], [thinking, text, call]]), "assistant")
        return said(self._random.choice([self.words() + "…", [text], [thinking, text]]), "assistant")

    def budget(self) -> Json:
        budget: Json = {"memories": self._random.random() < 0.3}
        if self._random.random() < 0.3:
            budget |= self._random.choice([{"max_tokens": 2000}, {"max_messages": 9}, {"format": "openai"}])
        return budget

    async def in_between(self, chat: Chat) -> None:
        """What others may do to a session between its turns."""
        match self._random.randrange(12):
            case 0:
                await chat.append(self.words() + "+")
            case 1:
                fine(await chat.put(session_summary=self.words() + "…", title=self.words() + "."))
            case 2:
                await chat.remember(self.words() + "=")
            case 3:
                seqs = [each["seq"] for each in (await chat.messages(limit=1000))["messages"]]
                to_seq = self._random.choice(seqs[-4:] or [0])
                fine(await chat.call("POST", "/rewind", json={"to_seq": to_seq}))
            case 4:
                assert (await chat.end()).status_code == 200

    async def turn(self, chat: Chat) -> Json:
        """The context of one turn, opened and completed; or why it could not be."""
        await self.in_between(chat)
        session = {"if_exists": self._random.choice(["resume", "resume", "restart"])}
        opened = await chat.turn(*self.asked(), context=self.budget(), create_session=session, lease_seconds=60)
        if opened.status_code == 422:  # an image is too large for the smallest budget
            return refused(opened, 422, "context_too_small")
        turn = Turn(chat, fine(opened))
        answer = self.answered()
        status = self._random.choice(["completed", "completed", "completed", "interrupted", "failed", "refused"])
        await turn.complete(*([] if status == "refused" else [answer]), status=status, usage={"output_tokens": 7})
        context: Json = turn.opened["context"]
        return context


@pytest.mark.parametrize("seed", range(4))
async def test_the_context_is_the_one_that_is_read(clients: list[httpx.AsyncClient], their_db: Db, seed: int) -> None:
    known = Chat(User(clients[0], new_user_id()), "s")
    read = Chat(User(clients[2], new_user_id()), "s")
    for chat in (known, read):
        await chat.user.create(session_id=chat.id)
    story, same_story = Story(seed), Story(seed)
    elsewhere = random.Random(-seed)
    left_out = 0
    for number in range(TURNS):
        context = await story.turn(known.of(known.user.at(clients[elsewhere.random() < 0.2])))
        expected = await same_story.turn(read)
        assert context == expected, number
        left_out += "receipt" in context and bool(context["receipt"]["left_out"])
    assert left_out  # windows have moved
    await check_counters(their_db, known.of(known.user.at(clients[0])))


async def test_a_database_that_has_lost_its_newest_writes(clients: list[httpx.AsyncClient], their_db: Db) -> None:
    """A standby that takes over may lack them; what is then written may have the same version again."""
    chat = Chat(User(clients[0], new_user_id()), "s")
    await (await chat.open(said("q"), create_session={})).complete(said("lost", "assistant"))
    key = (chat.user.id, chat.id)
    where = "WHERE user_id = $1 AND session_id = $2"
    await their_db.execute(f"UPDATE dev.session_messages SET content = 'kept' {where} AND seq = 2", *key)
    await their_db.execute(f"UPDATE dev.sessions SET updated_at = updated_at - interval '1 ms' {where}", *key)
    opened = await chat.open(said("and?"))
    assert [each["content"] for each in opened.opened["context"]["messages"]] == ["q", "kept", "and?"]


async def test_a_session_that_was_erased_and_made_again(clients: list[httpx.AsyncClient]) -> None:
    for forgetful in clients[:2]:  # the one that knew the session erases it, and another one
        chat = Chat(User(clients[0], new_user_id()), "s")
        await (await chat.open(said("old"), create_session={})).complete(said("a", "assistant"))
        fine(await forgetful.delete(f"/users/{chat.user.id}"))
        opened = await chat.open(said("new"), create_session={})
        assert [each["content"] for each in opened.opened["context"]["messages"]] == ["new"]
        assert opened.opened["session"]["message_count"] == 1


def test_what_else_happened_meanwhile_is_not_known() -> None:
    def session(version: int) -> wire.Session:
        made = unmade("u", "s").session
        made.version = version
        return made

    asked, answered = (draft(wire.NewMessage(role=role, content=role)) for role in ("user", "assistant"))
    found = replace(unmade("u", "s"), session=session(3), last_seq=1)
    opened = Known(found, stretch_of([asked], 0))
    completed = opened.completed(session(5), [answered])
    assert completed is not None
    assert [piece.content for piece in completed.stretch.pieces.values()] == ["user", "assistant"]
    assert opened.completed(session(4), []) is not None
    assert opened.completed(session(6), [answered]) is None
    assert opened.completed(session(5), []) is None


# ── how much is remembered ──────────────────────────────────────────────────────────────────────


def known_session(session_id: str, content: Any = "hello", user_id: str = "u") -> Known:
    found = unmade(user_id, session_id)
    found.session.metadata = found.session.conversation_data = {}
    return Known(found, stretch_of([draft(wire.NewMessage(role="user", content=content))], 0))


def test_so_many_sessions() -> None:
    sessions = KnownSessions(2)
    for session_id in ("a", "b", "a", "c"):  # a was used again
        sessions.put(known_session(session_id))
    assert [session_id for session_id in "abc" if sessions.get(("u", session_id))] == ["a", "c"]
    KnownSessions(0).put(known_session("a"))


def test_so_many_characters() -> None:
    sessions = KnownSessions(100)
    large = [{"type": "image", "source": {"data": "x" * 2**20}}]
    sessions.put(known_session("too large", large))
    for number in range(20):
        sessions.put(known_session(str(number), "x" * (2**20 - 100)))
    assert sessions.get(("u", "too large")) is None
    assert [number for number in range(20) if sessions.get(("u", str(number)))] == list(range(4, 20))
    sessions.put(known_session("19", large))  # one that has grown too large is forgotten
    assert sessions.get(("u", "19")) is None
    sessions.put(known_session("another", "x" * (2**20 - 100)))
    assert sessions.get(("u", "4")) is not None


def test_a_user_is_forgotten() -> None:
    sessions = KnownSessions(10)
    for user_id in ("u", "v"):
        for session_id in ("a", "b"):
            sessions.put(known_session(session_id, user_id=user_id))
    sessions.forget_user("u")
    assert [sessions.get((user_id, "a")) is None for user_id in ("u", "v")] == [True, False]
