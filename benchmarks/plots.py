"""Plots of a result, as PNG files. What is drawn is in the result; nothing is measured here."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

mpl.use("Agg")

_MET, _MISSED, _PLAIN = "#2a7f62", "#b3423a", "#7a7f87"
_DPI = 120


def draw(result: dict[str, Any], folder: Path) -> list[Path]:
    """All plots that the result has something for; gives their paths."""
    made = []
    compared = [each for each in result["figures"] if each["sign"] == "×" and each["target"]]
    if compared:
        made.append(_save(_shares(compared), folder / "compared.png"))
    curves: dict[str, Any] = result["curves"]
    for name, title, words, unit in (
        ("relay_latency", "A whole answer, open loop", ("relay at", "direct at"), "ms"),
        ("append_latency", "An append at half of the highest rate, open loop", ("append",), "ms"),
        ("contexts", "The context of the last 20 messages", ("context,",), "ms"),
        ("events", "From upstream's sending of an event to the client", ("event",), "ms"),
    ):
        chosen = {label: curve for label, curve in curves.items() if label.startswith(words)}
        if chosen:
            made.append(_save(_percentiles(title, chosen, unit), folder / f"{name}.png"))
    memory = {label: curve for label, curve in curves.items() if label.startswith("memory")}
    if memory:
        made.append(_save(_lines(memory), folder / "memory.png"))
    return made


def _save(canvas: Canvas, path: Path) -> Path:
    canvas.savefig(path, dpi=_DPI, bbox_inches="tight")
    return path


def _shares(figures: Sequence[dict[str, Any]]) -> Canvas:
    """Each figure as a multiple of its yardstick's, with the limit that it has."""
    canvas = Canvas(figsize=(9, 0.45 * len(figures) + 1.2))
    axes: Axes = canvas.subplots()
    labels = [f"{each['what']}\nbeside {each['yardstick']}" for each in figures]
    places = range(len(figures))
    colours = [_MET if each["is_met"] else _MISSED for each in figures]
    axes.barh(places, [each["compared"] for each in figures], color=colours, height=0.6)
    for place, each in zip(places, figures, strict=True):
        axes.plot([each["target"]["limit"]] * 2, [place - 0.42, place + 0.42], color="black", linewidth=1.5)
        for one in each["rounds"]:
            axes.plot(one, place, "o", color="white", markeredgecolor="black", markersize=3)
    axes.set_yticks(places, labels, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("multiple of the yardstick (black line: the target, dots: the rounds)", fontsize=8)
    _plain_frame(axes)
    return canvas


def _percentiles(title: str, curves: dict[str, Any], unit: str) -> Canvas:
    """How much of all took no longer than what; the scale of shares stretches the slowest."""
    canvas = Canvas(figsize=(7, 4))
    axes: Axes = canvas.subplots()
    for label, curve in curves.items():
        axes.plot([1 / (1 - share) for share, _ in curve], [value for _, value in curve], label=label, linewidth=1.3)
    axes.set_xscale("log")
    axes.set_yscale("log")
    ticks = [0.5, 0.9, 0.99, 0.999]
    axes.set_xticks([1 / (1 - share) for share in ticks], [f"p{share * 100:g}" for share in ticks])
    axes.minorticks_off()
    axes.set_ylabel(unit, fontsize=8)
    axes.set_title(title, fontsize=9)
    axes.legend(fontsize=7, frameon=False)
    _plain_frame(axes)
    return canvas


def _lines(curves: dict[str, Any]) -> Canvas:
    canvas = Canvas(figsize=(7, 3))
    axes: Axes = canvas.subplots()
    for label, curve in curves.items():
        axes.plot([share * 100 for share, _ in curve], [value for _, value in curve], marker="o", label=label)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("% of the turns", fontsize=8)
    axes.set_ylabel("MiB", fontsize=8)
    axes.legend(fontsize=7, frameon=False)
    _plain_frame(axes)
    return canvas


def _plain_frame(axes: Axes) -> None:
    axes.grid(visible=True, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=7)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.spines["left"].set_color(_PLAIN)
