"""The routes that the two apps really have, whether described or not.

Its one invariant: nothing is listed by hand here.
"""

import base64
import tempfile
from pathlib import Path

from fastapi import FastAPI
from fastapi.routing import iter_route_contexts
from pydantic import SecretStr

from services.relay.app import create_app as create_relay
from services.relay.settings import RelaySettings
from services.session_service.app import create_app as create_store
from services.session_service.settings import SessionServiceSettings
from shared.database import Database
from shared.service import Lifecycle

Call = tuple[str, str]
"""Method and path, with the path's parameters in braces."""


def _calls(door: object) -> list[Call]:
    app: FastAPI = door._app  # type: ignore[attr-defined]
    contexts = list(iter_route_contexts(app.routes))
    unknown = [context for context in contexts if not context.path or not context.methods]
    assert not unknown, f"no rows can be asked for these: {unknown}"
    return sorted((method, str(each.path)) for each in contexts for method in each.methods or () if method != "HEAD")


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
