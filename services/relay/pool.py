"""The pool: which account a request is sent with.

Its one invariant: a seat (an account with one of its slots) is given back exactly once, on every path.

Of the eligible accounts (enabled, serving the model, not cooling, with a free slot) a request takes the one that its
session had last; else among those of the lowest priority number the least loaded by weight, in turns where they are
equal. After failures an account is half open: one request probes it, the others wait for what comes of it. What
befalls an account is known here at once, written to its row beside the request, and read back from there, as is what
other relays and administrators write.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, Final

import structlog
from sqlalchemy.sql import ClauseElement

from services.relay import accounts
from services.relay.accounts import DEMO_MODEL, Account
from services.relay.errors import ModelNotServed, NoAccount, RelayError, UpstreamForbidden, UpstreamRateLimited
from services.relay.members import FOREVER, FULL_SECONDS, GiveWay, Member, Seat, chosen
from services.relay.slots import Slots
from services.relay.upstream import Upstream
from services.relay.verdicts import Verdict, failure_seconds
from shared.database import Database
from shared.errors import DatabaseUnavailable

log = structlog.get_logger(__name__)

_SLOTS: Final = "account"
_PROBE_SECONDS: Final = 60.0
_RECLAIM_SECONDS: Final = 2.0
_NO_ACCOUNT_SECONDS: Final = 30.0
_FORBIDDEN: Final = frozenset({"forbidden", "disabled"})
_WRITE_AGAIN_SECONDS: Final = 1.0


Connect = Callable[[Account], Upstream | None]


@dataclass(slots=True, eq=False)
class Pool:
    """The accounts of one relay; `connect` makes the way to one. Call `refresh` before anything else."""

    database: Database
    slots: Slots
    connect: Connect
    members: dict[str, Member] = field(default_factory=dict)
    _reading: asyncio.Lock = field(default_factory=asyncio.Lock)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)
    _lent: set[Seat] = field(default_factory=set)

    # ── what is known ───────────────────────────────────────────────────────────────────────────

    async def refresh(self) -> None:
        """Reads all rows; raises DatabaseUnavailable."""
        async with self._reading:  # one after the other: an older reading must not replace a newer one
            await self._read()
            while any(member.has_missed and not member.writing for member in self.members.values()):
                await self._read()

    async def _read(self) -> None:
        read_at = monotonic()
        found = {account.id: account for account in await accounts.list_all(self.database)}
        for account_id in self.members.keys() - found.keys():
            del self.members[account_id]
        for account in found.values():
            member = self.members.get(account.id)
            if member is None:
                member = self.members[account.id] = Member(account, self.connect(account))
            elif _way(member.account) != _way(account):
                member.upstream = self.connect(account)
            member.take_up(account, read_at)
        self._wake()

    def check(self, model: str) -> None:
        """Raises what `seat` would raise at once because no account could serve the model, however long one waits."""
        for member in self._candidates(model):
            if (obstacle := member.obstacle(monotonic())) is None or obstacle[1] < FOREVER:
                return
        raise self._none_for(model)

    def _candidates(self, model: str) -> list[Member]:
        """The accounts that serve the model; the demo account never stands in for others."""
        real = [member for member in self.members.values() if member.account.provider != "demo"]
        demo = [member for member in self.members.values() if member.account.provider == "demo"]
        if model == DEMO_MODEL and demo:
            return demo
        return [member for member in real or demo if member.account.serves(model)]

    # ── choosing ────────────────────────────────────────────────────────────────────────────────

    @asynccontextmanager
    async def seat(
        self,
        model: str,
        *,
        prefers: str | None,
        tried: set[str],
        wait_seconds: float,
        gives_way: GiveWay | None = None,
    ) -> AsyncIterator[Seat]:
        """An account for this model, those that were tried only when there is no other.

        Waits so long at most for one to become eligible. With `gives_way` the seat is borrowed: it is asked for back
        when a request that does not borrow finds the account full. Who borrows neither probes nor tries an account
        twice. Raises ModelNotServed, NoAccount, and where all rest for the same cause UpstreamRateLimited or
        UpstreamForbidden.
        """
        seat = await self._take(model, prefers, tried, monotonic() + wait_seconds, gives_way)
        try:
            yield seat
        finally:
            self._give_back(seat)

    async def _take(
        self, model: str, prefers: str | None, tried: set[str], until: float, gives_way: GiveWay | None
    ) -> Seat:
        while True:
            now = monotonic()
            candidates = self._candidates(model)
            obstacles = {member.account.id: member.obstacle(now) for member in candidates}
            eligible = [member for member in candidates if obstacles[member.account.id] is None]
            if gives_way is not None:
                eligible = [each for each in eligible if not (each.failures_in_row or each.account.id in tried)]
            if member := chosen(eligible, prefers, tried):
                if seat := await self._seated(member, gives_way):
                    return seat
                continue
            if gives_way is None and self._reclaim(candidates):
                until = max(until, now + _RECLAIM_SECONDS)
            soonest = min((obstacle[1] for obstacle in obstacles.values() if obstacle), default=FOREVER)
            if now + soonest > until:
                raise self._none_for(model)
            self._changed.clear()
            try:
                async with asyncio.timeout(soonest):
                    await self._changed.wait()
            except TimeoutError:
                continue

    def _reclaim(self, candidates: list[Member]) -> bool:
        """Whether somebody who borrows a seat of a full account gives it back now."""
        now = monotonic()
        for seat in self._lent:
            obstacle = seat.member.obstacle(now)
            if seat.member in candidates and obstacle and obstacle[0] == "full" and seat.gives_way:
                self._lent.discard(seat)
                seat.gives_way()
                return True
        return False

    async def _seated(self, member: Member, gives_way: GiveWay | None) -> Seat | None:
        """A seat of this account; None when other relays have taken what there was."""
        seat = Seat(member, is_probe=member.failures_in_row > 0, gives_way=gives_way)
        member.in_flight += 1
        member.is_probing = member.is_probing or seat.is_probe
        try:
            if await self._granted(seat):
                member.requests += 1
                if gives_way is not None:
                    self._lent.add(seat)
                return seat
        except BaseException:
            self._give_back(seat)
            raise
        member.full_until = monotonic() + FULL_SECONDS
        self._give_back(seat)
        return None

    async def _granted(self, seat: Seat) -> bool:
        """What only one of all relays may have is asked of the database; while it is away, each is on its own."""
        account, limit = seat.account, seat.account.max_concurrency
        try:
            if seat.is_probe and not await self.database.rows(
                accounts.CLAIM_PROBE, id=account.id, seconds=_PROBE_SECONDS
            ):
                self._end_probe(seat)  # the claim is another relay's, and stays
                return False
            if limit is None:
                return True
            freeing = set(seat.member.freeing)
            seat.slot = await self._slot(account.id, limit)
            if seat.slot is None and freeing:  # what this relay was about to give back is there now
                await asyncio.wait(freeing)
                seat.slot = await self._slot(account.id, limit)
        except DatabaseUnavailable:
            return True
        return seat.slot is not None

    async def _slot(self, account_id: str, limit: int) -> int | None:
        """A slot, if there is one; when cancelled, what it was about to get is given back."""
        taking = asyncio.create_task(self.slots.take(_SLOTS, account_id, limit))
        try:
            return await asyncio.shield(taking)
        except asyncio.CancelledError:
            self._beside(self._free_late(taking, account_id))
            raise

    async def _free_late(self, taking: asyncio.Task[int | None], account_id: str) -> None:
        if (slot := await taking) is not None:
            await self.slots.free(_SLOTS, account_id, slot)

    def _give_back(self, seat: Seat) -> None:
        seat.member.in_flight -= 1
        self._lent.discard(seat)
        if seat.is_probe:  # it has come to nothing
            self._beside(self.database.rows(accounts.END_PROBE, id=seat.account.id))
            self._end_probe(seat)
        if seat.slot is not None:
            freeing = self._beside(self.slots.free(_SLOTS, seat.account.id, seat.slot))
            seat.member.freeing.add(freeing)
            freeing.add_done_callback(seat.member.freeing.discard)
            seat.slot = None
        self._wake()

    def _end_probe(self, seat: Seat) -> None:
        if seat.is_probe:
            seat.is_probe = seat.member.is_probing = False
            self._wake()

    def _none_for(self, model: str) -> RelayError:
        """Why there is no account to take, and when there will be one."""
        candidates = self._candidates(model)
        if not self.members:
            return NoAccount(retry_after_seconds=_NO_ACCOUNT_SECONDS)
        if not candidates:
            return ModelNotServed()
        now = monotonic()
        there = [obstacle for each in candidates if each.could_be_tried and (obstacle := each.obstacle(now))]
        soonest = min((seconds for _, seconds in there), default=FOREVER)
        wait = _NO_ACCOUNT_SECONDS if soonest == FOREVER else soonest
        reasons = {reason for reason, _ in there}
        if reasons and reasons <= _FORBIDDEN:
            return UpstreamForbidden(retry_after_seconds=wait)
        if "rate_limited" in reasons and reasons <= _FORBIDDEN | {"rate_limited"}:
            return UpstreamRateLimited(retry_after_seconds=wait)
        return NoAccount(retry_after_seconds=wait)

    def rest_seconds(self, model: str) -> float | None:
        """In how many seconds an account for this model is eligible; None where that cannot be told."""
        now = monotonic()
        obstacles = [member.obstacle(now) for member in self._candidates(model)]
        soonest = min((0.0 if obstacle is None else obstacle[1] for obstacle in obstacles), default=FOREVER)
        return None if soonest == FOREVER else soonest

    def has_choice(self, model: str) -> bool:
        return len(self._candidates(model)) > 1

    # ── what befalls an account ─────────────────────────────────────────────────────────────────

    def worked(self, seat: Seat) -> None:
        """Upstream gave an answer."""
        member = seat.member
        if member.failures_in_row:
            member.failures_in_row = 0
            self._tell(member, accounts.WORKED)
        self._end_probe(seat)

    def failed(self, seat: Seat, verdict: Verdict) -> None:
        """Lets the account rest as the verdict says; a failure of a request that began before the rest adds nothing."""
        member, now = seat.member, monotonic()
        member.failures += 1
        if verdict.seconds is None:
            log.warning("account_disabled", account=member.account.id, reason=verdict.error)
            member.enabled, member.reason = False, verdict.reason
            self._tell(member, accounts.GIVE_UP, error=verdict.error)
        elif verdict.reason != "failing" or member.cooling_until <= now:
            failed = int(verdict.reason == "failing")
            member.failures_in_row += failed
            seconds = max(verdict.seconds, failure_seconds(member.failures_in_row) if failed else 0.0)
            if now + seconds > member.cooling_until:
                member.cooling_until, member.reason = now + seconds, verdict.reason
            log.warning("account_cools", account=member.account.id, reason=verdict.reason, seconds=round(seconds, 1))
            told = {"reason": verdict.reason, "failed": failed, "error": verdict.error}
            self._tell(member, accounts.COOL, until=now + seconds, **told)
        self._end_probe(seat)

    def _tell(self, member: Member, statement: ClauseElement, *, until: float | None = None, **values: Any) -> None:
        member.writing += 1
        self._beside(self._write(member, statement, until, values))

    async def _write(
        self, member: Member, statement: ClauseElement, until: float | None, values: dict[str, Any]
    ) -> None:
        """Tells the row, again until the database takes it: other relays and a restart shall know.

        `until` is a time by the monotonic clock, told as the seconds that are left to it.
        """
        try:
            while True:
                if until is not None:
                    values["seconds"] = max(0.0, until - monotonic())
                try:
                    await self.database.rows(statement, id=member.account.id, **values)
                except DatabaseUnavailable:
                    await asyncio.sleep(_WRITE_AGAIN_SECONDS)
                else:
                    return
        finally:
            member.writing -= 1
            member.written_at = monotonic()
            if member.has_missed and not member.writing:
                self._beside(self._refresh_again())

    async def _refresh_again(self) -> None:
        """Nobody may notify of it once more."""
        while True:
            try:
                await self.refresh()
            except DatabaseUnavailable:
                await asyncio.sleep(_WRITE_AGAIN_SECONDS)
            else:
                return

    # ── beside ──────────────────────────────────────────────────────────────────────────────────

    def _beside(self, work: Coroutine[Any, Any, Any] | Awaitable[Any]) -> asyncio.Task[None]:
        async def run() -> None:
            try:
                await work
            except DatabaseUnavailable as error:
                log.warning("account_state_not_written", error=error.code)
            except Exception:  # nobody awaits it
                log.exception("account_state_fault")

        task = asyncio.create_task(run())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def written(self, timeout_seconds: float) -> None:
        """Waits until what befell the accounts so far is in their rows, if that does not take too long."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=timeout_seconds)

    async def stop(self, timeout_seconds: float) -> None:
        """As `written`; then nothing is under way any more."""
        await self.written(timeout_seconds)
        for task in list(self._tasks):
            task.cancel()

    def _wake(self) -> None:
        self._changed.set()


def _way(account: Account) -> tuple[object, ...]:
    """What the way to an account is made of."""
    return account.provider, account.base_url, account.secrets, account.secrets_key_id
