"""Files of conversations over HTTP: put and fetched byte for byte, within their limits and their folder."""

import asyncio
import json
import os
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import asyncpg
import httpx
import pytest
import pytest_asyncio

from tests.processes import Process
from tests.relay.conversing import Conversation, User, fine, refused, text, until
from tests.upstream.client import TestUpstream

Json = dict[str, Any]
MIB = 2**20


@dataclass(frozen=True)
class Files:
    """The files of one conversation, by its runtime key; paths go out exactly as they are given."""

    conversation: Conversation
    http: httpx.AsyncClient

    async def upload(self, path: str, whole: bytes, content_type: str = "", **kwargs: Any) -> httpx.Response:
        part = ("name", whole, content_type) if content_type else ("name", whole)
        url = f"/api/file/upload/{quote(path, safe='')}"
        return await self.http.post(url, **{"files": {"file": part}, "headers": self.conversation.headers, **kwargs})

    async def download(self, path: str, **headers: str) -> httpx.Response:
        url = f"/api/file/download/{quote(path, safe='')}"
        return await self.http.get(url, headers=headers or self.conversation.headers)

    async def list(self, **params: str) -> httpx.Response:
        return await self.http.get(
            f"{self.conversation.path}/list-files", params=params, headers=self.conversation.headers
        )

    async def listed(self, **params: str) -> Any:
        return fine(await self.list(**params))

    async def offer(self, *files: tuple[str, bytes]) -> Any:
        parts = [("files", each) for each in files]
        url = f"{self.conversation.path}/upload-files"
        return fine(await self.http.post(url, files=parts, headers=self.conversation.headers))


@pytest_asyncio.fixture(loop_scope="session")
async def files(caller: User, relay: Process) -> AsyncIterator[Files]:
    """Of a conversation that no other test knows."""
    async with httpx.AsyncClient(base_url=relay.url, timeout=60, trust_env=False) as client:
        yield Files(await caller.conversation(), client)


# ── there and back ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("size", [0, 1, 65_537, 3 * MIB])
async def test_every_byte_comes_back(files: Files, size: int) -> None:
    content = os.urandom(size)
    assert fine(await files.upload("/workspace/a b.bin", content)) == {"success": True}
    got = await files.download("/workspace/a b.bin")
    assert got.status_code == 200
    assert got.content == content
    assert got.headers["content-type"] == "application/octet-stream"
    assert got.headers["content-length"] == str(size)
    assert got.headers["content-disposition"] == 'attachment; filename="a b.bin"'
    assert got.headers["x-content-type-options"] == "nosniff"


async def test_what_looks_like_multipart_is_content(files: Files) -> None:
    content = b'--x\r\nContent-Disposition: form-data; name="file"\r\n\r\n\0--x--\r\n' * 3
    assert (await files.upload("/workspace/a", content)).status_code == 200
    assert (await files.download("/workspace/a")).content == content


@pytest.mark.parametrize("name", ["deep/er/a.txt", "旅行 计划.md", "100%25.txt", ".hidden", "a..b"])
async def test_names_of_files(files: Files, name: str) -> None:
    assert (await files.upload(f"/workspace/{name}", name.encode())).status_code == 200
    assert (await files.download(f"/workspace/{name}")).content == name.encode()
    assert await files.listed() == [f"/workspace/{name}"]


async def test_overwriting(files: Files) -> None:
    for content in (b"first, and longer", b"second"):
        assert (await files.upload("/workspace/a", content)).status_code == 200
        assert (await files.download("/workspace/a")).content == content
    assert await files.listed() == ["/workspace/a"]


async def test_the_media_type_is_the_clients(files: Files) -> None:
    assert (await files.upload("/workspace/a.html", b"<p>", "text/html")).status_code == 200
    got = await files.download("/workspace/a.html")
    assert got.headers["content-type"] == "text/html"
    assert got.headers["content-disposition"].startswith("attachment;")


