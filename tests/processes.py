"""Processes of the real stack, started for a test and ended with it."""

import asyncio
import fcntl
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import httpx

ROOT = Path(__file__).resolve().parent.parent


_PORTS = range(20_000, 32_000)  # below those that the system gives to whoever asks for any
_held: list[IO[str]] = []


def free_port() -> int:
    """A port that is free, and that no other tests on this machine are given while this process lives."""
    folder = Path(tempfile.gettempdir(), "session-relay-ports")
    folder.mkdir(exist_ok=True)
    while True:
        port = random.choice(_PORTS)
        file = (folder / str(port)).open("a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(("127.0.0.1", port))
        except OSError:
            file.close()
            continue
        _held.append(file)
        return port


@dataclass
class Process:
    """A child process, its port and its log file."""

    popen: subprocess.Popen[bytes]
    port: int
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        return self.popen.pid

    def logged(self) -> str:
        return self.log.read_text()

    def kill(self) -> None:
        """SIGKILL, and waits for the end."""
        self.popen.kill()
        self.popen.wait(10)

    def stop(self, seconds: float = 30) -> int:
        """SIGTERM, and waits for the end; gives the exit code."""
        if self.popen.poll() is None:
            self.popen.send_signal(signal.SIGTERM)
        return self.popen.wait(seconds)

    def wait_until(self, path: str, seconds: float = 30, status: int = 200) -> None:
        """Returns once `path` answers with `status`."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.popen.poll() is not None:
                raise AssertionError(f"ended with {self.popen.returncode}:\n{self.logged()[-4000:]}")
            try:
                if httpx.get(self.url + path, timeout=5, trust_env=False).status_code == status:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.05)
        raise AssertionError(f"{path} did not answer {status} in {seconds} s:\n{self.logged()[-4000:]}")


ServiceProcess = Process


@contextmanager
def running(
    command: list[str], port: int, log: Path, environment: Mapping[str, str], *, cwd: Path = ROOT
) -> Iterator[Process]:
    """The command as a process with only this environment besides PATH and HOME; killed at the end."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    with log.open("ab") as output:
        popen = subprocess.Popen(command, cwd=cwd, env={**kept, **environment}, stdout=output, stderr=output)
    process = Process(popen, port, log)
    try:
        yield process
    finally:
        if popen.poll() is None:
            popen.terminate()
            try:
                popen.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


@contextmanager
def start_session_service(
    database_url: str, scratch: Path, port: int, wait: bool = True, **settings: str
) -> Iterator[Process]:
    """A session_service on this port; `settings` are environment variables."""
    environment = {
        "ENVIRONMENT": "test",
        "DATABASE_URL": database_url,
        "SERVICE_PORT": str(port),
        "DATA_DIR": str(scratch),
        **settings,
    }
    command = [sys.executable, "-m", "services.session_service.main"]
    with running(command, port, scratch / f"session_service-{port}.log", environment) as process:
        if wait:
            process.wait_until("/health/ready")
        yield process


def consul_program() -> str:
    """The consul program, from PATH or where install_consul.sh puts it."""
    found = shutil.which("consul") or shutil.which(str(ROOT / ".data" / "bin" / "consul"))
    if found is None:
        raise AssertionError("no consul program: run deployment/scripts/install_consul.sh")
    return found


@contextmanager
def start_consul(scratch: Path, port: int | None = None) -> Iterator[Process]:
    """A Consul agent in development mode; all its other ports are free ones or closed."""
    port = port or free_port()
    ports = {"-http-port": port, "-serf-lan-port": free_port(), "-server-port": free_port()}
    command = [
        *(consul_program(), "agent", "-dev", "-bind=127.0.0.1", "-client=127.0.0.1", "-log-level=warn"),
        *(f"{name}={value}" for name, value in ports.items()),
        *("-dns-port=-1", "-grpc-port=-1", "-serf-wan-port=-1"),
    ]
    with running(command, port, scratch / f"consul-{port}.log", {}) as agent:
        deadline = time.monotonic() + 30
        while True:
            try:
                leader = httpx.get(f"{agent.url}/v1/status/leader", timeout=2, trust_env=False)
                if leader.status_code == 200 and len(leader.text) > 4:
                    break
            except httpx.HTTPError:
                pass
            if time.monotonic() > deadline or agent.popen.poll() is not None:
                raise AssertionError(f"Consul did not start:\n{agent.logged()[-4000:]}")
            time.sleep(0.05)
        yield agent


async def log_of_one_who_leaves(service: Process, head: str) -> str:
    """What the service logs of a client that sends this head and the first byte of a body, and leaves."""
    before = len(service.logged())
    reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
    writer.write(f"{head}content-length: 1000\r\n\r\n{{".encode())
    await writer.drain()
    await asyncio.sleep(0.1)
    writer.close()
    async with asyncio.timeout(5):
        while '"status": 499' not in (logged := service.logged()[before:]):
            await asyncio.sleep(0.02)
    assert "unhandled_error" not in logged
    assert await reader.read() == b""
    return logged
