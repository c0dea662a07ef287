"""The routes that the two apps really have, whether described or not.

Its one invariant: nothing is listed by hand here.
"""

import base64
import tempfile
from pathlib import Path

from fastapi import FastAPI
from fastapi.routing import iter_route_contexts
from pydantic import SecretStr
from starlette.routing import WebSocketRoute

from services.relay.app import create_app as create_relay
from services.relay.settings import RelaySettings
from services.session_service.app import create_app as create_store
from services.session_service.settings import SessionServiceSettings
from shared.database import Database
from shared.service import Lifecycle

Call = tuple[str, str]
"""Method and path, with the path's parameters in braces."""
SOCKET = "WebSocket"


def _calls(app: object) -> list[Call]:
    while not isinstance(app, FastAPI):
        app = app._app  # type: ignore[attr-defined]  # what stands before it has no routes of its own
    found: list[Call] = []
    for context in iter_route_contexts(app.routes):
        is_socket = isinstance(context.original_route, WebSocketRoute)
        methods = {SOCKET} if is_socket else context.methods
        assert context.path, f"no row can be asked for this: {context}"
        assert methods, f"no row can be asked for this: {context}"
        found += [(method, context.path) for method in methods if method != "HEAD"]
    return sorted(found)


def _database() -> Database:
    return Database("postgresql://nobody@127.0.0.1:1/none", schema="dev")


def store_routes() -> list[Call]:
    settings = SessionServiceSettings(environment="test")
    return _calls(create_store(settings, _database(), Lifecycle()))


def relay_routes() -> list[Call]:
    with tempfile.TemporaryDirectory() as folder:
        settings = RelaySettings(
            environment="fire",
            data_dir=Path(folder),
            database_url=SecretStr("postgresql://nobody@127.0.0.1:1/none"),
            session_service_tokens=(SecretStr("t"),),
            relay_admin_token=SecretStr("t"),
            relay_key_pepper=SecretStr("t"),
            relay_encryption_keys=(SecretStr(f"k1:{base64.b64encode(bytes(32)).decode()}"),),
        )
        return _calls(create_relay(settings, _database(), Lifecycle()))
