"""What a result was taken on."""

import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from benchmarks.stack import Pace

_PACKAGES = ("asyncpg", "fastapi", "httpx", "aiohttp", "orjson", "pydantic", "uvicorn", "uvloop")


def conditions_of(pace: Pace, postgres: str) -> dict[str, Any]:
    """What the figures were taken on."""
    return {
        "taken_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "pace": pace.name,
        "cpus": psutil.cpu_count(),
        "cpu": _cpu(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "postgres": postgres,
        "load_average_before": psutil.getloadavg()[0],
        "packages": {name: version(name) for name in _PACKAGES},
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
