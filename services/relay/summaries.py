"""Summaries of what contexts had to leave out: made beside the turns, once for each move of a window, and on demand.

Its one invariant: no turn waits for a summary or fails for one. They run in tasks of their own, a few at a time, on
accounts that they give back to turns at once; what becomes of them is a summary, or none.
"""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from time import monotonic
from typing import Final

import structlog

from services.relay.errors import InvalidRequest, NotPermitted, SummaryOutdated, UpstreamTimedOut
from services.relay.keys import Key
from services.relay.outcomes import Ended
from services.relay.settings import RelaySettings
from services.relay.slots import Slots
from services.relay.summarizing import Declined, Summarizer, Wanted
from shared import wire
from shared.errors import ServiceError, SessionArchived, Unavailable
from shared.session_client import SessionKey

log = structlog.get_logger(__name__)

_AT_ONCE: Final = 2
_MOST_WAITING: Final = 100
_LONGEST_SECONDS: Final = 600.0
_ON_DEMAND_SECONDS: Final = 120.0
_POLL_SECONDS: Final = 0.25
_STOP_SECONDS: Final = 1.0
# A session whose summary has failed is left alone for so long: turns go on, and each would try again.
_REST_SECONDS: Final = 600.0
_MOST_RESTS: Final = 10_000
_SLOTS: Final = "summary"
_OWNER_DIGITS: Final = 3


class Summaries:
    """The summaries that one relay makes."""

    def __init__(self, summarizer: Summarizer, slots: Slots, settings: RelaySettings) -> None:
        self._summarizer = summarizer
        self._sessions = summarizer.sessions
        self._slots = slots
        self._settings = settings
        self._at_once = asyncio.Semaphore(_AT_ONCE)
        self._running: dict[SessionKey, asyncio.Task[None]] = {}
        self._rests: dict[SessionKey, float] = {}
        self._is_stopping = False

    # ── beside the turns ────────────────────────────────────────────────────────────────────────

    def after(self, key: SessionKey, turn: wire.TurnOpened, model: str) -> None:
        """A turn with this context has ended: where messages before it are in no summary, one is begun."""
        left_out = turn.context.receipt.left_out
        to_seq = max((each.to_seq for each in left_out if each.reason == "before_window"), default=0)
        if to_seq <= (turn.session.summary_to_seq or 0) or key in self._running or self._is_stopping:
            return
        if not self._settings.relay_summaries or self._rests.get(key, 0.0) > monotonic():
            return
        if len(self._running) >= _MOST_WAITING:
            log.warning("summary_dropped", waiting=len(self._running))
            return
        wanted = Wanted(key, to_seq, self._settings.relay_summary_model or model)
        self._running[key] = asyncio.create_task(self._run(wanted))

    async def stop(self) -> None:
        """Begins no more, and waits a moment for those that run."""
        self._is_stopping = True
        if tasks := list(self._running.values()):
            _, late = await asyncio.wait(tasks, timeout=_STOP_SECONDS)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)

    async def _run(self, wanted: Wanted) -> None:
        try:
            async with self._at_once:
                if not self._is_stopping:
                    await self._unhurried(wanted)
        except SummaryOutdated:
            log.info("summary_outdated")
        except (ServiceError, Declined, TimeoutError) as error:
            self._rest(wanted.key)
            told = error.code if isinstance(error, ServiceError) else str(error) or "given_up"
            log.warning("summary_failed", error=told)
        except Exception:  # nobody awaits it
            self._rest(wanted.key)
            log.exception("summary_fault")
        finally:
            del self._running[wanted.key]

    async def _unhurried(self, wanted: Wanted) -> None:
        """Unless somebody is at it; raises TimeoutError also when turns need the account."""
        if (slot := await self._slots.take(_SLOTS, _owner(wanted.key), 1)) is None:
            return
        async with self._freed(wanted.key, slot), asyncio.timeout(_LONGEST_SECONDS) as until:

            def give_way() -> None:
                if not until.expired():
                    until.reschedule(asyncio.get_running_loop().time())

            session = await self._summarizer.run(replace(wanted, gives_way=give_way))
        if (session.summary_to_seq or 0) < wanted.to_seq:  # nothing in there is visible any more
            self._rest(wanted.key)
        else:
            log.info("summary_made", to_seq=session.summary_to_seq, model=session.summary_model)

    def _rest(self, key: SessionKey) -> None:
        now = monotonic()
        if len(self._rests) >= _MOST_RESTS:
            self._rests = {each: until for each, until in self._rests.items() if until > now}
        self._rests[key] = now + _REST_SECONDS

    # ── on demand ───────────────────────────────────────────────────────────────────────────────

    async def make(self, key: SessionKey, payer: Key, *, model: str | None, to_seq: int | None) -> wire.Session | Ended:
        """The session with a summary of all that is visible, or up to `to_seq`; else upstream's own refusal.

        Raises SessionNotFound, SessionArchived, InvalidRequest, NotPermitted, SummaryOutdated, UpstreamTimedOut, and
        what asking and session_service raise.
        """
        try:
            async with asyncio.timeout(_ON_DEMAND_SECONDS):
                wanted = await self._wanted(key, payer, model, to_seq)
                async with self._alone(key):
                    try:
                        return await self._summarizer.run(wanted)
                    except SummaryOutdated:
                        return await self._summarizer.run(await self._wanted(key, payer, model, to_seq))
        except Declined as declined:
            return declined.ended
        except TimeoutError:
            raise UpstreamTimedOut("The summary was not made in time") from None

    async def _wanted(self, key: SessionKey, payer: Key, model: str | None, to_seq: int | None) -> Wanted:
        session = await self._sessions.get_session(key)
        if session.status == "archived":
            raise SessionArchived
        last = (await self._sessions.list_messages(key, order="desc", page_size=1)).messages
        if not last:
            raise InvalidRequest("The session holds no messages")
        if to_seq is not None and to_seq > last[0].seq:
            raise InvalidRequest.at("to_seq", f"the last message has seq {last[0].seq}")
        if model is not None and not payer.may_ask(model):
            raise NotPermitted("model: the API key may not ask this one")
        model = model or self._settings.relay_summary_model or await self._model_of_turns(key)
        return Wanted(key, to_seq or last[0].seq, model, again=True, payer=payer)

    async def _model_of_turns(self, key: SessionKey) -> str:
        """The model that answered last."""
        for turn in (await self._sessions.list_turns(key, limit=10)).turns:
            if turn.model:
                return turn.model
        raise InvalidRequest.at("model", "Field required: no turn of the session tells one")

    # ── one at a time ───────────────────────────────────────────────────────────────────────────

    @asynccontextmanager
    async def _alone(self, key: SessionKey) -> AsyncIterator[None]:
        """Waits until no relay is at this session's summary."""
        while (slot := await self._slots.take(_SLOTS, _owner(key), 1)) is None:  # noqa: ASYNC110 - of other processes
            await asyncio.sleep(_POLL_SECONDS)
        async with self._freed(key, slot):
            yield

    @asynccontextmanager
    async def _freed(self, key: SessionKey, slot: int) -> AsyncIterator[None]:
        try:
            yield
        finally:
            with suppress(Unavailable):  # then it runs out by itself
                await self._slots.free(_SLOTS, _owner(key), slot)


def _owner(key: SessionKey) -> str:
    """Few in all, so that the table of slots stays small; two sessions with the same one come one after the other."""
    told = f"{key.user_id}\0{key.session_id}".encode()
    return hashlib.sha256(told).hexdigest()[:_OWNER_DIGITS]
