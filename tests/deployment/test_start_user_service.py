"""start_user_service.sh where it must not start: one line says why, and nothing is left running."""

import contextlib
import socket
import subprocess
import threading
from pathlib import Path

import pytest

from tests.deployment.conftest import SCRIPTS, Stack, free_ports, table


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    """The only line on stderr, of a call that failed."""
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    return done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("-e", "test", "status"),
        ("status", "-e", "test"),
        ("relay", "status", "--env=test"),
        ("-etest", "session_service", "status", "relay"),
    ],
)
def test_options_commands_and_names_come_in_any_order(stack: Stack, arguments: tuple[str, ...]) -> None:
    done = stack.run(*arguments)
    assert done.returncode == 3  # nothing runs
    assert table(done.stdout)["relay"] == (str(stack.relay_port), "-", "stopped")


@pytest.mark.parametrize("arguments", [(), ("start", "stop"), ("start", "what"), ("-e",), ("-e", "../x", "start")])
def test_wrong_usage_is_exit_code_2(stack: Stack, arguments: tuple[str, ...]) -> None:
    done = stack.run(*arguments)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert not stack.data_dir.exists()


def test_help_names_every_command(stack: Stack) -> None:
    done = stack.run("start", "--help")
    assert done.returncode == 0
    for command in ("start", "stop", "restart", "status", "logs", "migrate"):
        assert f"\n  {command} " in done.stdout


def test_an_unknown_environment_names_the_missing_file(stack: Stack) -> None:
    assert "deployment/environments/nowhere.env is missing" in one_line(stack.run("-e", "nowhere", "start"))
    assert "copy production.env.example" in one_line(stack.run("-e", "production", "start"))


def test_a_taken_port_is_named_and_nothing_starts(stack: Stack) -> None:
    with socket.create_server(("127.0.0.1", stack.relay_port)):
        said = one_line(stack.run("start"))
    assert f"port {stack.relay_port} for relay is taken" in said
    assert "RELAY_PORT" in said
    assert stack.processes() == []


@pytest.mark.parametrize("port", ["0", "65536", "99999999999999999999", "08205", "http"])
def test_a_port_that_is_none_is_named(stack: Stack, port: str) -> None:
    assert f"SERVICE_PORT is '{port}', not a port" in one_line(stack.run("start", SERVICE_PORT=port))
    assert not stack.data_dir.exists()


def test_two_services_on_one_port_are_refused(stack: Stack) -> None:
    """Each would seem healthy where the other one answers."""
    port = str(stack.session_port)
    assert f"SERVICE_PORT and RELAY_PORT are both {port}" in one_line(stack.run("start", RELAY_PORT=port))
    assert stack.processes() == []


def test_a_data_folder_that_cannot_be_made_is_one_line(stack: Stack, folder: Path) -> None:
    (folder / "file").touch()
    said = one_line(stack.run("start", DATA_DIR=str(folder / "file" / "data")))
    assert f"cannot write in {folder}/file/data (DATA_DIR): " in said
    assert "Not a directory" in said


