"""A part of the corpus, and calls made up from the descriptions."""

from tests.fire import corpus, hostile, rights
from tests.fire.report import Report
from tests.fire.world import World


async def test_hostile_input(calm: World) -> None:
    report = Report(quiet=True)
    with report.of("hostile"):
        await hostile.run_corpus(report, calm, at_most=600)
        assert report.promise(hostile.REFUSED).trials >= 1200
    assert report.is_kept, report.table()


async def test_calls_made_up_from_the_description_of_relay(calm: World) -> None:
    """Those of session_service are tests/session_service/test_description.py."""
    report = Report(quiet=True)
    with report.of("hostile"):
        await hostile.run_schemathesis(report, calm, 1, services=("relay",))
    assert report.is_kept, report.table()


def test_every_route_that_takes_something_has_cases() -> None:
    for rows in (rights.RELAY, rights.STORE):
        known = {case.row.path for case in corpus.cases(rows)}
        missing = {row.path for row in rows} - known
        assert all("kiro" in path or path.startswith(("/docs", "/redoc", "/sockets")) for path in missing), missing
