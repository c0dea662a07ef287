"""Completions of turns on their way to the store, kept on disk while the store is away.

Its one invariant: a completion that `complete` has called `deferred` is on disk, whole, until the store has taken
it or refused it for good; refused ones are set aside, never deleted.

Each entry is a file of its own, synced before its name is: none is ever found half written, and any relay on the
same folder may deliver it, because delivering twice is the same as once. A session's entries go in order.
"""

import asyncio
import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from time import time
from typing import Any, Final, Literal

import structlog
from uuid_utils import uuid7

from shared import wire
from shared.errors import BodyTooLarge, Internal, ServiceError, SessionServiceUnavailable, Unavailable, ValidationFailed
from shared.json import dumps, loads
from shared.session_client import SessionClient, SessionKey

log = structlog.get_logger(__name__)

Persisted = Literal["yes", "deferred", "none"]

NOT_STORABLE: Final = "not_storable"
"""Type of the error of a turn that was closed without its message, because the store refused that for good."""

_SUFFIX: Final = ".json"
_DRAFT: Final = ".part"
_OLD_DRAFT_SECONDS: Final = 3600.0
_REFUSED: Final = "refused"
_POLL_SECONDS: Final = 0.5
# What may be different another time.
_AWAY: Final = (Unavailable, Internal, TimeoutError)


@dataclass(frozen=True, slots=True)
class Entry:
    """One completion that waits; `path` sorts by age."""

    path: Path
    key: SessionKey
    turn_id: str
    answer: wire.CompleteTurn
    kept_at: float


