"""A row of the table of rights: one route, and what each kind of caller gets.

Its one invariant: whoever is not named by a row's kind gets 401.
"""

from dataclasses import dataclass, field
from typing import Any

from tests.fire.routes import SOCKET, Call

ALL = "everyone"
ADMIN = "admin"
KEYED = "key"
RUNTIME = "runtime key"
EITHER = "key or runtime key"


@dataclass(frozen=True)
class Row:
    """One route. `owner` and `stranger`: the status for the owner, and for another user with all rights of a user.

    `other_runtime`: the status for the runtime key of another conversation. `files`: the field of an upload.
    """

    method: str
    path: str
    kind: str
    permission: str | None = None
    body: Any = None
    query: dict[str, str] = field(default_factory=dict)
    owner: int = 200
    stranger: int = 200
    content: str = ""
    other_runtime: int = 401
    files: str = ""

    @property
    def call(self) -> Call:
        return self.method, self.path


__all__ = ["ADMIN", "ALL", "EITHER", "KEYED", "RUNTIME", "SOCKET", "Row"]
