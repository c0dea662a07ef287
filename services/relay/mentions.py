"""Files that messages name: found in what the user said, and put beside it for the model to read.

Its one invariant: the same messages and the same files give the same prompt, byte for byte, and a conversation that
goes on leaves what stood in it as it was: a file stands where it was named first, and nowhere else. Only when there
is more than a prompt takes do files that were named last push out those that were named before.
"""

import re
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import islice
from typing import Any, Final

from services.relay import attachments
from services.relay.file_paths import FOLDER, MAX_CHARACTERS
from shared.database import Conn
from shared.session_client import SessionKey

Message = dict[str, Any]

MAX_FILE_BYTES: Final = 64 * 2**10
MAX_ALL_BYTES: Final = 256 * 2**10
_MOST_PLACES: Final = 1000
# Scripts that are written without blanks: what stands beside a path may be a word of the sentence that it is in.
_DENSE: Final = "\u2e80-\u9fff\ua960-\ua97f\uac00-\ud7ff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
_PLACE: Final = re.compile(rf"(?<![^\W{_DENSE}])(?<![./~]){FOLDER}")
# What makes of a path the beginning of a longer one: more of a name, at once or after dots and the like.
_GOES_ON: Final = re.compile(rf"[.+@%=~-]*(?:[^\W{_DENSE}]|/)")
_GOES_ON_DENSELY: Final = re.compile(rf"(?<=[{_DENSE}])(?=\w)[{_DENSE}]")


@dataclass(frozen=True, slots=True)
class Named:
    """A file that is named: its text, or the beginning of it where that is all that a prompt takes."""

    path: str
    text: str
    size_bytes: int

    @property
    def block(self) -> Message:
        """What the model reads."""
        given_bytes = len(self.text.encode())
        cut = f' first_bytes="{given_bytes}" of_bytes="{self.size_bytes}"' if given_bytes < self.size_bytes else ""
        return {"type": "text", "text": f'<file path="{escape(self.path)}"{cut}>\n{self.text}\n</file>'}


class Paths:
    """Paths to be looked for in texts."""

    def __init__(self, paths: Iterable[str]) -> None:
        self._sorted = sorted(set(paths))
        # The longest of the others that each begins with.
        self._shorter: dict[str, str | None] = {}
        open_ones: list[str] = []
        for path in self._sorted:
            while open_ones and not path.startswith(open_ones[-1]):
                open_ones.pop()
            self._shorter[path] = open_ones[-1] if open_ones else None
            open_ones.append(path)

    def named_in(self, text: str) -> list[str]:
        """Those that stand in the text, in its order; of several at one place the longest, and no part of another."""
        places = islice(_PLACE.finditer(text), _MOST_PLACES)
        found = (self._longest_at(text, place.start()) for place in places)
        return list(dict.fromkeys(path for path in found if path is not None))

    def _longest_at(self, text: str, start: int) -> str | None:
        # Whatever of them begins the rest of the text is this one, or a beginning of it.
        index = bisect_right(self._sorted, text[start : start + MAX_CHARACTERS])
        path = self._sorted[index - 1] if index else None
        while path is not None and not (text.startswith(path, start) and _ends(text, start + len(path))):
            path = self._shorter[path]
        return path


def _ends(text: str, end: int) -> bool:
    return not (_GOES_ON.match(text, end) or _GOES_ON_DENSELY.match(text, end))


async def with_named(conn: Conn, key: SessionKey, messages: list[Message]) -> list[Message]:
    """The messages as they go upstream, with the session's files that the user's name; they are not changed."""
    said = [_said(message) for message in messages]
    if not any(FOLDER in text for text in said):
        return messages
    return with_attachments(messages, await named_in(conn, key, said))


async def named_in(conn: Conn, key: SessionKey, texts: Sequence[str]) -> list[Named]:
    """The session's text files that are named, in the order of the texts, as far as there is room for them."""
    sizes = await attachments.text_sizes(conn, key)
    lengths = _lengths(texts, sizes)
    found = await attachments.beginnings(conn, key, list(lengths), length_bytes=MAX_FILE_BYTES) if lengths else {}
    return [
        # All of it is UTF-8: what cannot be read is a character that was cut in two.
        Named(path, found[path][0][:length].decode(errors="ignore"), found[path][1])
        for path, length in reversed(lengths.items())
        if path in found
    ]


def _lengths(texts: Sequence[str], sizes: dict[str, int]) -> dict[str, int]:
    """How many bytes there is room for of each file that is named, those first that are named last."""
    paths = Paths(sizes)
    left = MAX_ALL_BYTES
    lengths: dict[str, int] = {}
    for text in reversed(texts):
        for path in reversed(paths.named_in(text)):
            if left and path not in lengths:
                lengths[path] = min(sizes[path], MAX_FILE_BYTES, left)
                left -= lengths[path]
    return lengths


def with_attachments(messages: list[Message], found: Sequence[Named]) -> list[Message]:
    """The messages, each of these files after what the user said in the first one that names it."""
    paths, left = Paths(each.path for each in found), {each.path: each for each in found}
    return [
        _with(message, [left.pop(path) for path in paths.named_in(_said(message)) if path in left])
        for message in messages
    ]


def _with(message: Message, named: list[Named]) -> Message:
    if not named:
        return message
    content = message["content"]
    said = [{"type": "text", "text": content}] if isinstance(content, str) else content
    return {**message, "content": [*said, *(each.block for each in named)]}


def _said(message: Message) -> str:
    """What the user says in a message; results of tools are not the user's words."""
    if message["role"] != "user":
        return ""
    content = message["content"]
    blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
    return "\n".join(block["text"] for block in blocks if block["type"] == "text")
