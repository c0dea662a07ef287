"""An account that fails: what becomes of it, of the request, and of the client that waits."""

import asyncio
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import asyncpg
import httpx
import pytest
import pytest_asyncio

from tests.processes import free_port
from tests.relay.calls import Json, error_of, events_of, streamed_text
from tests.relay.stage import ALONE, KIRO, Operator, Stage, staged
from tests.upstream.client import TestUpstream

DISABLED = {"type": "error", "error": {"type": "permission_error", "message": "This organization has been disabled."}}
OVERLOADED = {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}
LIMITED = {"type": "error", "error": {"type": "rate_limit_error", "message": "Slow down"}}


@pytest_asyncio.fixture(loop_scope="session")
async def stage(hasty: Operator, upstream: TestUpstream) -> AsyncIterator[Stage]:
    async with staged(hasty, upstream) as stage:
        yield stage


def in_seconds(seconds: float) -> datetime:
    return datetime.now(UTC) + timedelta(seconds=seconds)


def reset_headers(**seconds: tuple[float, str]) -> dict[str, str]:
    """anthropic-ratelimit-*: when each limit is whole again, and how much is left of it."""
    headers = {}
    for name, (after, left) in seconds.items():
        limit = f"anthropic-ratelimit-{name.replace('_', '-')}"
        headers[f"{limit}-reset"] = in_seconds(after).isoformat().replace("+00:00", "Z")
        headers[f"{limit}-remaining"] = left
    return headers


def limited(headers: dict[str, str] | None = None) -> Json:
    return {"status": 429, "headers": headers or {}}


# ── each kind of failure ────────────────────────────────────────────────────────────────────────

KINDS: dict[str, tuple[Any, str, float, float]] = {
    # what upstream does, the reason, and the least and most seconds of the rest
    "403": ({"status": 403}, "forbidden", 1790, 1800),
    "401": ({"status": 401}, "forbidden", 1790, 1800),
    "402": ({"status": 402}, "forbidden", 1790, 1800),
    "429 seconds": (lambda: limited({"retry-after": "120"}), "rate_limited", 110, 120),
    "429 date": (
        lambda: limited({"retry-after": format_datetime(in_seconds(120), usegmt=True)}),
        "rate_limited",
        105,
        120,
    ),
    "429 reset": (lambda: limited(reset_headers(requests=(120, "0"))), "rate_limited", 110, 120),
    "429 the spent limit's reset": (
        lambda: limited(reset_headers(requests=(20, "7"), input_tokens=(120, "0"), output_tokens=(900, "5"))),
        *("rate_limited", 110, 120),
    ),
    "429 retry-after over reset": (
        lambda: limited({"retry-after": "120"} | reset_headers(requests=(900, "0"))),
        *("rate_limited", 110, 120),
    ),
    "429 nothing": (limited, "rate_limited", 50, 60),
    "429 nonsense": (lambda: limited({"retry-after": "soon"}), "rate_limited", 50, 60),
    "429 too long": (lambda: limited({"retry-after": "99999999"}), "rate_limited", 1790, 1800),
    "500": ({"status": 500}, "failing", 0.4, 0.5),
    "502": ({"status": 502, "body": "<html>"}, "failing", 0.4, 0.5),
    "503": ({"status": 503}, "failing", 0.4, 0.5),
    "503 with its wish": ({"status": 503, "headers": {"retry-after": "120"}}, "failing", 110, 120),
    "504": ({"status": 504}, "failing", 0.4, 0.5),
    "529": ({"status": 529}, "failing", 0.4, 0.5),
    "closed": ({"close": True}, "failing", 0.4, 0.5),
    "not HTTP": ({"garbage": "SSH-2.0-nothing\r\n"}, "failing", 0.4, 0.5),
    "not JSON": ({"body": "not JSON"}, "failing", 0.4, 0.5),
    "redirect": ({"redirect": "http://127.0.0.1:1/"}, "failing", 0.4, 0.5),
    "timeout": ({"hang_seconds": 30}, "failing", 0.4, 0.5),
}


