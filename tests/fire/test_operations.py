"""Rolling restarts, clocks that jump, a disk that is full."""

import os
from pathlib import Path

import pytest

from tests.fire import operations
from tests.fire.report import Report


async def test_a_rolling_restart(migrated: Path) -> None:
    report = Report(quiet=True)
    with report.of("rolling"):
        await operations.run_rolling(report, clients=6, order=("store-0", "relay-0"), migrated=migrated)
    assert report.is_kept, report.table()


async def test_clocks_that_jump(migrated: Path) -> None:
    if operations.faketime_library() is None and not os.environ.get("CI"):
        pytest.skip("libfaketime is not installed (apt-get install libfaketime)")
    report = Report(quiet=True)
    with report.of("clocks"):
        await operations.run_clocks(report, migrated=migrated)
    assert report.is_kept, report.table()


async def test_a_full_disk(migrated: Path) -> None:
    report = Report(quiet=True)
    with report.of("disk"):
        await operations.run_full_disk(report, migrated=migrated)
    assert report.is_kept, report.table()
