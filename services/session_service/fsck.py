"""python -m services.session_service.fsck: does the record agree with itself?

Its one invariant: without --repair it changes nothing; with it, only what follows from rows is written anew.
"""

import argparse
import asyncio
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from services.session_service import checks
from services.session_service.settings import SessionServiceSettings
from shared.database import Database, Row, from_settings
from shared.errors import DatabaseUnavailable
from shared.service import read_settings


@dataclass(frozen=True, slots=True)
class Finding:
    """Something off: in which session, what, and how it could be mended (None: not by this program)."""

    user_id: str
    session_id: str
    problem: str
    detail: str
    repair: tuple[Any, dict[str, Any]] | None = None


async def check(database: Database) -> AsyncIterator[Finding]:
    """Everything that is off, session by session; tells its progress on standard error."""
    after, seen = {"after_user": "", "after_session": ""}, 0
    while rows := await database.rows(checks.CHECK, **after):
        for row in rows:
            for finding in _findings(row):
                yield finding
        seen += len(rows)
        sys.stderr.write(f"\r{seen} sessions checked")
        after = {"after_user": rows[-1]["user_id"], "after_session": rows[-1]["session_id"]}
    sys.stderr.write(f"\r{seen} sessions checked\n")
    for row in await database.rows(checks.ORPHAN_MESSAGES):
        yield Finding(row["user_id"], row["session_id"], "message without its turn", f"seq {row['seq']}")
    for row in await database.rows(checks.ORPHAN_TURNS):
        yield Finding(row["user_id"], row["session_id"], "turn without its messages", row["turn_id"])
    for row in await database.rows(checks.TOTALS):
        yield Finding(row["user_id"] or "(all users)", "", "totals differ from what was counted", "")
    for row in await database.rows(checks.USAGE):
        yield Finding(row["user_id"] or "(all users)", "", "usage differs from the messages", f"on {row['start']:%F}")


def _findings(row: Row) -> list[Finding]:
    place = (row["user_id"], row["session_id"])
    key = {"user_id": place[0], "session_id": place[1]}
    found = []
    off = [name for name in checks.COUNTERS if row[name] != row[f"counted_{name}"]]
    if off:
        detail = ", ".join(f"{name} {row[name]}, by its rows {row[f'counted_{name}']}" for name in off)
        new = {f"new_{name}": row[f"counted_{name}"] for name in checks.COUNTERS}
        found.append(Finding(*place, "counter differs from its rows", detail, (checks.RECOUNT, key | new)))
    if row["rows"] != row["counted_last_seq"] or row["first"] != 1:
        detail = f"{row['rows']} messages, numbered {row['first']} to {row['counted_last_seq']}"
        found.append(Finding(*place, "gap in the seqs", detail))
    if row["open_turn_id"] is not None and row["lease_expires_at"] is None:
        found.append(Finding(*place, "open turn without a lease", row["open_turn_id"], (checks.CLOSE, key)))
    if row["open_turn_id"] is None and row["lease_expires_at"] is not None:
        found.append(Finding(*place, "lease without an open turn", str(row["latest_turn_id"]), (checks.RELEASE, key)))
    return found


async def run(database: Database, *, repair: bool) -> int:
    """Prints a table of what is off; the exit code: 0 when nothing is left that is off."""
    await database.open()
    left = 0
    try:
        async for finding in check(database):
            mended = repair and finding.repair is not None
            if mended and finding.repair is not None:
                statement, values = finding.repair
                await database.rows(statement, **values)
            left += not mended
            state = "repaired" if mended else "repairable" if finding.repair else "to be looked at"
            print(f"{finding.user_id}\t{finding.session_id}\t{finding.problem}\t{finding.detail}\t{state}")  # noqa: T201
    finally:
        await database.close()
    return 1 if left else 0


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m services.session_service.fsck",
        description="Checks counters against rows, seqs, turns and leases. Prints a line for each thing that is off "
        "(user, session, problem, detail, state, parted by tabs) and exits with 1 when any is left.",
        epilog="Checking is safe at any time; use --repair only while no one writes.",
    )
    parser.add_argument("--repair", action="store_true", help="write counters and leases anew from the rows")
    arguments = parser.parse_args()
    settings = read_settings(SessionServiceSettings, "fsck")
    try:
        sys.exit(asyncio.run(run(from_settings(settings, "fsck"), repair=arguments.repair)))
    except DatabaseUnavailable:
        sys.exit("fsck: the database cannot be reached")


if __name__ == "__main__":
    main()