@pytest.mark.parametrize("kind", KINDS)
async def test_another_account_serves(stage: Stage, sql: asyncpg.Connection, kind: str) -> None:
    """The client hears nothing of the failure; the account rests for as long as it is to."""
    step, reason, least, most = KINDS[kind]
    await stage.add("bad")
    await stage.add("good", priority=1)
    stage.script("bad", step() if callable(step) else step)
    answer = await stage.ask()
    assert answer.status_code == 200
    assert answer.json()["content"][0]["text"].startswith("You said: Hello")
    assert answer.headers["x-relay-attempts"] == "2"
    assert "x-should-retry" not in answer.headers
    assert not [name for name in answer.headers if "ratelimit" in name or name == "retry-after"]
    failed, _ = stage.entries()
    assert stage.asked() == ["bad", "good"]
    told = await stage.get("bad")
    assert (told["enabled"], told["failures"], told["requests"]) == (True, 1, 1)
    row = await sql.fetchrow(
        "SELECT cooldown_until, cooldown_reason FROM relay_accounts WHERE id = $1", stage.id("bad")
    )
    assert row is not None
    assert row["cooldown_reason"] == reason
    rest = row["cooldown_until"].timestamp() - (failed["ended_at"] or time.time())
    assert least < rest <= most + 5
    if least > 1:
        assert (told["state"], told["ineligible_reason"]) == ("cooling", reason)
        assert least - 5 < told["ineligible_seconds"] <= most
        assert await stage.is_served()
        assert stage.asked() == ["bad", "good", "good"]
    assert "scripted" not in told["last_error"]
    if "status" in failed and failed["status"] not in {None, 200, 307}:
        assert str(failed["status"]) in told["last_error"]
    good = await stage.get("good")
    assert (good["failures"], good["state"], good["last_error"]) == (0, "active", None)


@pytest.mark.parametrize("status", [401, 402, 403])
@pytest.mark.parametrize(
    "words",
    [
        "This organization has been disabled.",
        "Your account was suspended due to a violation",
        "该账号已被禁用",
    ],
)
async def test_a_disabled_account_stays_so_until_it_is_enabled(stage: Stage, status: int, words: str) -> None:
    """By upstream's own words; they are not told to anyone."""
    await stage.add("bad")
    await stage.add("good", priority=1)
    stage.script("bad", {"status": status, "body": {"type": "error", "error": {"type": "x", "message": words}}})
    assert await stage.is_served()
    assert stage.asked() == ["bad", "good"]
    told = await stage.get("bad")
    assert (told["enabled"], told["state"], told["cooldown_until"]) == (False, "disabled", None)
    assert (told["ineligible_reason"], told["ineligible_seconds"]) == ("disabled", None)
    assert str(status) in told["disabled_reason"] == told["last_error"]
    assert words not in str(told)
    await stage.post("good", "disable")
    answer = await stage.ask(path=KIRO)
    assert answer.status_code == 403
    assert answer.json() == {"type": "error", "error": {"type": "forbidden", "message": "账号已被禁用"}}
    assert (await stage.post("bad", "enable"))["state"] == "active"
    assert await stage.is_served()
    assert stage.asked() == ["bad", "good", "bad"]


async def test_an_account_that_cannot_be_reached(stage: Stage) -> None:
    await stage.add("bad", base_url=f"http://127.0.0.1:{free_port()}")
    await stage.add("good", priority=1)
    answer = await stage.ask()
    assert (answer.status_code, answer.headers["x-relay-attempts"]) == (200, "2")
    told = await stage.get("bad")
    assert (told["failures"], told["failures_in_row"]) == (1, 1)
    assert told["last_error"].startswith("connect")


async def test_an_error_whose_body_does_not_come_whole(stage: Stage, sql: asyncpg.Connection) -> None:
    """The status has said enough."""
    head = "HTTP/1.1 429 Too Many\r\nretry-after: 120\r\ncontent-length: 100\r\n\r\n{"
    await stage.add("bad")
    await stage.add("good", priority=1)
    stage.script("bad", {"garbage": head})
    assert await stage.is_served()
    told = await stage.get("bad")
    assert told["ineligible_reason"] == "rate_limited"
    assert 100 < told["ineligible_seconds"] <= 120


# ── streams ─────────────────────────────────────────────────────────────────────────────────────

EARLY: dict[str, Json] = {
    "429": limited(),
    "cut": {"cut_after_events": 1},
    "reset": {"cut_after_events": 1, "cut": "reset"},
    "ends as if whole": {"cut_after_events": 1, "cut": "end"},
    "error event": {"error_event": OVERLOADED, "after_events": 1},
    "limit event": {"error_event": LIMITED, "after_events": 0},
    "broken event": {"malformed_event": True, "after_events": 1},
    "no events": {"raw_events": []},
    "empty": {"body": ""},
    "timeout": {"hang_seconds": 30, "after_events": 1},
}


