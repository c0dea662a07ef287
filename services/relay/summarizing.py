"""One session's summary: what it is to cover is read, a model asked, the answer stored.

Its one invariant: a summary is stored only while every message that it covers is visible and the summary that it
goes on from is the session's: nothing that was taken back comes in again, and nobody's work is written over.
"""

from dataclasses import dataclass, field
from typing import Final

from services.relay import answers, outcomes, spending, transcript
from services.relay.answers import Answer
from services.relay.assembly import storable
from services.relay.attempts import Asking, Attempt
from services.relay.errors import InvalidRequest, SummaryOutdated, UpstreamOverloaded
from services.relay.key_limits import KeyLimits
from services.relay.keys import Key
from services.relay.members import GiveWay
from services.relay.metrics import Metrics
from services.relay.outcomes import Ended
from services.relay.request import ClaudeRequest
from services.relay.upstream import MESSAGES_PATH, UpstreamAnswer, UpstreamRequest
from shared import wire
from shared.errors import VersionMismatch
from shared.session_client import SessionClient, SessionKey
from shared.values import Limits

MAX_TOKENS: Final = 1024
# About 60,000 tokens: three bytes make one, in Latin script and in Chinese.
_PIECE_BYTES: Final = 180_000
_LEAST_PIECE_BYTES: Final = 10_000
_SMALLER: Final = 4
_TOO_LONG: Final = frozenset({400, 413})
# Few, because each may hold 32 MiB.
_PAGE: Final = 10
_STORE_TRIES: Final = 20
_SUMMARY_BYTES: Final = Limits().summary_bytes
_NAME_CHARACTERS: Final = 255


@dataclass(frozen=True, slots=True)
class Wanted:
    """A summary of what is visible up to `to_seq`. `again`: also where the session's own reaches as far.

    `payer` is the key whose limits hold. With `gives_way` accounts are only borrowed.
    """

    key: SessionKey
    to_seq: int
    model: str
    again: bool = False
    payer: Key | None = None
    gives_way: GiveWay | None = None


class Declined(Exception):
    """Upstream refuses the request itself."""

    def __init__(self, ended: Ended) -> None:
        super().__init__(f"upstream answered {ended.status}")
        self.ended = ended


@dataclass(slots=True)
class _Piece:
    """As much as one request holds, up to the seq `reached`; `last_id` is the last message that was read."""

    entries: list[str] = field(default_factory=list)
    reached: int = 0
    last_id: str | None = None


