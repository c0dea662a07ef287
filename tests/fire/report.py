"""What a run has tried and found: promise by promise.

Its one invariant: a promise that was tried never leaves the table, and one that was never tried is not kept.
"""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

_SHOWN = 8
_scenario: ContextVar[str] = ContextVar("scenario", default="")


@dataclass
class Promise:
    """`notes` are figures worth printing; `violations` say what was seen, and where."""

    trials: int = 0
    violations: list[str] = field(default_factory=list)
    notes: dict[str, str] = field(default_factory=dict)

    @property
    def is_kept(self) -> bool:
        return self.trials > 0 and not self.violations


class Report:
    """The promises of one run. `quiet` tells no progress."""

    def __init__(self, *, seed: int = 0, quiet: bool = False) -> None:
        self.seed = seed
        self.promises: dict[tuple[str, str], Promise] = {}
        self._quiet = quiet
        self._began = time.monotonic()

    @property
    def scenario(self) -> str:
        """The one that is running here; others may be running beside it."""
        return _scenario.get()

    @contextmanager
    def of(self, scenario: str) -> Iterator[None]:
        """What is reported while inside belongs to this scenario; a crash of it is a violation, too."""
        token = _scenario.set(scenario)
        try:
            yield
        except Exception as error:
            self.violation("the scenario runs to its end", f"{type(error).__name__}: {error}")
            raise
        finally:
            _scenario.reset(token)

    def promise(self, name: str) -> Promise:
        return self.promises.setdefault((self.scenario, name), Promise())

    def trial(self, name: str, times: int = 1) -> None:
        self.promise(name).trials += times

    def violation(self, name: str, what: str) -> None:
        """Counts no trial of its own, except for the first."""
        promise = self.promise(name)
        promise.trials = max(promise.trials, 1)
        promise.violations.append(what)
        self.say(f"VIOLATION {name}: {what}")

    def check(self, name: str, held: object, what: str = "") -> bool:
        """One trial; a violation when `held` is false."""
        self.trial(name)
        if not held:
            self.violation(name, what)
        return bool(held)

    def note(self, name: str, **figures: object) -> None:
        self.promise(name).notes.update({key: str(value) for key, value in figures.items()})

    def say(self, what: str) -> None:
        if not self._quiet:
            seconds = time.monotonic() - self._began
            print(f"{seconds:7.1f} s  {self.scenario:<8}  {what[:600]}", file=sys.stderr, flush=True)

    # ── the end ─────────────────────────────────────────────────────────────────────────────────

    @property
    def is_kept(self) -> bool:
        return bool(self.promises) and all(promise.is_kept for promise in self.promises.values())

    def broken(self, scenario: str | None = None) -> dict[str, list[str]]:
        """The promises that were not kept, and what was seen."""
        return {
            name: promise.violations or ["never tried"]
            for (where, name), promise in self.promises.items()
            if not promise.is_kept and scenario in {None, where}
        }

    def table(self) -> str:
        rows = [("scenario", "promise", "trials", "violations", "")]
        for (scenario, name), promise in self.promises.items():
            notes = ", ".join(f"{key} {value}" for key, value in promise.notes.items())
            rows.append((scenario, name, str(promise.trials), str(len(promise.violations)), notes))
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = [
            f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}  {d:>{widths[3]}}  {e}".rstrip()
            for a, b, c, d, e in rows
        ]
        for (scenario, name), promise in self.promises.items():
            if not promise.is_kept:
                seen = promise.violations or ["never tried"]
                lines += [f"\n{scenario}: {name}:", *(f"  {each}" for each in seen[:_SHOWN])]
                lines += [f"  … and {len(seen) - _SHOWN} more"] * (len(seen) > _SHOWN)
        return "\n".join(lines)

    def as_json(self) -> str:
        told: list[dict[str, Any]] = [
            {"scenario": scenario, "promise": name, **vars(promise)}
            for (scenario, name), promise in self.promises.items()
        ]
        return json.dumps({"seed": self.seed, "kept": self.is_kept, "promises": told}, ensure_ascii=False, indent=2)
