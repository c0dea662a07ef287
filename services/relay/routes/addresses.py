"""Where a client has reached this relay, by its own request.

Its one invariant: what is no address, and might be a command, is never repeated.
"""

import re
from typing import Final

from fastapi import Request

_ADDRESS: Final = re.compile(r"(?:[A-Za-z0-9_.-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\])(?::[0-9]{1,5})?")


def address_of(request: Request) -> str:
    """The relay's URL as this client has it, without a slash at its end."""
    return f"{_scheme(request)}://{_host(request)}"


def _scheme(request: Request) -> str:
    """https where a proxy in front says so; whoever lies only sees another page."""
    return "https" if request.headers.get("x-forwarded-proto") == "https" else "http"


def _host(request: Request) -> str:
    """Where the client has found us; what is no address, and might be a command, is not repeated."""
    named = request.headers.get("host", "")
    if _ADDRESS.fullmatch(named):
        return named
    host, port = request.scope.get("server") or ("127.0.0.1", None)
    host = f"[{host}]" if ":" in host else host
    return f"{host}:{port}" if port else host
