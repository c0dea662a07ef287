"""The embedded Postgres: a real server out of a Python wheel, for development and tests.

`python -m shared.embedded_postgres --help` does the same by hand.
"""

from shared.embedded_postgres.account import EmbeddedPostgresFailed
from shared.embedded_postgres.server import is_running, pid, start, stop, url

__all__ = ["EmbeddedPostgresFailed", "is_running", "pid", "start", "stop", "url"]