def test_a_port_taken_from_consul_stops_what_was_started_before(stack: Stack) -> None:
    with socket.create_server(("127.0.0.1", stack.consul_port)) as listener:
        # Something that answers, but is no Consul.
        def answer() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection, contextlib.suppress(OSError):  # who only looks hangs up at once
                    connection.sendall(b"HTTP/1.1 404 Not Found\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        said = one_line(stack.run("start", "consul", "postgres"))
        listener.shutdown(socket.SHUT_RDWR)
    thread.join()
    assert f"port {stack.consul_port} for consul is taken" in said
    assert stack.processes() == []


def test_an_unreachable_database_is_named_without_its_password(stack: Stack) -> None:
    (port,) = free_ports(1)
    said = one_line(stack.run("start", DATABASE_URL=f"postgresql://ada:s3cret@127.0.0.1:{port}/x"))
    assert f"ada:s3cret@127.0.0.1:{port}" not in said
    assert f"the database at 127.0.0.1:{port} cannot be reached" in said
    said = one_line(stack.run("migrate", DATABASE_URL="mysql://ada:s3cret@127.0.0.1/x"))
    assert "s3cret" not in said
    said = one_line(stack.run("migrate", DATABASE_URL="postgresql://ada:s3cret/1@127.0.0.1:5432/x"))
    assert "percent-encoded" in said
    assert "s3cret" not in said
    assert stack.processes() == []


def test_an_address_may_name_a_driver_as_sqlalchemy_has_it(stack: Stack, database_url: str) -> None:
    address = database_url.replace("postgresql://", "postgresql+asyncpg://", 1)
    done = stack.run("start", DATABASE_URL=address, START_CONSUL="no")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_failed_migration_stops_the_database_again(stack: Stack) -> None:
    said = one_line(stack.run("start", DB_SCHEMA="Not a schema"))
    assert "the migration failed: " in said
    assert stack.processes() == []


@pytest.mark.parametrize(
    ("setting", "value", "reason"),
    [
        ("CONTEXT_MAX_TOKENS", "many", "CONTEXT_MAX_TOKENS: Input should be a valid integer"),
        ("SERVICE_HOST", "nowhere.invalid", "of nowhere.invalid cannot be had: "),
    ],
)
def test_a_service_that_says_why_it_cannot_start_takes_the_rest_along(
    stack: Stack, setting: str, value: str, reason: str
) -> None:
    said = one_line(stack.run("start", "session_service", START_CONSUL="no", **{setting: value}))
    assert said.startswith("error: session_service did not start: ")
    assert reason in said
    assert stack.processes() == []


def test_a_service_that_dies_shows_its_last_lines_and_takes_the_rest_along(stack: Stack, folder: Path) -> None:
    (folder / "sitecustomize.py").write_text(
        "import os, sys\n"
        "if 'services.session_service.main' in sys.orig_argv:\n"
        "    print('one\\nlast words', flush=True)\n"
        "    os._exit(3)\n"
    )
    done = stack.run("start", "session_service", START_CONSUL="no", PYTHONPATH=str(folder))
    assert done.returncode == 1
    assert done.stderr.startswith("session_service | one\nsession_service | last words\n")
    assert done.stderr.splitlines()[-1].startswith("error: session_service did not start: last words")
    assert stack.processes() == []


def test_the_embedded_database_is_refused_in_production(stack: Stack, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    (copy / "deployment").mkdir(parents=True)
    for name in ("scripts", "environments"):
        subprocess.run(["cp", "-r", SCRIPTS.parent / name, copy / "deployment"], check=True)
    environments = copy / "deployment" / "environments"
    (environments / "production.env").write_text("# comment\nexport DB_SCHEMA='prod' # which\nDATABASE_URL=\n")
    done = subprocess.run(
        [str(copy / "deployment/scripts/start_user_service.sh"), "-e", "production", "start"],
        check=False,
        capture_output=True,
        text=True,
        env=stack.environment,
    )
    assert "the embedded Postgres is for dev and test" in one_line(done)
    (environments / "production.env").write_text("DB_SCHEMA=prod\nnot a setting\n")
    done = subprocess.run(
        [str(copy / "deployment/scripts/start_user_service.sh"), "-e", "production", "status"],
        check=False,
        capture_output=True,
        text=True,
        env=stack.environment,
    )
    assert "production.env, line 2 is not KEY=VALUE" in one_line(done)


def test_a_pid_that_went_to_another_process_is_not_ours(stack: Stack) -> None:
    run_dir = stack.data_dir / "run"
    run_dir.mkdir(parents=True)
    with subprocess.Popen(["sleep", "60"]) as other:
        (run_dir / "relay.pid").write_text(f"{other.pid} 1\n")
        assert table(stack.run("status").stdout)["relay"][2] == "stopped"
        assert stack.run("stop").returncode == 0
        assert other.poll() is None
        other.kill()
