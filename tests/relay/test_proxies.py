"""Accounts behind a proxy of their own, HTTP and SOCKS5: a real proxy process."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any
from urllib.parse import quote, urlsplit

import asyncpg
import pytest
import pytest_asyncio

from tests.processes import free_port
from tests.proxy.client import TestProxy
from tests.relay.calls import Json, error_of, events_of
from tests.relay.stage import ALONE, Operator, Stage, staged
from tests.upstream.client import TestUpstream

USER, PASSWORD = "operator", "p:+@ss/w?rd#%41 "
QUOTED = quote(PASSWORD, safe="")


@pytest.fixture(scope="module", params=["http", "socks5"])
def any_proxy(request: pytest.FixtureRequest) -> Iterator[TestProxy]:
    with TestProxy.started(user=USER, password=PASSWORD, socks=request.param == "socks5") as proxy:
        yield proxy


@pytest.fixture
def proxy(any_proxy: TestProxy) -> TestProxy:
    any_proxy.reset()
    return any_proxy


@pytest_asyncio.fixture(loop_scope="session")
async def stage(hasty: Operator, upstream: TestUpstream) -> AsyncIterator[Stage]:
    async with staged(hasty, upstream) as stage:
        yield stage


def through(proxy: TestProxy, stage: Stage) -> Json:
    """What the proxy's log says of a request that went well."""
    is_socks = proxy.url.startswith("socks5")
    return {
        "protocol": "socks5" if is_socks else "http",
        "method": "CONNECT" if is_socks else "POST",
        "target": urlsplit(stage.upstream.url).netloc,
        "credentials": "right",
    }


def noted(proxy: TestProxy) -> list[Json]:
    """The proxy's log; a tunnel may stay open for the next request."""
    return [{name: value for name, value in entry.items() if name != "outcome"} for entry in proxy.log()]


async def test_requests_go_through_the_accounts_proxy(proxy: TestProxy, stage: Stage) -> None:
    """Plain, streamed, large, counted and tried ones, with its credentials, which upstream never sees."""
    await stage.add("a", proxy_url=proxy.url)
    assert await stage.is_served()
    answer = await stage.ask(stream=True)
    assert events_of(answer.content)[-1][0] == "message_stop"
    assert (await stage.ask("x" * 1_000_000)).status_code == 200
    assert (await stage.operator.http.post("/v1/messages/count_tokens", json=stage.request())).status_code == 200
    assert (await stage.post("a", "test"))["ok"]
    assert stage.asked() == ["a"] * 5
    log = noted(proxy)
    assert log == [through(proxy, stage)] * len(log)
    if not proxy.url.startswith("socks5"):
        assert len(log) == 5
    assert log
    for entry in stage.entries():
        assert not [name for name in entry["headers"] if "proxy" in name]
        assert PASSWORD not in str(entry["headers"])


async def test_an_account_without_a_proxy_uses_none(proxy: TestProxy, stage: Stage) -> None:
    """Also when it had one before; and one that gets one uses it from then on."""
    await stage.add("a")
    assert await stage.is_served()
    assert noted(proxy) == []
    await stage.change("a", proxy_url=proxy.url)
    assert await stage.is_served()
    assert noted(proxy) == [through(proxy, stage)]
    await stage.change("a", proxy_url=None)
    assert await stage.is_served()
    assert len(proxy.log()) == 1
    assert stage.asked() == ["a"] * 3


async def test_each_account_has_its_own(proxy: TestProxy, stage: Stage) -> None:
    """Two with proxies and one without do not share connections."""
    with TestProxy.started() as other:
        await stage.add("a", proxy_url=proxy.url)
        await stage.add("b", proxy_url=other.url)
        await stage.add("c")
        for _ in range(6):
            assert await stage.is_served()
        assert sorted(stage.asked()) == sorted("abcabc")
        assert noted(proxy) == [through(proxy, stage)] * len(noted(proxy))
        assert len(noted(proxy)) in {1, 2}
        assert len(other.log()) == 2