@pytest.mark.parametrize("kind", EARLY)
async def test_a_stream_that_fails_before_its_commit_point(stage: Stage, kind: str) -> None:
    """The client gets the other account's stream, whole, and not a byte of the first."""
    await stage.add("bad")
    await stage.add("good", priority=1)
    stage.script("bad", {"text": "from the bad one", **EARLY[kind]})
    stage.script("good", {"text": "from the good one"})
    answer = await stage.ask(stream=True)
    assert answer.status_code == 200
    assert stage.asked() == ["bad", "good"]
    names = [name for name, _ in events_of(answer.content) if name != "ping"]
    assert (names[0], names[-1], names.count("message_start")) == ("message_start", "message_stop", 1)
    assert "error" not in names
    assert streamed_text(answer.content) == "from the good one"
    if kind != "timeout":  # that one's head was out before
        assert answer.headers["x-relay-attempts"] == "2"
    told = await stage.get("bad")
    assert told["failures"] == 1
    assert told["last_error"]
    assert told["failures_in_row"] == (0 if kind in {"429", "limit event"} else 1)


LATE: dict[str, Json] = {
    "cut": {"cut_after_events": 6},
    "reset": {"cut_after_events": 6, "cut": "reset"},
    "error event": {"error_event": OVERLOADED, "after_events": 6},
    "disabled event": {"error_event": DISABLED, "after_events": 6},
    "broken event": {"malformed_event": True, "after_events": 6},
    "timeout": {"hang_seconds": 30, "after_events": 6},
}


@pytest.mark.parametrize("kind", LATE)
async def test_nothing_is_tried_twice_after_the_commit_point(stage: Stage, kind: str) -> None:
    """The stream ends with one error; the account goes on being used."""
    await stage.add("bad")
    await stage.add("good", priority=1)
    stage.script("bad", {"text": "word " * 20, **LATE[kind]})
    answer = await stage.ask(stream=True)
    assert answer.status_code == 200
    assert answer.headers["x-relay-attempts"] == "1"
    names = [name for name, _ in events_of(answer.content)]
    assert (names[-1], names.count("error")) == ("error", 1)
    assert "organization" not in answer.text
    assert stage.asked() == ["bad"]
    told = await stage.get("bad")
    assert (told["failures"], told["state"], told["enabled"]) == (1, "active", True)
    assert await stage.is_served()
    assert stage.asked() == ["bad", "bad"]


async def test_a_plain_answer_that_breaks_is_asked_for_again(stage: Stage) -> None:
    """Nothing of it has been passed on."""
    await stage.add("bad")
    await stage.add("good", priority=1)
    stage.script("bad", {"text": "x" * 1000, "cut_after_bytes": 500})
    assert await stage.is_served()
    assert stage.asked() == ["bad", "good"]


async def test_after_a_first_ping_other_accounts_are_still_tried(stage: Stage) -> None:
    """The 200 is out, so the rest is told in the stream: the other's answer, or one error."""
    await stage.add("slow")
    await stage.add("good", priority=1)
    stage.script("slow", {"delay_ms": 800, "status": 500})
    answer = await stage.ask(stream=True)
    names = [name for name, _ in events_of(answer.content)]
    assert (answer.status_code, names[0], names[-1]) == (200, "ping", "message_stop")
    assert stage.asked() == ["slow", "good"]
    await stage.post("slow", "enable")
    stage.script("slow", {"delay_ms": 800, "status": 500})
    stage.script("good", {"status": 500})
    answer = await stage.ask(stream=True)
    events = events_of(answer.content)
    assert (answer.status_code, [name for name, _ in events]) == (200, ["ping", "error"])
    assert events[-1][1]["error"]["type"] == "overloaded_error"


# ── what is the client's ────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("status", [400, 404, 413, 422])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_refusal_of_the_clients_request(stage: Stage, status: int, stream: bool) -> None:
    """Passed on as it is, no other account asked, this one not blamed."""
    await stage.add("a")
    await stage.add("b", priority=1)
    exact = ' {"error":{"message":"This organization has been disabled."}, "type":"error"}'
    stage.script("a", {"status": status, "body": exact, "headers": {"retry-after": "5"}})
    answer = await stage.ask(stream=stream)
    assert (answer.status_code, answer.content) == (status, exact.encode())
    assert answer.headers["x-relay-attempts"] == "1"
    assert "x-should-retry" not in answer.headers
    assert stage.asked() == ["a"]
    told = await stage.get("a")
    assert (told["state"], told["failures"], told["failures_in_row"], told["last_error"]) == ("active", 0, 0, None)


# ── attempts used up ────────────────────────────────────────────────────────────────────────────

