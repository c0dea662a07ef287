"""A small forward proxy for tests: a real process on loopback that passes bytes on, and fails on command.

    $ python -m tests.proxy --port 3128 --user u --password p
    test proxy on http://127.0.0.1:3128

It speaks HTTP (requests in absolute form, and CONNECT; Basic credentials, 407 without the right ones), with
`--socks` SOCKS5 instead (no credentials, or user and password). Beside that, on the same port:

    GET  /control/log      what came in: protocol, method, target, whether the credentials were right, how it ended
    POST /control/fault    the next request fails; an unknown field is refused
        {"kind": "refuse"}                               502, or SOCKS5's "connection refused"
        {"kind": "hang"}                                 not a byte, until the client goes
        {"kind": "reset", "after_bytes": 100}            a TCP reset once so much of the answer has passed
        {"kind": "hang", "repeat": -1}                   this and all to come
    POST /control/reset    forgets log and faults

In Python tests use `client.TestProxy`:

    with TestProxy.started(user="u", password="p") as proxy:
        httpx.get(url, proxy=proxy.url)
        assert [entry["target"] for entry in proxy.log()] == ["127.0.0.1:8100"]

Its one invariant: what passes is noted before its target is connected, so that a log without an entry means that
nothing went this way.
"""
