"""Search: sessions by their titles, visible messages and memories, best first."""

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.session_service.calls import TIME, Chat, Db, Json, User, fine, invalid, refused, said


async def search(user: User, q: str, **params: Any) -> Json:
    return fine(await user.http.get("/sessions/search", params=user.params | {"q": q} | params))


async def found(user: User, q: str, **params: Any) -> list[str]:
    return [each["session_id"] for each in (await search(user, q, **params))["results"]]


async def settled(db: Db, user: User) -> None:
    """Returns when all that the user wrote is indexed; a second is what that may take."""
    behind = "SELECT count(*) FROM dev.sessions WHERE user_id = $1 AND indexed_version < version"
    deadline = time.monotonic() + 10
    while await db.fetchval(behind, user.id):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


async def written(user: User, *texts: str) -> Chat:
    """A session of these messages."""
    chat = await user.chat()
    for text in texts:
        await chat.append(text)
    return chat


MIXED = "我们使用Python写代码，version 2.7.1已经旧了。"
JAPANESE = "東京タワーへ行きました。コーヒーを飲みます！"
KOREAN = "안녕하세요, 세계! Kubernetes를 배웁니다."
ENGLISH = "The quick_brown fox's JUMP over Straße, naïve café — don't stop; e-mail a.b@example.org"
TOUCHING = "ใช้Python, ПриветWorld2; helloمرحبا λmm"
CASES: list[tuple[str, str, bool]] = [
    *(
        (MIXED, q, True)
        for q in ("我们", "们使", "使用", "我们使用", "Python", "python", "PYTHON", "使用Python", "Python写代码")
    ),
    *(
        (MIXED, q, True)
        for q in ("使用Python写", "Python写", "写代", "version", "2.7.1", "1已经", "旧了", "代码 python", "我们 旧了")
    ),
    *((MIXED, q, True) for q in ('"使用Python"', '"version 2"', "ｐｙｔｈｏｎ", "用Python写代")),
    *((MIXED, q, False) for q in ("我用", "使写", "Pytho", "ython", "java", "我们 java", '"python version"', "码写")),
    *(
        (JAPANESE, q, True)
        for q in ("東京", "京タ", "タワー", "コーヒー", "ーヒ", "行きました", "を飲", "飲みます", "ｺｰﾋｰ")
    ),
    *((JAPANESE, q, False) for q in ("東タ", "京都", "ワーコ", "したコ", "すコ")),
    *(
        (KOREAN, q, True)
        for q in ("안녕", "녕하", "안녕하세요", "세계", "Kubernetes", "kubernetes를", "를 배웁니다", "배웁")
    ),
    *((KOREAN, q, False) for q in ("안하", "요세", "계안", "Kubernetes을")),
    *(
        (ENGLISH, q, True)
        for q in ("the", "QUICK", "brown", "quick_brown", "fox", "fox's", "jump", "strasse", "STRAẞE")
    ),
    *((ENGLISH, q, True) for q in ("naïve", "NAÏVE", "cafe\u0301", "don't", "e-mail", "a.b@example.org", "example")),
    *(
        (ENGLISH, q, True)
        for q in ("fox stop the", '"jump over"', '"Over strasse"', '"the quick brown"', 'fox "jump over" stop')
    ),
    *(
        (ENGLISH, q, False)
        for q in ("foxes", "qui", "ick", "fox cat", '"over jump"', '"fox over"', '"the brown"', "naive")
    ),
    *(("ab c only", q, False) for q in ('"ab b"', "ab-b", "abc", '"ab only"')),
    *(("葛\U000e0100飾区", q, True) for q in ("葛飾", "葛\U000e0100飾", "飾区", "葛飾区")),
    *(("foo\u200bbar soft\u00adhyphen", q, True) for q in ("foobar", "softhyphen", "foo\u200bbar")),
    *(("a" * 150, q, expected) for q, expected in (("a" * 150, True), ("a" * 100, False), ("a" * 149, False))),
    *(("한국어 조선말", q, True) for q in ("한국", "한국어", "조선")),
    *(("𠀀𠀁𠀂 ideographs", q, True) for q in ("𠀀𠀁", "𠀁𠀂", "ideographs")),
    *(("ไทยแลนด์ हिन्दी עברית العربية русский", q, True) for q in ("हिन्दी", "עברית", "العربية", "РУССКИЙ")),
    *(
        (TOUCHING, q, True)
        for q in ("Python", "ใช้", "ใช้Python", "привет", "World2", "ПриветWorld2", "مرحبا", '"привет world2"', "λ", "mm")
    ),
    *((TOUCHING, q, False) for q in ("Pyth", "World", "2", '"world2 привет"', '"Python привет x"')),
    *(("哈" * 600, q, expected) for q, expected in (("哈哈", True), ("哈" * 200, True), ("哈笑", False))),
]