@dataclass(frozen=True, slots=True)
class Summarizer:
    """How summaries are made."""

    sessions: SessionClient
    asking: Asking
    metrics: Metrics
    key_limits: KeyLimits

    async def run(self, wanted: Wanted) -> wire.Session:
        """The session with the summary: its own, gone on with piece by piece; a new one where that reaches as far.

        What goes on is stored with every piece. Raises Declined, SummaryOutdated, InvalidRequest where there is
        nothing to tell, and what asking and session_service raise.
        """
        session = await self.sessions.get_session(wanted.key)
        text, reached, piece_bytes = session.session_summary, session.summary_to_seq or 0, _PIECE_BYTES
        is_new = reached >= wanted.to_seq
        if is_new and not wanted.again:
            return session
        if is_new:
            text, reached = "", 0
        while reached < wanted.to_seq:
            piece = await self._read(wanted, reached, piece_bytes)
            if piece.entries:
                try:
                    text = await self._ask(wanted, text, piece.entries)
                except Declined as declined:
                    # Too much at once for this model, perhaps.
                    if declined.ended.status not in _TOO_LONG or piece_bytes // _SMALLER < _LEAST_PIECE_BYTES:
                        raise
                    piece_bytes //= _SMALLER
                    continue
            reached = piece.reached
            if not text or piece.last_id is None:
                break
            if not is_new or reached >= wanted.to_seq:
                session = await self._store(wanted, session, text, piece)
        if not text:
            raise InvalidRequest("The session holds nothing that could be summarised")
        return session

    async def _read(self, wanted: Wanted, after: int, most_bytes: int) -> _Piece:
        piece, size_bytes = _Piece(reached=after), 0
        while True:
            page = await self.sessions.list_messages(wanted.key, after_seq=piece.reached, limit=_PAGE)
            for message in page.messages:
                if message.seq > wanted.to_seq:
                    piece.reached = wanted.to_seq
                    return piece
                entry = transcript.entry(message)
                size_bytes += len(entry.encode())
                if piece.entries and size_bytes > most_bytes:
                    return piece
                if entry:
                    piece.entries.append(entry)
                piece.reached, piece.last_id = message.seq, message.message_id
            if not page.has_more:
                piece.reached = wanted.to_seq
                return piece

    async def _ask(self, wanted: Wanted, summary: str, entries: list[str]) -> str:
        """The model's summary; raises Declined, and what asking raises."""
        request = ClaudeRequest(
            {
                "model": wanted.model,
                "max_tokens": MAX_TOKENS,
                "system": transcript.SYSTEM,
                "messages": [{"role": "user", "content": transcript.prompt(summary, entries)}],
            },
            None,
        )
        if wanted.payer is None:
            completed = await self._completed(request, wanted.gives_way)
        else:
            async with spending.billed(self.key_limits, wanted.payer, request) as bill:
                completed = await self._completed(request, wanted.gives_way)
                await bill.settle(spending.of(completed))
        blocks = completed.messages[0].content if completed.messages else []
        text = "".join(str(block["text"]) for block in blocks if isinstance(block, dict) and block["type"] == "text")
        if not text.strip():
            raise UpstreamOverloaded("The upstream's answer holds no text")
        return text.strip().encode()[:_SUMMARY_BYTES].decode(errors="ignore")

    async def _completed(self, request: ClaudeRequest, gives_way: GiveWay | None) -> wire.CompleteTurn:
        """The answer in the form in which turns are completed, its figures counted."""
        asked = UpstreamRequest(MESSAGES_PATH, "", {}, request.body)
        ended = await self.asking.ask(asked, _take, gives_way=gives_way)
        if ended.error is not None:
            raise ended.error
        if ended.answer.status != "completed":
            raise Declined(ended)
        completed = answers.completion(ended.answer, lease_token="", prefill=[], body=request.body)
        self.metrics.count_tokens(completed.model, completed.usage)
        self.metrics.count_cost(completed.model, completed.cost_usd)
        return completed

    async def _store(self, wanted: Wanted, before: wire.Session, text: str, piece: _Piece) -> wire.Session:
        """The session with this summary in place of the one in `before`; other writes may come in between."""
        model = str(storable(wanted.model)[0])[:_NAME_CHARACTERS]
        change = wire.UpdateSession(session_summary=text, summary_to_seq=piece.reached, summary_model=model)
        new = (text, piece.reached, model)
        for _ in range(_STORE_TRIES):
            session = await self.sessions.get_session(wanted.key)
            if _summary_of(session) == new:
                return session
            if _summary_of(session) != _summary_of(before) or not await self._is_visible(wanted.key, piece):
                break
            try:
                return await self.sessions.update_session(wanted.key, change, if_match=session.version)
            except VersionMismatch:
                continue
        raise SummaryOutdated

    async def _is_visible(self, key: SessionKey, piece: _Piece) -> bool:
        """Whether all that the piece and those before it were made of is visible still.

        What is taken back always takes with it all that comes after, so the last of them tells for all.
        """
        listed = await self.sessions.list_messages(key, before_seq=piece.reached + 1, limit=1)
        return [message.message_id for message in listed.messages] == [piece.last_id]


def _summary_of(session: wire.Session) -> tuple[str, int | None, str | None]:
    return session.session_summary, session.summary_to_seq, session.summary_model


async def _take(answer: UpstreamAnswer, _attempt: Attempt) -> Ended:
    content = await answer.read()
    told = outcomes.source(answer.status, answer.headers)
    return Ended(Answer("completed", outcomes.message_of(content), told))
