"""Attachments: the files of sessions, by their paths.

Its one invariant: the files of a session never hold more than MAX_SESSION_BYTES together, and a content that none of
its user's files has any more is gone.
"""

import asyncio
import hashlib
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final
from weakref import WeakValueDictionary

import sqlalchemy as sa
from sqlalchemy import ARRAY, and_, bindparam, func, literal_column, or_, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.sql.elements import ColumnElement

from services.relay.attachment_schema import relay_attachments as table
from services.relay.attachment_schema import relay_blobs as blobs
from services.relay.errors import AttachmentNotFound, FileTooLarge, InvalidRequest, SessionFilesFull
from services.relay.file_paths import path_of_name
from shared.database import Conn, Database
from shared.errors import Unavailable
from shared.session_client import SessionKey

MAX_FILE_BYTES: Final = 3 * 2**20
MAX_SESSION_BYTES: Final = 50 * 2**20
MAX_SESSION_FILES: Final = 10_000
"""Empty files take up no bytes, but room all the same."""
_MEDIA_TYPE: Final = re.compile(r"[\w!#$&^.+-]{1,99}/[\w!#$&^.+-]{1,99}(?:; ?[\w-]{1,20}=[\w.+-]{1,30})?", re.ASCII)
_WAIT_SECONDS: Final = 10.0


@dataclass(frozen=True, slots=True)
class File:
    """`content_type` is the media type that its client named; None where it named none."""

    path: str
    content: bytes
    content_type: str | None


@dataclass(frozen=True, slots=True)
class Skipped:
    """A file that was offered and not taken."""

    name: str
    reason: str


_NOW = func.statement_timestamp()
# Any number; it keeps these locks apart from others of the same names.
_SEED: ColumnElement[int] = literal_column("20261120")
_user_id = bindparam("user_id", type_=sa.Text)
_mine = and_(table.c.user_id == _user_id, table.c.session_id == bindparam("session_id"))
_path_sha256 = bindparam("path_sha256", type_=sa.LargeBinary)
_this = and_(_mine, table.c.path_sha256 == _path_sha256)
_its_blob = and_(table.c.user_id == blobs.c.user_id, table.c.sha256 == blobs.c.sha256)
_told: dict[str, Any] = {
    name: bindparam(name, type_=table.c[name].type) for name in ("sha256", "size_bytes", "is_text", "content_type")
}

LOCK_USER = select(func.pg_advisory_xact_lock(func.hashtextextended(_user_id, _SEED)))
OTHERS = select(func.count().label("files"), func.coalesce(func.sum(table.c.size_bytes), 0).label("size_bytes")).where(
    _mine, table.c.path_sha256 != _path_sha256
)
HASH = select(table.c.sha256).where(_this)
KEEP = (
    insert(blobs)
    .values(user_id=_user_id, content=bindparam("content"), **{name: _told[name] for name in ("sha256", "size_bytes")})
    .on_conflict_do_nothing(constraint="relay_blobs_pkey")
)
PUT = (
    insert(table)
    .values(
        user_id=_user_id,
        session_id=bindparam("session_id"),
        path_sha256=_path_sha256,
        path=bindparam("path"),
        created_at=_NOW,
        updated_at=_NOW,
        **_told,
    )
    .on_conflict_do_update(constraint="relay_attachments_pkey", set_=_told | {"updated_at": _NOW})
)
GET = select(table.c.path, blobs.c.content, table.c.content_type).join(blobs, _its_blob).where(_this)
_folder = bindparam("folder", type_=sa.Text)
LIST = (
    select(table.c.path)
    .where(_mine, or_(table.c.path == _folder, func.starts_with(table.c.path, _folder.concat("/"))))
    .order_by(table.c.path)
)
LIST_TEXTS = select(table.c.path, table.c.size_bytes).where(_mine, table.c.is_text)
BEGINNINGS = (
    select(
        table.c.path,
        table.c.size_bytes,
        func.substring(blobs.c.content, 1, bindparam("length", type_=sa.Integer)).label("beginning"),
    )
    .join(blobs, _its_blob)
    .where(_mine, table.c.is_text, table.c.path_sha256 == func.any(bindparam("hashes", type_=ARRAY(sa.LargeBinary))))
)
DELETE_ALL = sa.delete(table).where(_mine).returning(table.c.sha256)
FREE = sa.delete(blobs).where(
    blobs.c.user_id == _user_id,
    blobs.c.sha256 == func.any(bindparam("hashes", type_=ARRAY(sa.LargeBinary))),
    ~select(table.c.path_sha256).where(_its_blob).exists(),
)