def bad_urls(proxy: TestProxy) -> dict[str, str]:
    scheme, port = urlsplit(proxy.url).scheme, proxy.port
    return {
        "wrong password": f"{scheme}://{USER}:not-{QUOTED}@127.0.0.1:{port}",
        "no password": f"{scheme}://127.0.0.1:{port}",
        "nobody there": f"{scheme}://{USER}:{QUOTED}@127.0.0.1:{free_port()}",
        "no such host": f"{scheme}://{USER}:{QUOTED}@no-such-host.invalid:1080",
        "another protocol": f"{'http' if scheme == 'socks5' else 'socks5'}://{USER}:{QUOTED}@127.0.0.1:{port}",
        **dict.fromkeys(("refuse", "hang", "reset"), proxy.url),
    }


PLAIN = ("wrong password", "no password", "nobody there", "no such host", "another protocol", "refuse", "hang", "reset")
STREAMED = ("wrong password", "refuse")


@pytest.mark.parametrize(
    ("fault", "stream"), [*((each, False) for each in PLAIN), *((each, True) for each in STREAMED)]
)
async def test_a_proxy_that_fails_leads_to_another_account(
    proxy: TestProxy, stage: Stage, sql: asyncpg.Connection, fault: str, stream: bool
) -> None:
    """The account rests as after any failure of upstream; nothing goes past its proxy; nobody hears the password."""
    await stage.add("bad", proxy_url=bad_urls(proxy)[fault])
    await stage.add("good", priority=1)
    if fault in {"refuse", "hang", "reset"}:
        proxy.fail(fault, repeat=-1)  # type: ignore[arg-type]
    answer = await stage.ask(stream=stream)
    assert answer.status_code == 200
    assert stage.asked() == ["good"]
    assert answer.headers["x-relay-attempts"] == "2"
    told = await stage.get("bad")
    assert (told["failures"], told["failures_in_row"], told["enabled"]) == (1, 1, True)
    assert told["last_error"]
    await stage.post("good", "disable")
    await stage.post("bad", "enable")
    refused = await stage.ask()
    if fault == "hang" or refused.status_code == 504:  # on a busy machine anything may take a second
        error_of(refused, 504, "timeout_error")
    else:
        error_of(refused, 529, "overloaded_error")
    tried = await stage.post("bad", "test")
    assert not tried["ok"]
    assert stage.asked() == ["good"]
    shown = [str(await stage.get("bad")), str(tried), refused.text, str(refused.headers), answer.text]
    shown += [stage.operator.relay.logged(), str(await sql.fetch("SELECT * FROM relay_accounts"))]
    for secret in (PASSWORD, QUOTED):
        assert secret not in "".join(shown)


async def test_what_is_shown_of_a_proxy(proxy: TestProxy, stage: Stage) -> None:
    """Everything but the password; sent back like that it is the one that is known already."""
    await stage.add("a", proxy_url=proxy.url)
    shown = (await stage.get("a"))["proxy_url"]
    scheme = urlsplit(proxy.url).scheme
    assert shown == f"{scheme}://{USER}:***@127.0.0.1:{proxy.port}"
    assert (await stage.change("a", proxy_url=shown, priority=1))["proxy_url"] == shown
    assert (await stage.change("a", api_key=stage.key("new")))["proxy_url"] == shown
    assert await stage.is_served()
    assert (noted(proxy), stage.asked()) == ([through(proxy, stage)], ["new"])
    await stage.change("a", proxy_url=f"{scheme}://{USER}:other@127.0.0.1:{proxy.port}")
    assert not await stage.is_served()


async def test_a_client_that_hangs_up_frees_the_proxys_connection(proxy: TestProxy, stage: Stage) -> None:
    await stage.add("a", proxy_url=proxy.url)
    stage.script("a", {"hang_seconds": 30})
    asking = asyncio.create_task(
        stage.operator.http.post("/v1/messages", json=stage.request(stream=True), headers=ALONE)
    )
    await stage.upstream.until(lambda state: state["running"] == 1)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    await stage.upstream.until(lambda state: state["running"] == 0, seconds=1)


async def test_models_are_asked_for_through_the_proxy(proxy: TestProxy, stage: Stage) -> None:
    """An account that serves all models tells those that its upstream has."""
    await stage.add("a", proxy_url=proxy.url, models=[])
    listed: Any = (await stage.operator.http.get("/v1/models", params={"limit": 1000})).json()
    assert {"test-model", "claude-sonnet-4-5"} <= {each["id"] for each in listed["data"]}
    (entry,) = noted(proxy)
    assert (entry["target"], entry["credentials"]) == (urlsplit(stage.upstream.url).netloc, "right")