HANG: Json = {"hang_seconds": 30}
USED_UP: dict[str, tuple[list[Json], int, str, tuple[int, str] | None]] = {
    "5xx": ([{"status": 500}, {"status": 502}, {"status": 529}], 529, "overloaded_error", None),
    "timeouts": ([HANG, HANG, HANG], 504, "timeout_error", None),
    "5xx and a timeout": ([{"status": 500}, HANG, {"close": True}], 529, "overloaded_error", None),
    "403s": ([{"status": 403}, {"status": 401}, {"status": 402}], 529, "overloaded_error", (403, "forbidden")),
    "disabled": ([{"status": 403, "body": DISABLED}] * 2, 529, "overloaded_error", (403, "forbidden")),
    "429s": (
        [limited({"retry-after": "90"}), limited({"retry-after": "40"})],
        429,
        "rate_limit_error",
        (429, "rate_limit"),
    ),
    "403 and 429": ([{"status": 403}, limited({"retry-after": "40"})], 429, "rate_limit_error", (429, "rate_limit")),
    "429 and disabled": (
        [limited({"retry-after": "40"}), {"status": 403, "body": DISABLED}],
        *(429, "rate_limit_error", (429, "rate_limit")),
    ),
    "429 and 5xx": ([limited(), {"status": 500}], 529, "overloaded_error", None),
    "403 and 5xx": ([{"status": 403}, {"close": True}], 529, "overloaded_error", None),
}


@pytest.mark.parametrize("kind", USED_UP)
async def test_attempts_used_up(stage: Stage, kind: str) -> None:
    """What the client hears by the causes of all, in Claude's words and on the seed's path in the seed's."""
    steps, status, error_type, kiro = USED_UP[kind]
    names = [f"a{number}" for number in range(len(steps))]
    paths = ["/v1/messages", KIRO] if kiro else ["/v1/messages"]
    for number, name in enumerate(names):
        await stage.add(name, priority=number)
    for path in paths:
        for name, step in zip(names, steps, strict=True):
            await stage.post(name, "enable")
            stage.script(name, step)
        answer = await stage.ask(path=path)
        if path == KIRO:
            assert kiro is not None
            assert (answer.status_code, answer.json()["error"]["type"]) == kiro
        else:
            message = error_of(answer, status, error_type)
            assert "scripted" not in message
            assert "organization" not in message
        assert answer.headers["x-relay-attempts"] == str(len(steps))
        assert answer.headers["x-should-retry"] == "false"
        if status == 429:
            assert 30 < int(answer.headers["retry-after"]) <= 40
    assert stage.asked() == names * len(paths)


async def test_no_more_than_the_attempts_there_are(stage: Stage) -> None:
    """RELAY_MAX_ATTEMPTS: a fourth account is not asked, though it would answer; each is asked once."""
    for number in range(4):
        await stage.add(f"a{number}", priority=number)
    for number in range(3):
        stage.script(f"a{number}", {"status": 500})
    answer = await stage.ask()
    error_of(answer, 529, "overloaded_error")
    assert (answer.headers["x-relay-attempts"], answer.headers["x-should-retry"]) == ("3", "false")
    assert stage.asked() == ["a0", "a1", "a2"]


async def test_counting_tokens_fails_over_too(stage: Stage) -> None:
    """With the same errors when nobody can count."""
    await stage.add("bad")
    await stage.add("good", priority=1)
    path = "/v1/messages/count_tokens"
    match = {"api_key": stage.key("bad"), "path": path}
    stage.upstream.script({"match": match, "status": 403})
    answer = await stage.operator.http.post(path, json=stage.request())
    assert (answer.status_code, stage.asked()) == (200, ["bad", "good"])
    await stage.post("bad", "enable")
    await stage.post("good", "disable")
    stage.upstream.script({"match": match, "status": 403})
    answer = await stage.operator.http.post(path, json=stage.request())
    error_of(answer, 529, "overloaded_error")
    assert answer.headers["x-should-retry"] == "false"


async def test_the_total_deadline(stage: Stage) -> None:
    """RELAY_DEADLINE_SECONDS: an account that never falls silent and never answers; no other is blamed for it."""
    await stage.add("endless")
    await stage.add("good", priority=1)
    pings = [{"after_events": 1, "raw": "event: ping\ndata: {}\n\n"}] * 40
    stage.script("endless", {"event_delay_ms": 300, "insert": pings})
    started = time.monotonic()
    answer = await stage.ask(stream=True)
    assert 2 < time.monotonic() - started < 8
    events = events_of(answer.content)
    assert events[-1][0] == "error"
    assert events[-1][1]["error"]["type"] == "timeout_error"
    assert stage.asked() == ["endless"]
    good = await stage.get("good")
    assert (good["requests"], good["failures"], good["failures_in_row"], good["last_error"]) == (0, 0, 0, None)
    assert (await stage.get("endless"))["failures"] == 1
    await stage.upstream.until(lambda state: state["running"] == 0, seconds=1)


