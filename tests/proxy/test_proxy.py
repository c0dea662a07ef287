"""The test proxy itself: a tool that others rely on has to be right."""

import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from tests.processes import free_port
from tests.proxy.client import TestProxy
from tests.upstream.client import TestUpstream

USER, PASSWORD = "user", "p:ä@ss"
BODY: dict[str, Any] = {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "hello"}]}
HEADERS = {"x-api-key": "k", "anthropic-version": "2023-06-01"}
ANSWER = "You said: hello. I see 1 messages."


@pytest.fixture(scope="module")
def upstream() -> Iterator[TestUpstream]:
    with TestUpstream.started() as upstream:
        yield upstream


@pytest.fixture(scope="module")
def open_proxy() -> Iterator[TestProxy]:
    with TestProxy.started() as proxy:
        yield proxy


@pytest.fixture(scope="module")
def guarded_proxy() -> Iterator[TestProxy]:
    with TestProxy.started(user=USER, password=PASSWORD) as proxy:
        yield proxy


@pytest.fixture
def proxy(open_proxy: TestProxy, upstream: TestUpstream) -> TestProxy:
    upstream.reset()
    open_proxy.reset()
    return open_proxy


@pytest.fixture
def guarded(guarded_proxy: TestProxy, upstream: TestUpstream) -> TestProxy:
    upstream.reset()
    guarded_proxy.reset()
    return guarded_proxy


def client(proxy_url: str) -> httpx.Client:
    return httpx.Client(proxy=proxy_url, headers=HEADERS, timeout=5, trust_env=False)


def ask(proxy_url: str, upstream: TestUpstream, **fields: Any) -> httpx.Response:
    with client(proxy_url) as http:
        return http.post(f"{upstream.url}/v1/messages?beta=true", json=BODY | fields)


def entry(upstream: TestUpstream, **fields: str) -> dict[str, str]:
    told = {"protocol": "http", "method": "POST", "target": urlsplit(upstream.url).netloc, "credentials": "none"}
    return told | {"outcome": "finished"} | fields


# ── HTTP ────────────────────────────────────────────────────────────────────────────────────────


def test_a_plain_answer(proxy: TestProxy, upstream: TestUpstream) -> None:
    answer = ask(proxy.url, upstream)
    assert answer.json()["content"][0]["text"] == ANSWER
    (sent,) = upstream.requests()
    assert (sent["json"], sent["query"], sent["headers"]["x-api-key"]) == (BODY, "beta=true", "k")
    assert proxy.log() == [entry(upstream)]


def test_a_stream_passes_as_it_comes(proxy: TestProxy, upstream: TestUpstream) -> None:
    upstream.script({"hang_seconds": 30, "after_events": 4})
    with (
        client(proxy.url) as http,
        http.stream("POST", f"{upstream.url}/v1/messages", json=BODY | {"stream": True}) as answer,
    ):
        pieces, seen = answer.iter_raw(), b""
        while seen.count(b"\n\n") < 4:
            seen += next(pieces)
        assert upstream.state()["running"] == 1
        assert proxy.log() == [entry(upstream, outcome="running")]


async def test_a_client_that_goes_frees_the_target(proxy: TestProxy, upstream: TestUpstream) -> None:
    upstream.script({"hang_seconds": 30})
    with pytest.raises(httpx.ReadTimeout), client(proxy.url) as http:
        http.post(f"{upstream.url}/v1/messages", json=BODY, timeout=httpx.Timeout(5, read=0.2))
    await upstream.until(lambda state: state["running"] == 0, seconds=1)


def test_large_bodies_both_ways(guarded: TestProxy, upstream: TestUpstream) -> None:
    upstream.script({"huge_answer_bytes": 3_000_000})
    answer = ask(guarded.url, upstream, system="x" * 3_000_000)
    assert len(answer.json()["content"][0]["text"]) == 3_000_000
    assert len(upstream.requests()[0]["json"]["system"]) == 3_000_000


def test_credentials(guarded: TestProxy, upstream: TestUpstream) -> None:
    assert ask(guarded.url, upstream).status_code == 200
    assert "proxy-authorization" not in upstream.requests()[0]["headers"]
    wrong = f"http://{USER}:no@127.0.0.1:{guarded.port}"
    for url in (wrong, f"http://127.0.0.1:{guarded.port}"):
        answer = ask(url, upstream, system="x" * 1_000_000)
        assert answer.status_code == 407
        assert answer.headers["proxy-authenticate"].startswith("Basic ")
    assert guarded.log() == [
        entry(upstream, credentials="right"),
        entry(upstream, credentials="wrong", outcome="denied"),
        entry(upstream, credentials="none", outcome="denied"),
    ]
    assert len(upstream.requests()) == 1


