"""Finding instances of a service: through Consul, or at a static address.

Its one invariant: instances once known stay in use until something better is known; Consul being away, restarted
or in an election never empties the set.
"""

import asyncio
from dataclasses import dataclass
from itertools import count
from time import monotonic
from typing import Any, Final

import consul.base
import httpx
import structlog
from consul.exceptions import ConsulException

from shared.http_client import http_client

log = structlog.get_logger(__name__)

_WAIT: Final = "20s"
_READ_TIMEOUT_SECONDS: Final = 30
_CALL_TIMEOUT_SECONDS: Final = 3
_RECONCILE_SECONDS: Final = 10
_KEEP_EMPTY_SECONDS: Final = 30
_REST_SECONDS: Final = 5.0

CONSUL_FAILURES: Final = (ConsulException, httpx.HTTPError, OSError, TimeoutError)


class _Http(consul.base.HTTPClient):  # type: ignore[misc]
    """py-consul's calls over the HTTP client that everything else here uses."""

    def __init__(self, host: str, port: int) -> None:
        super().__init__(host, port)
        self._client = http_client(read_seconds=_READ_TIMEOUT_SECONDS, connect_seconds=_CALL_TIMEOUT_SECONDS)

    async def _call(
        self, callback: Any, method: str, path: str, params: Any = None, headers: Any = None, data: Any = None
    ) -> Any:
        # Closing after each call: an agent that restarts leaves no dead connection behind.
        response = await self._client.request(
            method, self.uri(path, params), headers={**(headers or {}), "connection": "close"}, content=data
        )
        return callback(consul.base.Response(response.status_code, response.headers, response.text))

    def get(self, callback: Any, path: str, params: Any = None, headers: Any = None, **_: Any) -> Any:
        return self._call(callback, "GET", path, params, headers)

    def put(self, callback: Any, path: str, params: Any = None, data: Any = "", headers: Any = None, **_: Any) -> Any:
        return self._call(callback, "PUT", path, params, headers, data)

    def delete(self, callback: Any, path: str, params: Any = None, headers: Any = None, **_: Any) -> Any:
        return self._call(callback, "DELETE", path, params, headers)

    def post(self, callback: Any, path: str, params: Any = None, data: Any = "", headers: Any = None, **_: Any) -> Any:
        return self._call(callback, "POST", path, params, headers, data)

    async def close(self) -> None:
        await self._client.aclose()


class Consul(consul.base.Consul):  # type: ignore[misc]
    """An asyncio client of one Consul agent."""

    def http_connect(self, host: str, port: int, scheme: str, verify: Any = True, cert: Any = None) -> _Http:
        return _Http(host, port)

    async def close(self) -> None:
        await self.http.close()


# ── registering ─────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Registration:
    """This process as an instance in Consul: made once it listens, made again when the agent has forgotten it."""

    agent: Consul
    name: str
    host: str
    port: int

    @property
    def service_id(self) -> str:
        return f"{self.name}-{self.host}-{self.port}"

    async def register(self) -> None:
        check = {
            "HTTP": f"http://{self.host}:{self.port}/health",
            "Interval": "10s",
            "Timeout": "5s",
            "DeregisterCriticalServiceAfter": "1m",
            # It was just seen to answer; the first check must not cost its first ten seconds.
            "Status": "passing",
        }
        await self.agent.agent.service.register(
            self.name, service_id=self.service_id, address=self.host, port=self.port, check=check
        )
        log.info("registered", service_id=self.service_id)

    async def keep(self) -> None:
        """Registers, and registers again whenever the agent does not know this instance; for ever."""
        while True:
            try:
                known = await self.agent.agent.services()
                if self.service_id not in known:
                    await self.register()
            except CONSUL_FAILURES as error:
                log.warning("consul_unreachable", error=type(error).__name__)
                await asyncio.sleep(1)
                continue
            await asyncio.sleep(_RECONCILE_SECONDS)

    async def deregister(self) -> None:
        """Takes this instance out of Consul; without Consul its check will do that after a minute."""
        try:
            async with asyncio.timeout(_CALL_TIMEOUT_SECONDS):
                await self.agent.agent.service.deregister(self.service_id)
            log.info("deregistered", service_id=self.service_id)
        except CONSUL_FAILURES as error:
            log.warning("deregistration_failed", error=type(error).__name__)


