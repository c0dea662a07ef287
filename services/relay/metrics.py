"""The relay's metrics. Never a user or a session as a label."""

from decimal import Decimal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from services.relay.prices import TOKEN_CLASSES
from shared.telemetry import build_info

_MODELS = 100
_OTHER_MODEL = "other"
_LONG_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """The metrics of one app, in a registry of their own."""

    def __init__(self, revision: str) -> None:
        self.registry = registry = CollectorRegistry()
        self.duration = Histogram(
            "relay_http_request_duration_seconds",
            "Time from a request's headers to the end of its answer",
            ["route", "method", "status"],
            registry=registry,
        )
        self.turns = Counter("relay_turns_total", "Turns by how they ended", ["outcome"], registry=registry)
        self.upstream_requests = Counter(
            "relay_upstream_requests_total", "Calls of upstream", ["account", "status"], registry=registry
        )
        self.upstream_duration = Histogram(
            "relay_upstream_duration_seconds",
            "Time of a call of upstream, to the answer's end",
            buckets=_LONG_BUCKETS,
            registry=registry,
        )
        self.first_byte = Histogram(
            "relay_time_to_first_byte_seconds",
            "Time from a request to the first byte of its answer",
            buckets=_LONG_BUCKETS,
            registry=registry,
        )
        self.tokens = Counter("relay_tokens_total", "Tokens by model and kind", ["model", "type"], registry=registry)
        self.cost = Counter("relay_cost_usd_total", "Price of upstream's answers", ["model"], registry=registry)
        self.in_flight = Gauge("relay_in_flight_requests", "Requests that are being served", registry=registry)
        self.queued = Gauge("relay_queued_requests", "Requests that wait to be served", registry=registry)
        self.account_state = Gauge(
            "relay_account_state", "1 for the state that an account is in", ["account", "state"], registry=registry
        )
        self.spool_entries = Gauge("relay_spool_entries", "Completions that wait for the store", registry=registry)
        self.spool_age = Gauge(
            "relay_spool_oldest_age_seconds", "Age of the completion that waits longest", registry=registry
        )
        build_info(registry, "relay", revision)
        self._models: set[str] = set()

    def count_tokens(self, model: str | None, usage: dict[str, object] | None) -> None:
        """Adds a turn's usage."""
        label = self._label(model)
        for name in TOKEN_CLASSES:  # upstream may say anything besides
            if isinstance(count := (usage or {}).get(name), int):
                self.tokens.labels(label, name.removesuffix("_tokens")).inc(count)

    def count_cost(self, model: str | None, cost_usd: Decimal | None) -> None:
        if cost_usd:
            self.cost.labels(self._label(model)).inc(float(cost_usd))

    def _label(self, model: str | None) -> str:
        """Models beyond the first hundred count as one, because callers make up names."""
        label = model or "unknown"
        if label not in self._models:
            if len(self._models) >= _MODELS:
                label = _OTHER_MODEL
            self._models.add(label)
        return label
