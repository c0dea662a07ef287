"""Random histories of a few sessions against a plain model of the rules, compared after every step."""

import asyncio
import copy
import time
from collections.abc import Iterator

import asyncpg
import httpx
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule, run_state_machine_as_test

from tests.processes import ServiceProcess
from tests.session_service import calls
from tests.session_service.calls import Chat, Db, Json, User, check_counters, fine, refused, said, wait
from tests.session_service.machine import OUTCOMES, Compared, Reach, places, priced, texts, ways
from tests.session_service.model import MILLION, Message, Refusal, Session, Turn


class Sessions(Compared):
    @initialize()
    def begin(self) -> None:
        self.create("return")

    # ── sessions ──

    @rule(if_exists=ways)
    @precondition(lambda self: len(self.sessions) < 3)
    def create_one_more(self, if_exists: str) -> None:
        self.create(if_exists)

    @rule(if_exists=ways, place=places)
    def create_again(self, if_exists: str, place: float) -> None:
        """Most often one that has ended, which may come back."""
        ended = [session for session in self.sessions if session.status == "ended"]
        self.create(if_exists, (ended or self.sessions)[0] if place < 0.8 else self.some(place))

    def create(self, if_exists: str, session: Session | None = None) -> None:
        refusal: Refusal = None
        is_new = session is None
        if session is None:
            session = Session(f"s{len(self.sessions)}")
            self.sessions.append(session)
        elif if_exists == "error":
            refusal = "session_exists"
        elif if_exists != "return":
            refusal = session.revive(if_exists)
        body = {"user_id": self.user_id, "session_id": session.session_id, "if_exists": if_exists}
        self.create_keyed("/sessions", body, refusal)
        if is_new:
            session.version = 0
        self.check(session, moved=None if refusal is None else False)

    @rule(place=places, sure=st.integers(0, 2))
    def end(self, place: float, sure: int) -> None:
        session = self.some(place)
        if sure:
            return  # seldom: most can be done with an active one
        was = session.status
        refusal = session.end()
        self.told(self.call("DELETE", f"/sessions/{session.session_id}"), refusal)
        self.check(session, moved=session.status != was)

    @rule(place=places, status=st.sampled_from(["completed", "archived", "active"]), sure=st.integers(0, 9))
    def put_status(self, place: float, status: str, sure: int) -> None:
        session = self.some(place)
        if sure and session.status == "active":
            return  # seldom: nothing leads back
        was = session.status
        refusal = session.put_status(status)
        self.told(self.call("PUT", f"/sessions/{session.session_id}", {"status": status}), refusal)
        self.check(session, moved=session.status != was)

    @rule(place=places, at=places)
    def summarise(self, place: float, at: float) -> None:
        session = self.some(place)
        summary, to_seq = f"summary {next(self.numbers)}", self.seq_in(session, at)
        refusal = session.put_summary(summary, to_seq)
        body = {"session_summary": summary, "summary_to_seq": to_seq}
        self.told(self.call("PUT", f"/sessions/{session.session_id}", body), refusal)
        self.check(session, moved=refusal is None)

    @rule(place=places, at=places)
    @precondition(lambda self: len(self.sessions) < 3)
    def fork(self, place: float, at: float) -> None:
        session = self.some(place)
        at_seq = self.seq_in(session, at)
        new = session.fork(f"s{len(self.sessions)}", at_seq)
        body = {"at_seq": at_seq, "session_id": new.session_id}
        answer = self.create_keyed(f"/sessions/{session.session_id}/fork", body, None)
        assert (answer["total_tokens"], answer["total_cost"], answer["version"]) == (0, 0, 1)
        self.sessions.append(new)
        self.check(new, moved=False)
        self.check(session, moved=False)

    # ── messages ──

    @rule(place=places, message=texts)
    def append(self, place: float, message: Message) -> None:
        session = self.some(place)
        refusal = session.why_not_written()
        message_id = f"{self.user_id}-m{next(self.numbers)}"
        path = f"/sessions/{session.session_id}/messages"
        answer = self.create_keyed(path, message.body(message_id), refusal)
        if refusal is None:
            assert [answer["seq"]] == session.append([message])
            self.known.append((path, message_id, message, answer))
        self.check(session, moved=refusal is None)

    @rule(place=places, messages=st.lists(texts, min_size=1, max_size=4))
    def batch(self, place: float, messages: list[Message]) -> None:
        session = self.some(place)
        refusal = session.why_not_written()
        path, body = f"/sessions/{session.session_id}/messages/batch", {"messages": [each.body() for each in messages]}
        answer = self.create_keyed(path, body, refusal)
        if refusal is None:
            session.close_overdue()
            assert [each["seq"] for each in answer["messages"]] == session.append(messages)
        self.check(session, moved=refusal is None)

    @rule(place=places, at=places, beyond=st.booleans())
    def rewind(self, place: float, at: float, beyond: bool) -> None:
        session = self.some(place)
        to_seq = session.last_seq + 1 if beyond and at > 0.9 else self.seq_in(session, at)
        refusal = session.rewind(to_seq)
        self.told(self.call("POST", f"/sessions/{session.session_id}/rewind", {"to_seq": to_seq}), refusal)
        self.check(session, moved=None if refusal is None else False)
        self.check_view(session)

    # ── turns ──

    @rule(place=places, message=texts)
    def ask(self, place: float, message: Message) -> None:
        active = [session for session in self.sessions if session.status == "active"]
        self.open(active[0] if active else self.some(place), [message], None, None)

    @rule(place=places, message=texts, status=st.sampled_from(OUTCOMES))
    @precondition(lambda self: self.open_turns())
    def answer(self, place: float, message: Message, status: str) -> None:
        session, turn = self.open_turns()[0]
        self.finish(
            session, turn, {"lease_token": turn.lease_token, "status": status, "messages": [message.body()]}, [message]
        )

    @rule(
        message=texts,
        way=st.sampled_from(["opened", "revived", "rewound", "appended"]),
        status=st.sampled_from(OUTCOMES),
    )
    @precondition(lambda self: self.open_turns())
    def answer_late(self, message: Message, way: str, status: str) -> None:
        """The lease runs out, something else happens, then the answer comes after all."""
        session, turn = self.open_turns()[0]
        self.expire(session, turn)
        if way == "opened":
            session = self.open(session, [message], None, None) or session
        elif way == "revived":
            self.told(self.call("DELETE", f"/sessions/{session.session_id}"), session.end())
            self.create("restart" if message.tokens else "resume", session)
        elif way == "rewound":
            refusal = session.rewind(session.last_seq // 2)
            body = {"to_seq": session.last_seq // 2}
            self.told(self.call("POST", f"/sessions/{session.session_id}/rewind", body), refusal)
        elif session.why_not_written() is None:
            self.told(self.call("POST", f"/sessions/{session.session_id}/messages", message.body()), None)
            session.append([message])
        turn = next(each for each in session.turns if each.turn_id == turn.turn_id)
        done = {"lease_token": turn.lease_token, "status": status, "messages": [message.body()]}
        self.finish(session, turn, done, [message])

    @rule(
        place=places,
        messages=st.lists(texts, max_size=3),
        back=st.none() | places,
        if_exists=st.sampled_from([None, None, "return", "error", "restart", "resume"]),
    )
    def open_turn(self, place: float, messages: list[Message], back: float | None, if_exists: str | None) -> None:
        session = self.some(place)
        self.open(session, messages, None if back is None else self.seq_in(session, back), if_exists)

    def open(
        self, session: Session, messages: list[Message], rewind_to_seq: int | None, if_exists: str | None
    ) -> Session | None:
        """The session as it is with the turn opened, or None where it is refused."""
        tried = copy.deepcopy(session)
        refusal = tried.may_open(messages, rewind_to_seq, if_exists)
        body: Json = {"messages": [each.body() for each in messages], "rewind_to_seq": rewind_to_seq}
        if if_exists is not None:
            body["create_session"] = {"if_exists": if_exists}
        answer = self.create_keyed(f"/sessions/{session.session_id}/turns", body, refusal)
        if refusal is not None:
            if refusal == "turn_in_progress":
                assert answer["turn_id"] == next(each.turn_id for each in session.turns if each.status == "open")
            self.check(session, moved=False)
            return None
        self.sessions[self.sessions.index(session)] = tried
        seqs = tried.append(messages)
        assert [each["seq"] for each in answer["messages"]] == seqs
        turn = Turn(answer["turn_id"], answer["lease_token"], (seqs[0], seqs[-1]) if seqs else None)
        tried.turns.append(turn)
        tried.holder = turn
        self.check(tried, moved=True)
        self.check_view(tried)
        return tried

    @rule(
        place=places,
        messages=st.lists(texts, max_size=2),
        status=st.sampled_from(OUTCOMES),
        usage=st.sampled_from([None, {"output_tokens": 5}, {"input_tokens": 40, "output_tokens": 2, "other": 9}]),
        cost_micro_usd=st.sampled_from([None, 0, 123_456]),
        of=st.sampled_from(["open", "open", "expired", "any"]),
    )
    @precondition(lambda self: self.turns())
    def complete(
        self,
        place: float,
        messages: list[Message],
        status: str,
        usage: Json | None,
        cost_micro_usd: int | None,
        of: str,
    ) -> None:
        """Most often the open turn's; else one's whose lease is lost or was late, or one's that is closed."""
        found = [each for each in self.turns() if each[1].status == of] or self.turns()
        session, turn = found[int(place * (len(found) - 1) + 0.5)]
        cost = None if cost_micro_usd is None else cost_micro_usd / MILLION
        body = {"lease_token": turn.lease_token, "status": status, "messages": [each.body() for each in messages]}
        self.finish(session, turn, body | {"usage": usage, "cost_usd": cost}, priced(messages, usage, cost_micro_usd))

    @rule(place=places)
    @precondition(lambda self: any(turn.completion for _, turn in self.turns()))
    def complete_again(self, place: float) -> None:
        done = [(session, turn) for session, turn in self.turns() if turn.completion is not None]
        session, turn = done[int(place * (len(done) - 1) + 0.5)]
        assert turn.completion is not None
        self.finish(session, turn, turn.completion, [])

    def finish(self, session: Session, turn: Turn, body: Json, new: list[Message]) -> None:
        was_done = turn.completion is not None
        refusal = session.complete(turn, body, new)
        path = f"/sessions/{session.session_id}/turns/{turn.turn_id}/complete"
        answer = self.told(self.call("POST", path, body), refusal)
        if refusal is None:
            assert answer["turn"]["status"] == turn.status
            assert [each["seq"] for each in answer["messages"]] == turn.output_seqs
        self.check(session, moved=refusal is None and not was_done)
        self.check_view(session)

    @rule(place=places)
    @precondition(lambda self: self.turns())
    def renew(self, place: float) -> None:
        session, turn = self.turns()[int(place * (len(self.turns()) - 1) + 0.5)]
        refusal = None if turn.status == "open" else "turn_closed"
        path = f"/sessions/{session.session_id}/turns/{turn.turn_id}/renew"
        self.told(self.call("POST", path, {"lease_token": turn.lease_token}), refusal)
        if refusal is None:
            turn.lease_is_over = False
        self.check(session, moved=refusal is None)

    @rule(place=places)
    @precondition(lambda self: self.open_turns())
    def let_the_lease_run_out(self, place: float) -> None:
        session, turn = self.open_turns()[int(place * (len(self.open_turns()) - 1) + 0.5)]
        self.expire(session, turn)
        self.check(session, moved=False)

    # ── again ──

    @rule(place=places)
    @precondition(lambda self: self.kept)
    def send_again_under_its_key(self, place: float) -> None:
        path, key, body, answer = self.kept[int(place * (len(self.kept) - 1) + 0.5)]
        again = self.call("POST", path, body, key)
        assert fine(again) == answer
        assert again.headers["idempotent-replayed"] == "true"
        for session in self.sessions:
            self.check(session, moved=False)

    @rule(place=places, other=st.booleans())
    @precondition(lambda self: self.known)
    def send_a_message_id_again(self, place: float, other: bool) -> None:
        path, message_id, message, answer = self.known[int(place * (len(self.known) - 1) + 0.5)]
        body = message.body(message_id) | ({"content": "another body"} if other else {})
        again = self.told(self.call("POST", path, body), "message_exists" if other else None)
        if not other:
            assert {**again, "superseded_at": None} == answer
        for session in self.sessions:
            self.check(session, moved=False)


@pytest.fixture
def reach(session_service: ServiceProcess, database_url: str) -> Iterator[Reach]:
    with (
        asyncio.Runner() as runner,
        httpx.Client(base_url=f"{session_service.url}/api/v1", timeout=30, trust_env=False) as http,
    ):
        db = runner.run(asyncpg.connect(database_url))
        yield Reach(http, runner, db)
        runner.run(db.close())


def test_random_histories(reach: Reach) -> None:
    Sessions.reach = reach
    run_state_machine_as_test(
        Sessions,
        settings=settings(
            max_examples=20,
            stateful_step_count=30,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
            # Shrinking would take minutes over HTTP; add Phase.shrink to look into a failure.
            phases=[Phase.generate],
        ),
    )
    # What is made beside the request path agrees in the end: the sums over each user's sessions.
    deadline = time.monotonic() + 10
    users = list(reach.expected)
    behind = "SELECT count(*) FROM dev.sessions WHERE user_id = ANY($1) AND indexed_version < version"
    while reach.sql(behind, users)[0][0]:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    sums = "SELECT user_id, sessions, active, messages, tokens, cost FROM dev.session_totals WHERE user_id = ANY($1)"
    found = {row[0]: (*row[1:5], float(row[5])) for row in map(tuple, reach.sql(sums, users))}
    assert found == reach.expected


# ── histories that chance seldom hits upon ──────────────────────────────────────────────────────


async def test_an_answer_to_a_question_that_a_resume_kept(user: User, db: Db) -> None:
    """What was paid for is kept until another turn has taken over."""
    chat = await user.chat()
    first, second = [await _left_by_its_holder(user, db, chat, "resume") for _ in range(2)]
    done = await second.complete(said("late", "assistant"))
    assert (done["turn"]["status"], done["session"]["status"]) == ("completed", "active")
    assert await chat.contents() == ["q", "q", "late"]
    refused(await first.finish(said("later", "assistant")), 409, "lease_lost")
    await check_counters(db, chat)


async def _left_by_its_holder(user: User, db: Db, chat: Chat, if_exists: str) -> calls.Turn:
    turn = await chat.open(said("q"))
    await wait(db, chat, 601)
    fine(await chat.end())
    await user.create(session_id=chat.id, if_exists=if_exists)
    return turn


async def test_an_answer_to_an_earlier_generation(user: User, db: Db) -> None:
    chat = await user.chat()
    turn = await _left_by_its_holder(user, db, chat, "restart")
    before = await check_counters(db, chat)
    refused(await turn.finish(said("late", "assistant")), 409, "lease_lost")
    assert await check_counters(db, chat) == before


async def test_a_late_refusal_takes_back_its_own_question_only(user: User, db: Db) -> None:
    chat = await user.chat()
    turn = await chat.open(said("bad"), said("question"))
    await wait(db, chat, 601)
    await chat.append("meanwhile")
    await turn.complete(status="refused")
    assert await chat.contents() == ["meanwhile"]
    await check_counters(db, chat)
