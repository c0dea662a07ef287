"""`python -m shared.embedded_postgres start | stop | status | url DIR`."""

import argparse
import sys
from pathlib import Path

from shared import embedded_postgres

HELP = """
  start   start the server, making DIR first if it is not there, and print its URL;
          one that runs already is left as it is. It goes on running until 'stop'.
  stop    stop the server and wait for its end
  status  print whether it runs; the exit code is 3 when it does not
  url     print the URL of the running server
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m shared.embedded_postgres",
        description="A real Postgres in one directory, for development and tests.",
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("action", choices=["start", "stop", "status", "url"])
    parser.add_argument("directory", metavar="DIR", type=Path, help="its data directory")
    arguments = parser.parse_args()
    try:
        return _act(arguments.action, arguments.directory)
    except embedded_postgres.EmbeddedPostgresFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _act(action: str, directory: Path) -> int:
    if action == "start":
        print(embedded_postgres.start(directory))
    elif action == "stop":
        embedded_postgres.stop(directory)
    elif action == "url":
        print(embedded_postgres.url(directory))
    elif (pid := embedded_postgres.pid(directory)) is None:
        print("not running")
        return 3
    else:
        print(f"running, pid {pid}, {embedded_postgres.url(directory)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