@pytest.mark.parametrize(
    ("name", "disposition"),
    [
        ("a.txt", 'attachment; filename="a.txt"'),
        ("报告 1.txt", "attachment; filename=\"__ 1.txt\"; filename*=UTF-8''%E6%8A%A5%E5%91%8A%201.txt"),
        ('a";b=%41', "attachment; filename=\"a_;b=_41\"; filename*=UTF-8''a%22%3Bb%3D%2541"),
    ],
)
async def test_names_of_downloads(files: Files, name: str, disposition: str) -> None:
    assert (await files.upload(f"/workspace/d/{name}", b"x")).status_code == 200
    got = await files.download(f"/workspace/d/{name}")
    assert got.content == b"x"
    assert got.headers["content-disposition"] == disposition


async def test_a_file_that_is_not_there(files: Files) -> None:
    assert refused(await files.download("/workspace/none"), 404) == "path: no file of this session has it"


# ── whose files ─────────────────────────────────────────────────────────────────────────────────


async def test_a_key_opens_its_own_conversation(files: Files, caller: User) -> None:
    other = Files(await caller.conversation(), files.http)
    assert (await files.upload("/workspace/a", b"mine")).status_code == 200
    refused(await other.download("/workspace/a"), 404)
    assert await other.listed() == []
    assert (await other.upload("/workspace/a", b"theirs")).status_code == 200
    assert (await files.download("/workspace/a")).content == b"mine"
    crossed = await files.http.get(f"{files.conversation.path}/list-files", headers=other.conversation.headers)
    refused(crossed, 401)


@pytest.mark.parametrize("key", [None, b"", b"wrong", "é".encode(), b"a" * 5000])
async def test_no_key_no_file(files: Files, key: bytes | None) -> None:
    headers = {} if key is None else {b"x-session-api-key": key}
    refused(await files.http.get("/api/file/download/%2Fworkspace%2Fa", headers=headers), 401)
    refused(await files.upload("/workspace/a", b"x", headers=headers), 401)
    user = {b"x-api-key": files.conversation.user.http.headers["x-api-key"].encode()}
    refused(await files.upload("/workspace/a", b"x", headers=headers | user), 401)
    assert await files.listed() == []


# ── paths ───────────────────────────────────────────────────────────────────────────────────────


async def raw(files: Files, method: str, target: str) -> tuple[int, bytes]:
    """Status and body of a call whose target goes out as it is; an upload brings the file `x`."""
    body = (
        b'--b\r\nContent-Disposition: form-data; name="file"; filename="n"\r\n\r\nx\r\n--b--\r\n'
        if method == "POST"
        else b""
    )
    base = files.http.base_url
    head = (
        f"{method} {target} HTTP/1.1\r\nHost: {base.host}\r\nConnection: close\r\n"
        f"Content-Type: multipart/form-data; boundary=b\r\nContent-Length: {len(body)}\r\n"
        f"X-Session-API-Key: {files.conversation.secret}\r\n\r\n"
    )
    reader, writer = await asyncio.open_connection(base.host, base.port)
    writer.write(head.encode() + body)
    answered = await reader.read()
    writer.close()
    head_bytes, _, content = answered.partition(b"\r\n\r\n")
    return int(head_bytes.split()[1]), content


@pytest.mark.parametrize(
    ("sent", "path"),
    [
        ("%2Fworkspace%2Fa.txt", "/workspace/a.txt"),
        ("/workspace/a.txt", "/workspace/a.txt"),
        ("%2fworkspace/d%2Fa.txt", "/workspace/d/a.txt"),
        ("%2Fworkspace%2F%E6%96%87.txt", "/workspace/文.txt"),
        ("%2Fworkspace%2Fa+b%20c%3Fd%23", "/workspace/a+b c?d#"),
        # encoded twice: a name like any other
        ("%2Fworkspace%2F%252e%252e%252Fetc", "/workspace/%2e%2e%2Fetc"),
        ("%2Fworkspace%2F%2500", "/workspace/%00"),
        # characters that look like others
        (
            "%2Fworkspace%2F%EF%BC%8E%EF%BC%8E%2F%E2%80%A4%E2%80%A4%E2%88%95a",
            "/workspace/\uff0e\uff0e/\u2024\u2024\u2215a",
        ),
        ("%2Fworkspace%2F...", "/workspace/..."),
        ("%2Fworkspace%2F" + "a" * 255, "/workspace/" + "a" * 255),
    ],
)
async def test_a_path_is_decoded_once(files: Files, sent: str, path: str) -> None:
    status, body = await raw(files, "POST", f"/api/file/upload/{sent}")
    assert (status, json.loads(body)) == (200, {"success": True})
    assert await files.listed() == [path]
    assert await raw(files, "GET", f"/api/file/download/{sent}") == (200, b"x")