class Spool:
    """The completions of one relay. Call `load` before anything else."""

    def __init__(self, folder: Path, sessions: SessionClient, *, timeout_seconds: float) -> None:
        self._folder = folder
        self._sessions = sessions
        self._timeout_seconds = timeout_seconds
        self._waiting: dict[SessionKey, list[Entry]] = {}
        self._by_turn: dict[tuple[str, str], Entry] = {}
        self._delivering: dict[SessionKey, asyncio.Lock] = {}
        self._kept = asyncio.Event()

    @property
    def count(self) -> int:
        return sum(map(len, self._waiting.values()))

    @property
    def oldest_age_seconds(self) -> float:
        return max((time() - entries[0].kept_at for entries in self._waiting.values()), default=0.0)

    def load(self) -> None:
        """Takes up what an earlier relay left. Raises OSError when the folder cannot be used."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path in sorted(self._folder.glob(f"*{_SUFFIX}")):
            try:
                self._add(_read(path))
            except FileNotFoundError:
                continue  # another relay was quicker
            except (ValueError, KeyError, TypeError):
                log.error("spool_entry_unreadable", file=path.name)  # noqa: TRY400 - one line says it
                _remove(path, aside=True)
        for draft in self._folder.glob(f"*{_DRAFT}"):
            _remove_if_old(draft)
        if self.count:
            log.info("spool_found", entries=self.count)

    async def complete(self, key: SessionKey, turn_id: str, answer: wire.CompleteTurn) -> Persisted:
        """Completes the turn: `yes` when the store has it, `deferred` when the disk has it, else `none`."""
        entry = Entry(self._folder / f"{uuid7()}{_SUFFIX}", key, turn_id, answer, time())
        if key not in self._waiting:
            try:
                return await self._completed(key, turn_id, answer)
            except _AWAY as error:
                log.warning("completion_deferred", turn_id=turn_id, error=type(error).__name__)
            except asyncio.CancelledError:
                _write(entry)  # the relay stops, and the next one delivers it
                raise
        try:
            await asyncio.to_thread(_write, entry)
        except OSError as error:
            log.error("spool_unusable", turn_id=turn_id, reason=error.strerror)  # noqa: TRY400 - one line says it
            return "none"
        self._add(entry)
        return "deferred"

    def waits(self, user_id: str, turn_id: str) -> Entry | None:
        """The completion of this user's turn, while it waits here."""
        return self._by_turn.get((user_id, turn_id))

    async def settle(self, key: SessionKey) -> None:
        """Delivers what waits for this session; raises SessionServiceUnavailable when that cannot be done now."""
        if key in self._waiting and not await self._deliver(key):
            raise SessionServiceUnavailable(retry_after_seconds=1)

    async def keep_delivering(self) -> None:
        """Delivers for ever, as soon as the store takes it."""
        while True:
            await self._kept.wait()
            for key in list(self._waiting):
                if not await self._deliver(key):
                    break
            if not self._waiting:
                self._kept.clear()
            else:
                await asyncio.sleep(_POLL_SECONDS)

    async def _completed(self, key: SessionKey, turn_id: str, answer: wire.CompleteTurn) -> Persisted:
        """`yes`, or `none` when the store has refused it for good; raises one of _AWAY."""
        try:
            async with asyncio.timeout(self._timeout_seconds):
                await self._sessions.complete_turn(key, turn_id, answer)
        except _AWAY:
            raise
        except ServiceError as error:
            log.error("completion_refused", turn_id=turn_id, code=error.code)  # noqa: TRY400 - an answer, no fault
            if isinstance(error, BodyTooLarge | ValidationFailed):
                await self._close_empty(key, turn_id, answer)
            return "none"
        return "yes"

    async def _close_empty(self, key: SessionKey, turn_id: str, answer: wire.CompleteTurn) -> None:
        """Closes the turn without its message, so that the session at least goes on."""
        empty = wire.CompleteTurn(lease_token=answer.lease_token, status="failed", error={"type": NOT_STORABLE})
        with contextlib.suppress(ServiceError, TimeoutError):
            async with asyncio.timeout(self._timeout_seconds):
                await self._sessions.complete_turn(key, turn_id, empty)

    async def _deliver(self, key: SessionKey) -> bool:
        """Whether all that waited for this session has been delivered or set aside."""
        async with self._delivering.setdefault(key, asyncio.Lock()):
            while entries := self._waiting.get(key):
                entry = entries[0]
                try:
                    persisted = await self._completed(key, entry.turn_id, entry.answer)
                except _AWAY:
                    return False
                try:
                    await asyncio.to_thread(_remove, entry.path, aside=persisted == "none")
                except OSError as error:
                    log.error("spool_unusable", turn_id=entry.turn_id, reason=error.strerror)  # noqa: TRY400
                    return False
                entries.pop(0)
                self._by_turn.pop((key.user_id, entry.turn_id), None)
                if not entries:
                    del self._waiting[key]
                log.info("spool_delivered", turn_id=entry.turn_id, persisted=persisted, left=self.count)
        if key not in self._waiting:
            self._delivering.pop(key, None)
        return True

    def _add(self, entry: Entry) -> None:
        self._waiting.setdefault(entry.key, []).append(entry)
        self._by_turn[entry.key.user_id, entry.turn_id] = entry
        self._kept.set()


# ── files ───────────────────────────────────────────────────────────────────────────────────────


def _write(entry: Entry) -> None:
    content = dumps(
        {
            "user_id": entry.key.user_id,
            "session_id": entry.key.session_id,
            "turn_id": entry.turn_id,
            "kept_at": entry.kept_at,
            "answer": entry.answer.model_dump(exclude_none=True),
        }
    )
    draft = entry.path.with_suffix(_DRAFT)
    file = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(file, "wb") as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
    except OSError:
        draft.unlink(missing_ok=True)  # a disk that is full needs no half entries
        raise
    draft.rename(entry.path)
    _sync_folder(entry.path.parent)


def _read(path: Path) -> Entry:
    value: dict[str, Any] = loads(path.read_bytes())
    key = SessionKey(value["user_id"], value["session_id"])
    return Entry(path, key, value["turn_id"], wire.CompleteTurn.model_validate(value["answer"]), value["kept_at"])


def _remove_if_old(draft: Path) -> None:
    """What a relay left that was killed while it wrote: nobody was told of it. A young one is somebody's at work."""
    with contextlib.suppress(FileNotFoundError):
        if time() - draft.stat().st_mtime > _OLD_DRAFT_SECONDS:
            draft.unlink()


def _remove(path: Path, *, aside: bool) -> None:
    if aside:
        refused = path.parent / _REFUSED
        refused.mkdir(mode=0o700, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            path.rename(refused / path.name)
    else:
        path.unlink(missing_ok=True)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
