"""Copies of the source with one fault put in: what a harness must find, or it proves nothing.

Its one invariant: the tree that this file stands in is never changed.
"""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.processes import ROOT

_COPIED = ("services", "shared", "migrations", "alembic.ini")


@dataclass(frozen=True)
class Change:
    """In this file, this text (which stands there once) becomes that one."""

    file: str
    old: str
    new: str


ASYNC_COMMIT = (
    Change(
        "shared/database.py",
        '"timezone": "UTC",\n        }',
        '"timezone": "UTC",\n            "synchronous_commit": "off",\n        }',
    ),
)
KEYS_IGNORED = (
    Change(
        "services/session_service/routes/creating.py",
        'if "idempotency-key" not in request.headers:\n            return',
        "if True:\n            return",
    ),
    Change("services/relay/once.py", "key = idempotency.header_of(caller.headers)", "key = None"),
)
OWNER_LEFT_OUT_OF_A_LISTING = (
    Change(
        "services/session_service/history.py",
        "select(*columns).where(mine)",
        'select(*columns).where(table.c.session_id == bindparam("session_id"))',
    ),
)
OWNER_LEFT_OUT_OF_CONTEXTS = (
    Change(
        "services/session_service/recent.py",
        "_visible = and_(mine, table.c.superseded_at.is_(None))",
        '_visible = and_(table.c.session_id == bindparam("session_id"), table.c.superseded_at.is_(None))',
    ),
    # Of a session that is remembered nothing is read.
    Change("services/session_service/settings.py", "known_sessions: int = Field(500", "known_sessions: int = Field(0"),
)


@contextmanager
def mutant(changes: tuple[Change, ...]) -> Iterator[Path]:
    """A folder with the changed source. Raises AssertionError when a text to be changed is not there, once."""
    folder = Path(tempfile.mkdtemp(prefix="mutant-"))
    try:
        folder.chmod(0o755)
        for name in _COPIED:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / name, folder / name)
        for change in changes:
            path = folder / change.file
            text = path.read_text()
            assert text.count(change.old) == 1, f"{change.file} has changed: {change.old!r}"
            path.write_text(text.replace(change.old, change.new))
        yield folder
    finally:
        shutil.rmtree(folder)
