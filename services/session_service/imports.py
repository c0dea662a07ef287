"""Taking an exported session back.

Its one invariant: a file is stored whole or not at all: it is read to its last line and its seal is checked
before the first row is written, and all rows are written in one transaction.
"""

import hashlib
import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import IO, Any, Final

from pydantic import BaseModel, ValidationError

from services.session_service import imported, imported_rows, sessions
from services.session_service.export import FORMAT, FORMAT_VERSION
from shared import json, values, wire
from shared.database import Conn, Violation, Writer
from shared.errors import SessionExists, ValidationFailed

_MAX_LINE_BYTES: Final = 64 * 2**20
_IN_MEMORY_BYTES: Final = 8 * 2**20
_CHUNK: Final = 200
_TRIES: Final = 3
_MESSAGE_ID: Final = "session_messages_message_id_key"
_CHUNK_BYTES: Final = 8 * 2**20


class Damaged(ValidationFailed):
    """The file is not a whole export."""

    @classmethod
    def line(cls, number: int, problem: str) -> ValidationFailed:
        return ValidationFailed.at("body", number, msg=f"Line {number}: {problem}", type="damaged_export")


@dataclass(slots=True)
class Received:
    """A file on disk (or in memory, when small) whose seal was checked."""

    file: IO[bytes]
    lines: int = 0
    sha256: bytes = b""
    counts: dict[str, int] = field(default_factory=dict)

    def entries(self) -> Iterator[tuple[int, dict[str, Any], int]]:
        """Number, value and size of each line but the last."""
        self.file.seek(0)
        for number, line in enumerate(self.file, 1):
            if number < self.lines:
                yield number, _value(number, line.rstrip(b"\n")), len(line)


async def receive(chunks: AsyncIterator[bytes]) -> Received:
    """The file, read to its end; raises ValidationFailed where it is cut short or damaged."""
    received = Received(tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY_BYTES))  # noqa: SIM115 - closed by the caller
    try:
        await _receive(chunks, received)
    except BaseException:
        received.file.close()
        raise
    return received


async def _receive(chunks: AsyncIterator[bytes], received: Received) -> None:
    sealed, whole = hashlib.sha256(), hashlib.sha256()
    last = b""
    async for line in _lines(chunks, received, whole):
        if received.lines:
            sealed.update(last + b"\n")
        last = line
        received.lines += 1
    received.sha256 = whole.digest()
    seal = _value(received.lines, last) if last else {}
    if seal.get("type") != "end" or not isinstance(seal.get("counts"), dict):
        raise Damaged.line(received.lines, "the last line does not end an export")
    if seal.get("sha256") != sealed.hexdigest():
        raise Damaged.line(received.lines, "the lines before do not have the sha256 that it names")
    received.counts = seal["counts"]


async def _lines(chunks: AsyncIterator[bytes], received: Received, whole: Any) -> AsyncIterator[bytes]:
    """The lines as they come, without their ends; all bytes go to the file."""
    parts: list[bytes] = []
    size = 0
    async for chunk in chunks:
        received.file.write(chunk)
        whole.update(chunk)
        first, *others = chunk.split(b"\n")
        parts.append(first)
        size += len(first)
        for other in others:
            yield b"".join(parts)
            parts, size = [other], len(other)
        if size > _MAX_LINE_BYTES:
            raise Damaged.line(received.lines + 1, f"more than {_MAX_LINE_BYTES} bytes")
    if size:
        raise Damaged.line(received.lines + 1, "the last line has no end")


def _value(number: int, line: bytes) -> dict[str, Any]:
    try:
        value = json.parse(line)
    except ValidationFailed as error:
        problem = error.detail[0]["msg"] if isinstance(error.detail, list) else "not JSON"
        raise Damaged.line(number, problem) from None
    if not isinstance(value, dict):
        raise Damaged.line(number, "not an object")
    return value


# ── writing it ──────────────────────────────────────────────────────────────────────────────────


async def store(
    writer: Writer, user_id: str, session_id: str | None, received: Received, limits: values.Limits
) -> wire.Session:
    """The session, stored as it was exported. Raises SessionExists, or ValidationFailed for what breaks a rule."""

    async def work(conn: Conn) -> wire.Session:
        entries = received.entries()
        number, first, _ = next(entries, (1, {}, 0))
        header = _checked(imported.Header, number, first, limits)
        if header.format != FORMAT or header.format_version != FORMAT_VERSION:
            raise Damaged.line(number, "not an export of this format and version")
        target = imported_rows.Target(user_id, session_id or header.session.session_id)
        if not await imported_rows.create(conn, target, header):
            raise SessionExists
        counts = {"messages": 0, "memories": 0, "turns": 0}
        last_seq_of_turns = 0
        async for kind, models in _chunks(entries, limits):
            counts[kind] += len(models)
            if kind == "turns":
                last_seq_of_turns = max(last_seq_of_turns, *(model.last_seq for model in models))
            await imported_rows.STORE[kind](conn, target, models, counts[kind] - len(models))
        if counts != received.counts:
            raise Damaged.line(received.lines, "the counts are not those of the lines")
        await imported_rows.settle(conn, target, header, counts, last_seq_of_turns)
        return await sessions.get(conn, target.user_id, target.session_id)

    for attempt in range(1, _TRIES + 1):
        try:
            return await writer.transact(work)
        except Violation as violation:
            # An id that someone else took meanwhile is seen as taken the next time; one that the file has twice is not.
            if violation.constraint == _MESSAGE_ID and attempt < _TRIES:
                continue
            problem = f"breaks {violation.constraint}: an id that comes twice, or a value out of its range"
            raise Damaged.line(received.lines, problem) from None
    raise AssertionError("unreachable")


async def _chunks(
    entries: Iterator[tuple[int, dict[str, Any], int]], limits: values.Limits
) -> AsyncIterator[tuple[str, list[Any]]]:
    """The models of the lines, those of one kind together, some at a time."""
    kind, size = "", 0
    models: list[Any] = []
    for number, value, line_bytes in entries:
        found = _KINDS.get(str(value.get("type")))
        if found is None:
            raise Damaged.line(number, "of an unknown type")
        if models and (found[0] != kind or len(models) == _CHUNK or size > _CHUNK_BYTES):
            yield kind, models
            models, size = [], 0
        kind, size = found[0], size + line_bytes
        models.append(_checked(found[1], number, value, limits))
    if models:
        yield kind, models


_KINDS: Final[dict[str, tuple[str, type[BaseModel]]]] = {
    "message": ("messages", imported.Message),
    "memory": ("memories", imported.Memory),
    "turn": ("turns", imported.Turn),
}


def _checked(model: type[imported.Model], number: int, value: dict[str, Any], limits: values.Limits) -> imported.Model:
    try:
        return model.model_validate(value, context=limits)
    except ValidationError as error:
        problems = [
            {"type": each["type"], "loc": ["body", number, *each["loc"]], "msg": each["msg"]}
            for each in error.errors(include_url=False, include_input=False)
        ]
        raise ValidationFailed(problems) from None
