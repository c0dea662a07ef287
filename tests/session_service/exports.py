"""Exported files in the tests: taking them, reading them, sealing them anew after a change, giving them back.

Its one invariant: `sealed(lines_of(file))` is a whole file of the same contents.
"""

import hashlib
import json
from collections.abc import AsyncIterator, Iterable

import httpx

from tests.session_service.calls import Chat, Db, Json, User, fine, said, wait

PARTS = {"message": "messages", "memory": "memories", "turn": "turns"}


async def take_back(user: User, file: bytes | AsyncIterator[bytes], **params: str) -> httpx.Response:
    """An import, whatever comes of it."""
    headers = {"content-type": "application/x-ndjson"}
    return await user.http.post("/sessions/import", params=user.params | params, content=file, headers=headers)


async def taken_back(user: User, file: bytes, **params: str) -> Chat:
    """The session of a successful import."""
    answer = await take_back(user, file, **params)
    session = fine(answer)
    assert answer.headers["etag"] == f'"{session["version"]}"'
    assert session["user_id"] == user.id
    return Chat(user, session["session_id"])


def lines_of(file: bytes) -> list[Json]:
    """All lines but the last, after a look at the form of the file."""
    assert file.endswith(b"}\n")
    lines: list[Json] = [json.loads(line) for line in file.splitlines()]
    *body, end = lines
    assert [body[0]["type"], end["type"]] == ["header", "end"]
    assert end["counts"] == counts_of(body)
    assert end["sha256"] == hashlib.sha256(b"".join(file.splitlines(keepends=True)[:-1])).hexdigest()
    return body


def counts_of(body: Iterable[Json]) -> dict[str, int]:
    kinds = [str(line.get("type")) for line in body]
    return {name: kinds.count(kind) for kind, name in PARTS.items()}


def sealed(body: list[Json], counts: Json | None = None) -> bytes:
    """A file of these lines, with the last line that belongs to them."""
    text = b"".join(json.dumps(line, ensure_ascii=False).encode() + b"\n" for line in body)
    end = {"type": "end", "counts": counts or counts_of(body), "sha256": hashlib.sha256(text).hexdigest()}
    return text + json.dumps(end).encode() + b"\n"


async def a_rich_chat(user: User, db: Db) -> Chat:
    """A session with something of everything: generations, rewinds, blocks, all kinds of turns, memories, a summary."""
    metadata = {"num": [0.1, -1e-7, 2**53, -0.0, 1e15], "deep": {"ü": [None, True, {"": ""}]}}
    chat = await user.chat(
        title="题目 😀 \u2028", metadata=metadata, conversation_data={"c": "\\"}, idle_timeout_seconds=999
    )
    await chat.append("of the first generation", tokens_used=3, cost_usd=0.000001)
    fine(await chat.end())
    await user.create(session_id=chat.id, if_exists="restart")
    await chat.append("be kind", "system")
    blocks = [
        {"type": "text", "text": "b", "z": 1, "a": {"d": 2, "c": 1}},
        {"type": "tool_use", "id": "t", "name": "n"},
    ]
    turn = await chat.open(said("question", native={"z": [1e23, 10**30], "a": None}, metadata={"m": 1}))
    usage = {"input_tokens": 10, "output_tokens": 20, "service_tier": "x"}
    await turn.complete(said(blocks, "assistant"), usage=usage, cost_usd=0.123456, stop_reason="tool_use", model="m-1")
    turn = await chat.open(said([{"type": "tool_result", "tool_use_id": "t", "content": "r"}]))
    await turn.complete(
        said("half", "assistant"), status="interrupted", error={"type": "cut"}, upstream={"b": 1, "a": 2}
    )
    for status in ("failed", "refused"):
        turn = await chat.open(said(status, message_type="notification"))
        await turn.complete(status=status)
    await chat.append("taken back", tokens_used=5, cost_usd=1.5, message_id=f"a/b ü?# {chat.id}")
    fine(await chat.call("POST", "/rewind", json={"to_seq": 5}))
    fine(await chat.put(session_summary="what was said ✓", summary_to_seq=4, summary_model="m-1"))
    turn = await chat.open(said("left open"), lease_seconds=5)
    await wait(db, chat, 6)
    turn = await chat.open(said("真的吗"))
    await turn.complete(said("真的", "assistant"), usage={"output_tokens": 4})
    await chat.remember("first memory", metadata={"k": [1]})
    second = await chat.remember("second", "summary")
    fine(await chat.call("PUT", f"/memories/{second['memory_id']}", json={"content": "second, changed"}))
    return chat


async def seen(chat: Chat) -> Json:
    """All that can be seen of a session but whose it is and how it is called."""
    session = await chat.get()
    messages = (await chat.messages(include_superseded=True, page_size=1000))["messages"]
    shown: Json = {
        "session": session,
        "messages": messages,
        "visible": [each["seq"] for each in (await chat.messages(page_size=1000))["messages"]],
        "turns": fine(await chat.call("GET", "/turns", params={"limit": 100}))["turns"],
        "memories": fine(await chat.call("GET", "/memories"))["memories"],
        "summary": fine(await chat.call("GET", "/summary")),
        "context": await chat.context(memories="true"),
        "narrow": await chat.context(max_tokens=60),
        "openai": await chat.context(format="openai"),
    }
    for each in (session, shown["summary"], *messages, *shown["turns"], *shown["memories"]):
        del each["session_id"], each["user_id"]
    return shown


async def count(db: Db, user: User) -> int:
    """Rows of a user in any table."""
    names = [row[0] for row in await db.fetch(USER_TABLES)]
    assert "sessions" in names
    return sum([await db.fetchval(f'SELECT count(*) FROM dev."{name}" WHERE user_id = $1', user.id) for name in names])


USER_TABLES = (
    "SELECT table_name FROM information_schema.columns WHERE table_schema = 'dev' AND column_name = 'user_id'"
    " AND table_name NOT LIKE 'relay%'"
)


async def grow(db: Db, chat: Chat, to: int, content: str, blocks: str = "NULL") -> None:
    """The session's only message, many times over: `content` and `blocks` are SQL, of the seq `g`."""
    found = "SELECT column_name FROM information_schema.columns WHERE table_schema = 'dev' AND table_name = $1"
    names = [row[0] for row in await db.fetch(found, "session_messages")]
    new = {"seq": "g", "message_id": "$2 || '-' || g", "content": content, "content_blocks": blocks}
    values = ", ".join(new.get(name, f"m.{name}") for name in names)
    await db.execute(
        f"INSERT INTO dev.session_messages ({', '.join(names)}) SELECT {values}"
        f" FROM dev.session_messages m, generate_series(2, {to}) g WHERE user_id = $1 AND session_id = $2",
        chat.user.id,
        chat.id,
    )
    await db.execute(
        "UPDATE dev.sessions SET message_count = $3, last_seq = $3 WHERE user_id = $1 AND session_id = $2",
        chat.user.id,
        chat.id,
        to,
    )
