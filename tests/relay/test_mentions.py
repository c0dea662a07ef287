"""Files that messages name: which they are, and what the model is given of them."""

import copy
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from hypothesis import given
from hypothesis import strategies as st

from services.relay.attachments import Uploads
from services.relay.mentions import MAX_ALL_BYTES, MAX_FILE_BYTES, Named, Paths, named_in, with_attachments, with_named
from shared.database import Database
from shared.session_client import SessionKey
from tests.relay.calls import Json, assistant, user

A, B = "/workspace/a.txt", "/workspace/b.txt"


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def database(database_url: str) -> AsyncIterator[Database]:
    opened = Database(database_url, schema="dev", pool_size=2)
    await opened.open()
    yield opened
    await opened.close()


@pytest.fixture
def key(user_id: str) -> SessionKey:
    return SessionKey(user_id, "s")


async def put(database: Database, key: SessionKey, files: dict[str, bytes]) -> None:
    uploads = Uploads(database)
    for name, content in files.items():
        await uploads.put(key, f"/workspace/{name}", content)


def block(path: str, text: str) -> Json:
    return {"type": "text", "text": f'<file path="{path}">\n{text}\n</file>'}


def said(text: str) -> Json:
    return {"type": "text", "text": text}


# ── which files a text names ────────────────────────────────────────────────────────────────────

STORED = [
    A,
    "/workspace/a",
    "/workspace/a b.txt",
    "/workspace/d/a.txt",
    "/workspace/报告",
    "/workspace/报告.pdf",
    "/workspace/r",
]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("/workspace/a.txt", [A]),
        ("Look at /workspace/a.txt.", [A]),
        ("Look at /workspace/a.txt...", [A]),
        ("(/workspace/a.txt), \"/workspace/a\"; '/workspace/d/a.txt'?", [A, "/workspace/a", "/workspace/d/a.txt"]),
        ("`/workspace/a.txt`:12 and path=/workspace/a", [A, "/workspace/a"]),
        ("/workspace/a.txt:12", [A]),
        ("<file>/workspace/a.txt</file>", [A]),
        ("sandbox:/workspace/a.txt @/workspace/a", [A, "/workspace/a"]),
        ("/workspace/a b.txt", ["/workspace/a b.txt"]),
        ("/workspace/a bc", ["/workspace/a"]),
        ("/workspace/a b.txt2", ["/workspace/a"]),
        ("/workspace/a.txt\n/workspace/a.txt /workspace/a", [A, "/workspace/a"]),
        ("请看/workspace/a.txt的内容，和/workspace/报告.pdf。", [A, "/workspace/报告.pdf"]),
        ("看看/workspace/报告，谢谢", ["/workspace/报告"]),
        ("/workspace/a.txt~", [A]),
        # beginnings of longer paths
        ("/workspace/a.txt.bak", []),
        ("/workspace/a.txt/b", []),
        ("/workspace/a.txt2 /workspace/a.txt_ /workspace/a.txt-old /workspace/a.txt+b /workspace/a-.x", []),
        ("/workspace/ab.txt", []),
        ("/workspace/résumé", []),
        ("/workspace/报告书", []),
        ("/workspace/a/", []),
        # ends of longer paths, and no paths of ours
        ("/tmp/workspace/a.txt x/workspace/a.txt ./workspace/a.txt ~/workspace/a.txt", []),
        ("https://workspace/a.txt", []),
        ("workspace/a.txt a.txt /WORKSPACE/a.txt", []),
        ("/workspace/missing.txt /workspace/ /workspace", []),
        ("", []),
    ],
)
def test_what_is_named(text: str, names: list[str]) -> None:
    assert Paths(STORED).named_in(text) == names


part = st.sampled_from(["a", "b", "ab", "a.b", "a b", "-", "文", "a/b", "."])
some_paths = st.lists(
    st.lists(part, min_size=1, max_size=4).map(lambda parts: "/workspace/" + "".join(parts)), max_size=8
)


@given(some_paths, st.lists(part | st.just("/workspace/") | st.sampled_from([" ", "\n", ",", "x"]), max_size=12))
def test_the_search_misses_none(paths: list[str], parts: list[str]) -> None:
    """However the paths begin with one another, it finds what trying each of them at each place finds."""
    text = "".join(parts)
    alone = {path for path in paths if Paths([path]).named_in(text)}
    found = Paths(paths).named_in(text)
    assert set(found) <= alone
    assert all(any(other != path and other.startswith(path) for other in found) for path in alone - set(found))


@given(some_paths.filter(bool), st.integers(0, 7))
def test_a_path_by_itself_is_named(paths: list[str], index: int) -> None:
    path = paths[index % len(paths)]
    assert Paths(paths).named_in(f"see '{path}'") == [path]


# ── what is read ────────────────────────────────────────────────────────────────────────────────


