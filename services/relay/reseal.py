"""python -m services.relay.reseal: seals all accounts' secrets anew with the first of RELAY_ENCRYPTION_KEYS."""

import argparse
import asyncio
import sys

from services.relay import accounts, development
from services.relay.sealing import Sealer, Unsealable
from services.relay.settings import RelaySettings
from shared.database import Conn, Database, from_settings
from shared.errors import DatabaseUnavailable
from shared.service import read_settings


async def reseal(database: Database, sealer: Sealer) -> tuple[int, list[str]]:
    """How many were sealed anew, and why others could not be opened; all in one transaction."""

    async def work(conn: Conn) -> tuple[int, list[str]]:
        count, problems = 0, []
        for account in await accounts.lock_all(conn):
            if account.secrets is None or account.secrets_key_id == sealer.key_id:
                continue
            try:
                secrets = sealer.secrets_of(account)
            except Unsealable as problem:
                problems.append(f"{account.id}: {problem}")
                continue
            await accounts.put_secrets(conn, account.id, sealer.seal(account.id, secrets), sealer.key_id)
            count += 1
        return count, problems

    await database.open()
    try:
        return await database.transact(work)
    finally:
        await database.close()


def main() -> None:
    argparse.ArgumentParser(
        prog="python -m services.relay.reseal",
        description="Seals the secrets of all accounts anew with the first of RELAY_ENCRYPTION_KEYS. To change the "
        "key, put the new one first and keep the old one behind it, restart all relays, run this, and take the old "
        "one out.",
        epilog="Reads the relay's settings (DATABASE_URL, DB_SCHEMA, RELAY_ENCRYPTION_KEYS …) from the environment. "
        "Exit code 1 when an account could not be opened.",
    ).parse_args()
    settings = read_settings(RelaySettings, "reseal")
    sealer = Sealer(development.secrets_of(settings).encryption_keys)
    try:
        count, problems = asyncio.run(reseal(from_settings(settings, "reseal"), sealer))
    except DatabaseUnavailable:
        sys.exit("reseal: the database cannot be reached")
    print(f"{count} sealed anew with key {sealer.key_id!r}")  # noqa: T201
    if problems:
        sys.exit("\n".join(f"reseal: {problem}" for problem in problems))


if __name__ == "__main__":
    main()