def connected(proxy: TestProxy, target: str, *headers: str) -> tuple[socket.socket, bytes]:
    """A tunnel by CONNECT, and what the proxy said."""
    tunnel = socket.create_connection(("127.0.0.1", proxy.port), timeout=5)
    tunnel.sendall("\r\n".join([f"CONNECT {target} HTTP/1.1", f"Host: {target}", *headers, "", ""]).encode())
    said = b""
    while b"\r\n\r\n" not in said:
        said += tunnel.recv(1)
    return tunnel, said


def get_through(tunnel: socket.socket) -> bytes:
    """The answer to a request through a tunnel, whole."""
    tunnel.sendall(
        b"GET /v1/models HTTP/1.1\r\nhost: x\r\nx-api-key: k\r\nanthropic-version: 1\r\nconnection: close\r\n\r\n"
    )
    with tunnel.makefile("rb") as answer:
        return answer.read()


def test_a_tunnel(guarded: TestProxy, upstream: TestUpstream) -> None:
    target = urlsplit(upstream.url).netloc
    authorization = "Proxy-Authorization: Basic dXNlcjpwOsOkQHNz"
    tunnel, said = connected(guarded, target, authorization)
    with closing(tunnel):
        assert said.startswith(b"HTTP/1.1 200 ")
        assert b"test-model" in get_through(tunnel)
    tunnel, said = connected(guarded, target)
    tunnel.close()
    assert said.startswith(b"HTTP/1.1 407 ")
    assert guarded.log() == [
        entry(upstream, protocol="connect", method="CONNECT", credentials="right"),
        entry(upstream, protocol="connect", method="CONNECT", outcome="denied"),
    ]


# ── SOCKS5 ──────────────────────────────────────────────────────────────────────────────────────


def greeted(proxy: TestProxy, methods: bytes) -> tuple[socket.socket, bytes]:
    tunnel = socket.create_connection(("127.0.0.1", proxy.port), timeout=5)
    tunnel.sendall(b"\x05" + bytes([len(methods)]) + methods)
    return tunnel, received(tunnel, 2)