async def test_text_is_given_and_nothing_else(database: Database, key: SessionKey) -> None:
    files = {"t": "ü\r\n😀".encode(), "empty": b"", "nul": b"a\0b", "latin": b"\xfc", "utf16": "a".encode("utf-16")}
    await put(database, key, files | {"late": b"a" * MAX_FILE_BYTES + b"\xff"})
    text = " ".join(f"/workspace/{name}" for name in (*files, "late", "missing"))
    assert await named_in(database, key, [text]) == [
        Named("/workspace/t", "ü\r\n😀", 8),
        Named("/workspace/empty", "", 0),
    ]
    assert await named_in(database, SessionKey(key.user_id, "other"), [text]) == []


async def test_a_long_text_is_cut_between_characters(database: Database, key: SessionKey) -> None:
    await put(database, key, {"fits": b"a" * MAX_FILE_BYTES, "long": b"a" + "文".encode() * MAX_FILE_BYTES})
    fits, long = await named_in(database, key, ["/workspace/fits /workspace/long"])
    assert fits.block == block("/workspace/fits", "a" * MAX_FILE_BYTES)
    assert MAX_FILE_BYTES == 65_536
    assert long.text == "a" + "文" * 21_845  # 65,536 bytes
    head = '<file path="/workspace/long" first_bytes="65536" of_bytes="196609">\n'
    assert long.block == said(f"{head}{long.text}\n</file>")
    await put(database, key, {"odd": "文".encode() * MAX_FILE_BYTES})
    (odd,) = await named_in(database, key, ["/workspace/odd"])
    assert odd.text == "文" * 21_845  # and a byte less


async def test_all_together_have_256_kib(database: Database, key: SessionKey) -> None:
    """Those named last come first; what no longer fits is cut, and then left out."""
    assert MAX_ALL_BYTES == 262_144
    await put(database, key, {name: name.encode() * 60_000 for name in "abcdef"})
    texts = ["/workspace/a /workspace/b", "/workspace/c", "/workspace/d /workspace/e /workspace/f /workspace/c"]
    found = await named_in(database, key, texts)
    assert {each.path[-1]: len(each.text) for each in found} == {
        **dict.fromkeys("cdef", 60_000),
        "b": 262_144 - 240_000,
    }
    assert await named_in(database, key, texts) == found


# ── where it stands ─────────────────────────────────────────────────────────────────────────────

FOUND = [Named(A, "text of a", 9), Named(B, "text of b", 9)]


def test_files_stand_after_what_was_said() -> None:
    result = {"type": "tool_result", "tool_use_id": "t", "content": f"see {B}"}
    messages = [
        user("Hello"),
        assistant(f"Shall I read {A}?"),
        user(f"Yes, {A}"),
        assistant([said("…")]),
        user([result, said(f"compare {B} with {A}"), {"type": "image", "source": {}}]),
        user(f"again {A} {B}"),
    ]
    before = copy.deepcopy(messages)
    given_messages = with_attachments(messages, FOUND)
    assert messages == before
    assert given_messages == [
        *before[:2],
        user([said(f"Yes, {A}"), block(A, "text of a")]),
        before[3],
        user([*before[4]["content"], block(B, "text of b")]),
        before[5],
    ]
    assert with_attachments(messages, FOUND[::-1]) == given_messages


def test_several_stand_in_the_order_in_which_they_are_named() -> None:
    (message,) = with_attachments([user(f"{B} and {A} and {B}")], FOUND)
    assert message["content"][1:] == [block(B, "text of b"), block(A, "text of a")]


def test_nothing_named_nothing_changed() -> None:
    messages = [user("Hello"), user([said("/workspace/c")]), {"role": "system", "content": A}]
    assert with_attachments(messages, FOUND) == messages
    assert with_attachments([], FOUND) == []


def test_a_path_is_written_so_that_it_ends_where_it_ends() -> None:
    named = Named('/workspace/"><file path="x&', "t", 1)
    assert named.block["text"].startswith('<file path="/workspace/&quot;&gt;&lt;file path=&quot;x&amp;">\n')


async def test_a_conversation_that_goes_on_keeps_its_beginning(database: Database, key: SessionKey) -> None:
    await put(database, key, {"a.txt": b"1", "b.txt": b"2"})
    messages: list[Json] = []
    last: list[Json] = []
    for text in ("Hello", f"read {A}", "thanks", f"and {B}, as {A} was"):
        messages += [user(text), assistant("well")]
        now = await with_named(database, key, list(messages))
        assert now[: len(last)] == last
        last = now
    assert [len(each["content"]) for each in last if isinstance(each["content"], list)] == [2, 2]
    assert last[2]["content"][1] == block(A, "1")
    assert last[6]["content"][1] == block(B, "2")


async def test_without_a_path_nobody_is_asked(key: SessionKey) -> None:
    closed = Database("postgresql://nobody@127.0.0.1:1/none", schema="dev")
    messages: list[dict[str, Any]] = [user("Hello"), assistant(A)]
    assert await with_named(closed, key, messages) is messages
