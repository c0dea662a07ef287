"""Conversations of one relay, all parts of them together, and what they look like to their clients.

Its one invariant: whoever is shown a conversation is its user, or has its runtime key.
"""

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final

from services.relay import attachments, conversation_lists, conversations, keys, runtime_keys
from services.relay.conversations import Conversation, SandboxStatus
from services.relay.errors import ConversationArchived, NotPermitted, UnknownKey
from services.relay.event_log import EventLog
from services.relay.keys import ANONYMOUS_ID, Key
from services.relay.live import Live
from services.relay.posting import Posting
from services.relay.runs import Runs
from services.relay.starting import Starts
from shared import wire
from shared.database import Conn, Database
from shared.errors import SessionArchived, SessionNotFound
from shared.session_client import SessionClient

_AT_ONCE: Final = 100
_LIVELINESS: Final[tuple[SandboxStatus, ...]] = ("RUNNING", "STARTING", "PAUSED", "ERROR", "MISSING")
_V0_STATUS: Final = {
    "RUNNING": "RUNNING",
    "STARTING": "STARTING",
    "PAUSED": "STOPPED",
    "ERROR": "ERROR",
    "MISSING": "ARCHIVED",
}


@dataclass(slots=True, eq=False)
class Conversing:
    """What the routes of both APIs work with."""

    database: Database
    sessions: SessionClient
    live: Live
    log: EventLog
    runs: Runs
    posting: Posting
    starts: Starts
    pepper: str
    connections: Counter[str] = field(default_factory=Counter)

    async def by_runtime_key(self, secret: str) -> Conversation | None:
        return await conversations.by_key_hash(self.database, runtime_keys.digest(self.pepper, secret))

    def secret_of(self, conversation: Conversation) -> str:
        return runtime_keys.secret_of(self.pepper, conversation.id, conversation.runtime_nonce)

    async def session_of(self, conversation: Conversation) -> wire.Session | None:
        return (await self.sessions_of([conversation]))[conversation.id]

    async def sessions_of(self, found: Sequence[Conversation]) -> dict[str, wire.Session | None]:
        """The stored sessions of a user's conversations, by these' ids; None for one that was erased."""
        sessions: dict[str, wire.Session] = {}
        for some in (found[start : start + _AT_ONCE] for start in range(0, len(found), _AT_ONCE)):
            ids = [each.session_id for each in some]
            listed = await self.sessions.list_sessions(some[0].user_id, session_id=ids, page_size=_AT_ONCE)
            sessions |= {session.session_id: session for session in listed.sessions}
        return {each.id: sessions.get(each.session_id) for each in found}

    async def there(self, found: Sequence[Conversation]) -> list[Conversation]:
        """Those whose sessions go on; raises ConversationArchived where all were ended or erased."""
        sessions = await self.sessions_of(found)
        there = [each for each in found if sandbox_status(each, sessions[each.id]) != "MISSING"]
        if not there:
            raise ConversationArchived
        return there

    async def remove(self, conversation: Conversation) -> None:
        """Stops it, ends its session, and removes it with its events and files."""
        await self.runs.pause(conversation.id)
        with suppress(SessionNotFound, SessionArchived):
            await self.sessions.end_session(conversation.session)
        await self.database.transact(lambda conn: _delete(conn, conversation))

    # ── shown ───────────────────────────────────────────────────────────────────────────────────

    async def apps(self, user_id: str, found: Sequence[Conversation], base_url: str) -> list[dict[str, Any]]:
        """Conversations as the V1 API shows them."""
        sessions = await self.sessions_of(found)
        children = await conversation_lists.children(self.database, user_id, [each.id for each in found])
        return [self._app(each, sessions[each.id], children[each.id], base_url) for each in found]

    def _app(
        self, each: Conversation, session: wire.Session | None, children: list[str], base_url: str
    ) -> dict[str, Any]:
        status = sandbox_status(each, session)
        is_running = status == "RUNNING"
        return {
            "id": each.id,
            "created_by_user_id": each.user_id,
            "sandbox_id": each.sandbox_id,
            "selected_repository": each.selected_repository,
            "selected_branch": each.selected_branch,
            "git_provider": each.git_provider,
            "title": each.shown_title,
            "trigger": each.trigger,
            "pr_number": each.pr_number,
            "llm_model": each.llm_model,
            "metrics": _metrics(session),
            "parent_conversation_id": each.parent_id,
            "sub_conversation_ids": children,
            "created_at": each.created_at,
            "updated_at": each.updated_at,
            "sandbox_status": status,
            "execution_status": each.execution_status if is_running else None,
            "conversation_url": url_of(base_url, each) if is_running else None,
            "session_api_key": self.secret_of(each) if is_running else None,
            "session_id": each.session_id,
        }

    async def infos(self, user_id: str, found: Sequence[Conversation], base_url: str) -> list[dict[str, Any]]:
        """Conversations as the V0 API shows them."""
        sessions = await self.sessions_of(found)
        children = await conversation_lists.children(self.database, user_id, [each.id for each in found])
        return [self._info(each, sessions[each.id], children[each.id], base_url) for each in found]

    def _info(
        self, each: Conversation, session: wire.Session | None, children: list[str], base_url: str
    ) -> dict[str, Any]:
        status = sandbox_status(each, session)
        is_running = status == "RUNNING"
        runtime_status = "STATUS$ERROR" if each.execution_status in {"error", "stuck"} else "STATUS$READY"
        return {
            "conversation_id": each.id,
            "title": each.shown_title,
            "last_updated_at": each.updated_at,
            "status": v0_status(status),
            "runtime_status": runtime_status if is_running else None,
            "selected_repository": each.selected_repository,
            "selected_branch": each.selected_branch,
            "git_provider": each.git_provider,
            "trigger": each.trigger,
            "num_connections": self.connections[each.id],
            "url": url_of(base_url, each) if is_running else None,
            "session_api_key": self.secret_of(each) if is_running else None,
            "created_at": each.created_at,
            "pr_number": each.pr_number,
            "conversation_version": each.api,
            "sub_conversation_ids": children,
        }

    async def sandboxes(self, found: dict[str, list[Conversation]], base_url: str) -> dict[str, dict[str, Any]]:
        """Sandboxes by their ids as the V1 API shows them; one that several share is what the liveliest of them is."""
        sessions = await self.sessions_of([each for shared in found.values() for each in shared])
        shown = {}
        for sandbox_id, shared in found.items():
            statuses = {each.id: sandbox_status(each, sessions[each.id]) for each in shared}
            liveliest = min(shared, key=lambda each: _LIVELINESS.index(statuses[each.id]))
            is_running = statuses[liveliest.id] == "RUNNING"
            shown[sandbox_id] = {
                "id": sandbox_id,
                "created_by_user_id": liveliest.user_id,
                "sandbox_spec_id": "relay",
                "status": statuses[liveliest.id],
                "session_api_key": self.secret_of(liveliest) if is_running else None,
                "exposed_urls": [{"name": "AGENT_SERVER", "url": base_url}] if is_running else None,
                "created_at": shared[0].created_at,
            }
        return shown


