"""Files of conversations: put and fetched by the runtime key, by V0's calls, and given to the model when named."""

import asyncio
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from tests.relay.conversing import Conversation, User, fine, refused
from tests.upstream.client import TestUpstream

BINARY = bytes(range(256)) * 10


async def put(mine: Conversation, path: str, content: bytes, **kind: Any) -> httpx.Response:
    """Uploads as a front end does: the whole path percent-encoded."""
    files = {"file": ("name", content, *kind.values())}
    async with httpx.AsyncClient(base_url=mine.user.http.base_url, trust_env=False, timeout=30) as client:
        return await client.post(f"/api/file/upload/{quote(path, safe='')}", files=files, headers=mine.headers)


async def get(mine: Conversation, path: str, headers: dict[str, str] | None = None) -> httpx.Response:
    async with httpx.AsyncClient(base_url=mine.user.http.base_url, trust_env=False) as client:
        return await client.get(f"/api/file/download/{quote(path, safe='')}", headers=headers or mine.headers)


async def test_a_file_comes_back_as_it_was(caller: User) -> None:
    mine = await caller.conversation()
    for name in ("a.bin", "deep/er/a.txt", "旅行 计划.md", "100%25.txt", 'quote".txt', ".hidden", "a..b"):
        path = f"/workspace/{name}"
        assert fine(await put(mine, path, BINARY)) == {"success": True}
        found = await get(mine, path)
        assert (found.status_code, found.content) == (200, BINARY)
        assert found.headers["content-disposition"].startswith("attachment; filename=")
        assert found.headers["x-content-type-options"] == "nosniff"
    fine(await put(mine, "/workspace/a.bin", b"second", kind="text/plain"))
    found = await get(mine, "/workspace/a.bin")
    assert (found.content, found.headers["content-type"]) == (b"second", "text/plain")


@pytest.mark.parametrize(
    "path",
    [
        *("workspace/a", "a", "/etc/passwd", "/workspace", "/workspace/", "/workspace/.", "/workspace/..", "/"),
        *("/workspace/../a", "/workspace/a/../b", "/workspace/./a", "/workspace//a", "/workspace/a/", "//workspace/a"),
        *("/workspace/a\\b", "/workspace/a\0b", "/workspace/a\nb", "/workspace/a\x7f", "/workspace/" + "x" * 256),
        *("/workspaces/a", "/WORKSPACE/a"),
    ],
)
async def test_paths_outside_the_rules(caller: User, path: str) -> None:
    mine = await caller.conversation()
    refused(await put(mine, path, b"x"), 400)
    refused(await get(mine, path), 400)
    assert fine(await caller.http.get(f"{mine.path}/list-files")) == []


async def test_a_longest_name(caller: User) -> None:
    mine = await caller.conversation()
    fine(await put(mine, "/workspace/" + "x" * 255, b"x"))
    fine(await put(mine, "/workspace/%2e%2e", b"literal"))
    assert (await get(mine, "/workspace/%2e%2e")).content == b"literal"


async def test_what_is_missing_or_too_large(caller: User) -> None:
    mine, other = await caller.conversation(), await caller.conversation()
    refused(await get(mine, "/workspace/none"), 404)
    fine(await put(mine, "/workspace/a", b"x" * (3 * 2**20)))
    refused(await get(other, "/workspace/a"), 404)
    for size in (3 * 2**20 + 1, 4 * 2**20, 31 * 2**20):
        refused(await put(mine, "/workspace/b", b"x" * size), 413)
    refused(await get(mine, "/workspace/b"), 404)
    for headers in ({"x-session-api-key": ""}, {"x-session-api-key": "wrong"}):
        refused(await get(mine, "/workspace/a", headers), 401)
    async with httpx.AsyncClient(base_url=caller.http.base_url, trust_env=False) as client:
        url = f"/api/file/upload/{quote('/workspace/c', safe='')}"
        refused(await client.post(url, files={"file": b"x"}), 401)
        refused(await client.post(url, files={"other": b"x"}, headers=mine.headers), 400)
        refused(await client.post(url, data={"file": "x"}, headers=mine.headers), 400)
        refused(await client.post(url, content=b"x", headers=mine.headers), 400)


async def test_a_session_is_full_at_fifty_mebibytes(caller: User) -> None:
    mine = await caller.conversation()
    some = asyncio.Semaphore(4)

    async def one(number: int) -> int:
        async with some:
            content = number.to_bytes(4) * (3 * 2**18)
            return (await put(mine, f"/workspace/{number}", content)).status_code

    statuses = await asyncio.gather(*(one(number) for number in range(20)))
    assert sorted(statuses) == [200] * 16 + [413] * 4
    fine(await put(mine, "/workspace/rest", b"x" * (2 * 2**20)))
    refused(await put(mine, "/workspace/one more", b"x"), 413)


async def test_files_of_v0(caller: User) -> None:
    mine = await caller.conversation()
    files = [
        ("files", ("b.txt", b"b")),
        ("files", ("a.txt", b"a")),
        ("files", ("large.bin", b"x" * (3 * 2**20 + 1))),
        ("files", ("../up.txt", b"x")),
    ]
    told = fine(await caller.http.post(f"{mine.path}/upload-files", files=files))
    assert told["uploaded_files"] == ["/workspace/b.txt", "/workspace/a.txt"]
    assert [each["name"] for each in told["skipped_files"]] == ["large.bin", "../up.txt"]
    assert all(each["reason"] for each in told["skipped_files"])
    fine(await put(mine, "/workspace/deep/c.txt", b"c"))
    get_list = caller.http.get
    every = ["/workspace/a.txt", "/workspace/b.txt", "/workspace/deep/c.txt"]
    assert fine(await get_list(f"{mine.path}/list-files")) == every
    assert fine(await get_list(f"{mine.path}/list-files", params={"path": "/workspace/deep"})) == every[2:]
    refused(await get_list(f"{mine.path}/list-files", params={"path": "/etc"}), 400)
    assert fine(await get_list(f"{mine.path}/list-files", headers=mine.headers)) == every


async def test_a_named_file_is_given_to_the_model(caller: User, upstream: TestUpstream) -> None:
    mine = await caller.conversation()
    fine(await put(mine, "/workspace/plan.md", "Berge, 山".encode()))
    fine(await put(mine, "/workspace/photo.png", BINARY))
    await mine.answered("What does /workspace/plan.md say, and /workspace/photo.png?")
    asked = upstream.requests()[-1]["json"]["messages"][-1]["content"]
    assert asked == [
        {"type": "text", "text": "What does /workspace/plan.md say, and /workspace/photo.png?"},
        {"type": "text", "text": '<file path="/workspace/plan.md">\nBerge, 山\n</file>'},
    ]
    assert (await mine.stored())[0] == ("user", "What does /workspace/plan.md say, and /workspace/photo.png?")
    await mine.answered("Thanks")
    again = upstream.requests()[-1]["json"]["messages"]
    assert again[0]["content"] == asked


async def test_a_deleted_conversation_leaves_no_files(caller: User) -> None:
    mine = await caller.conversation()
    fine(await put(mine, "/workspace/a", b"x"))
    assert fine(await caller.http.delete(mine.path)) is True
    refused(await get(mine, "/workspace/a"), 401)
