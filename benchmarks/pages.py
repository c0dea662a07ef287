"""Results on the pages in docs/: what stands below the mark of a page is the last full result, and its conditions."""

from pathlib import Path
from typing import Any

from benchmarks.load import ROOT

MARK = "<!-- result -->\n"


def write(page: str, table: str, conditions: dict[str, Any]) -> Path:
    """Puts the result in place of the one before."""
    path = ROOT / "docs" / page
    above, mark, _ = path.read_text(encoding="utf-8").partition(MARK)
    if not mark:
        raise ValueError(f"{path} has no line {MARK.strip()}")
    told = {name: value for name, value in conditions.items() if name not in {"packages", "peers", "pace"}}
    lines = [f"- {name.replace('_', ' ')}: {value}" for name, value in told.items()]
    versions = ", ".join(f"{name} {number}" for name, number in conditions["packages"].items())
    lines += [f"- {versions}", *(f"- {each}" for each in conditions.get("peers", ()))]
    path.write_text(above + MARK + "\n" + table + "\n" + "\n".join(lines) + "\n", encoding="utf-8")
    return path
