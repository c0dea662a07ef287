"""A stack of its own for a test: own ports, own data, the interpreter that runs the tests."""

import os
import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "deployment" / "scripts"


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listener.getsockname()[1] for listener in sockets]
    for listener in sockets:
        listener.close()
    return ports


class Stack:
    """start_user_service.sh on data and ports that nothing else uses."""

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = data_dir
        self.session_port, self.relay_port, self.consul_port = free_ports(3)
        inherited = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
        self.environment = inherited | {
            "VENV": sys.prefix,
            "DATA_DIR": str(data_dir),
            "SERVICE_PORT": str(self.session_port),
            "RELAY_PORT": str(self.relay_port),
            "CONSUL_PORT": str(self.consul_port),
        }

    def run(self, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(SCRIPTS / "start_user_service.sh"), *arguments],
            check=False,
            capture_output=True,
            text=True,
            timeout=120,
            cwd="/",
            env=self.environment | settings,
        )

    def processes(self) -> list[str]:
        """What runs on this stack's data or ports: nothing else is looked at."""
        marks = {str(self.data_dir), str(self.data_dir / "postgres"), str(self.consul_port)}
        found = []
        for process in psutil.process_iter(["pid", "cmdline", "status"]):
            info = process.info
            if info["status"] == psutil.STATUS_ZOMBIE:
                continue
            try:
                environment = process.environ() if process.pid != os.getpid() else {}
            except psutil.Error:
                environment = {}
            belongs = marks & set(info["cmdline"] or ()) or environment.get("DATA_DIR") == str(self.data_dir)
            if belongs:
                found.append(" ".join(info["cmdline"]))
        return found


def table(output: str) -> dict[str, tuple[str, str, str]]:
    """Service -> port, pid, health, of the table that start and status print."""
    rows = re.findall(r"^(session_service|relay|consul|postgres) +(\S+) +(\S+) +(.+?)  +", output, flags=re.MULTILINE)
    return {name: (port, pid, health) for name, port, pid, health in rows}


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that only its owner may enter. pytest's own is closed anew by each pytest that starts beside this
    one, which would lock out a server that runs as another user.
    """
    with tempfile.TemporaryDirectory(prefix="deployment-") as made:
        yield Path(made)


@pytest.fixture
def stack(folder: Path) -> Iterator[Stack]:
    made = Stack(folder / "data")
    yield made
    if (made.data_dir / "run").exists():
        made.run("stop")
    assert made.processes() == []
