"""Figures: totals of all users and of one, and usage over time."""

from datetime import UTC, datetime, timedelta

from services.session_service import stats
from tests.session_service.calls import Chat, Db, Json, User, fine, said

NOTHING: Json = {
    "total_sessions": 0,
    "active_sessions": 0,
    "total_messages": 0,
    "total_tokens": 0,
    "total_cost": 0.0,
    "average_messages_per_session": 0.0,
}


async def test_nobodys_stats(user: User) -> None:
    assert await user.stats() == NOTHING


async def test_a_users_stats_are_exact_and_of_visible_messages(user: User) -> None:
    chats = [await user.chat() for _ in range(3)]
    for number, chat in enumerate(chats):
        for _ in range(number + 1):
            await chat.append("x", tokens_used=10, cost_usd=0.1)
    await (await user.other().chat()).append("of another", tokens_used=99)
    assert await user.stats() == {
        "total_sessions": 3,
        "active_sessions": 3,
        "total_messages": 6,
        "total_tokens": 60,
        "total_cost": 0.6,
        "average_messages_per_session": 2.0,
    }
    fine(await chats[0].end())
    fine(await chats[1].put(status="completed"))
    await (await chats[2].open(said("y", tokens_used=5), rewind_to_seq=1)).complete()
    assert await user.stats() == {
        "total_sessions": 3,
        "active_sessions": 1,
        "total_messages": 5,
        "total_tokens": 45,
        "total_cost": 0.4,
        "average_messages_per_session": 1.7,
    }


async def usage(user: User, **params: str) -> list[Json]:
    answer = fine(await user.http.get("/sessions/stats/usage", params=user.params | params))
    assert list(answer) == ["bucket", "items"]
    assert answer["bucket"] == params.get("bucket", "day")
    items: list[Json] = answer["items"]
    for item in items:
        assert list(item) == ["start", "messages", "tokens", "cost", "active_sessions"]
    return items


async def at(db: Db, chat: Chat, *moments: str) -> None:
    """Appends messages, and says that they were made at these moments."""
    for moment in moments:
        message = await chat.append("x", tokens_used=3, cost_usd=0.5)
        await db.execute(
            "UPDATE dev.session_messages SET created_at = $3 WHERE user_id = $1 AND message_id = $2",
            chat.user.id,
            message["message_id"],
            datetime.fromisoformat(moment),
        )


def figures(items: list[Json]) -> list[tuple[str, int, int, float, int]]:
    return [(each["start"], each["messages"], each["tokens"], each["cost"], each["active_sessions"]) for each in items]


async def test_usage_by_day(user: User, db: Db) -> None:
    one, two = await user.chat(), await user.chat()
    await at(db, one, "2025-03-01T00:00:00Z", "2025-03-01T23:59:59.999999Z", "2025-03-03T12:00:00Z")
    await at(db, two, "2025-03-01T12:00:00+14:00", "2025-03-03T12:00:00Z", "2025-03-04T00:00:00Z")
    items = await usage(user, **{"from": "2025-03-01T00:00:00Z", "to": "2025-03-04T00:00:00Z"})
    assert figures(items) == [
        ("2025-03-01T00:00:00.000000Z", 2, 6, 1.0, 1),
        ("2025-03-02T00:00:00.000000Z", 0, 0, 0.0, 0),
        ("2025-03-03T00:00:00.000000Z", 2, 6, 1.0, 2),
    ]
    items = await usage(user, **{"from": "2025-03-01T00:00:00.000001Z", "to": "2025-03-04T00:00:00.000001Z"})
    assert [(item["start"][:10], item["messages"]) for item in items] == [
        ("2025-03-01", 1),
        ("2025-03-02", 0),
        ("2025-03-03", 2),
        ("2025-03-04", 1),
    ]


