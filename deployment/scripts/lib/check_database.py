"""Tries DATABASE_URL once. Says in one line, without the password, why it cannot be used; exit code 1 then."""

import asyncio
import os
import sys
from urllib.parse import urlsplit

import asyncpg

from shared.settings import postgres_address

TIMEOUT_SECONDS = 5


async def connect(url: str) -> None:
    connection = await asyncpg.connect(url, timeout=TIMEOUT_SECONDS)
    await connection.close()


def main() -> int:
    try:
        url = postgres_address(os.environ["DATABASE_URL"])
    except ValueError as error:
        print(f"DATABASE_URL is {error}")  # noqa: T201
        return 1
    parts = urlsplit(url)
    try:
        _ = parts.port
    except ValueError:  # whatever is shown of it here could be a part of the password
        print("DATABASE_URL cannot be read: special characters in user and password have to be percent-encoded")  # noqa: T201
        return 1
    try:
        asyncio.run(connect(url))
    except TimeoutError:
        reason = f"no answer within {TIMEOUT_SECONDS} s"
    except Exception as error:  # whatever it is, it goes into the one line
        reason = str(error).strip().split("\n")[0] or type(error).__name__
    else:
        return 0
    where = parts.netloc.rpartition("@")[2] or "the local socket"
    if parts.password:
        reason = reason.replace(parts.password, "***")
    print(f"the database at {where} cannot be reached (DATABASE_URL): {reason}")  # noqa: T201
    return 1


if __name__ == "__main__":
    sys.exit(main())
