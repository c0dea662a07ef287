"""Files of sessions: their paths, their limits, what they share, and what of them a model is given."""

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator

import asyncpg
import pytest
import pytest_asyncio
from hypothesis import example, given
from hypothesis import strategies as st

from services.relay import attachments
from services.relay.attachments import MAX_FILE_BYTES, MAX_SESSION_BYTES, MAX_SESSION_FILES, Skipped, Uploads
from services.relay.errors import AttachmentNotFound, FileTooLarge, InvalidRequest, SessionFilesFull
from services.relay.file_paths import folder_of, path_of, path_of_name
from shared.database import Database
from shared.session_client import SessionKey

Db = asyncpg.Connection


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def relays(database_url: str) -> AsyncIterator[list[Database]]:
    """What two relays have of the same database."""
    opened = [Database(database_url, schema="dev", pool_size=8) for _ in range(2)]
    for database in opened:
        await database.open()
    yield opened
    for database in opened:
        await database.close()


@pytest.fixture
def database(relays: list[Database]) -> Database:
    return relays[0]


@pytest.fixture
def uploads(database: Database) -> Uploads:
    return Uploads(database)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def sql(database_url: str) -> AsyncIterator[Db]:
    connection = await asyncpg.connect(database_url, server_settings={"search_path": "dev"})
    yield connection
    await connection.close()


@pytest.fixture
def key(user_id: str) -> SessionKey:
    return SessionKey(user_id, "s")


async def blobs_of(sql: Db, user_id: str) -> list[tuple[bytes, int]]:
    """Hashes and sizes of all contents that are kept of a user."""
    query = "SELECT sha256, length(content) FROM relay_blobs WHERE user_id = $1 ORDER BY sha256"
    return [tuple(row) for row in await sql.fetch(query, user_id)]


async def stored_bytes(sql: Db, key: SessionKey) -> int:
    query = "SELECT coalesce(sum(size_bytes), 0) FROM relay_attachments WHERE user_id = $1 AND session_id = $2"
    return int(await sql.fetchval(query, key.user_id, key.session_id))


def hashes(*contents: bytes) -> list[tuple[bytes, int]]:
    return sorted((hashlib.sha256(content).digest(), len(content)) for content in contents)


# ── paths ───────────────────────────────────────────────────────────────────────────────────────

FINE = [
    "/workspace/a",
    "/workspace/a/b/c.txt",
    "/workspace/.hidden",
    "/workspace/...",
    "/workspace/..a/a..",
    "/workspace/ /blank ",
    "/workspace/文件.txt",
    "/workspace/e\u0301",
    "/workspace/%2e%2e/%2Fetc%2Fpasswd",  # what is encoded twice is a name like any other
    "/workspace/\uff0e\uff0e/\u2024\u2024/a\u2215b\uff3cc",  # look-alikes are other characters
    "/workspace/~root/$HOME/*?\"'<>|;&#",
    "/workspace/" + "a" * 255,
    "/workspace/" + "文" * 255,
    "/workspace/" + "/".join(["a" * 255] * 15),
    "/workspace/workspace/workspace",
]
REFUSED = {
    "": "must be absolute",
    "/": "must be absolute",
    "a.txt": "must be absolute",
    "workspace/a": "must be absolute",
    "./workspace/a": "must be absolute",
    "/workspace": "must be absolute",
    "/workspaces/a": "must be absolute",
    "/Workspace/a": "must be absolute",
    "//workspace/a": "must be absolute",
    "/etc/passwd": "must be absolute",
    "/./workspace/a": "must be absolute",
    "/x/../workspace/a": "must be absolute",
    "\uff0fworkspace/a": "must be absolute",
    "C:/workspace/a": "must be absolute",
    "file:///workspace/a": "must be absolute",
    " /workspace/a": "must be absolute",
    "/workspace/": "an empty segment",
    "/workspace//a": "an empty segment",
    "/workspace/a/": "an empty segment",
    "/workspace/a//b": "an empty segment",
    "/workspace/.": "a segment . or ..",
    "/workspace/..": "a segment . or ..",
    "/workspace/../etc/passwd": "a segment . or ..",
    "/workspace/a/../../b": "a segment . or ..",
    "/workspace/a/./b": "a segment . or ..",
    "/workspace\\a": "a backslash",
    "/workspace/..\\..\\a": "a backslash",
    "\\workspace\\a": "a backslash",
    "/workspace/a\0": "control characters",
    "/workspace/a\0.txt": "control characters",
    "/workspace/a\nb": "control characters",
    "/workspace/a\n": "control characters",
    "/workspace/\t": "control characters",
    "/workspace/a\x7f": "control characters",
    "/workspace/a\x85": "control characters",
    "/workspace/a\x9f": "control characters",
    "/workspace/\ud800": "control characters",
    "/workspace/" + "a" * 256: "a segment of more than 255",
    "/workspace/" + "a" * 256 + "/b": "a segment of more than 255",
    "/workspace/" + "a/" * 2050 + "b": "at most 4096",
}


