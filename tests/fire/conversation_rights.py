"""The rows of both conversation APIs in the table of rights (rights.py).

Its one invariant: a runtime key opens its own conversation, a user's login the user's own, and neither the other's.
"""

from tests.fire.rows import EITHER, KEYED, RUNTIME, SOCKET, Row

_SAID = {"role": "user", "content": [{"type": "text", "text": "{text}"}], "run": False}
_BY_ID = {"ids": "{id}"}


def _user(method: str, path: str, body: object = None, stranger: int = 200, query: dict[str, str] | None = None) -> Row:
    return Row(method, path, KEYED, "conversations", body, query or {}, stranger=stranger)


def _either(method: str, path: str, body: object = None, files: str = "") -> Row:
    """By the user's login, or by the runtime key."""
    place = f"/api/conversations/{{id}}{path}"
    return Row(method, place, EITHER, "conversations", body, stranger=404, files=files)


def _runtime(method: str, path: str, body: object = None, owner: int = 200) -> Row:
    return Row(method, f"/api/conversations/{{id}}{path}", RUNTIME, body=body, owner=owner)


ROWS: list[Row] = [
    _runtime("POST", "/pause", {}),
    _runtime("POST", "/events/respond_to_confirmation", {"accept": True, "reason": "{text}"}),
    _runtime("POST", "/run", {}),
    # The key names the conversation: another conversation's key is at home elsewhere.
    Row("POST", "/api/file/upload/{path:anything}", RUNTIME, files="file", other_runtime=200),
    Row("GET", "/api/file/download/{path:anything}", RUNTIME, other_runtime=200),
    Row("GET", "/api/vscode/url", RUNTIME, other_runtime=200),
    Row(SOCKET, "/sockets/events/{id:anything}", RUNTIME),
    _either("POST", "/events", _SAID),
    _either("POST", "/message", {"message": "{text}"}),
    _either("POST", "/upload-files", files="files"),
    _either("POST", "/submit-feedback", {"rating": 5, "note": "{text}"}),
    *(_either("GET", f"/{name}") for name in ("config", "events", "list-files", "trajectory")),
    *(_either("GET", f"/{name}") for name in ("microagents", "vscode-url", "web-hosts")),
    _user("GET", "/api/conversations"),
    _user("GET", "/api/conversations/{id}"),
    _user("PATCH", "/api/conversations/{id}", {"title": "{text}"}, stranger=404),
    _user("POST", "/api/conversations/{id}/stop", stranger=404),
    _user("POST", "/api/conversations/{id}/start", {}, stranger=404),
    _user("GET", "/api/v1/app-conversations", query=_BY_ID),
    _user("GET", "/api/v1/app-conversations/search"),
    _user("GET", "/api/v1/app-conversations/count"),
    _user("GET", "/api/v1/app-conversations/start-tasks", query=_BY_ID),
    _user("GET", "/api/v1/app-conversations/start-tasks/search"),
    _user("GET", "/api/v1/app-conversations/start-tasks/count"),
    _user("GET", "/api/v1/events/count", query={"conversation_id__eq": "{id}"}, stranger=404),
    _user("GET", "/api/v1/sandboxes", query={"id": "{sandbox_id}"}),
    _user("POST", "/api/v1/sandboxes/{sandbox_id}/pause", {}, stranger=404),
    _user("POST", "/api/v1/sandboxes/{sandbox_id}/resume", {}, stranger=404),
    _user("POST", "/api/v1/app-conversations", {"title": "{text}"}),
    _user("POST", "/api/v1/app-conversations/stream-start", {"title": "{text}"}),
    _user("POST", "/api/conversations", {}),
    _user("DELETE", "/api/conversations/{id}"),
]
