"""/sessions/stats: totals and usage over time. Declared before /sessions/{session_id}, whose ids exclude `stats`."""

from contextlib import suppress
from datetime import MAXYEAR, MINYEAR, UTC, datetime, timedelta
from typing import Annotated

from fastapi import APIRouter, Query, Response

from services.session_service import stats
from services.session_service.counting import start_of
from services.session_service.routes.parameters import AppState, Db, UserIdInPath, errors
from shared import values, wire
from shared.door import answer
from shared.errors import ValidationFailed
from shared.strict_route import StrictRoute

router = APIRouter(route_class=StrictRoute, tags=["stats"], prefix="/api/v1")

_DEFAULT_SPAN = {"hour": timedelta(days=1), "day": timedelta(days=30), "month": timedelta(days=365)}


@router.get("/sessions/stats", response_model=wire.Stats, responses=errors())
async def get_stats(_db: Db, state: AppState) -> Response:
    """Totals of all users, at most five seconds old."""
    return answer(await state.stats.get())


@router.get("/users/{user_id}/stats", response_model=wire.Stats, responses=errors())
async def get_stats_of_user(user_id: UserIdInPath, db: Db) -> Response:
    return answer(await stats.totals(db, user_id))


@router.get("/sessions/stats/usage", response_model=wire.Usage, responses=errors())
async def get_usage(
    db: Db,
    bucket: Annotated[stats.Bucket, Query()] = "day",
    since: Annotated[
        datetime | None,
        Query(
            alias="from",
            description="Included; RFC 3339; default: a day, 30 days or a year back, from the start of a bucket",
        ),
    ] = None,
    until: Annotated[datetime | None, Query(alias="to", description="Excluded; default: now")] = None,
    user_id: Annotated[values.UserId | None, Query()] = None,
) -> Response:
    """Visible messages, tokens and cost by UTC hour, day or month; empty buckets included."""
    now = datetime.now(UTC)
    until = _utc("to", until or now)
    since = _utc("from", since or start_of(bucket, _before(until, _DEFAULT_SPAN[bucket])))
    if since >= until:
        raise ValidationFailed.at("query", "to", msg="Not later than from")
    return answer(await stats.usage(db, bucket, since, until, user_id, now=now))


def _utc(name: str, moment: datetime) -> datetime:
    """A time without an offset is UTC; the calendar's ends mean "infinity" to the database driver."""
    with suppress(OverflowError):
        moment = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
        if MINYEAR < moment.year < MAXYEAR:
            return moment
    raise ValidationFailed.at("query", name, msg="Out of the calendar's range")


def _before(moment: datetime, span: timedelta) -> datetime:
    try:
        return moment - span
    except OverflowError:
        raise ValidationFailed.at("query", "to", msg="Out of the calendar's range") from None