@pytest.mark.parametrize("raw", FINE, ids=ascii)
def test_a_path_is_taken_as_it_is(raw: str) -> None:
    assert path_of(raw) == raw


@pytest.mark.parametrize("raw", REFUSED, ids=lambda raw: ascii(raw[:40]))
def test_a_path_is_refused_with_the_reason(raw: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        path_of(raw)
    assert refused.value.status == 400
    assert str(refused.value.detail).startswith("path: must ")
    assert REFUSED[raw] in str(refused.value.detail)


PIECES = ["/", "/", "/workspace/", ".", "..", "a", "%2e", "\\", "\0", "\x7f", "\u0085", "文", "a" * 255, "\uff0f"]


@given(st.lists(st.sampled_from(PIECES) | st.characters(), max_size=12).map("".join) | st.text())
@example("/workspace/a/..")
def test_no_path_leads_out(rest: str) -> None:
    """Whatever passes stays where it is when a file system reads it, and is one name for one file."""
    for raw in (rest, "/workspace/" + rest):
        try:
            path = path_of(raw)
        except InvalidRequest:
            continue
        assert path == raw == os.path.normpath(path)
        assert path.startswith("/workspace/")
        assert not any(character < " " or "\x7f" <= character <= "\x9f" or character == "\\" for character in path)
        assert all(len(segment.encode()) > 0 and len(segment) <= 255 for segment in path[1:].split("/"))


def test_a_name_is_a_file_of_the_folder() -> None:
    assert path_of_name("a b.txt") == "/workspace/a b.txt"
    assert path_of_name("d/a.txt") == "/workspace/d/a.txt"
    assert path_of_name("/workspace/d/a.txt") == "/workspace/d/a.txt"
    for name in ("", ".", "..", "../a", "/etc/passwd", "a\\b", "a\n", "/"):
        with pytest.raises(InvalidRequest):
            path_of_name(name)


def test_folders() -> None:
    for raw in ("", "/workspace", "/workspace/"):
        assert folder_of(raw) == "/workspace"
    assert folder_of("/workspace/a/b") == folder_of("/workspace/a/b/") == "/workspace/a/b"
    for raw in ("/", "a", "/etc", "//", "/workspace//", "/workspace/..", "/workspace/../", "/workspace/a//", "."):
        with pytest.raises(InvalidRequest):
            folder_of(raw)


# ── put and get ─────────────────────────────────────────────────────────────────────────────────


async def test_every_byte_comes_back(database: Database, uploads: Uploads, key: SessionKey) -> None:
    whole = bytes(range(256)) * (MAX_FILE_BYTES // 256)
    for path, content in (("/workspace/all", whole), ("/workspace/none", b""), ("/workspace/nul", b"\0\xff\r\n")):
        await uploads.put(key, path, content, None)
        got = await attachments.get(database, key, path)
        assert (got.path, got.content, got.content_type) == (path, content, None)


async def test_long_paths_can_be_stored(database: Database, uploads: Uploads, key: SessionKey) -> None:
    """Longer than what an index takes, of characters that cannot be made shorter."""
    name = "".join(chr(0x20000 + int.from_bytes(os.urandom(2), "big") % 0xA000) for _ in range(255 * 15))
    path = "/workspace/" + "/".join(name[start : start + 255] for start in range(0, len(name), 255))
    await uploads.put(key, path, b"deep")
    assert (await attachments.get(database, key, path)).content == b"deep"
    assert await attachments.list_paths(database, key, "/workspace") == [path]


@pytest.mark.parametrize(
    ("given_type", "kept"),
    [
        ("text/plain", "text/plain"),
        ("text/plain; charset=utf-8", "text/plain; charset=utf-8"),
        ("application/vnd.a+json", "application/vnd.a+json"),
        (None, None),
        ("", None),
        ("text", None),
        ("text/plain\r\nset-cookie: a=b", None),
        ("text/plain\n", None),
        ("täxt/plain", None),
        ("text/" + "a" * 300, None),
    ],
)
async def test_media_types(
    database: Database, uploads: Uploads, key: SessionKey, given_type: str | None, kept: str | None
) -> None:
    await uploads.put(key, "/workspace/a", b"a", given_type)
    assert (await attachments.get(database, key, "/workspace/a")).content_type == kept


async def test_files_are_their_sessions_own(database: Database, uploads: Uploads, user_id: str) -> None:
    mine = SessionKey(user_id, "s")
    await uploads.put(mine, "/workspace/a", b"mine")
    for other in (SessionKey(user_id, "t"), SessionKey(user_id + "x", "s")):
        with pytest.raises(AttachmentNotFound) as missing:
            await attachments.get(database, other, "/workspace/a")
        assert missing.value.status == 404
        assert await attachments.list_paths(database, other, "/workspace") == []
        await uploads.put(other, "/workspace/a", b"theirs")
    assert (await attachments.get(database, mine, "/workspace/a")).content == b"mine"


async def test_lists_are_sorted_and_of_a_folder(database: Database, uploads: Uploads, key: SessionKey) -> None:
    paths = [f"/workspace/{name}" for name in ("b", "a", "d/b", "d/a/c", "d_", "dd", "D", "文")]
    for path in paths:
        await uploads.put(key, path, b"")
    assert await attachments.list_paths(database, key, "/workspace") == sorted(paths)
    assert await attachments.list_paths(database, key, "/workspace/d") == ["/workspace/d/a/c", "/workspace/d/b"]
    assert await attachments.list_paths(database, key, "/workspace/d/a") == ["/workspace/d/a/c"]
    assert await attachments.list_paths(database, key, "/workspace/dd") == ["/workspace/dd"]
    assert await attachments.list_paths(database, key, "/workspace/none") == []


# ── limits ──────────────────────────────────────────────────────────────────────────────────────


async def test_a_file_has_3_mib(database: Database, uploads: Uploads, key: SessionKey, sql: Db) -> None:
    assert MAX_FILE_BYTES == 3 * 1024 * 1024
    with pytest.raises(FileTooLarge) as refused:
        await uploads.put(key, "/workspace/a", bytes(MAX_FILE_BYTES + 1))
    assert refused.value.status == 413
    assert await blobs_of(sql, key.user_id) == []
    await uploads.put(key, "/workspace/a", bytes(MAX_FILE_BYTES))
    assert len((await attachments.get(database, key, "/workspace/a")).content) == MAX_FILE_BYTES


async def fill(uploads: Uploads, key: SessionKey) -> None:
    """Two bytes are left after this."""
    for number in range(16):
        await uploads.put(key, f"/workspace/{number}", bytes(MAX_FILE_BYTES))
    await uploads.put(key, "/workspace/rest", bytes(MAX_SESSION_BYTES - 16 * MAX_FILE_BYTES - 2))


async def test_a_session_has_50_mib(database: Database, uploads: Uploads, key: SessionKey, sql: Db) -> None:
    """As its files say, though there are but two contents; to the byte, and with what is taken away by overwriting."""
    assert MAX_SESSION_BYTES == 50 * 1024 * 1024
    await fill(uploads, key)
    with pytest.raises(SessionFilesFull) as refused:
        await uploads.put(key, "/workspace/new", b"123")
    assert refused.value.status == 413
    with pytest.raises(AttachmentNotFound):
        await attachments.get(database, key, "/workspace/new")
    await uploads.put(key, "/workspace/new", b"12")
    assert await stored_bytes(sql, key) == MAX_SESSION_BYTES
    await uploads.put(key, "/workspace/empty", b"")
    with pytest.raises(SessionFilesFull):
        await uploads.put(key, "/workspace/new", b"123")
    assert (await attachments.get(database, key, "/workspace/new")).content == b"12"
    await uploads.put(key, "/workspace/0", bytes(MAX_FILE_BYTES - 1))
    await uploads.put(key, "/workspace/new", b"123")
    assert await stored_bytes(sql, key) == MAX_SESSION_BYTES
    other = SessionKey(key.user_id, "other")
    await uploads.put(other, "/workspace/a", bytes(MAX_FILE_BYTES))


async def test_a_session_has_10_000_files(uploads: Uploads, key: SessionKey, sql: Db) -> None:
    await uploads.put(key, "/workspace/a", b"")
    await sql.execute(
        "INSERT INTO relay_attachments SELECT user_id, session_id, sha256(n::text::bytea), '/workspace/' || n, sha256,"
        " 0, true, NULL, now(), now() FROM relay_attachments, generate_series(2, $1::int) n WHERE user_id = $2",
        MAX_SESSION_FILES,
        key.user_id,
    )
    with pytest.raises(SessionFilesFull):
        await uploads.put(key, "/workspace/b", b"")
    await uploads.put(key, "/workspace/a", b"again")


async def test_many_at_once_stay_below_the_limit(relays: list[Database], key: SessionKey, sql: Db) -> None:
    """From two relays, with contents of their own and with equal ones."""
    each = [Uploads(database) for database in relays]
    await fill(each[0], SessionKey(key.user_id, "other"))
    contents = [bytes([number % 5]) * (MAX_FILE_BYTES - number // 20) for number in range(40)]
    put = (each[n % 2].put(key, f"/workspace/{n}", content) for n, content in enumerate(contents))
    outcomes = await asyncio.gather(*put, return_exceptions=True)
    taken = [content for content, outcome in zip(contents, outcomes, strict=True) if outcome is None]
    assert all(outcome is None or isinstance(outcome, SessionFilesFull) for outcome in outcomes), outcomes
    assert len(taken) == 16
    assert await stored_bytes(sql, key) == sum(map(len, taken)) <= MAX_SESSION_BYTES


async def test_whoever_waits_holds_no_connection(
    database_url: str, relays: list[Database], key: SessionKey, sql: Db
) -> None:
    """One user's uploads take one connection of the pool, however many they are."""
    database = Database(database_url, schema="dev", pool_size=2, timeout_seconds=5)
    await database.open()
    uploads = Uploads(database)
    lock = "SELECT pg_advisory_xact_lock(hashtextextended($1, 20261120))"
    async with sql.transaction():
        await sql.fetch(lock, key.user_id)
        waiting = [asyncio.create_task(uploads.put(key, f"/workspace/{n}", b"a")) for n in range(10)]
        for _ in range(20):
            assert await attachments.list_paths(database, key, "/workspace") == []
    await asyncio.gather(*waiting)
    assert len(await attachments.list_paths(database, key, "/workspace")) == 10
    await database.close()


# ── equal contents ──────────────────────────────────────────────────────────────────────────────


async def test_equal_contents_are_kept_once(database: Database, uploads: Uploads, user_id: str, sql: Db) -> None:
    one, two = SessionKey(user_id, "1"), SessionKey(user_id, "2")
    for key in (one, two):
        for name in "ab":
            await uploads.put(key, f"/workspace/{name}", b"same")
    assert await blobs_of(sql, user_id) == hashes(b"same")
    stranger = SessionKey(user_id + "x", "1")
    await uploads.put(stranger, "/workspace/a", b"same")
    assert await blobs_of(sql, stranger.user_id) == hashes(b"same")


async def test_overwriting_frees(database: Database, uploads: Uploads, user_id: str, sql: Db) -> None:
    key, other = SessionKey(user_id, "1"), SessionKey(user_id, "2")
    await uploads.put(key, "/workspace/a", b"old", "text/plain")
    await uploads.put(other, "/workspace/b", b"old")
    await uploads.put(key, "/workspace/a", b"new")
    assert (await attachments.get(database, key, "/workspace/a")).content == b"new"
    assert (await attachments.get(database, key, "/workspace/a")).content_type is None
    assert (await attachments.get(database, other, "/workspace/b")).content == b"old"
    assert await blobs_of(sql, user_id) == hashes(b"old", b"new")
    await uploads.put(other, "/workspace/b", b"new")
    assert await blobs_of(sql, user_id) == hashes(b"new")
    await uploads.put(other, "/workspace/b", b"new")
    assert await blobs_of(sql, user_id) == hashes(b"new")
    row = "SELECT updated_at > created_at FROM relay_attachments WHERE user_id = $1"
    assert [each[0] for each in await sql.fetch(row, user_id)] == [True, True]


async def test_overwriting_at_once_leaves_nothing_behind(relays: list[Database], user_id: str, sql: Db) -> None:
    """Every file has its content, and no content is left that no file has."""
    each = [Uploads(database) for database in relays]
    keys = [SessionKey(user_id, session_id) for session_id in "12"]
    for _ in range(3):
        await asyncio.gather(
            *(each[n % 2].put(keys[n // 2 % 2], f"/workspace/{n % 3}", b"%d" % (n % 7)) for n in range(60))
        )
    found = [
        (await attachments.get(relays[0], key, path)).content
        for key in keys
        for path in await attachments.list_paths(relays[0], key, "/workspace")
    ]
    assert len(found) == 6
    assert await blobs_of(sql, user_id) == hashes(*set(found))


async def test_deleting_frees(database: Database, uploads: Uploads, user_id: str, sql: Db) -> None:
    key, other = SessionKey(user_id, "1"), SessionKey(user_id, "2")
    for name in "abc":
        await uploads.put(key, f"/workspace/{name}", b"only here" if name == "c" else b"everywhere")
    await uploads.put(other, "/workspace/a", b"everywhere")
    assert await database.transact(lambda conn: attachments.delete_all(conn, key)) == 3
    assert await attachments.list_paths(database, key, "/workspace") == []
    assert (await attachments.get(database, other, "/workspace/a")).content == b"everywhere"
    assert await blobs_of(sql, user_id) == hashes(b"everywhere")
    assert await database.transact(lambda conn: attachments.delete_all(conn, key)) == 0
    assert await database.transact(lambda conn: attachments.delete_all(conn, other)) == 1
    assert await blobs_of(sql, user_id) == []


# ── offers ──────────────────────────────────────────────────────────────────────────────────────


async def test_what_cannot_be_taken_says_why(database: Database, uploads: Uploads, key: SessionKey) -> None:
    assert await uploads.offer(key, "a.txt", b"a") == "/workspace/a.txt"
    assert await uploads.offer(key, "../a", b"a") == Skipped("../a", "path: must not hold a segment . or ..")
    large = await uploads.offer(key, "large", bytes(MAX_FILE_BYTES + 1))
    assert large == Skipped("large", "file: has at most 3145728 bytes")
    await fill(uploads, SessionKey(key.user_id, "full"))
    full = await uploads.offer(SessionKey(key.user_id, "full"), "b", b"123")
    assert isinstance(full, Skipped)
    assert full.reason == "A session has at most 10000 files of 52428800 bytes together"
    assert await attachments.list_paths(database, key, "/workspace") == ["/workspace/a.txt"]
