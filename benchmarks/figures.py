"""A figure beside its yardstick, and the table and file that they end up in.

Its one invariant: what is compared was measured in turn, in the same run: each round's value stands beside the
yardstick's of the same round, and what is told is the median of the rounds' comparisons.
"""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

QUANTILES = [*(step / 100 for step in range(1, 100)), 0.995, 0.999]


@dataclass(frozen=True, slots=True)
class Target:
    limit: float
    kind: Literal["at least", "at most"]
    aim: float | None = None

    def is_met(self, value: float) -> bool:
        return value >= self.limit if self.kind == "at least" else value <= self.limit


def at_least(limit: float, *, aim: float | None = None) -> Target:
    return Target(limit, "at least", aim)


def at_most(limit: float) -> Target:
    return Target(limit, "at most")


@dataclass(slots=True)
class Figure:
    """`compared` is `value` set against the yardstick in `sign`: a share (×), a difference (+) or nothing (itself)."""

    what: str
    unit: str
    value: float
    target: Target | None = None
    yardstick: str = ""
    yardstick_value: float | None = None
    sign: Literal["×", "+", ""] = ""
    compared: float = 0.0
    rounds: list[float] = field(default_factory=list)
    benchmark: str = ""

    @property
    def verdict(self) -> str:
        if self.target is None:
            return ""
        return "yes" if self.target.is_met(self.compared) else "NO"

    def wire(self) -> dict[str, Any]:
        return asdict(self) | {"is_met": self.target.is_met(self.compared) if self.target else None}


def alone(what: str, unit: str, value: float, target: Target | None = None) -> Figure:
    return Figure(what, unit, value, target, compared=value)


def share(
    what: str, unit: str, values: Sequence[float], yardstick: str, theirs: Sequence[float], target: Target | None = None
) -> Figure:
    """The value as a multiple of the yardstick's, round by round."""
    rounds = [one / other for one, other in zip(values, theirs, strict=True)]
    medians = statistics.median(values), statistics.median(theirs)
    compared = statistics.median(rounds)
    return Figure(what, unit, medians[0], target, yardstick, medians[1], "×", compared, rounds)


def added(
    what: str, unit: str, values: Sequence[float], yardstick: str, theirs: Sequence[float], target: Target | None = None
) -> Figure:
    """What the value is above the yardstick's, round by round."""
    rounds = [one - other for one, other in zip(values, theirs, strict=True)]
    medians = statistics.median(values), statistics.median(theirs)
    compared = statistics.median(rounds)
    return Figure(what, unit, medians[0], target, yardstick, medians[1], "+", compared, rounds)


def percentile(values: Sequence[float], share_of_all: float) -> float:
    """The value that this share of all is not above."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share_of_all * len(ordered)))]


def curve(values: Sequence[float]) -> list[tuple[float, float]]:
    """Percentiles, for plots: the share and its value."""
    ordered = sorted(values)
    return [(each, ordered[min(len(ordered) - 1, int(each * len(ordered)))]) for each in QUANTILES]


@dataclass(slots=True)
class Findings:
    """What a benchmark gives: figures, and the curves behind them by name."""

    figures: list[Figure] = field(default_factory=list)
    curves: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, figure: Figure) -> None:
        self.figures.append(figure)


def number(value: float) -> str:
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.2f}"


_HEAD = ("what", "measured", "yardstick", "its figure", "compared", "target", "met")


def rows(figures: Sequence[Figure]) -> list[tuple[str, ...]]:
    """The table's lines, its head first."""
    lines: list[tuple[str, ...]] = [_HEAD]
    for each in figures:
        theirs = "" if each.yardstick_value is None else f"{number(each.yardstick_value)} {each.unit}"
        sign = {"×": f"{each.compared:.2f} ×", "+": f"{each.compared:+.2f} {each.unit}", "": ""}[each.sign]
        target = ""
        if each.target is not None:
            target = f"{'≥' if each.target.kind == 'at least' else '≤'} {number(each.target.limit)}"
        measured = f"{number(each.value)} {each.unit}"
        lines.append((each.what, measured, each.yardstick, theirs, sign, target, each.verdict))
    return lines


def table(figures: Sequence[Figure]) -> str:
    lines = rows(figures)
    widths = [max(len(line[column]) for line in lines) for column in range(len(_HEAD))]
    told = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([told[0], "-" * len(told[0]), *told[1:]])


def markdown(figures: Sequence[Figure]) -> str:
    head, *lines = rows(figures)
    told = [head, tuple("---" for _ in head), *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in told) + "\n"