def received(tunnel: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count and (piece := tunnel.recv(count - len(data))):
        data += piece
    return data


def socks_request(tunnel: socket.socket, host: str | bytes, port: int, command: int = 1) -> int:
    """The proxy's reply code; a host of bytes goes as an address, of text as a name."""
    kinds = {4: b"\x01", 16: b"\x04"}
    address = kinds[len(host)] + host if isinstance(host, bytes) else b"\x03" + bytes([len(host)]) + host.encode()
    tunnel.sendall(bytes([5, command, 0]) + address + struct.pack("!H", port))
    return received(tunnel, 10)[1]


@pytest.mark.parametrize(("host", "told"), [("localhost", "localhost"), (bytes([127, 0, 0, 1]), "127.0.0.1")])
def test_socks_without_credentials(upstream: TestUpstream, host: str | bytes, told: str) -> None:
    port = urlsplit(upstream.url).port or 0
    with TestProxy.started(socks=True) as proxy:
        tunnel, chosen = greeted(proxy, b"\x00\x02")
        with closing(tunnel):
            assert chosen == b"\x05\x00"
            assert socks_request(tunnel, host, port) == 0
            assert b"test-model" in get_through(tunnel)
        unreachable, _ = greeted(proxy, b"\x00")
        with closing(unreachable):
            assert socks_request(unreachable, host, free_port()) == 5
        binding, _ = greeted(proxy, b"\x00")
        with closing(binding):
            assert socks_request(binding, host, port, command=2) == 7
        log = proxy.log()
    assert log[0] == entry(upstream, protocol="socks5", method="CONNECT", target=f"{told}:{port}")
    assert [each["outcome"] for each in log] == ["finished", "unreachable"]


def test_socks_with_credentials(upstream: TestUpstream) -> None:
    port = urlsplit(upstream.url).port or 0
    with TestProxy.started(user=USER, password=PASSWORD, socks=True) as proxy:
        assert proxy.url == f"socks5://user:p%3A%C3%A4%40ss@127.0.0.1:{proxy.port}"
        for password, accepted in ((PASSWORD, b"\x01\x00"), ("no", b"\x01\x01")):
            tunnel, chosen = greeted(proxy, b"\x00\x02")
            with closing(tunnel):
                assert chosen == b"\x05\x02"
                secret = password.encode()
                tunnel.sendall(b"\x01" + bytes([len(USER)]) + USER.encode() + bytes([len(secret)]) + secret)
                assert received(tunnel, 2) == accepted
                if password == PASSWORD:
                    assert socks_request(tunnel, "127.0.0.1", port) == 0
                    assert b"test-model" in get_through(tunnel)
                else:
                    assert tunnel.recv(1) == b""
        tunnel, chosen = greeted(proxy, b"\x00")
        with closing(tunnel):
            assert chosen == b"\x05\xff"
        log = proxy.log()
    assert [(each["credentials"], each["outcome"]) for each in log] == [
        *(("right", "finished"), ("wrong", "denied"), ("none", "denied")),
    ]


def test_each_speaks_its_own_protocol_only(proxy: TestProxy, upstream: TestUpstream) -> None:
    _, chosen = (refused := greeted(proxy, b"\x00"))
    refused[0].close()
    assert chosen == b"\x05\xff"
    with TestProxy.started(socks=True) as socks:
        assert ask(f"http://127.0.0.1:{socks.port}", upstream).status_code == 405
    assert upstream.requests() == []


# ── faults ──────────────────────────────────────────────────────────────────────────────────────


def test_refusing_so_many_times(proxy: TestProxy, upstream: TestUpstream) -> None:
    proxy.fail("refuse", repeat=2)
    assert [ask(proxy.url, upstream).status_code for _ in range(3)] == [502, 502, 200]
    assert [each["outcome"] for each in proxy.log()] == ["refuse", "refuse", "finished"]
    assert len(upstream.requests()) == 1


def test_hanging_until_it_is_reset(proxy: TestProxy, upstream: TestUpstream) -> None:
    proxy.fail("hang", repeat=-1)
    for _ in range(2):
        with pytest.raises(httpx.ReadTimeout), client(proxy.url) as http:
            http.post(f"{upstream.url}/v1/messages", json=BODY, timeout=httpx.Timeout(5, read=0.1))
    proxy.reset()
    assert ask(proxy.url, upstream).status_code == 200


@pytest.mark.parametrize("kind", ["reset", "hang"])
def test_failing_mid_way(proxy: TestProxy, upstream: TestUpstream, kind: Any) -> None:
    upstream.script({"text": "x" * 100_000})
    proxy.fail(kind, after_bytes=50_000)
    seen = 0
    with (
        client(proxy.url) as http,
        http.stream("POST", f"{upstream.url}/v1/messages", json=BODY, timeout=httpx.Timeout(5, read=1)) as answer,
    ):
        pieces = answer.iter_raw()
        with pytest.raises(httpx.ReadError if kind == "reset" else httpx.ReadTimeout):  # noqa: PT012
            while True:
                seen += len(next(pieces))
    assert 40_000 < seen < 50_000
    assert proxy.log() == [entry(upstream, outcome=kind)]


def test_resetting_at_once(proxy: TestProxy, upstream: TestUpstream) -> None:
    proxy.fail("reset")
    with pytest.raises((httpx.ReadError, httpx.RemoteProtocolError)):  # by whether the body was sent by then
        ask(proxy.url, upstream)
    assert upstream.requests() == []


def test_a_target_that_is_not_there(proxy: TestProxy) -> None:
    with client(proxy.url) as http:
        assert http.get(f"http://127.0.0.1:{free_port()}/").status_code == 502
    assert [each["outcome"] for each in proxy.log()] == ["unreachable"]


def test_a_fault_that_is_not_understood_is_refused(proxy: TestProxy) -> None:
    with pytest.raises(ValueError, match="explode"):
        proxy.fail("explode")  # type: ignore[arg-type]


# ── the process ─────────────────────────────────────────────────────────────────────────────────


def test_help_and_a_taken_port(proxy: TestProxy) -> None:
    command = [sys.executable, "-m", "tests.proxy"]
    told = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True)
    assert "GET  /control/log" in told.stdout
    taken = subprocess.run([*command, "--port", str(proxy.port)], capture_output=True, text=True, check=False)
    assert taken.returncode == 1
    assert taken.stderr.count("\n") == 1


def test_it_ends_with_the_one_that_started_it() -> None:
    with TestProxy.started() as proxy:
        process = proxy._process
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(timeout=5) == 0
        process.stdin = None
        process.communicate()