async def test_what_is_found_in_a_text(user: User, db: Db) -> None:
    """As a message, as a title and as a memory alike; each session has one text in one of these places."""
    texts = list(dict.fromkeys(text for text, _, _ in CASES))
    places: dict[str, set[str]] = {}
    for text in texts:
        title = await user.chat(title=text[:500])
        memory = await user.chat()
        await memory.remember(text)
        message = await written(user, "before", text, "after")
        places[text] = {title.id, memory.id, message.id}
    await settled(db, user)
    wrong = []
    for text, q, expected in CASES:
        hits = places[text] & set(await found(user, q, limit=100))
        if hits != (places[text] if expected else set()):
            wrong.append((text[:20], q[:40], expected, [sorted(places[text]).index(each) for each in hits]))
    assert not wrong


async def test_the_answer(user: User, db: Db) -> None:
    chat = await user.chat(title="About rivers")
    for n in range(1, 6):
        await chat.append(f"message {n} about the River Thames " + "and so on " * 40)
    memory = await chat.remember("likes rivers: the river Wye", "preference")
    await written(user, "no such word")
    await settled(db, user)
    body = await search(user, "river")
    assert list(body) == ["results", "next_cursor"]
    assert body["next_cursor"] is None
    (result,) = body["results"]
    assert list(result) == ["session_id", "title", "score", "last_activity", "snippets"]
    session = await chat.get()
    assert {name: result[name] for name in ("session_id", "title", "last_activity")} == {
        name: session[name] for name in ("session_id", "title", "last_activity")
    }
    assert TIME.fullmatch(result["last_activity"])
    assert isinstance(result["score"], int | float)
    assert 1 <= len(result["snippets"]) <= 10
    for snippet in result["snippets"]:
        assert "river" in snippet["text"].lower()
        assert len(snippet["text"]) < 300
        assert (snippet.get("seq") is None) != (snippet.get("memory_id") is None)
        assert snippet.get("seq") in {None, 1, 2, 3, 4, 5}
        assert snippet.get("memory_id") in {None, memory["memory_id"]}
    assert (await search(user, "about rivers"))["results"][0]["session_id"] == chat.id


@pytest.mark.parametrize(
    ("before", "text", "q"),
    [
        ("……" * 80, "目标在这里", "目标"),
        ("ßﬁ…½" * 60, " needle here", "needle"),
        ("x " * 2000, "hello,  world", '"hello world"'),
        ("x " * 2000, "apples. " + "y " * 30 + "pears", "pears apples"),
        ("字" * 9000, "Needle字字", "NEEDLE"),
        ("ｗｉｄｅ " * 300, "ｎｅｅｄｌｅ", "needle"),
    ],
)
async def test_snippets_show_the_match(user: User, db: Db, before: str, text: str, q: str) -> None:
    await written(user, before + text + " the end" * 50)
    await settled(db, user)
    ((snippet,),) = [each["snippets"] for each in (await search(user, q))["results"]]
    shown = snippet["text"]
    assert any(word in shown for word in (text[:2], "hello", "apples", "pears", "Needle", "needle", "ｎｅｅｄｌｅ")), (
        shown
    )
    assert shown.startswith("…")
    assert len(shown) <= 300


async def test_all_words_in_one_place(user: User, db: Db) -> None:
    """Words of one message, title or memory; a session in which they are scattered is none."""
    both = await written(user, "apples and pears")
    await written(user, "apples alone", "pears alone")
    await settled(db, user)
    assert (await found(user, "pears apples"))[0] == both.id


async def test_best_first(user: User, db: Db) -> None:
    once = await written(user, "zebra", "other")
    thrice = await written(user, "zebra", "a zebra", "the zebra")
    titled = await user.chat(title="zebra")
    newer = await written(user, "zebra", "newer")
    await settled(db, user)
    ranked = await found(user, "zebra")
    assert set(ranked) == {once.id, thrice.id, titled.id, newer.id}
    assert ranked.index(thrice.id) < ranked.index(newer.id) < ranked.index(once.id)
    scores = [each["score"] for each in (await search(user, "zebra"))["results"]]
    assert scores == sorted(scores, reverse=True)


# ── what is seen, and whose ─────────────────────────────────────────────────────────────────────