async def test_usage_by_hour_and_month(user: User, db: Db) -> None:
    chat = await user.chat()
    await at(db, chat, "2024-02-29T22:59:59Z", "2024-02-29T23:00:00Z", "2024-03-01T00:00:00Z")
    items = await usage(user, bucket="hour", **{"from": "2024-02-29T22:30:00Z", "to": "2024-03-01T01:00:00Z"})
    assert [(item["start"], item["messages"]) for item in items] == [
        ("2024-02-29T22:00:00.000000Z", 1),
        ("2024-02-29T23:00:00.000000Z", 1),
        ("2024-03-01T00:00:00.000000Z", 1),
    ]
    items = await usage(user, bucket="month", **{"from": "2024-01-31T00:00:00Z", "to": "2024-04-01T00:00:00Z"})
    assert [(item["start"], item["messages"]) for item in items] == [
        ("2024-01-01T00:00:00.000000Z", 0),
        ("2024-02-01T00:00:00.000000Z", 2),
        ("2024-03-01T00:00:00.000000Z", 1),
    ]
    offset = await usage(
        user, bucket="hour", **{"from": "2024-03-01T00:00:00+01:00", "to": "2024-03-01T01:00:00+01:00"}
    )
    assert [(item["start"], item["messages"]) for item in offset] == [("2024-02-29T23:00:00.000000Z", 1)]


async def test_usage_by_default_and_without_superseded_messages(user: User) -> None:
    chat = await user.chat()
    await chat.append("x", tokens_used=2, cost_usd=0.000001)
    await chat.append("gone", tokens_used=4)
    await (await chat.open(said("y", tokens_used=8), rewind_to_seq=1)).complete()
    for bucket, least in (("hour", 24), ("day", 30), ("month", 12)):
        items = await usage(user, bucket=bucket)
        assert least <= len(items) <= least + 2
        starts = [datetime.fromisoformat(item["start"]) for item in items]
        assert starts == sorted(starts)
        assert starts[-1] <= datetime.now(UTC) < starts[-1] + timedelta(days=32)
        # Near midnight the two may lie in different buckets.
        assert sum(item["messages"] for item in items[-2:]) == 2
        assert sum(item["tokens"] for item in items[-2:]) == 10
        assert sum(item["cost"] for item in items) == 0.000001


async def test_usage_of_all_users_contains_each(user: User, db: Db) -> None:
    other = user.other()
    await at(db, await user.chat(session_id="same"), "2023-05-05T05:05:05Z")
    await at(db, await other.chat(session_id="same"), "2023-05-05T05:05:06Z")
    span = {"from": "2023-05-05T05:05:05Z", "to": "2023-05-05T05:05:07Z", "bucket": "hour"}
    everyone = fine(await user.http.get("/sessions/stats/usage", params=span))["items"]
    assert figures(everyone) == [("2023-05-05T05:00:00.000000Z", 2, 6, 1.0, 2)]
    assert figures(await usage(user, **span)) == [("2023-05-05T05:00:00.000000Z", 1, 3, 0.5, 1)]


def test_only_buckets_asked_for_in_part_are_added_up_again() -> None:
    """A call without `from` and `to` asks for whole ones: the last of them goes on, and has no other part yet."""
    now = datetime(2026, 5, 7, 11, 30, tzinfo=UTC)
    today, noon = datetime(2026, 5, 7, tzinfo=UTC), datetime(2026, 5, 1, 12, tzinfo=UTC)
    first = datetime(2026, 5, 1, tzinfo=UTC)
    hour_ago, tomorrow = datetime(2026, 5, 7, 10, 30, tzinfo=UTC), datetime(2026, 5, 8, tzinfo=UTC)
    assert stats.parts("day", first, now, now) == []
    assert stats.parts("day", first, tomorrow, now) == []
    assert stats.parts("day", first, hour_ago, now) == [(today, hour_ago)]
    assert stats.parts("day", noon, now, now) == [(noon, datetime(2026, 5, 2, tzinfo=UTC))]
    assert stats.parts("day", noon, hour_ago, now) == [(noon, datetime(2026, 5, 2, tzinfo=UTC)), (today, hour_ago)]
