"""The models that clients may name, as the accounts tell them.

Its one invariant: a model is listed only where an enabled account serves it.
"""

import asyncio
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, Final

import structlog

from services.relay.accounts import DEMO_MODEL
from services.relay.members import Member
from services.relay.pool import Pool
from services.relay.upstream import Upstream, UpstreamError

log = structlog.get_logger(__name__)

_KEPT_SECONDS: Final = 300.0
_AGAIN_SECONDS: Final = 15.0
_LONGEST_SECONDS: Final = 5.0

Model = dict[str, Any]


@dataclass(slots=True)
class _Told:
    upstream: Upstream
    models: list[Model]
    until: float


@dataclass(slots=True)
class Models:
    """The models of a pool's accounts; an account that takes all of them is asked what upstream has."""

    pool: Pool
    _told: dict[str, _Told] = field(default_factory=dict)

    async def all(self) -> list[Model]:
        """In the order of the accounts; upstream's own words of a model where it has any."""
        members = [(member, member.upstream) for member in self.pool.members.values() if member.enabled]
        lists = await asyncio.gather(*(self._of(member, upstream) for member, upstream in members if upstream))
        found: dict[str, Model] = {}
        for models in lists:
            for model in models:
                found.setdefault(model["id"], model)
        return list(found.values())

    async def _of(self, member: Member, upstream: Upstream) -> list[Model]:
        if member.account.provider == "demo":
            return [_named(DEMO_MODEL)]
        if member.account.models:
            return [_named(name) for name in member.account.models]
        told = self._told.get(member.account.id)
        if told is None or told.upstream is not upstream:  # a changed account has another
            told = _Told(upstream, [], 0.0)
        if told.until < monotonic():
            told = self._told[member.account.id] = await self._asked(member.account.id, told)
        return told.models

    async def _asked(self, account_id: str, known: _Told) -> _Told:
        """What upstream says; what was known where it does not answer."""
        upstream = known.upstream
        try:
            async with asyncio.timeout(_LONGEST_SECONDS):
                return _Told(upstream, await upstream.models(), monotonic() + _KEPT_SECONDS)
        except (UpstreamError, TimeoutError) as error:
            log.info("models_not_told", account=account_id, reason=type(error).__name__)
            return _Told(upstream, known.models, monotonic() + _AGAIN_SECONDS)


def _named(name: str) -> Model:
    return {"type": "model", "id": name, "display_name": name, "created_at": "1970-01-01T00:00:00Z"}
