"""A short kill run and a short cut run hold; and each finds the fault that it is there to find."""

from pathlib import Path

from tests.fire import cuts, kill, mutants
from tests.fire.audit import KEPT, ONCE, ONE_USER
from tests.fire.clients import NO_LEAK, User
from tests.fire.link import DEAF, RESET, Link
from tests.fire.report import Report
from tests.fire.world import MODEL, World, world

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


async def test_a_try_that_was_opened_unheard_is_replaced_though_the_next_was_never_opened(migrated: Path) -> None:
    """The key's record names the turn that a try is about to open: it must not forget the one before for it."""
    links: list[Link] = []

    async def prepare(made: World) -> None:
        links.append(await Link("turns", seed="1", port=made.store_ports[0], only=b"/turns?").open())
        made.store_url = links[0].url

    async with world(prepare=prepare, migrated=migrated) as made:
        (link,) = links
        user = User("u", key=await made.make_key("u"))
        body = {"model": MODEL, "max_tokens": 50, "messages": [{"role": "user", "content": "only once"}]}
        headers = {"x-api-key": user.key, "x-session-id": "s", "idempotency-key": "k"}
        statuses = []
        for fault in (DEAF, RESET, ""):
            link.rate, link.weights = bool(fault), {fault: 1}
            answer = await made.http.post(f"{made.relay()}/v1/messages", json=body, headers=headers)
            statuses.append(answer.status_code)
            await made.leases_run_out()
        await link.close()
        params: dict[str, str | bool] = {"user_id": "u", "include_superseded": True}
        url = f"{made.store()}/api/v1/sessions/s/messages"
        stored = (await made.http.get(url, params=params, headers=made.store_headers)).json()["messages"]
    assert statuses == [529, 529, 200]
    assert link.faults == {DEAF: 1, RESET: 1}
    assert [each["content"] for each in stored if each["role"] == "user"] == ["only once"] * 2
    assert [each["superseded_at"] is None for each in stored] == [False, True, True]


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