async def get(conn: Conn, key: SessionKey, path: str) -> File:
    """Raises AttachmentNotFound."""
    row = await conn.row(GET, **_of(key), path_sha256=_sha256(path.encode()))
    if row is None:
        raise AttachmentNotFound
    return File(**dict(row.items()))


async def list_paths(conn: Conn, key: SessionKey, folder: str) -> list[str]:
    """The files in the folder and in those below it, sorted; of a file's own path, this file."""
    return [row["path"] for row in await conn.rows(LIST, **_of(key), folder=folder)]


async def text_sizes(conn: Conn, key: SessionKey) -> dict[str, int]:
    """The paths of all files that are UTF-8 text, and their sizes in bytes."""
    return {row["path"]: row["size_bytes"] for row in await conn.rows(LIST_TEXTS, **_of(key))}


async def beginnings(
    conn: Conn, key: SessionKey, paths: Sequence[str], *, length_bytes: int
) -> dict[str, tuple[bytes, int]]:
    """The first bytes of those that are text, and the size of each in bytes."""
    hashes = [_sha256(path.encode()) for path in paths]
    rows = await conn.rows(BEGINNINGS, **_of(key), hashes=hashes, length=length_bytes)
    return {row["path"]: (row["beginning"], row["size_bytes"]) for row in rows}


async def delete_all(conn: Conn, key: SessionKey) -> int:
    """Deletes the session's files, within a transaction, and says how many they were."""
    await conn.rows(LOCK_USER, user_id=key.user_id)
    deleted = await conn.rows(DELETE_ALL, **_of(key))
    await conn.rows(FREE, user_id=key.user_id, hashes=[row["sha256"] for row in deleted])
    return len(deleted)


class Uploads:
    """Puts files: those of one user one after the other, so that they take one connection of the pool and not all."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._lines: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def put(self, key: SessionKey, path: str, content: bytes, content_type: str | None = None) -> None:
        """Stores a file, instead of the one that had its path; raises FileTooLarge, SessionFilesFull, Unavailable."""
        if len(content) > MAX_FILE_BYTES:
            raise too_large()
        values = {
            "sha256": _sha256(content),
            "size_bytes": len(content),
            "is_text": _is_text(content),
            "content_type": content_type if content_type and _MEDIA_TYPE.fullmatch(content_type) else None,
        }

        async def work(conn: Conn) -> None:
            await _put(conn, key, path, content, values)

        async with self._alone(key.user_id):
            await self._database.transact(work)

    async def offer(self, key: SessionKey, name: str, content: bytes, content_type: str | None = None) -> str | Skipped:
        """Stores a file that came with a name, and gives its path, or why it could not be taken."""
        try:
            path = path_of_name(name)
            await self.put(key, path, content, content_type)
        except (InvalidRequest, FileTooLarge, SessionFilesFull) as error:
            return Skipped(name, str(error.detail))
        return path

    @asynccontextmanager
    async def _alone(self, user_id: str) -> AsyncIterator[None]:
        line = self._lines.setdefault(user_id, asyncio.Lock())
        try:
            async with asyncio.timeout(_WAIT_SECONDS):
                await line.acquire()
        except TimeoutError:
            raise Unavailable("Too many files of this user are on their way") from None
        try:
            yield
        finally:
            line.release()


async def _put(conn: Conn, key: SessionKey, path: str, content: bytes, values: dict[str, Any]) -> None:
    this = {**_of(key), "path_sha256": _sha256(path.encode())}
    # The locks of rows would not do: what is counted, and what is freed, are rows that others are about to insert.
    await conn.rows(LOCK_USER, user_id=key.user_id)
    others = await conn.row(OTHERS, **this)
    assert others is not None  # noqa: S101 - an aggregate is one row
    if others["files"] >= MAX_SESSION_FILES or others["size_bytes"] + len(content) > MAX_SESSION_BYTES:
        most = f"{MAX_SESSION_FILES} files of {MAX_SESSION_BYTES} bytes together"
        raise SessionFilesFull(f"A session has at most {most}", max_bytes=MAX_SESSION_BYTES)
    before = await conn.value(HASH, **this)
    await conn.rows(KEEP, **values, user_id=key.user_id, content=content)
    await conn.rows(PUT, **values, **this, path=path)
    if before is not None:
        await conn.rows(FREE, user_id=key.user_id, hashes=[before])


def too_large() -> FileTooLarge:
    return FileTooLarge(f"file: has at most {MAX_FILE_BYTES} bytes", max_bytes=MAX_FILE_BYTES)


def _of(key: SessionKey) -> dict[str, str]:
    return {"user_id": key.user_id, "session_id": key.session_id}


def _sha256(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


def _is_text(content: bytes) -> bool:
    """Whether a model can read it: all of it is UTF-8 without U+0000."""
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return b"\0" not in content
