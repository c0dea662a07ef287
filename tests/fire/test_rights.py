"""Every route of both services, by every kind of caller."""

from tests.fire import rights
from tests.fire.report import Report
from tests.fire.world import World


async def test_who_may_do_what(calm: World) -> None:
    report = Report(quiet=True)
    with report.of("rights"):
        await rights.run(report, calm)
        assert report.promise(rights.STATUS).trials > 600
    assert report.is_kept, report.table()


def test_a_route_without_a_row_and_a_row_without_a_route_are_found() -> None:
    routes = [row.call for row in rights.RELAY]
    report = Report(quiet=True)
    rights.check_coverage(report, "relay", rights.RELAY[1:], [*routes[:-1], ("GET", "/new")])
    seen = report.broken()[rights.EVERY_ROUTE]
    assert len(seen) == 3
    assert "relay: GET /new has no row" in seen
