"""How a peer is driven: commands come as JSON lines on standard input, answers go as JSON lines to standard output.

Nothing but the standard library: it runs in each peer's own environment.
"""

import asyncio
import json
import sys
import time
from typing import Any, Protocol

TEXT = "The quick brown fox jumps over the lazy dog. 我们使用这个服务来保存对话记录。 " * 3
LAST = 20


class Peer(Protocol):
    """A store of conversations, used as its documentation says."""

    async def fill(self, session: str, count: int) -> None:
        """Makes the session with so many messages of TEXT, in whatever way is quickest."""

    async def append(self, session: str, text: str) -> None:
        """Stores one message of the user; on disk when this returns."""

    async def last(self, session: str) -> list[str]:
        """The texts of the newest 20 messages, oldest first."""


async def serve(peer: Peer) -> None:
    """Answers commands until standard input ends; checks what comes back."""
    while line := await asyncio.to_thread(sys.stdin.readline):
        sys.stdout.write(json.dumps(await _done(peer, json.loads(line))) + "\n")
        sys.stdout.flush()


async def _done(peer: Peer, command: dict[str, Any]) -> dict[str, Any]:
    session: str = command["session"]
    if command["do"] == "fill":
        await peer.fill(session, command["count"])
        return {}
    ms = []
    for number in range(command["times"]):
        began = time.perf_counter()
        if command["do"] == "append":
            await peer.append(session, f"{number}: {TEXT}")
            ms.append((time.perf_counter() - began) * 1000)
        else:
            texts = await peer.last(session)
            ms.append((time.perf_counter() - began) * 1000)
            if len(texts) != LAST or TEXT not in texts[-1]:
                return {"error": f"{len(texts)} messages, the last one {texts[-1:]}"}
    if command["do"] == "append" and not (await peer.last(session))[-1].startswith(f"{command['times'] - 1}: "):
        return {"error": "the message appended last is not the last one"}
    return {"ms": ms}