async def _delete(conn: Conn, conversation: Conversation) -> None:
    await attachments.delete_all(conn, conversation.session)
    await conversations.delete(conn, conversation.user_id, conversation.id)


def sandbox_status(conversation: Conversation, session: wire.Session | None) -> SandboxStatus:
    """The stored status; MISSING when the session was ended or erased."""
    if conversation.sandbox_status in {"RUNNING", "PAUSED"} and (session is None or not session.is_active):
        return "MISSING"
    return conversation.sandbox_status


def v0_status(status: SandboxStatus) -> str:
    return _V0_STATUS[status]


def url_of(base_url: str, conversation: Conversation) -> str:
    return f"{base_url}/api/conversations/{conversation.id}"


def _metrics(session: wire.Session | None) -> dict[str, Any] | None:
    if session is None:
        return None
    return {"accumulated_cost": session.total_cost, "accumulated_tokens": session.total_tokens}


async def key_of(database: Database, conversation: Conversation) -> Key:
    """The API key that made the conversation, whose limits its runs count against.

    Raises UnknownKey when it is no longer good, NotPermitted for a model that it may not ask.
    """
    if conversation.key_id == ANONYMOUS_ID:
        return keys.anonymous(ANONYMOUS_ID)
    key = await keys.get(database, conversation.key_id)
    is_over = key.expires_at is not None and key.expires_at <= datetime.now(UTC)
    if not key.is_active or key.deleted_at is not None or is_over:
        raise UnknownKey("The API key that made the conversation is no longer valid")
    if conversation.llm_model and not key.may_ask(conversation.llm_model):
        raise NotPermitted("model: the API key may not ask this one")
    return key
