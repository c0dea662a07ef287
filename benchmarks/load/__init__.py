"""The load generator: a process of its own, so that what it measures does not wait for whoever reads the figures.

Its one invariant: every answer is looked at, and after a run the service is asked what it has stored; one that is
not right ends the run with an error, and there is no figure.

There are good generators of HTTP load with an open loop (wrk2, vegeta, k6); none of them can check that each answer
is the one to its own request and that all of it was stored, which is half of the work here.
"""

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SPARE_SECONDS = 90


class WrongAnswer(Exception):
    """A service gave an answer that is not right, or did not store what it said it had."""


@dataclass(frozen=True, slots=True)
class Result:
    """What one run of the generator came to; `ms` holds one duration for each piece of work, in order of ending."""

    done: int
    seconds: float
    ms: list[float]
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        return self.done / self.seconds


def run(work: str, url: str, **plan: Any) -> Result:
    """Runs a plan in a generator process. Raises WrongAnswer with what the generator had to say."""
    asked = {"work": work, "url": url, **plan}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.load"],
        input=json.dumps(asked).encode(),
        cwd=ROOT,
        capture_output=True,
        timeout=float(plan.get("seconds", 0)) + SPARE_SECONDS,
        check=False,
    )
    if done.returncode:
        raise WrongAnswer(f"{work} at {url}: {done.stderr.decode(errors='replace').strip()[-2000:]}")
    return Result(**json.loads(done.stdout))