async def test_the_deadline_is_for_the_answers_beginning(stage: Stage) -> None:
    """A stream that has begun takes as long as it takes."""
    await stage.add("a")
    stage.script("a", {"text": "x" * 48, "delta_characters": 3, "event_delay_ms": 200})
    started = time.monotonic()
    answer = await stage.ask(stream=True)
    assert time.monotonic() - started > 3
    assert events_of(answer.content)[-1][0] == "message_stop"


# ── resting ─────────────────────────────────────────────────────────────────────────────────────


async def test_a_later_answer_never_shortens_a_rest(stage: Stage) -> None:
    """Of three requests under way, the second's short wish and the third's failure change nothing."""
    await stage.add("a")
    stage.script(
        "a",
        {"delay_ms": 100, **limited({"retry-after": "900"})},
        {"delay_ms": 300, **limited({"retry-after": "5"})},
        {"delay_ms": 500, "status": 500},
    )
    answers = await asyncio.gather(*(stage.ask() for _ in range(3)))
    assert [each.status_code for each in answers].count(429) >= 2
    assert len(stage.asked()) == 3
    told = await stage.get("a")
    assert told["ineligible_reason"] == "rate_limited"
    assert 850 < told["ineligible_seconds"] <= 900
    assert told["failures"] == 3


async def test_a_short_rest_grows_with_failures_in_a_row(stage: Stage, sql: asyncpg.Connection) -> None:
    """0.5 s, 1 s, 2 s …; a success begins anew."""

    async def fail() -> float:
        await sql.execute("UPDATE relay_accounts SET cooldown_until = NULL WHERE id = $1", stage.id("a"))
        while (await stage.get("a"))["ineligible_reason"] is not None:
            await asyncio.sleep(0.02)
        stage.script("a", {"status": 500})
        answer = await stage.ask()
        error_of(answer, 529, "overloaded_error")
        await stage.get("a")
        until = await sql.fetchval("SELECT cooldown_until FROM relay_accounts WHERE id = $1", stage.id("a"))
        return float(until.timestamp() - stage.entries()[-1]["ended_at"])

    await stage.add("a")
    rests = [await fail() for _ in range(4)]
    assert all(seconds < rest for seconds, rest in zip((0.45, 0.95, 1.95, 3.95), rests, strict=True))
    assert rests[0] < 0.95
    assert rests == sorted(rests)
    await stage.post("a", "enable")
    assert await fail() < 0.95
    told = await stage.get("a")
    assert (told["failures"], told["failures_in_row"]) == (5, 1)


async def test_a_success_ends_a_row_of_failures(stage: Stage) -> None:
    await stage.add("a")
    stage.script("a", {"status": 500})
    assert not await stage.is_served()
    while not await stage.is_served():
        await asyncio.sleep(0.05)
    told = await stage.get("a")
    assert (told["failures_in_row"], told["failures"], told["state"]) == (0, 1, "active")
    assert "500" in told["last_error"]


# ── clients that hang up ────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", ["plain", "stream", "count"])
async def test_a_client_that_hangs_up_frees_slot_and_connection(
    stage: Stage, sql: asyncpg.Connection, kind: str
) -> None:
    """Within a second; the account is not blamed, and its only slot is there for the next."""
    await stage.add("a", max_concurrency=1)
    path = "/v1/messages/count_tokens" if kind == "count" else "/v1/messages"
    body = stage.request(stream=kind == "stream")
    step = {"hang_seconds": 30, "match": {"api_key": stage.key("a"), "path": path}}
    stage.script("a", step | ({"after_events": 5} if kind == "stream" else {}))

    async def left() -> None:
        async with stage.operator.http.stream("POST", path, json=body, headers=ALONE) as answer:
            await answer.aread()

    with pytest.raises((asyncio.TimeoutError, httpx.HTTPError)):
        await asyncio.wait_for(left(), 0.4)
    gone_at = time.time()
    await stage.upstream.until(lambda state: state["running"] == 0, seconds=2)
    (entry,) = stage.entries()
    assert entry["outcome"] == "disconnected"
    assert entry["ended_at"] - gone_at < 1
    taken = "SELECT count(*) FROM relay_slots WHERE owner_id = $1 AND expires_at > now()"
    while await sql.fetchval(taken, stage.id("a")):
        assert time.time() - gone_at < 2
        await asyncio.sleep(0.02)
    assert await stage.is_served()
    told = await stage.get("a")
    assert (told["in_flight"], told["state"], told["failures"], told["last_error"]) == (0, "active", 0, None)
