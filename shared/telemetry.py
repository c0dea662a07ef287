"""Logs and metrics: one JSON line an event on standard error, Prometheus text on /metrics.

Its one invariant: a log line has only the fields that its call names, so that no secret slips in by accident.
"""

import logging
import sys
from typing import Any

import structlog
from prometheus_client import CollectorRegistry, Gauge
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from starlette.responses import Response

from shared import __version__
from shared.settings import SharedSettings


def configure_logging(settings: SharedSettings, service: str) -> None:
    """Sets up structlog and the standard library's logging, which dependencies use, to write the same lines."""
    level = "DEBUG" if settings.debug else settings.log_level
    shared_processors: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _named(service),
    ]
    structlog.configure(
        processors=[*shared_processors, structlog.processors.format_exc_info, structlog.processors.JSONRenderer()],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level]),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared_processors, structlog.stdlib.add_logger_name],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.format_exc_info,
                structlog.processors.JSONRenderer(),
            ],
        )
    )
    # Dependencies speak up only when something is wrong; what they say of requests could hold secrets.
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)


def _named(service: str) -> structlog.typing.Processor:
    def add(_logger: Any, _method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
        return {"service": service, **event}

    return add


def build_info(registry: CollectorRegistry, prefix: str, revision: str) -> None:
    """The gauge `<prefix>_build_info`, always 1, that tells version and revision by its labels."""
    gauge = Gauge(
        f"{prefix}_build_info", "Version and revision of this process", ["version", "revision"], registry=registry
    )
    gauge.labels(__version__, revision).set(1)


def exposition(registry: CollectorRegistry) -> Response:
    """The registry in Prometheus' text format."""
    return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)
