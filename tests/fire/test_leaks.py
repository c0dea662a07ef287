"""Everything that has a secret fails; then the secrets are looked for everywhere."""

from pathlib import Path

from tests.fire import leaks
from tests.fire.report import Report


async def test_secrets_stay_where_they_belong(migrated: Path) -> None:
    report = Report(quiet=True)
    with report.of("secrets"):
        await leaks.run(report, migrated=migrated)
    assert report.is_kept, report.table()