BAD = [
    *("", "/", "%2F", "a.txt", "workspace/a.txt", "workspace%2Fa.txt", "%2Fworkspace", "%2Fworkspace%2F"),
    *(
        "/etc/passwd",
        "%2Fetc%2Fpasswd",
        "//workspace/a",
        "%2F%2Fworkspace%2Fa",
        "%2Fworkspaces%2Fa",
        "%2FWORKSPACE%2Fa",
    ),
    *("../../etc/passwd", "/workspace/../../etc/passwd", "%2Fworkspace%2F..%2F..%2Fetc%2Fpasswd", "/workspace/.."),
    *("%2Fworkspace%2F%2E%2E%2Fa", "%2Fworkspace%2F%2e", "/workspace/./a", "/workspace/a/.", "%2Fworkspace%2F.%2Fa"),
    *("/workspace//a", "%2Fworkspace%2F%2Fa", "%2Fworkspace%2Fa%2F", "/workspace/a/"),
    *("%2Fworkspace%5Ca", "%2Fworkspace%2F..%5C..%5Ca", "%5Cworkspace%5Ca", "C:%5Ca", "/workspace/a\\b"),
    *(
        "%2Fworkspace%2Fa%00",
        "%2Fworkspace%2F%00%2Fa",
        "%2Fworkspace%2Fa%0A",
        "%2Fworkspace%2F%0Aa",
        "%2Fworkspace%2Fa%0Ab",
    ),
    *(
        "%2Fworkspace%2F%0D%0Aa",
        "%2Fworkspace%2F%09",
        "%2Fworkspace%2Fa%7F",
        "%2Fworkspace%2F%C2%85",
        "%2Fworkspace%2F%1B",
    ),
    *(
        "%EF%BC%8Fworkspace%EF%BC%8Fa",
        "file:///workspace/a",
        "%2Fworkspace%2F" + "a" * 256,
        "%2Fworkspace%2F" + "a" * 9000,
    ),
]


@pytest.mark.parametrize("sent", BAD, ids=lambda sent: sent[:40])
async def test_bad_paths(files: Files, sent: str) -> None:
    for method, action in (("POST", "upload"), ("GET", "download")):
        status, body = await raw(files, method, f"/api/file/{action}/{sent}")
        assert status == 400, body
        told = json.loads(body)
        assert told["message"].startswith("path: must ")
        assert told["detail"] == told["message"]
    assert await files.listed() == []


@pytest.mark.parametrize("sent", ["%2Fworkspace%2F%FF", "%2Fworkspace%2F%C0%AE%C0%AE%2Fa", "%2Fworkspace%2F%ED%A0%80"])
async def test_paths_that_are_no_utf_8(files: Files, sent: str) -> None:
    for method, action in (("POST", "upload"), ("GET", "download")):
        status, body = await raw(files, method, f"/api/file/{action}/{sent}")
        assert status in {400, 422}, body
        assert json.loads(body)["message"]
    assert await files.listed() == []


# ── bodies ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "kwargs",
    [
        {"files": {"other": ("n", b"x")}},
        {"files": [("file", ("n", b"x")), ("file", ("n", b"y"))]},
        {"files": {"other": ("n", b"x")}, "data": {"file": "not a file"}},
        {"files": None, "data": {"file": "x"}},
        {"files": None, "json": {"file": "x"}},
        {"files": None, "content": b"x"},
        {"files": None},
    ],
    ids=str,
)
async def test_bodies_without_a_file(files: Files, kwargs: Json) -> None:
    message = refused(await files.upload("/workspace/a", b"x", **kwargs), 400)
    assert message.startswith(("file: ", "content-type: "))
    assert await files.listed() == []


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("multipart/form-data", b"--b--"),
        ("multipart/form-data; boundary=", b"--b--"),
        ("multipart/form-data; boundary=b", b""),
        ("multipart/form-data; boundary=b", b"nothing like it"),
        ("multipart/form-data; boundary=b", b"--b\r\nno header\r\n\r\nx\r\n--b--"),
        ("multipart/form-data; boundary=b", b"--b\r\nA: b\r\n\r\nx\r\n--b--"),
        # broken off
        (
            "multipart/form-data; boundary=b",
            b'--b\r\nContent-Disposition: form-data; name="file"; filename="n"\r\n\r\nx',
        ),
        (
            "multipart/form-data; boundary=b; charset=punycode",
            b'--b\r\nContent-Disposition: form-data; name="\xff\xff"; filename="n"\r\n\r\nx\r\n--b--',
        ),
    ],
)
async def test_broken_bodies(files: Files, content_type: str, body: bytes) -> None:
    headers = files.conversation.headers | {"content-type": content_type}
    url = "/api/file/upload/%2Fworkspace%2Fa"
    refused(await files.http.post(url, content=body, headers=headers), 400)
    assert await files.listed() == []


