"""Runs the test upstream until it is told to stop.

Its one invariant: the line that names the address is printed once the port is open, and not before.
"""

import argparse
import asyncio
import signal
import sys

import uvloop

import tests.upstream
from tests.upstream.server import Server


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.upstream",
        description=tests.upstream.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=0, help="port to listen on; 0, the default: a free one")
    parser.add_argument(
        "--log-limit", type=int, default=10_000, metavar="N", help="requests kept in the log (default: %(default)s)"
    )
    parser.add_argument("--exit-with-stdin", action="store_true", help="stop when standard input is closed")
    return parser.parse_args()


async def _run(arguments: argparse.Namespace) -> None:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    if arguments.exit_with_stdin:
        loop.add_reader(sys.stdin.fileno(), stop.set)
    server = Server(log_limit=arguments.log_limit)
    listener = await loop.create_server(server.connect, arguments.host, arguments.port, backlog=4096)
    host, port = listener.sockets[0].getsockname()[:2]
    print(f"test upstream on http://{host}:{port}", flush=True)
    await stop.wait()
    listener.close()


def main() -> int:
    arguments = _arguments()
    try:
        uvloop.run(_run(arguments))
    except OSError as error:
        print(f"cannot listen on {arguments.host}:{arguments.port}: {error.strerror or error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
