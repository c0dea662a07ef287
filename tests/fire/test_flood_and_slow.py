"""A short flood, and a few hundred slow and broken clients."""

from pathlib import Path

from tests.fire import flood, slow
from tests.fire.report import Report


async def test_a_flood(migrated: Path) -> None:
    report = Report(quiet=True)
    with report.of("flood"):
        await flood.run(report, seconds=4, rate=10, migrated=migrated)
    assert report.is_kept, report.table()


async def test_slow_and_broken_clients(migrated: Path) -> None:
    report = Report(quiet=True)
    with report.of("slow"):
        await slow.run(report, idle=600, migrated=migrated)
    assert report.is_kept, report.table()