async def test_a_client_that_leaves_in_the_middle(files: Files, relay: Process) -> None:
    """It stores nothing, and is no fault of ours."""
    _, writer = await asyncio.open_connection(files.http.base_url.host, files.http.base_url.port)
    request_id = f"left-{uuid.uuid4().hex}"
    head = (
        "POST /api/file/upload/%2Fworkspace%2Fa HTTP/1.1\r\nHost: relay\r\nContent-Length: 1000\r\n"
        f"Content-Type: multipart/form-data; boundary=b\r\nX-Session-API-Key: {files.conversation.secret}\r\n"
        f"X-Request-Id: {request_id}\r\n\r\n"
    )
    writer.write(head.encode() + b'--b\r\nContent-Disposition: form-data; name="file"; filename="n"\r\n\r\nx')
    await writer.drain()
    writer.close()

    async def noted() -> list[Json]:
        return [json.loads(line) for line in relay.logged().splitlines() if request_id in line]

    told = await until(noted)
    assert [(each["event"], each["status"]) for each in told] == [("request", 499)]
    assert await files.listed() == []


# ── limits ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("size", [3 * MIB + 1, 4 * MIB, 30 * MIB])
async def test_too_large(files: Files, size: int) -> None:
    """A client that has sent all of it hears why, and can go on."""
    refused(await files.upload("/workspace/a", bytes(size)), 413)
    assert await files.listed() == []
    assert (await files.upload("/workspace/a", b"fits")).status_code == 200


async def test_too_large_by_pieces(files: Files) -> None:
    """Nobody waits for the end of a body that is too large by now."""
    reader, writer = await asyncio.open_connection(files.http.base_url.host, files.http.base_url.port)
    head = (
        "POST /api/file/upload/%2Fworkspace%2Fa HTTP/1.1\r\nHost: relay\r\nTransfer-Encoding: chunked\r\n"
        f"Content-Type: multipart/form-data; boundary=b\r\nX-Session-API-Key: {files.conversation.secret}\r\n\r\n"
    )
    start = b'--b\r\nContent-Disposition: form-data; name="file"; filename="n"\r\n\r\n'
    writer.write(head.encode())
    for piece in (start, *[bytes(MIB)] * 4):
        writer.write(b"%x\r\n%b\r\n" % (len(piece), piece))
    async with asyncio.timeout(20):
        assert (await reader.readline()).split()[1] == b"413"
    writer.close()


async def test_a_session_has_50_mib(files: Files) -> None:
    """However many come at once, and of whatever way."""
    sizes = [3 * MIB] * 18
    uploads = (files.upload(f"/workspace/{number}", bytes(size)) for number, size in enumerate(sizes))
    statuses = [answered.status_code for answered in await asyncio.gather(*uploads)]
    assert sorted(statuses) == [200] * 16 + [413] * 2
    assert (await files.upload("/workspace/rest", bytes(2 * MIB))).status_code == 200
    assert refused(await files.upload("/workspace/more", b"x"), 413).startswith("A session has at most")
    offered = await files.offer(("none", b""), ("more", b"x"))
    assert offered["uploaded_files"] == ["/workspace/none"]
    assert [each["name"] for each in offered["skipped_files"]] == ["more"]
    assert (await files.upload("/workspace/rest", b"")).status_code == 200
    assert (await files.upload("/workspace/more", b"x")).status_code == 200


