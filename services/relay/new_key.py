"""python -m services.relay.new_key --user alice: makes an API key and prints it, this once."""

import argparse
import asyncio
import secrets
import sys

from pydantic import TypeAdapter, ValidationError
from uuid_utils import uuid7

from services.relay import development, keys
from services.relay.settings import RelaySettings
from shared import values
from shared.database import Database, from_settings
from shared.errors import DatabaseUnavailable
from shared.service import read_settings


async def make(database: Database, pepper: str, user_id: str, name: str) -> str:
    """The new key: `cr_` and 64 hex digits. What is stored of it is its keyed hash."""
    secret = keys.KEY_PREFIX + secrets.token_hex(32)
    await database.open()
    try:
        await keys.add(database, str(uuid7()), pepper, secret, {"user_id": user_id, "name": name})
    finally:
        await database.close()
    return secret


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m services.relay.new_key",
        description="Makes an API key for the relay and prints it. It is shown this once: only its hash is stored.",
        epilog="Reads the relay's settings (DATABASE_URL, DB_SCHEMA, RELAY_KEY_PEPPER …) from the environment.",
    )
    parser.add_argument("--user", required=True, help="whose sessions the key works on")
    parser.add_argument("--name", help="a name for people, 1 to 100 characters; default: the user's id")
    arguments = parser.parse_args()
    name = arguments.name or arguments.user[:100]
    try:
        TypeAdapter(values.UserId).validate_python(arguments.user)
    except ValidationError as error:
        parser.error(f"--user: {error.errors()[0]['msg']}")
    if len(name) > 100:
        parser.error("--name: at most 100 characters")
    settings = read_settings(RelaySettings, "new_key")
    pepper = development.secrets_of(settings).pepper
    try:
        print(asyncio.run(make(from_settings(settings, "new_key"), pepper, arguments.user, name)))  # noqa: T201
    except DatabaseUnavailable:
        sys.exit("new_key: the database cannot be reached")


if __name__ == "__main__":
    main()
