"""The index beside the request path: soon, complete, whoever is killed; and words of any text, as properties."""

import asyncio
import random
import time
from itertools import pairwise
from pathlib import Path

import asyncpg
import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.session_service import words
from shared.http_client import http_client
from tests.processes import free_port, start_session_service
from tests.session_service.calls import Db, User, fine, new_user_id, said
from tests.session_service.test_search import found, settled, written

LAG_SECONDS = 2.0
"""The second that the contract allows, and one for a busy machine."""


async def until_found(user: User, q: str, session_id: str, seconds: float = 15) -> float:
    began = time.monotonic()
    while session_id not in await found(user, q):
        assert time.monotonic() - began < seconds, f"{q!r} is not found"
        await asyncio.sleep(0.02)
    return time.monotonic() - began


# ── soon, and complete ──────────────────────────────────────────────────────────────────────────


async def test_within_a_second(user: User) -> None:
    chat = await user.chat(title="lagtitle")
    assert await until_found(user, "lagtitle", chat.id) < LAG_SECONDS
    await chat.append("lagmessage")
    assert await until_found(user, "lagmessage", chat.id) < LAG_SECONDS
    turn = await chat.open(said("lagquestion"))
    assert await until_found(user, "lagquestion", chat.id) < LAG_SECONDS
    await turn.complete(said("laganswer", "assistant"))
    assert await until_found(user, "laganswer", chat.id) < LAG_SECONDS
    await chat.remember("lagmemory")
    assert await until_found(user, "lagmemory", chat.id) < LAG_SECONDS


async def test_nobody_waits_for_a_big_session(user: User) -> None:
    """120 long messages at once, of a user whose name comes first: another one's are found in a second still."""
    big = await User(user.http, f"!{user.id}").chat()
    chance = random.Random(1)
    for _ in range(3):
        texts = ["".join(chr(chance.randint(0x4E00, 0x9FFF)) for _ in range(8000)) for _ in range(40)]
        fine(await big.call("POST", "/messages/batch", json={"messages": [said(text) for text in texts]}))
    small = await written(user, "quick")
    assert await until_found(user, "quick", small.id) < LAG_SECONDS
    await until_found(big.user, texts[-1][-9:], big.id, seconds=60)


async def test_appends_in_the_middle_of_indexing(user: User, crowd: httpx.AsyncClient, db: Db) -> None:
    """All words of many writers to few sessions are found in the end, each in its own session."""
    chats = [(await user.chat()).of(user.at(crowd)) for _ in range(4)]

    async def write(name: int) -> None:
        for number in range(15):
            await chats[name % 4].append(f"w{name}x{number}")
            if number % 5 == 0:
                await chats[name % 4].remember(f"r{name}x{number}")
                await asyncio.sleep(0.1)

    await asyncio.gather(*(write(name) for name in range(16)))
    await settled(db, user)
    for name in range(16):
        for number in range(15):
            assert await found(user, f"w{name}x{number}") == [chats[name % 4].id]
        assert await found(user, f"r{name}x10") == [chats[name % 4].id]


async def test_two_instances_and_a_kill(own_database: str, scratch: Path) -> None:
    """Both index all the time; one is killed at work, and begins again; every text is found, once."""
    ports = [free_port(), free_port()]
    user_id = new_user_id()
    db = await asyncpg.connect(own_database)
    fast = {"NEWS_INTERVAL_SECONDS": "0.02"}
    async with http_client(read_seconds=20, connect_seconds=5) as http:
        http.base_url = httpx.URL(f"http://127.0.0.1:{ports[0]}/api/v1/")
        user = User(http, user_id)
        written_words: dict[str, str] = {}

        async def write(name: int) -> None:
            chat = await user.chat()
            for number in range(25):
                word = f"n{name}z{number}"
                await chat.append(f"{word} " + "filling " * 50)
                written_words[word] = chat.id

        with start_session_service(own_database, scratch, ports[0], True, **fast) as staying:
            with start_session_service(own_database, scratch, ports[1], True, **fast) as killed:
                writing = asyncio.gather(*(write(name) for name in range(16)))
                await asyncio.sleep(0.15)
                killed.kill()
                await writing
            await settled(db, user)
            for word, session_id in written_words.items():
                assert await found(user, word) == [session_id]
            entries = await db.fetchval("SELECT count(*) FROM dev.session_search WHERE seq > 0")
            assert entries == len(written_words) == 400
            # The last one at work is killed as well; what was written meanwhile is found by the next.
            last = await written(user, "lastword")
            staying.kill()
        with start_session_service(own_database, scratch, ports[0], True, **fast):
            await until_found(user, "lastword", last.id)
    await db.close()


