"""Running one service process: listen, register, serve, and stop without dropping anyone.

Its one invariant: on SIGTERM the instance leaves Consul before it stops listening. Under uvicorn the lifespan's
shutdown part runs only after the port is closed, so registration belongs here.
"""

import asyncio
import gc
import resource
import signal
import socket
import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import structlog
import uvicorn
import uvloop
from pydantic import ValidationError
from starlette.types import ASGIApp

from shared.discovery import Consul, Registration
from shared.http_protocol import protocol
from shared.settings import SharedSettings

log = structlog.get_logger(__name__)

KEEP_ALIVE_SECONDS: Final = 75
"""Longer than clients keep idle connections (30 s), so that none is closed under a request on its way."""
_MOST_FILES: Final = 65_536


@dataclass(slots=True)
class Lifecycle:
    """What the process is about to do, for the health routes."""

    draining: bool = False


Settings = TypeVar("Settings", bound=SharedSettings)


class ServiceStopped(SystemExit):
    """The process cannot run; the line that says why has been logged."""


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield  # signals are ours

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Lets in who stands in line when the port closes: to their knowledge they are connected.

        The loop takes in one at a time, and closing the port would reset all others.
        """
        in_line = [each for bound in sockets or [] for each in _accepted(bound, self.config.backlog)]
        for server in self.servers:
            server.close()
        for each in in_line:
            with suppress(OSError):  # it may have left again
                await asyncio.get_running_loop().connect_accepted_socket(self._connection, each)
        await super().shutdown(sockets)

    def _connection(self) -> asyncio.Protocol:
        kind: Any = self.config.http_protocol_class
        made: asyncio.Protocol = kind(config=self.config, server_state=self.server_state, app_state=self.lifespan.state)
        return made


def _accepted(bound: socket.socket, most: int) -> Iterator[socket.socket]:
    """Those who have connected to this port and wait to be taken in."""
    bound.setblocking(False)
    for _ in range(most):
        try:
            yield bound.accept()[0]
        except OSError:
            return


def read_settings(kind: type[Settings], name: str) -> Settings:
    """The settings from the environment; one line that says what is wrong, and exit code 1, if they are not valid."""
    try:
        return kind()
    except ValidationError as error:
        wrong = [_problem(each) for each in error.errors()]
        sys.stderr.write(f"{name} cannot start: {'; '.join(wrong)}\n")
        raise ServiceStopped(1) from None


def _problem(error: Any) -> str:
    """A validation error in one line: the variable, where it is one's, and what is wrong with it."""
    name = ".".join(map(str, error["loc"])).upper()
    problem = error["msg"].removeprefix("Value error, ")
    return f"{name}: {problem}" if name else problem


def listen(host: str, port: int, name: str) -> socket.socket:
    """A bound socket; one clear line and exit code 1 when the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        sys.stderr.write(f"{name} cannot start: port {port} of {host} cannot be had: {error.strerror}\n")
        raise ServiceStopped(1) from None
    return bound


def run(
    app: ASGIApp,
    *,
    name: str,
    host: str,
    port: int,
    settings: SharedSettings,
    lifecycle: Lifecycle,
    register: bool,
    websockets: bool = False,
) -> None:
    """Serves until SIGTERM or SIGINT, then drains; a second signal stops at once.

    Without `websockets` whoever asks for one is answered as if it had not.
    """
    _allow_many_connections()
    bound = listen(host, port, name)
    config = uvicorn.Config(
        app,
        ws="websockets-sansio" if websockets else "none",
        http=protocol(settings.header_timeout_seconds),
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        lifespan="on",
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=int(settings.graceful_stop_seconds),
    )
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(_Server(config), bound, name, settings, lifecycle, register=register))


async def _serve(
    server: _Server,
    bound: socket.socket,
    name: str,
    settings: SharedSettings,
    lifecycle: Lifecycle,
    *,
    register: bool,
) -> None:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()

    def on_signal() -> None:
        if stop.is_set():
            server.should_exit = server.force_exit = True
        stop.set()

    for each in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(each, on_signal)
    serving = asyncio.create_task(server.serve(sockets=[bound]))
    stopping = asyncio.create_task(stop.wait())
    while not server.started and not serving.done():  # noqa: ASYNC110 - uvicorn tells it by a flag only
        await asyncio.sleep(0.01)
    _settle_garbage()
    host, port = _advertised(bound, settings)
    log.info("listening", name=name, host=host, port=port, environment=settings.environment)
    agent: Any = None
    registration: Registration | None = None
    keeping: asyncio.Task[None] | None = None
    if register and settings.consul_host:
        token = settings.consul_token.get_secret_value() or None
        agent = Consul(settings.consul_host, settings.consul_port, token=token)
        registration = Registration(agent, name, host, port)
        keeping = asyncio.create_task(registration.keep())
    await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
    log.info("stopping", name=name)
    lifecycle.draining = True
    if registration is not None and keeping is not None:
        keeping.cancel()
        with suppress(asyncio.CancelledError):
            await keeping
        await registration.deregister()
        await agent.close()
    if registration is not None or not settings.is_development:
        # Those who watch Consul or /health need a moment to hear of it; until then this port must answer them.
        await asyncio.wait({serving}, timeout=settings.drain_seconds)
    server.should_exit = True
    stopping.cancel()
    await serving
    log.info("stopped", name=name)
    sys.stderr.flush()


def _allow_many_connections() -> None:
    """Room for as many open files as the machine lets us have: by default it is 1,024, and each connection is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _settle_garbage() -> None:
    """What is there now stays for ever: the collector need not look at it again and again.

    With a thousand open streams a full collection stopped everything for 250 to 400 ms; so it looked at all that
    was imported, and too often. Young objects are still collected.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 100)


def _advertised(bound: socket.socket, settings: SharedSettings) -> tuple[str, int]:
    """The address that others reach this process at."""
    host, port = bound.getsockname()[:2]
    if settings.advertise_host:
        return settings.advertise_host, port
    if host in {"0.0.0.0", "::"}:
        return socket.gethostbyname(socket.gethostname()), port
    return host, port
