"""Every error of the relay, and the body that tells it in Claude's words.

    ServiceError (shared)
    └── RelayError
        ├── InvalidRequest 400          the client's request, naming the field
        ├── UnknownKey 401
        ├── NotPermitted 403            what the key may not do, or the model that it may not ask
        ├── KeyNotFound 404
        ├── KeyLimitReached 429         one of the key's limits, by its name
        ├── NotAdministrator 401        admin calls without the admin token
        ├── ModelNotServed 404          no account serves the model
        ├── AccountNotFound 404
        ├── AccountExists 409
        ├── SessionNotPooled 404        no session of the session pool has the id
        ├── AttachmentNotFound 404      the session has no file of this path
        ├── FileTooLarge 413            one file is over its limit
        ├── SessionFilesFull 413        the session's files together would be over theirs
        ├── HistoryConflict 409         X-Session-Conflict: reject
        ├── SummaryOutdated 409         what was summarised has been taken back, or summarised by another
        ├── TooManyRequests 429         the relay itself is full
        ├── TooManySessions 429         RELAY_MAX_SESSIONS are active
        ├── NoAccount 529               there is none to try
        ├── Interrupted 529             the relay gave the turn up: it stops, or the client does not read
        └── UpstreamFailed              no account could serve it, or attempts are used up
            ├── UpstreamUnusable 500    the answer is over the limit
            ├── UpstreamTimedOut 504
            ├── UpstreamRateLimited 429
            ├── UpstreamForbidden 529   the operator's account was refused
            └── UpstreamOverloaded 529  5xx, no connection, a broken answer

Its one invariant: no message here holds anything of a key, an account or an upstream's error body.
"""

from typing import Any

from shared.errors import ContextTooSmall, ServiceError, Unavailable

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
    529: "overloaded_error",
}


class RelayError(ServiceError):
    """An error that the relay itself tells its clients."""

    code = "relay_error"


class InvalidRequest(RelayError):
    status = 400
    code = "invalid_request"

    @classmethod
    def at(cls, field: str, problem: str) -> "InvalidRequest":
        return cls(f"{field}: {problem}")


class UnknownKey(RelayError):
    status = 401
    code = "unknown_key"
    default_detail = "Missing, unknown or expired API key (header x-api-key, or Authorization: Bearer)"


class NotPermitted(RelayError):
    status = 403
    code = "not_permitted"
    default_detail = "The API key has no permission for this"


class KeyNotFound(RelayError):
    status = 404
    code = "key_not_found"
    default_detail = "No API key has this id"


class KeyLimitReached(RelayError):
    status = 429
    code = "key_limit_reached"

    @classmethod
    def of(cls, limit: str, *, retry_after_seconds: float) -> "KeyLimitReached":
        return cls(f"The API key has reached its {limit}", retry_after_seconds=retry_after_seconds)


class NotAdministrator(RelayError):
    status = 401
    code = "not_administrator"
    default_detail = "Missing or wrong admin token (Authorization: Bearer)"

    def headers(self) -> dict[str, str]:
        return {"www-authenticate": "Bearer"}


class ModelNotServed(RelayError):
    status = 404
    code = "model_not_served"
    default_detail = "No account serves this model"


class AccountNotFound(RelayError):
    status = 404
    code = "account_not_found"
    default_detail = "No account has this id"


class AccountExists(RelayError):
    status = 409
    code = "account_exists"
    default_detail = "id: another account has it"


class SessionNotPooled(RelayError):
    status = 404
    code = "session_not_pooled"
    default_detail = "No session of the session pool has this id"


class ConversationNotFound(RelayError):
    status = 404
    code = "conversation_not_found"
    default_detail = "Conversation not found"


class SandboxNotFound(RelayError):
    status = 404
    code = "sandbox_not_found"
    default_detail = "Sandbox not found"


class WrongRuntimeKey(RelayError):
    status = 401
    code = "wrong_runtime_key"
    default_detail = "Missing or wrong key of the conversation (X-Session-API-Key)"


class BadConversationId(RelayError):
    """An id in a path that no conversation can have."""

    status = 400
    code = "bad_conversation_id"


class RunInProgress(RelayError):
    status = 409
    code = "run_in_progress"
    default_detail = "The conversation is running already"


class ConversationArchived(RelayError):
    status = 409
    code = "conversation_archived"
    default_detail = "The conversation's session has ended; it can be read, and not go on"


class NoPlace(RelayError):
    status = 429
    code = "no_place"
    default_detail = "As many of your conversations are running as may; pause one, or come back later"


class AttachmentNotFound(RelayError):
    status = 404
    code = "attachment_not_found"
    default_detail = "path: no file of this session has it"


class FileTooLarge(RelayError):
    status = 413
    code = "file_too_large"


class SessionFilesFull(RelayError):
    status = 413
    code = "session_files_full"


class HistoryConflict(RelayError):
    status = 409
    code = "history_conflict"
    default_detail = "The messages depart from the stored conversation (X-Session-Conflict: reject)"

    def headers(self) -> dict[str, str]:
        """The same messages depart from it another time too."""
        return super().headers() | {"x-should-retry": "false"}


class SummaryOutdated(RelayError):
    status = 409
    code = "summary_outdated"
    default_detail = "The session was changed while it was summarised; try again"


class TooManyRequests(RelayError):
    status = 429
    code = "too_many_requests"
    default_detail = "The relay serves as many requests as it can; try again shortly"


class TooManySessions(RelayError):
    status = 429
    code = "too_many_sessions"
    default_detail = "As many sessions are active as there may be; close one, or come back later"


class NoAccount(RelayError):
    status = 529
    code = "no_account"
    default_detail = "No upstream account is available"


class Interrupted(RelayError):
    status = 529
    code = "interrupted"
    default_detail = "The answer was interrupted by the relay"


class UpstreamFailed(RelayError):
    """Once the relay has used up its attempts, a client's trying again at once is of no use."""

    attempts_used = False

    def headers(self) -> dict[str, str]:
        return super().headers() | ({"x-should-retry": "false"} if self.attempts_used else {})


class UpstreamUnusable(UpstreamFailed):
    status = 500
    code = "upstream_unusable"
    default_detail = "The upstream's answer is larger than the relay takes"


class UpstreamTimedOut(UpstreamFailed):
    status = 504
    code = "upstream_timed_out"
    default_detail = "The upstream took too long to answer"


class UpstreamRateLimited(UpstreamFailed):
    status = 429
    code = "upstream_rate_limited"
    default_detail = "Every upstream account is rate-limited"


class UpstreamForbidden(UpstreamFailed):
    status = 529
    code = "upstream_forbidden"
    default_detail = "Every upstream account was refused"


class UpstreamOverloaded(UpstreamFailed):
    status = 529
    code = "upstream_overloaded"
    default_detail = "The upstream failed to answer"


def claude_status(error: ServiceError) -> int:
    """The status by which a Claude client hears of this error."""
    if isinstance(error, ContextTooSmall):
        return 400
    return 529 if isinstance(error, Unavailable) else error.status


def claude_body(error: ServiceError, request_id: str) -> dict[str, Any]:
    """The error as the Claude Messages API writes it."""
    told = {"type": claude_type(claude_status(error)), "message": message_of(error)}
    return {"type": "error", "error": told, "request_id": request_id}


def claude_type(status: int) -> str:
    return _TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")


def message_of(error: ServiceError) -> str:
    """The error in one line for people."""
    if isinstance(error.detail, str):
        return error.detail
    return "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.detail)