# ── properties ──────────────────────────────────────────────────────────────────────────────────

HAN = "一二三四五六七八九十百千万中国日本語漢字〇々"
KANA = "あいうえおかがきぎアイウエオカガーン"
HANGUL = "가나다라마바사한국어"
CJK = HAN + KANA + HANGUL
LATIN = "abcXYZéßλЖ019"
OTHER = " \n\t.,;!?、。「」…_-'\"()&|<>:*\\%😀"


def mixed_texts(most: int = 60) -> st.SearchStrategy[str]:
    runs = st.one_of(
        *(st.text(alphabet, min_size=1, max_size=8) for alphabet in (CJK, LATIN, OTHER)),
        st.text(max_size=5).filter(lambda text: "\0" not in text and text.encode("utf-8", "replace").decode() == text),
    )
    return st.lists(runs, min_size=1, max_size=most // 5).map("".join).filter(lambda text: bool(text.strip()))


def runs_of_cjk(text: str) -> list[str]:
    return "".join(each if each in CJK else " " for each in text).split()


# Each example waits for the index once, so that it is a few examples of many texts.
properties = settings(
    max_examples=5,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)


@properties
@given(texts=st.lists(mixed_texts(), min_size=15, max_size=15), data=st.data())
async def test_any_two_neighbours_are_found_and_strangers_are_not(
    sessions: httpx.AsyncClient, db: Db, texts: list[str], data: st.DataObject
) -> None:
    user = User(sessions, new_user_id())
    chats = {(await written(user, text)).id: words.fold(text) for text in texts}
    await settled(db, user)
    runs = [run for text in texts for run in runs_of_cjk(text) if len(run) > 1] or ["一二"]
    for _ in range(10):
        run = data.draw(st.sampled_from(runs))
        start = data.draw(st.integers(0, len(run) - 2))
        part = run[start : data.draw(st.integers(start + 2, len(run)))]
        stranger = data.draw(st.text(CJK, min_size=2, max_size=4))
        for asked in (part, stranger):
            expected = {name for name, text in chats.items() if words.fold(asked) in text}
            assert set(await found(user, asked, limit=100)) == expected, asked


@properties
@given(texts=st.lists(mixed_texts(), min_size=15, max_size=15), data=st.data())
async def test_any_word_and_any_whole_text_is_found(
    sessions: httpx.AsyncClient, db: Db, texts: list[str], data: st.DataObject
) -> None:
    user = User(sessions, new_user_id())
    chats = {(await written(user, text)).id: text for text in texts}
    await settled(db, user)
    for name, text in chats.items():
        pieces = [each.text for each in words.places(words.fold(text)) if each.kind != "end"]
        if pieces:
            assert name in await found(user, data.draw(st.sampled_from(pieces)), limit=100)
            quoted = text.replace('"', " ").strip()[:200]
            if len(text) < 200:
                assert name in await found(user, f'"{quoted}"', limit=100)


@settings(max_examples=300, deadline=None, database=None)
@given(st.text(max_size=200))
def test_places(text: str) -> None:
    """Places rise from 1, pairs overlap, and the same text has the same words."""
    folded = words.fold(text)
    listed = list(words.places(folded))
    assert [each.place for each in listed] == sorted(each.place for each in listed)
    assert not listed or listed[0].place == 1
    for one, other in pairwise(listed):
        if one.kind == "pair":
            assert (other.place, other.text[0]) == (one.place + 1, one.text[1])
            assert other.kind in {"pair", "end"}
    assert words.vector("u", text) == words.vector("u", text)
    assert words.vector("u", text)[0] == "" or words.vector("u", text)[0] != words.vector("v", text)[0]


@pytest.mark.parametrize("size", [65536, 200_000])
def test_vectors_of_any_long_text_fit_into_a_tsvector(size: int) -> None:
    """A tsvector holds 1 MiB of lexemes and places."""
    chance = random.Random(size)
    texts = [
        "".join(chr(chance.randint(0x4E00, 0x9FFF)) for _ in range(size // 3)),
        " ".join(chr(chance.randint(0xA1, 0x2FFF)) for _ in range(size // 3)),
        "ﷺ" * (size // 3),
        " ".join(str(number) for number in range(size // 6)),
    ]
    for text in texts:
        vector, _ = words.vector("user", text)
        assert len(vector.encode()) < 2**20