# ── V0 ──────────────────────────────────────────────────────────────────────────────────────────


async def test_lists(files: Files) -> None:
    for name in ("b.txt", "a.txt", "d/c.txt", "d/e/f.txt", "d_.txt"):
        assert (await files.upload(f"/workspace/{name}", b"")).status_code == 200
    every = [f"/workspace/{name}" for name in ("a.txt", "b.txt", "d/c.txt", "d/e/f.txt", "d_.txt")]
    for path in ("", "/workspace", "/workspace/"):
        assert await files.listed(path=path) == every
    assert await files.listed() == every
    for path in ("/workspace/d", "/workspace/d/"):
        assert await files.listed(path=path) == ["/workspace/d/c.txt", "/workspace/d/e/f.txt"]
    assert await files.listed(path="/workspace/none") == []
    for path in ("/", "/etc", "d", "/workspace/..", "/workspace/d\n", "\0", "/workspace//"):
        refused(await files.list(path=path), 400)


async def test_offers(files: Files) -> None:
    offered = await files.offer(
        ("a.txt", b"a"),
        ("文.txt", b"b"),
        ("d/e.txt", b"c"),
        ("../x", b"d"),
        ("/etc/x", b"e"),
        ("big", bytes(3 * MIB + 1)),
    )
    assert offered["uploaded_files"] == ["/workspace/a.txt", "/workspace/文.txt", "/workspace/d/e.txt"]
    assert [each["name"] for each in offered["skipped_files"]] == ["../x", "/etc/x", "big"]
    assert all(set(each) == {"name", "reason"} and each["reason"] for each in offered["skipped_files"])
    assert await files.listed() == sorted(offered["uploaded_files"])
    assert (await files.download("/workspace/文.txt")).content == b"b"


async def test_offering_nothing(files: Files) -> None:
    url = f"{files.conversation.path}/upload-files"
    headers = files.conversation.headers | {"content-type": "multipart/form-data; boundary=b"}
    empty = fine(await files.http.post(url, content=b"--b--\r\n", headers=headers))
    assert empty == {"uploaded_files": [], "skipped_files": []}
    refused(await files.http.post(url, json={}, headers=files.conversation.headers), 400)


async def test_a_users_login_lists_and_offers(files: Files) -> None:
    http, path = files.conversation.user.http, files.conversation.path
    offered = fine(await http.post(f"{path}/upload-files", files=[("files", ("a", b"a"))]))
    assert offered["uploaded_files"] == ["/workspace/a"]
    assert fine(await http.get(f"{path}/list-files")) == ["/workspace/a"]


async def test_deleting_a_conversation_deletes_its_files(files: Files, database_url: str) -> None:
    assert (await files.upload("/workspace/a", b"a")).status_code == 200
    sql = await asyncpg.connect(database_url, server_settings={"search_path": "dev"})
    kept = "SELECT count(*) FROM relay_blobs WHERE user_id = $1"
    assert await sql.fetchval(kept, files.conversation.user.user_id) == 1
    assert fine(await files.conversation.user.http.delete(files.conversation.path)) is True
    refused(await files.download("/workspace/a"), 401)
    assert await sql.fetchval(kept, files.conversation.user.user_id) == 0
    await sql.close()


# ── what the model reads ────────────────────────────────────────────────────────────────────────


async def test_a_named_text_is_given_to_the_model(files: Files, upstream: TestUpstream) -> None:
    assert (await files.upload("/workspace/notes.md", "ünï\n".encode())).status_code == 200
    assert (await files.upload("/workspace/image", b"\xff\xd8")).status_code == 200
    question = "Read /workspace/notes.md and /workspace/image."
    app = await files.conversation.answered(question)
    assert app["execution_status"] == "finished"
    block = {"type": "text", "text": '<file path="/workspace/notes.md">\nünï\n\n</file>'}
    first = {"role": "user", "content": [*text(question), block]}
    assert upstream.requests()[-1]["json"]["messages"] == [first]
    await files.conversation.answered("Thanks for /workspace/notes.md")
    assert upstream.requests()[-1]["json"]["messages"][0] == first
    stored = await files.conversation.stored()
    assert [said for role, said in stored if role == "user"] == [question, "Thanks for /workspace/notes.md"]