async def test_superseded_messages_are_never_found(user: User, db: Db) -> None:
    chat = await written(user, "kept word", "taken word")
    await settled(db, user)
    fine(await chat.call("POST", "/rewind", json={"to_seq": 1}))
    assert await found(user, "taken") == []
    assert await found(user, "kept") == [chat.id]
    turn = await chat.open(said("refused question"))
    await settled(db, user)
    await turn.complete(status="refused")
    assert await found(user, "question") == []
    fine(await chat.end())
    await user.create(session_id=chat.id, if_exists="restart")
    assert await found(user, "kept") == []
    await chat.append("taken back before it was indexed")
    fine(await chat.call("POST", "/rewind", json={"to_seq": 0}))
    await settled(db, user)
    assert await found(user, "indexed") == []


async def test_in_the_middle_of_an_erase(user: User, db: Db) -> None:
    """Messages and memories go first, by batches; an erase that was cut off may leave it so for long."""
    chat = await user.chat(title="heron on the title")
    await chat.append("heron in a message")
    await chat.remember("heron in a memory")
    await settled(db, user)
    assert len((await search(user, "heron"))["results"][0]["snippets"]) == 2
    for table in ("session_messages", "session_memories"):
        await db.execute(f"DELETE FROM dev.{table} WHERE user_id = $1", user.id)
    (result,) = (await search(user, "heron"))["results"]
    assert (result["session_id"], result["snippets"]) == (chat.id, [])
    assert await found(user, "message") == await found(user, "memory") == []


async def test_sessions_of_any_status(user: User, db: Db) -> None:
    chats = [await written(user, "lighthouse") for _ in range(4)]
    for chat, steps in zip(chats, ([], ["ended"], ["completed"], ["completed", "archived"]), strict=True):
        for step in steps:
            fine(await chat.put(status=step))
    await settled(db, user)
    assert set(await found(user, "lighthouse")) == {chat.id for chat in chats}


async def test_nobody_elses(user: User, db: Db) -> None:
    other = user.other()
    await (await other.chat(title="secret plans", session_id="same")).append("secret plans")
    await (await written(other, "x")).remember("secret plans")
    mine = await user.chat(session_id="same")
    await mine.append("harmless")
    await settled(db, other)
    await settled(db, user)
    assert await found(user, "secret") == []
    assert len(await found(other, "secret")) == 2
    assert await found(user, "harmless") == ["same"]


async def test_titles_and_memories_that_change(user: User, db: Db) -> None:
    chat = await user.chat(title="first title")
    memory = await chat.remember("first memory")
    await settled(db, user)
    assert await found(user, "first title") == await found(user, '"first memory"') == [chat.id]
    path = f"/memories/{memory['memory_id']}"
    fine(await chat.put(title="second heading"))
    fine(await chat.call("PUT", path, json={"content": "another remembrance"}))
    await settled(db, user)
    assert await found(user, "first") == []
    assert await found(user, "heading") == await found(user, "remembrance") == [chat.id]
    fine(await chat.call("PUT", path, json={"memory_type": "custom"}))
    await settled(db, user)
    assert await found(user, "remembrance") == [chat.id]
    fine(await chat.call("DELETE", path))
    assert await found(user, "remembrance") == []
    fine(await chat.put(title=""))
    await settled(db, user)
    assert await found(user, "heading") == []


async def test_blocks_are_searched_by_their_text(user: User, db: Db) -> None:
    chat = await user.chat()
    blocks = [
        {"type": "text", "text": "visible words"},
        {"type": "tool_use", "id": "t", "name": "hiddenname", "input": {}},
    ]
    await chat.append(blocks, "assistant", native={"x": "nativeword"}, metadata={"x": "metaword"})
    await settled(db, user)
    assert await found(user, "visible") == [chat.id]
    for hidden in ("hiddenname", "nativeword", "metaword"):
        assert await found(user, hidden) == []


async def test_copies_and_imports_are_found(user: User, db: Db) -> None:
    chat = await written(user, "waterfall")
    await chat.remember("rainbow")
    fork = fine(await chat.call("POST", "/fork", json={"title": "forked"}))["session_id"]
    there = user.other()
    file = (await chat.call("GET", "/export")).content
    fine(await user.http.post("/sessions/import", params=there.params, content=file))
    for each in (user, there):
        await settled(db, each)
    assert set(await found(user, "waterfall")) == {chat.id, fork}
    assert await found(user, "rainbow") == [chat.id]
    assert await found(there, "waterfall") == await found(there, "rainbow") == [chat.id]


# ── long texts ──────────────────────────────────────────────────────────────────────────────────


