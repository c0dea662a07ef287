"""Asking upstream: the one retry loop.

Its one invariant: until an answer's commit point a failure of one account leads to another one, within
RELAY_MAX_ATTEMPTS and a total deadline; from then on nothing is asked a second time.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, Final

from services.relay import outcomes, verdicts
from services.relay.answers import Answer
from services.relay.assembly import Assembly
from services.relay.errors import RelayError, UpstreamFailed, UpstreamUnusable
from services.relay.members import GiveWay, Seat
from services.relay.metrics import Metrics
from services.relay.outcomes import Ended, ErrorEvent
from services.relay.pool import Pool
from services.relay.settings import RelaySettings
from services.relay.upstream import UpstreamAnswer, UpstreamError, UpstreamRequest, UpstreamTimeout
from services.relay.verdicts import Verdict

_OK: Final = 200


@dataclass(slots=True, eq=False)
class Attempt:
    """One call of upstream. Whoever reads its answer says `committed` when the client begins to get it."""

    number: int
    seat: Seat
    pool: Pool
    deadline: asyncio.Timeout
    assembly: Assembly = field(default_factory=Assembly)
    is_committed: bool = False
    status: str = "none"

    @property
    def source(self) -> dict[str, Any]:
        """What a turn remembers of it."""
        return {"account": self.seat.account.id, "attempts": self.number}

    def committed(self) -> None:
        self.is_committed = True
        if not self.deadline.expired():
            self.deadline.reschedule(None)
        self.pool.worked(self.seat)


Take = Callable[[UpstreamAnswer, Attempt], Awaitable[Ended]]
"""Reads an answer of status 200 to its end; raises UpstreamError."""


@dataclass(frozen=True, slots=True)
class Asking:
    """How upstream is asked."""

    pool: Pool
    settings: RelaySettings
    metrics: Metrics

    async def ask(
        self,
        request: UpstreamRequest,
        take: Take,
        *,
        prefers: str | None = None,
        on_attempt: Callable[[Attempt], None] = lambda _: None,
        gives_way: GiveWay | None = None,
    ) -> Ended:
        """How it ended; raises RelayError only where no account could be tried at all.

        With `gives_way` accounts are only borrowed: nobody waits for this request, and its failures count against none.
        """
        settings, model = self.settings, str(request.body["model"])
        until = asyncio.get_running_loop().time() + settings.relay_deadline_seconds
        failures = _Failures()
        for number in range(1, settings.relay_max_attempts + 1):
            left_seconds = until - asyncio.get_running_loop().time()
            if failures.errors and left_seconds <= 0:  # another account could not do anything about it
                break
            wait_seconds = min(settings.relay_retry_wait_seconds, left_seconds)
            try:
                async with self.pool.seat(
                    model, prefers=prefers, tried=failures.tried, wait_seconds=wait_seconds, gives_way=gives_way
                ) as seat:
                    attempt = Attempt(number, seat, self.pool, asyncio.timeout_at(until))
                    on_attempt(attempt)
                    ended = await self._attempt(attempt, request, take)
            except RelayError as error:
                if not failures.errors:
                    raise
                if isinstance(error, UpstreamFailed):
                    failures.errors.append(error)
                break
            ended.answer.upstream.update(attempt.source)
            if attempt.is_committed or not isinstance(ended.error, UpstreamFailed):
                return ended
            failures.add(seat.account.id, ended)
            if isinstance(ended.error, UpstreamUnusable):  # it would be as large from anyone
                break
        return failures.concluded(self.pool.rest_seconds(model))

    async def _attempt(self, attempt: Attempt, request: UpstreamRequest, take: Take) -> Ended:
        """One attempt, and what it says of the account."""
        asked_at = monotonic()
        seat = attempt.seat
        try:
            async with attempt.deadline, await seat.upstream.open(_for_account(request, seat)) as answer:
                attempt.status = str(answer.status)
                if answer.status == _OK:
                    ended = await take(answer, attempt)
                    self.pool.worked(seat)
                    return ended
                content = await _read(answer)
            self._judge(attempt, verdicts.of_answer(answer.status, answer.headers, content))
            return outcomes.declined(answer.status, answer.headers, content)
        except UpstreamError as failure:
            return self._failed(attempt, failure)
        except TimeoutError:
            if not attempt.deadline.expired():
                raise
            return self._failed(attempt, UpstreamTimeout("the deadline for all attempts has passed"))
        finally:
            self.metrics.upstream_requests.labels(seat.account.id, attempt.status).inc()
            self.metrics.upstream_duration.observe(monotonic() - asked_at)

    def _failed(self, attempt: Attempt, failure: UpstreamError) -> Ended:
        if attempt.status == "none":
            attempt.status = failure.kind
        if isinstance(failure, ErrorEvent) and not attempt.is_committed:
            self._judge(attempt, verdicts.of_answer(failure.status, {}, failure.content))
        else:
            self._judge(attempt, verdicts.of_failure(f"{failure.kind}: {failure}"))
        return outcomes.failed(failure, attempt.assembly.partial() if attempt.is_committed else None)

    def _judge(self, attempt: Attempt, verdict: Verdict | None) -> None:
        if verdict is None:
            self.pool.worked(attempt.seat)
        elif attempt.is_committed or attempt.seat.gives_way is not None:
            attempt.seat.member.failures += 1
        else:
            self.pool.failed(attempt.seat, verdict)


@dataclass(slots=True)
class _Failures:
    """What the attempts so far came to."""

    tried: set[str] = field(default_factory=set)
    errors: list[UpstreamFailed] = field(default_factory=list)
    last: Ended | None = None

    def add(self, account_id: str, ended: Ended) -> None:
        self.tried.add(account_id)
        self.last = ended
        if isinstance(ended.error, UpstreamFailed):
            self.errors.append(ended.error)

    def concluded(self, retry_after_seconds: float | None) -> Ended:
        answer = self.last.answer if self.last else Answer("failed")
        return Ended(answer, error=outcomes.concluded(self.errors, retry_after_seconds))


async def _read(answer: UpstreamAnswer) -> bytes:
    """The body of an answer other than 200; one that does not come whole says no less than its status."""
    try:
        return await answer.read()
    except UpstreamError:
        if answer.status in verdicts.PASSED_STATUSES:
            raise
        return b""


def _for_account(request: UpstreamRequest, seat: Seat) -> UpstreamRequest:
    """The request with the model's name as this account's upstream knows it."""
    model: Any = request.body["model"]
    name = seat.account.upstream_model(model)
    if name == model:
        return request
    return UpstreamRequest(request.path, request.query, request.headers, {**request.body, "model": name})
