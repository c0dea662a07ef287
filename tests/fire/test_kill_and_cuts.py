"""A short kill run and a short cut run hold; and each finds the fault that it is there to find."""

from pathlib import Path

from tests.fire import cuts, kill, mutants
from tests.fire.audit import KEPT, ONCE, ONE_USER
from tests.fire.clients import NO_LEAK
from tests.fire.report import Report
from tests.fire.world import World

NO_FAULTS: dict[str, float] = {}


async def test_parts_killed_at_random(migrated: Path) -> None:
    report = Report(quiet=True)
    with report.of("kill"):
        await kill.run(report, kills=6, clients=12, instances=1, in_a_hurry=True, migrated=migrated, seed=1)
    assert report.is_kept, report.table()


async def test_links_cut_at_random(migrated: Path) -> None:
    report = Report(quiet=True)
    with report.of("cuts"):
        await cuts.run(report, seconds=6, clients=12, in_a_hurry=True, migrated=migrated, seed=1)
    assert report.is_kept, report.table()


async def write_the_log_late(made: World) -> None:
    """What a transaction leaves to be written later is written much later, so that one kill is sure to lose some."""
    async with made.sql() as sql:
        for setting in ("wal_writer_delay = '10s'", "wal_writer_flush_after = '1GB'"):
            await sql.execute(f"ALTER SYSTEM SET {setting}")
        await sql.execute("SELECT pg_reload_conf()")


async def test_a_kill_run_finds_commits_that_are_not_on_disk(migrated: Path) -> None:
    report = Report(quiet=True)
    with mutants.mutant(mutants.ASYNC_COMMIT) as source, report.of("kill"):
        await kill.run(
            report,
            kills=2,
            clients=6,
            instances=1,
            in_a_hurry=True,
            migrated=migrated,
            only=("postgres",),
            source=source,
            prepare=write_the_log_late,
        )
    lost = [what for what in report.broken().get(KEPT, []) if "lost" in what]
    assert len(lost) > 3, report.table()


async def test_a_cut_run_finds_keys_that_are_ignored(migrated: Path) -> None:
    report = Report(quiet=True)
    rates = {"clients-store": 0.3, "clients-relay": 0.3}
    with mutants.mutant(mutants.KEYS_IGNORED) as source, report.of("cuts"):
        await cuts.run(report, seconds=4, clients=8, in_a_hurry=True, migrated=migrated, source=source, rates=rates)
    twice = "\n".join(report.broken().get(ONCE, []))
    assert " log: 2 times" in twice, report.table()
    assert " talk-0: " in twice, report.table()


async def test_the_markers_find_an_owner_left_out_of_a_listing(migrated: Path) -> None:
    report = Report(quiet=True)
    with mutants.mutant(mutants.OWNER_LEFT_OUT_OF_A_LISTING) as source, report.of("cuts"):
        await cuts.run(report, seconds=1, clients=8, in_a_hurry=True, migrated=migrated, source=source, rates=NO_FAULTS)
    assert NO_LEAK in report.broken(), report.table()


async def test_the_markers_find_an_owner_left_out_of_contexts(migrated: Path) -> None:
    """Nobody reads it, but a model would be sent it."""
    report = Report(quiet=True)
    with mutants.mutant(mutants.OWNER_LEFT_OUT_OF_CONTEXTS) as source, report.of("cuts"):
        await cuts.run(
            report, seconds=2, clients=12, in_a_hurry=True, migrated=migrated, source=source, rates=NO_FAULTS
        )
    assert ONE_USER in report.broken(), report.table()
