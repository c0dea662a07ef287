"""Runs the test proxy until it is told to stop.

Its one invariant: the line that names the address is printed once the port is open, and not before.
"""

import argparse
import asyncio
import signal
import sys

import tests.proxy
from tests.proxy.server import Proxy


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.proxy",
        description=tests.proxy.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=0, help="port to listen on; 0, the default: a free one")
    parser.add_argument("--user", default="", help="with --password: the credentials that it asks for")
    parser.add_argument("--password", default="")
    parser.add_argument("--socks", action="store_true", help="SOCKS5 instead of HTTP")
    parser.add_argument("--exit-with-stdin", action="store_true", help="stop when standard input is closed")
    return parser.parse_args()


async def _run(arguments: argparse.Namespace) -> None:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    if arguments.exit_with_stdin:
        loop.add_reader(sys.stdin.fileno(), stop.set)
    credentials = (arguments.user, arguments.password) if arguments.user else None
    proxy = Proxy(credentials, socks=arguments.socks)
    listener = await asyncio.start_server(proxy.serve, arguments.host, arguments.port, backlog=1024)
    host, port = listener.sockets[0].getsockname()[:2]
    print(f"test proxy on {'socks5' if arguments.socks else 'http'}://{host}:{port}", flush=True)
    await stop.wait()
    listener.close()


def main() -> int:
    arguments = _arguments()
    try:
        asyncio.run(_run(arguments))
    except OSError as error:
        print(f"cannot listen on {arguments.host}:{arguments.port}: {error.strerror or error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
