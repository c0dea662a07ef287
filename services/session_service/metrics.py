"""session_service's metrics. Never a user or a session as a label."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from shared.telemetry import build_info


class Metrics:
    """The metrics of one app, in a registry of their own."""

    def __init__(self, revision: str) -> None:
        self.registry = CollectorRegistry()
        self.duration = Histogram(
            "sessions_http_request_duration_seconds",
            "Time from a request's headers to the end of its answer",
            ["route", "method", "status"],
            registry=self.registry,
        )
        self.appends = Counter("sessions_appends_total", "Messages stored", registry=self.registry)
        self.expired = Counter("sessions_expired_total", "Sessions ended by the sweeper", registry=self.registry)
        self.open_turns = Gauge("sessions_open_turns", "Turns that are open now", registry=self.registry)
        self.pool = Gauge(
            "sessions_db_pool_connections", "Database connections by state", ["state"], registry=self.registry
        )
        build_info(self.registry, "sessions", revision)
