"""GET /: a page that a newcomer can follow, in two languages, and whose lines work as they stand."""

import asyncio
import json
import os
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import httpx
import pytest

from tests.processes import ROOT, Process

PAGES = ("/docs", "/openapi.json", "/health", "/metrics")


async def page_of(http: httpx.AsyncClient, host: str | None = None, **headers: str) -> tuple[httpx.Response, Any]:
    """The answer, and the page as a tree: it is XML too, so that whatever is not closed or escaped shows."""
    answer = await http.get("/", headers={**({"host": host} if host else {}), **headers})
    assert answer.status_code == 200
    assert answer.text.startswith("<!DOCTYPE html>\n")
    return answer, ElementTree.fromstring(answer.text)


def lines_of(page: Any) -> list[str]:
    return ["".join(each.itertext()) for each in page.iter("pre")]


async def test_it_says_what_is_where_in_both_languages(http: httpx.AsyncClient) -> None:
    answer, page = await page_of(http)
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.headers["content-security-policy"].startswith("default-src 'none'")
    assert page.find("head/title").text == "relay"
    assert page.find(".//script") is None
    assert [each.get("href") for each in page.iter("a")] == list(PAGES)
    for path in PAGES:
        assert (await http.get(path)).status_code == 200
    described = (await http.get("/openapi.json")).json()["paths"]
    assert "/" not in described
    named = ["".join(each.itertext()) for each in page.iterfind(".//td/code")]
    assert set(named) >= {
        *("/v1/messages", "/sessions/{session_id}", "/admin/session-pool/stats"),
        *("/api/v1/app-conversations", "/api/conversations", "/api/file/upload/{path}"),
    }
    assert set(named) <= set(described)
    chinese = [each for each in page.iter() if each.get("lang") == "zh-CN"]
    captions = [*page.iter("h2"), *page.iterfind("body/p")]
    assert len(chinese) >= len(named) + len(captions) - 1


async def test_each_line_works(http: httpx.AsyncClient, relay: Process, data_dir: Path, tmp_path: Path) -> None:
    (tmp_path / ".curlrc").write_text('fail\nshow-error\nnoproxy = "*"\n')
    environment = {"PATH": os.environ["PATH"], "CURL_HOME": str(tmp_path), "DATA_DIR": str(data_dir)}

    async def run(script: str) -> str:
        process = await asyncio.create_subprocess_exec(
            *("bash", "-euc", script), stdout=-1, stderr=-1, cwd=ROOT, env=environment
        )
        out, complaints = await asyncio.wait_for(process.communicate(), 30)
        assert (process.returncode, complaints) == (0, b""), script
        return out.decode()

    _, page = await page_of(http)
    export, *lines = lines_of(page)
    key = (data_dir / "api.key").read_text().strip()
    assert await run(f'{export}; printf %s "$RELAY_KEY"') == key
    environment["RELAY_KEY"] = key
    assert all(line.startswith("curl ") and relay.url in line for line in lines)
    answers = [await run(line) for line in lines]
    assert "Ada" in json.loads(answers[0])["content"][0]["text"]
    assert "Ada" in answers[1]
    assert "message_stop" in answers[1]
    assert json.loads(answers[2])["message_count"] == 4
    assert json.loads(answers[3])["message_count"] == 2
    assert len(answers) == 6
    for answer in answers[2:]:
        assert json.loads(answer)


async def test_it_holds_no_secret_and_no_path(http: httpx.AsyncClient, data_dir: Path) -> None:
    text = (await page_of(http))[0].text
    secrets = [path.read_text().strip() for path in data_dir.iterdir() if path.suffix in {".key", ".token", ".pepper"}]
    assert len(secrets) >= 4
    for hidden in (*secrets, str(data_dir), str(ROOT), "cr_"):
        assert hidden not in text


@pytest.mark.parametrize("host", ["relay.example", "relay.example:8443", "[::1]:8000", "my_host", "10.0.0.7:1"])
async def test_lines_use_the_address_that_the_client_uses(http: httpx.AsyncClient, host: str) -> None:
    _, page = await page_of(http, host)
    assert f" http://{host}/v1/messages " in lines_of(page)[1]
    _, page = await page_of(http, host, **{"x-forwarded-proto": "https"})
    assert f" https://{host}/v1/messages " in lines_of(page)[1]


MARKUP = ("<script>alert(1)</script>", '"onload="alert(1)', "x&y", "a b", "x/../y")
COMMANDS = ("x;reboot", "x$(reboot)", "x`reboot`", "x|reboot", "$RELAY_KEY.example")


@pytest.mark.parametrize("host", [*MARKUP, *COMMANDS])
async def test_what_is_no_address_is_not_repeated(http: httpx.AsyncClient, relay: Process, host: str) -> None:
    answer, page = await page_of(http, host, **{"x-forwarded-host": "<b>", "x-forwarded-proto": "<b>"})
    assert "alert" not in answer.text
    assert "reboot" not in answer.text
    assert "<b>" not in answer.text
    assert page.find(".//script") is None
    assert lines_of(page)[1].startswith(f"curl -s {relay.url}/v1/messages ")
