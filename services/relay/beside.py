"""What a relay does beside its requests, from its start to its end.

Its one invariant: when `running` is left, nothing runs any more, and what was on its way to the database is there, if
that can be reached.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial

import structlog
from uuid_utils import uuid7

from services.relay import account_use, development, first_accounts, keys, runs, slots, start_tasks, upkeep
from services.relay.changes import Changes
from services.relay.key_limits import GIVE_BACK_SECONDS, RENEW_SECONDS
from services.relay.state import State
from services.relay.upkeep import Chore
from shared.discovery import Consul, Watch
from shared.errors import Unavailable

log = structlog.get_logger(__name__)

_RETRY_SECONDS = 1.0
_USE_SECONDS = 1.0
_NOTES_SECONDS = 0.2
_OLD_SECONDS = 60.0
_SETTLE_SECONDS = 2.0
_SESSION_SERVICE = "session_service"


@asynccontextmanager
async def running(state: State) -> AsyncIterator[None]:
    """Opens what the relay works with, keeps it going, and closes it."""
    beside = [
        asyncio.create_task(_open(state)),
        asyncio.create_task(state.spool.keep_delivering()),
        asyncio.create_task(state.session_limit.keep_counting()),
        asyncio.create_task(state.key_limits.keep_saving()),
    ]
    if state.settings.consul_host:
        beside.append(asyncio.create_task(_watch(state)))
    try:
        yield
    finally:
        await state.conversing.starts.stop()
        await state.turns.stop()
        await state.conversing.runs.stop()
        await state.summaries.stop()
        for task in beside:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        await state.pool.stop(_SETTLE_SECONDS)
        with suppress(Unavailable):
            await state.key_limits.save()
            await state.account_use.tell()
            await state.affinity.save()
            await state.session_pool.save()
        await state.sessions.close()
        await state.ways.close()
        await state.database.close()


def _chores(state: State) -> list[Chore]:
    return [
        Chore("account_use", _USE_SECONDS, state.account_use.tell),
        Chore("slots", slots.RENEW_SECONDS, state.slots.renew),
        Chore("affinities", _USE_SECONDS, state.affinity.save),
        Chore("session_pool", _USE_SECONDS, state.session_pool.save),
        Chore("old_affinities", _OLD_SECONDS, state.affinity.forget),
        Chore("key_reservations", RENEW_SECONDS, state.key_limits.renew),
        Chore("given_back_reservations", GIVE_BACK_SECONDS, state.key_limits.give_back),
        Chore("idempotency", _OLD_SECONDS, state.idempotency.sweep),
        Chore("gone_relays", _OLD_SECONDS, partial(account_use.keep_gone, state.database)),
    ]


def _conversation_chores(state: State) -> list[Chore]:
    return [
        Chore("conversations_watched", _USE_SECONDS, state.conversing.live.look),
        Chore("start_tasks", start_tasks.RENEW_SECONDS, state.conversing.starts.renew),
        Chore("stranded_runs", runs.SWEEP_SECONDS, state.conversing.runs.sweep),
    ]


async def _open(state: State) -> None:
    """Makes the app ready once Postgres answers and the tables are there; until then requests are sent away.

    After that it keeps the tables and what is known of them together, for ever.
    """
    while not state.is_ready:
        try:
            if not state.database.is_open:
                await state.database.open()
            if await first_accounts.tables_exist(state.database, state.database.schema):
                if state.secrets.api_key is not None:
                    owner = {"user_id": development.USER_ID, "name": "development"}
                    await keys.add(state.database, str(uuid7()), state.secrets.pepper, state.secrets.api_key, owner)
                await first_accounts.make(state.database, state.settings, state.sealer)
                await state.pool.refresh()
                await state.session_pool.refresh()
                state.is_ready = True
                log.info("ready", schema=state.database.schema)
                break
            log.warning("schema_missing", schema=state.database.schema, hint="run the migrations")
        except Unavailable:
            log.warning("database_unreachable")
        await asyncio.sleep(_RETRY_SECONDS)
    url = state.settings.listen_database_url.get_secret_value() or state.database.url
    readers = {
        "relay_accounts": state.pool.refresh,
        "relay_api_keys": state.callers.forget,
        "relay_session_pool": state.session_pool.refresh,
        "relay_session_pool_current": state.session_pool.refresh,
    }
    changes = Changes(url, state.database.schema, readers, state.conversing.live)
    # It calls session_service, which may take its time: by itself.
    notes = [
        Chore("conversation_notes", _NOTES_SECONDS, state.conversing.log.take_notes),
        Chore("waiting_messages", runs.SWEEP_SECONDS, state.conversing.log.note_waiting),
    ]
    chores = [_chores(state), _conversation_chores(state), notes]
    await asyncio.gather(changes.run(), *map(upkeep.keep, chores))


async def _watch(state: State) -> None:
    """Keeps the instances of session_service as Consul knows them."""
    settings = state.settings
    token = settings.consul_token.get_secret_value() or None
    agent = Consul(settings.consul_host, settings.consul_port, token=token)
    try:
        await Watch(agent, _SESSION_SERVICE, state.instances).run()
    finally:
        await agent.close()