async def test_the_first_64_kib_of_a_message(user: User, db: Db) -> None:
    filler = "filler " * ((65536 - 20) // 7)
    chat = await written(user, filler + "inside", "字" * 21_000 + "鲸鱼", filler + "x" * 30 + " outside")
    await settled(db, user)
    assert await found(user, "inside") == await found(user, "鲸鱼") == [chat.id]
    assert await found(user, "outside") == []
    assert await found(user, "filler") == [chat.id]


async def test_phrases_in_long_texts(user: User, db: Db) -> None:
    english = "alpha " + "the " * 300 + "omega, gamma. delta " + "word " * 5000 + "Straße beta ДаPython"
    chinese = "甲乙" + "字" * 17_000 + "乙丙" + "话" * 100 + "丙丁戊己"
    chat = await written(user, english, chinese)
    await settled(db, user)
    for q in (
        '"omega gamma delta"',
        "alpha omega beta",
        '"the omega"',
        "乙丙",
        "丙丁戊己",
        "丁戊己",
        '"straße beta"',
        "话丙丁",
        "ДаPython",
        '"beta да python"',
    ):
        assert await found(user, q) == [chat.id], q
    for q in (
        '"alpha omega"',
        '"gamma omega"',
        '"delta alpha"',
        "甲乙丙",
        "乙丙丁",
        "丁己",
        '"lpha the"',
        "даpytho",
        '"python да"',
    ):
        assert await found(user, q) == [], q


# ── parameters, and walking by cursor ───────────────────────────────────────────────────────────


@pytest.mark.parametrize("q", ["", " ", "\t\n", "\u3000", "x" * 257, "a\0b"])
async def test_queries_that_are_none(user: User, q: str) -> None:
    invalid(await user.http.get("/sessions/search", params=user.params | {"q": q}), "query", "q")


def _cursor(*place: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(place).encode()).decode().rstrip("=")


async def test_bad_parameters(user: User, db: Db) -> None:
    invalid(await user.http.get("/sessions/search", params=user.params), "query", "q")
    invalid(await user.http.get("/sessions/search", params={"q": "x"}), "query", "user_id")
    for limit in ("0", "101", "-1", "x", "1.5"):
        invalid(
            await user.http.get("/sessions/search", params=user.params | {"q": "x", "limit": limit}), "query", "limit"
        )
    listing = (await user.http.get("/sessions", params=user.params | {"page_size": 1})).json()["next_cursor"]
    strange = [
        _cursor("search", 10**30, "2026-01-01T00:00:00Z", "s"),
        _cursor("search", -1, "2026-01-01T00:00:00Z", "s"),
        _cursor("search", 1, "0001-01-01T00:00:00+14:00", "s"),
        _cursor("search", 1, "2026-01-01T00:00:00Z", "\0"),
    ]
    for cursor in ("x", "e30", "WzFd", "A" * 3000, listing or "bnVsbA", *strange):
        params = user.params | {"q": "x", "cursor": cursor}
        invalid(await user.http.get("/sessions/search", params=params), "query", "cursor")
    refused(await user.http.get("/sessions/search", params={"user_id": "a/b", "q": "x"}), 400, "validation_error")


@pytest.mark.parametrize(
    "q",
    [
        "!",
        "'",
        '"',
        '""',
        "\\",
        "a'b",
        "a & b | !c",
        "a <-> b",
        ":*",
        "x:A",
        "((",
        "%",
        "' OR 1=1 --",
        "😀",
        "“”",
        "* . ?",
    ],
)
async def test_queries_of_any_characters(user: User, q: str) -> None:
    assert (await search(user, q))["results"] == []
    assert (await search(user, "x" * 256))["results"] == []


async def test_a_walk_by_cursor_meets_each_session_once(user: User, db: Db) -> None:
    chats = [await written(user, *["walk"] * (1 + n % 3)) for n in range(11)]
    await db.execute(
        "UPDATE dev.sessions SET last_activity = '2024-01-01' WHERE session_id = ANY($1)", [c.id for c in chats[:6]]
    )
    await settled(db, user)
    whole = await found(user, "walk", limit=100)
    assert set(whole) == {chat.id for chat in chats}
    for limit in (1, 2, 3, 11):
        met: list[str] = []
        async for page in pages(user, "walk", limit):
            assert 1 <= len(page) <= limit
            met += page
            assert len(met) <= len(whole), "the walk goes in circles"
        assert met == whole


async def pages(user: User, q: str, limit: int) -> AsyncIterator[list[str]]:
    cursor: dict[str, str] = {}
    while True:
        body = await search(user, q, limit=limit, **cursor)
        yield [each["session_id"] for each in body["results"]]
        if body["next_cursor"] is None:
            return
        cursor = {"cursor": body["next_cursor"]}
