"""An account as one relay sees it now, and which of several a request takes.

Its one invariant: everything here is read and decided without waiting for anything.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Literal

from services.relay import accounts
from services.relay.accounts import Account, Reason
from services.relay.upstream import Upstream

FULL_SECONDS: Final = 0.2
"""How long an account counts as full after another relay was seen to have taken what there was."""
FOREVER: Final = float("inf")

GiveWay = Callable[[], None]
"""Has whoever only borrows a seat give it back at once: others have come who need it."""


@dataclass(slots=True, eq=False)
class Member:
    """An account in this process. `upstream` is None when its secrets cannot be opened."""

    account: Account
    upstream: Upstream | None
    in_flight: int = 0
    requests: int = 0
    failures: int = 0
    cooling_until: float = 0.0
    """By the monotonic clock, as are the following."""
    full_until: float = 0.0
    is_probing: bool = False
    credit: float = 0.0
    """Of equally loaded accounts the one with the most is next."""
    enabled: bool = True
    failures_in_row: int = 0
    reason: Reason | None = None
    """Why it cools, or is disabled."""
    writing: int = 0
    written_at: float = 0.0
    has_missed: bool = False
    """Its row was read when that could not be taken up; it is to be read again."""
    freeing: set[asyncio.Task[None]] = field(default_factory=set)

    def take_up(self, account: Account, read_at: float) -> None:
        """The row as it was read; what was told here meanwhile and is on its way to the row stays."""
        self.account = account
        self.has_missed = bool(self.writing) or read_at < self.written_at
        if self.has_missed:
            return
        self.enabled = account.enabled
        self.failures_in_row = account.failures_in_row
        self.cooling_until = read_at + account.cooling_seconds if account.cooling_seconds else 0.0
        self.reason = account.cooldown_reason if account.enabled else "disabled"

    @property
    def could_be_tried(self) -> bool:
        """Whether upstream has, or may have, said something of it; not of one that only an administrator can change."""
        is_by_admin = not self.enabled and self.account.disabled_reason == accounts.BY_ADMIN
        return self.upstream is not None and not is_by_admin

    def state(self, now: float) -> Literal["active", "cooling", "disabled"]:
        if not self.enabled or self.upstream is None:
            return "disabled"
        return "cooling" if self.cooling_until > now else "active"

    def obstacle(self, now: float) -> tuple[Reason, float] | None:
        """Why no request may take it now, and for how many seconds; None when one may."""
        limit = self.account.max_concurrency
        if not self.enabled:
            return "disabled", FOREVER
        if self.upstream is None:
            return "unreadable", FOREVER
        if self.cooling_until > now:
            return self.reason or "failing", self.cooling_until - now
        if self.failures_in_row and self.is_probing:
            return "failing", FULL_SECONDS
        if limit is not None and (self.in_flight >= limit or self.full_until > now):
            return "full", FULL_SECONDS
        return ("failing", self.full_until - now) if self.full_until > now else None


@dataclass(slots=True, eq=False)
class Seat:
    """An account that a request was given, with a slot of it."""

    member: Member
    slot: int | None = None
    is_probe: bool = False
    gives_way: GiveWay | None = None

    @property
    def account(self) -> Account:
        return self.member.account

    @property
    def upstream(self) -> Upstream:
        if self.member.upstream is None:
            raise AssertionError("an account that cannot be used was taken")
        return self.member.upstream


def chosen(eligible: list[Member], prefers: str | None, tried: set[str]) -> Member | None:
    """One that was not tried yet, if there is one: the preferred, else of the first priority the least loaded."""
    eligible = [member for member in eligible if member.account.id not in tried] or eligible
    for member in eligible:
        if member.account.id == prefers:
            return member
    first = min((member.account.priority for member in eligible), default=0)
    eligible = [member for member in eligible if member.account.priority == first]
    least = min((member.in_flight / member.account.weight for member in eligible), default=0.0)
    return _next_in_turn([member for member in eligible if member.in_flight / member.account.weight == least])


def _next_in_turn(equal: list[Member]) -> Member | None:
    """Smooth weighted round robin: each comes as often as its weight says, spread evenly."""
    if not equal:
        return None
    for member in equal:
        member.credit += member.account.weight
    chosen = max(equal, key=lambda member: member.credit)
    chosen.credit -= sum(member.account.weight for member in equal)
    return chosen