# ── finding ─────────────────────────────────────────────────────────────────────────────────────


@dataclass(slots=True)
class Instance:
    """An address of a service; `rests_until` is in the future after a connection to it failed."""

    url: str
    rests_until: float = 0.0
    failures: int = 0


class Instances:
    """The known instances of one service, spread over in turn."""

    def __init__(self, urls: list[str] | None = None) -> None:
        self._known: dict[str, Instance] = {url: Instance(url) for url in urls or []}
        self._turns = count()
        self._arrived = asyncio.Event()
        if self._known:
            self._arrived.set()

    @property
    def urls(self) -> list[str]:
        return sorted(self._known)

    def replace(self, urls: list[str]) -> None:
        """The instances are these now; what is known of those that stay is kept."""
        if set(urls) != set(self._known):
            log.info("instances_changed", instances=sorted(urls))
        self._known = {url: self._known.get(url) or Instance(url) for url in urls}
        if self._known:
            self._arrived.set()

    async def first(self, timeout_seconds: float) -> None:
        """Returns once an instance is known, or when the time is up."""
        try:
            await asyncio.wait_for(self._arrived.wait(), timeout_seconds)
        except TimeoutError:
            return

    def in_order(self) -> list[Instance]:
        """All instances, each call beginning with the next one; those at rest come last."""
        known = list(self._known.values())
        if not known:
            return []
        start = next(self._turns) % len(known)
        now = monotonic()
        return sorted(known[start:] + known[:start], key=lambda each: max(each.rests_until - now, 0.0))

    def failed(self, instance: Instance) -> None:
        """Leaves the instance alone for a while, longer each time."""
        instance.failures += 1
        instance.rests_until = monotonic() + min(_REST_SECONDS * 2 ** (instance.failures - 1), 60.0)

    def worked(self, instance: Instance) -> None:
        instance.failures, instance.rests_until = 0, 0.0


class Watch:
    """Keeps `instances` equal to what Consul calls passing, by blocking queries."""

    def __init__(self, agent: Consul, name: str, instances: Instances) -> None:
        self._agent = agent
        self._name = name
        self._instances = instances
        self._empty_since: float | None = None

    async def run(self) -> None:
        """Watches for ever; an outage of Consul only delays it."""
        index = 0
        while True:
            try:
                found, nodes = await self._agent.health.service(
                    self._name, index=index or None, wait=_WAIT, passing=True
                )
            except CONSUL_FAILURES as error:
                log.warning("consul_unreachable", error=type(error).__name__)
                index = 0
                await asyncio.sleep(1)
                continue
            # An index that goes backwards belongs to another life of the server: begin again.
            index = int(found) if int(found) >= index else 0
            await self._take(nodes or [])

    async def _take(self, nodes: list[dict[str, Any]]) -> None:
        urls = [_url(node) for node in nodes]
        if urls:
            self._empty_since = None
            self._instances.replace(urls)
        elif self._instances.urls:
            self._empty_since = self._empty_since or monotonic()
            if monotonic() - self._empty_since > _KEEP_EMPTY_SECONDS and not await self._any_answers():
                self._instances.replace([])

    async def _any_answers(self) -> bool:
        """Whether a known instance answers although Consul names none."""
        async with http_client(read_seconds=_CALL_TIMEOUT_SECONDS, connect_seconds=_CALL_TIMEOUT_SECONDS) as client:
            for url in self._instances.urls:
                try:
                    if (await client.get(f"{url}/health")).is_success:
                        return True
                except httpx.HTTPError:
                    continue
        return False


def _url(node: dict[str, Any]) -> str:
    service = node["Service"]
    host = service.get("Address") or node["Node"]["Address"]
    return f"http://{f'[{host}]' if ':' in host else host}:{service['Port']}"
