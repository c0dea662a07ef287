"""/admin/api-keys: keys made, listed, changed, deleted and restored, and what is told of them."""

import asyncio
import json
import re
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio

from tests.processes import Process
from tests.relay.calls import Json, error_of
from tests.relay.key_calls import ADMIN, Admin, fine, latin, open_db, open_http
from tests.session_service.calls import TIME, UUID7, Db
from tests.upstream.client import TestUpstream

USAGE: Json = {
    "requests": 0,
    "tokens": 0,
    "cost": 0,
    "inFlight": 0,
    "today": {"requests": 0, "tokens": 0, "cost": 0},
    "total": {"requests": 0, "tokens": 0, "cost": 0},
}
PLAIN: Json = {
    "description": "",
    "collectSession": False,
    "tokenLimit": None,
    "concurrencyLimit": None,
    "rateLimitWindow": None,
    "rateLimitRequests": None,
    "dailyCostLimit": None,
    "totalCostLimit": None,
    "permissions": "all",
    "allowedModels": [],
    "expiresAt": None,
    "isActive": True,
    "tags": [],
    "deletedAt": None,
    "lastUsedAt": None,
    "usage": USAGE,
}
"""What a key of which only the name was said has."""
MADE = {"id", "name", "userId", "prefix", "createdAt", "updatedAt"}
FULL: Json = {
    "name": "Whitelist Key for Session Collection",
    "description": "用于收集真实 session_id\nsecond line",
    "userId": "alice@example.org",
    "collectSession": True,
    "tokenLimit": 100000,
    "concurrencyLimit": 10,
    "rateLimitWindow": 60,
    "rateLimitRequests": 500,
    "dailyCostLimit": 12.345678,
    "totalCostLimit": 1000,
    "permissions": ["messages", "chat"],
    "allowedModels": ["claude-sonnet-4-5", "demo"],
    "expiresAt": "2999-01-02T03:04:05.000006Z",
    "isActive": False,
    "tags": ["team a", "团队"],
}
LIMITS = (
    *("tokenLimit", "concurrencyLimit", "rateLimitWindow"),
    *("rateLimitRequests", "dailyCostLimit", "totalCostLimit"),
)
NO_NUMBER: list[Any] = [-1, -0.5, "5", True, 2**54, [1], {}]
BAD: dict[str, list[Any]] = {
    "name": [None, "", " ", "x" * 101, 7, "two\nlines", "two\u2028lines", "a\tb", "\u3000", "\u200b", "nul\0", ["a"]],
    "description": ["x" * 501, 7, "nul\0", ["a"]],
    "userId": ["", " a", "a/b", "x" * 256, "a\n", 7, ["a"]],
    "collectSession": ["true", 1, []],
    **{name: [*NO_NUMBER, 1.5, 5.0] for name in LIMITS[:4]},
    **{name: [*NO_NUMBER, 1.5, 5.0, 2**31] for name in LIMITS[1:4]},
    **{name: [*NO_NUMBER, -0.000001, 1e-7, 1e12] for name in LIMITS[4:]},
    "permissions": ["messages", "", ["all"], ["admin"], [5], 5, {"all": True}, ["a", "chat"]],
    "allowedModels": ["claude", [5], [""], ["nul\0"], {"a": "b"}, ["x" * 256], [["a"]]],
    "expiresAt": [
        *("tomorrow", "", 1900000000, True, "2999-13-01T00:00:00Z"),
        *("9999-12-31T23:59:59-14:00", "0001-01-01T00:00:00+14:00"),
    ],
    "isActive": ["yes", 1, 0, []],
    "tags": ["a", [5], [""], ["x" * 256], ["nul\0"], {"a": 1}, [f"t{n}" for n in range(101)]],
}


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def bare(relay: Process) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the shared relay without credentials."""
    async with open_http(relay) as http:
        yield http


@pytest.fixture
def admin(bare: httpx.AsyncClient, data_dir: Path, upstream: TestUpstream) -> Admin:
    return Admin.of(bare, data_dir)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def db(database_url: str) -> AsyncIterator[Db]:
    async with open_db(database_url) as db:
        yield db


def calls_of(key_id: str) -> list[tuple[str, str, Any]]:
    """Every admin call, as one for this key."""
    return [
        ("GET", "", None),
        ("POST", "", {"name": "made by a stranger"}),
        ("GET", f"/{key_id}", None),
        ("PATCH", f"/{key_id}", {"name": "changed by a stranger"}),
        ("PATCH", f"/{key_id}/collect-session", {"collectSession": True}),
        ("DELETE", f"/{key_id}", None),
        ("POST", f"/{key_id}/restore", None),
    ]


def on_keys(key_id: str) -> list[tuple[str, str, Any]]:
    return [call for call in calls_of(key_id) if call[1]]


# ── who may ask ─────────────────────────────────────────────────────────────────────────────────


async def test_without_the_admin_token_nothing_is_looked_at(
    admin: Admin, db: Db, data_dir: Path, bare: httpx.AsyncClient
) -> None:
    """401 comes before a bad body, bad parameters or an unknown id, and nothing has changed afterwards."""
    key = await admin.make(name="untouched")
    before = await admin.key(key.id)
    known = (data_dir / "admin.token").read_text().strip()
    api_key = (data_dir / "api.key").read_text().strip()
    wrong: list[dict[str, str]] = [
        {},
        {"authorization": ""},
        {"authorization": "Bearer"},
        {"authorization": known},
        {"authorization": f"Basic {known}"},
        {"authorization": f"Bearer {known}x"},
        {"authorization": f"Bearer {known[:-1]}"},
        {"authorization": f"Bearer {known.upper()}"},
        {"authorization": f"Bearer {api_key}"},
        {"authorization": f"Bearer {key.secret}"},
        {"authorization": "Bearer \xff"},
        {"x-api-key": known},
        {"x-api-key": api_key},
    ]
    told = "Missing or wrong admin token (Authorization: Bearer)"
    for headers in wrong:
        raw = latin(headers)
        for method, path, content in calls_of(key.id):
            sent = b"" if content is None else json.dumps(content).encode()
            answer = await bare.request(method, ADMIN + path, content=sent, headers=raw)
            assert error_of(answer, 401, "authentication_error") == told
            assert answer.headers["www-authenticate"] == "Bearer"
    for method, path, _ in calls_of("nobodys%00"):
        answer = await bare.request(method, f"{ADMIN}{path}?page=x", content=b"{")
        error_of(answer, 401, "authentication_error")
    assert await admin.key(key.id) == before
    assert await db.fetchval("SELECT count(*) FROM dev.relay_api_keys WHERE name LIKE '%by a stranger'") == 0
    lower = {"authorization": f"bearer {known}"}
    assert (await bare.get(ADMIN, headers=lower)).status_code == 200


# ── making a key ────────────────────────────────────────────────────────────────────────────────


async def test_a_key_of_which_only_the_name_is_said(admin: Admin) -> None:
    """Its user is itself; it has no limits and may do everything. The key is in this answer and no other."""
    made = fine(await admin.call("POST", json={"name": "Personal Key"}))
    assert list(made) == ["success", "message", "data"]
    assert made["success"] is True
    assert made["message"] == "API key created"
    data = made["data"]
    secret = data.pop("apiKey")
    assert re.fullmatch(r"cr_[0-9a-f]{64}", secret)
    assert set(data) == MADE | set(PLAIN)
    assert {name: data[name] for name in PLAIN} == PLAIN
    assert data["name"] == "Personal Key"
    assert UUID7.fullmatch(data["id"])
    assert data["userId"] == data["id"]
    assert data["prefix"] == secret[:11]
    assert TIME.fullmatch(data["createdAt"])
    assert data["updatedAt"] == data["createdAt"]
    assert await admin.key(data["id"]) == data
    listed = fine(await admin.call("GET", params={"search": data["id"]}))
    assert listed == [data]


async def test_a_key_of_which_everything_is_said(admin: Admin) -> None:
    """What was said is what is told, then and later; a field that is the relay's own cannot be said."""
    own = {"id": "mine", "createdAt": "2000-01-01T00:00:00Z", "usage": {"cost": -5}, "apiKey": "cr_mine", "prefix": "x"}
    data = fine(await admin.call("POST", json=FULL | own))["data"]
    assert data.pop("apiKey") != "cr_mine"
    assert {name: data[name] for name in FULL} == FULL
    assert data["id"] != "mine"
    assert data["createdAt"] > "2020"
    assert data["usage"] == USAGE
    assert await admin.key(data["id"]) == data


async def test_two_keys_are_never_the_same(admin: Admin) -> None:
    keys = [await admin.make(name="the same name", userId="the same user") for _ in range(3)]
    assert len({key.secret for key in keys}) == len({key.id for key in keys}) == 3


@pytest.mark.parametrize(("name", "values"), [
    ("name", ["x", "x" * 100, "名字", "张三\u3000的", "a\u00a0b", "👨\u200d👩\u200d👧", "𝄞" * 100]),
    ("description", ["", "x" * 500]),
    ("userId", ["a", "x" * 255]),
    ("tokenLimit", [1, 2**53]),
    ("concurrencyLimit", [1, 2**31 - 1]),
    ("rateLimitWindow", [1, 2**31 - 1]),
    ("dailyCostLimit", [0.000001, 0.1, 5]),
    ("totalCostLimit", [0.000001, 999_999_999.999999]),
    ("permissions", ["all", [], ["messages"], ["messages", "chat", "conversations"]]),
    ("allowedModels", [[], ["m"], [f"m{n}" for n in range(100)]]),
    ("expiresAt", ["0001-01-01T00:00:00.000000Z", "9999-12-31T23:59:59.999999Z"]),
    ("tags", [[], ["a"], ["x" * 255], ["团\u3000队"]]),
])  # fmt: skip
async def test_values_at_their_bounds(admin: Admin, name: str, values: list[Any]) -> None:
    key = await admin.make()
    for value in values:
        assert (await admin.change(key.id, **{name: value}))[name] == value
        made = fine(await admin.call("POST", json={"name": "bounds", name: value}))["data"]
        assert made[name] == value


async def test_times_are_utc_and_lists_hold_each_thing_once(admin: Admin) -> None:
    key = await admin.make(expiresAt="2999-01-01T02:00:00+02:00", tags=["a", "b", "a"], allowedModels=["m", "m"])
    told = await admin.key(key.id)
    assert (told["tags"], told["allowedModels"]) == (["a", "b"], ["m"])
    assert told["expiresAt"] == "2999-01-01T00:00:00.000000Z"
    for sent, meant in (("2999-01-01T05:00:00", "T05:00:00.000000Z"), ("2999-01-01", "T00:00:00.000000Z")):
        assert (await admin.change(key.id, expiresAt=sent))["expiresAt"] == "2999-01-01" + meant
    told = await admin.change(key.id, permissions=["chat", "messages", "chat"])
    assert told["permissions"] == ["chat", "messages"]


@pytest.mark.parametrize("name", BAD)
async def test_a_bad_field_is_named_and_nothing_is_done(admin: Admin, db: Db, name: str) -> None:
    """Neither a key made nor one changed; what was sent is not repeated."""
    key = await admin.make()
    before = await admin.key(key.id)
    marker = f"secret-{uuid.uuid4().hex}"
    for value in BAD[name]:
        sent = {"name": marker, "description": marker, name: value}
        for method, path in (("POST", ""), ("PATCH", f"/{key.id}")):
            answer = await admin.call(method, path, json=sent)
            message = error_of(answer, 400, "invalid_request_error")
            assert re.search(rf"\b{name}\b", message), (value, message)
            assert marker not in answer.text
    assert await admin.key(key.id) == before
    assert await db.fetchval("SELECT count(*) FROM dev.relay_api_keys WHERE name = $1", marker) == 0


async def test_a_body_that_is_no_object_is_refused(admin: Admin) -> None:
    key = await admin.make()
    before = await admin.key(key.id)
    for content in (b"", b"{", b"[]", b'"name"', b"null", b'{"name": NaN}', b'\xef\xbb\xbf{"name":"a"}'):
        for method, path in (("POST", ""), ("PATCH", f"/{key.id}"), ("PATCH", f"/{key.id}/collect-session")):
            answer = await admin.call(method, path, content=content)
            assert "body" in error_of(answer, 400, "invalid_request_error")
    assert await admin.key(key.id) == before


async def test_a_name_is_required(admin: Admin) -> None:
    answer = await admin.call("POST", json={"description": "nameless"})
    assert "name" in error_of(answer, 400, "invalid_request_error")


@pytest.mark.parametrize("window", [None, 0, "absent"])
async def test_a_limit_of_requests_needs_a_window(admin: Admin, window: Any) -> None:
    """Also when either is taken away or given later."""
    given = {} if window == "absent" else {"rateLimitWindow": window}
    answer = await admin.call("POST", json={"name": "n", "rateLimitRequests": 5, **given})
    assert "rateLimitRequests" in error_of(answer, 400, "invalid_request_error")
    key = await admin.make()
    answer = await admin.call("PATCH", f"/{key.id}", json={"rateLimitRequests": 5, **given})
    assert "rateLimitRequests" in error_of(answer, 400, "invalid_request_error")
    await admin.change(key.id, rateLimitWindow=1)
    await admin.change(key.id, rateLimitRequests=5)
    if given:
        answer = await admin.call("PATCH", f"/{key.id}", json=given)
        assert "rateLimitRequests" in error_of(answer, 400, "invalid_request_error")
        await admin.change(key.id, rateLimitRequests=0, **given)
    told = await admin.key(key.id)
    expected = (None, None) if given else (1, 5)
    assert (told["rateLimitWindow"], told["rateLimitRequests"]) == expected


@pytest.mark.parametrize("nothing", [0, None])
async def test_a_limit_of_0_or_null_is_none(admin: Admin, nothing: int | None) -> None:
    key = await admin.make(**dict.fromkeys(LIMITS, nothing))
    told = await admin.key(key.id)
    assert [told[name] for name in LIMITS] == [None] * len(LIMITS)
    assert (await key.ask()).status_code == 200
    await admin.change(key.id, **dict.fromkeys(LIMITS, 1))
    told = await admin.change(key.id, **dict.fromkeys(LIMITS, nothing))
    assert [told[name] for name in LIMITS] == [None] * len(LIMITS)


# ── lists ───────────────────────────────────────────────────────────────────────────────────────


async def listed(admin: Admin, **params: Any) -> tuple[list[str], int]:
    """Names of the keys that are listed, and how many there are in all."""
    answer = await admin.call("GET", params=params)
    found = fine(answer)
    assert isinstance(found, list)
    return [each["name"] for each in found], int(answer.headers["x-total-count"])


async def test_pages_and_filters(admin: Admin) -> None:
    tag = f"tag-{uuid.uuid4().hex[:8]}"
    names = [f"{name} {tag}" for name in ("Zoë", "alpha", "100%_sure", "钥匙", "last")]
    keys = [await admin.make(name=name, tags=[tag, f"{tag}-{place}"]) for place, name in enumerate(names)]
    assert await listed(admin, tag=tag) == (names, 5)
    assert await listed(admin, tag=tag, page=1, page_size=2) == (names[:2], 5)
    assert await listed(admin, tag=tag, page=2, page_size=2) == (names[2:4], 5)
    assert await listed(admin, tag=tag, page=3, page_size=2) == (names[4:], 5)
    assert await listed(admin, tag=tag, page=4, page_size=2) == ([], 5)
    assert await listed(admin, tag=f"{tag}-3") == (names[3:4], 1)
    assert await listed(admin, tag=tag[:-1]) == ([], 0)
    await admin.change(keys[1].id, isActive=False, description=f"Revoked because of {tag}-Reasons")
    assert await listed(admin, tag=tag, isActive="false") == (names[1:2], 1)
    assert await listed(admin, tag=tag, isActive="true") == ([names[0], *names[2:]], 4)
    for search, found in (
        (tag.upper(), names),
        ("ZOË", names[:1]),
        (f"{tag}-reasons", names[1:2]),
        ("100%_s", names[2:3]),
        ("1%_s", []),
        ("钥", names[3:4]),
        (keys[4].id, names[4:]),
        (keys[4].id[:-1], []),
        (keys[4].secret, names[4:]),
        (keys[4].secret[:11], names[4:]),
    ):
        assert await listed(admin, tag=tag, search=search) == (found, len(found)), search
    fine(await admin.call("DELETE", f"/{keys[0].id}"))
    assert await listed(admin, tag=tag) == (names[1:], 4)


async def test_a_bad_parameter_is_named(admin: Admin) -> None:
    bad = {
        "page": ("0", "x", "-1", "1000001"),
        "page_size": ("0", "1001", "1.5"),
        "isActive": ("maybe", ""),
        "search": ("x" * 256, "a\0"),
        "tag": ("x" * 256, "\0"),
    }
    for name, values in bad.items():
        for value in values:
            answer = await admin.call("GET", params={name: value})
            assert name in error_of(answer, 400, "invalid_request_error")


async def test_an_unknown_id(admin: Admin) -> None:
    """One that no key could have is refused as such."""
    for key_id in ("unknown", str(uuid.uuid4()), "%20", "%F0%9F%94%91", "x" * 255):
        for method, path, content in on_keys(key_id):
            answer = await admin.call(method, path, json=content)
            assert error_of(answer, 404, "not_found_error") == "No API key has this id"
    for key_id in ("a%00b", "x" * 256):
        for method, path, content in on_keys(key_id):
            answer = await admin.call(method, path, json=content)
            assert "key_id" in error_of(answer, 400, "invalid_request_error")


# ── changes ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", FULL)
async def test_each_field_can_be_changed_by_itself(admin: Admin, name: str) -> None:
    """The others stay; null takes away what may be absent: not a name, nor whether the key is active."""
    key = await admin.make()
    before = await admin.key(key.id)
    window = {"rateLimitWindow": 5} if name == "rateLimitRequests" else {}
    told = await admin.change(key.id, **window, **{name: FULL[name]})
    assert told == before | window | {name: FULL[name], "updatedAt": told["updatedAt"]}
    assert told["updatedAt"] > before["updatedAt"]
    assert await admin.key(key.id) == told
    if name in {"name", "isActive"}:
        answer = await admin.call("PATCH", f"/{key.id}", json={name: None})
        assert error_of(answer, 400, "invalid_request_error") == f"{name}: must not be null"
        assert await admin.key(key.id) == told
        return
    told = await admin.change(key.id, **{name: None})
    assert told == before | window | {"updatedAt": told["updatedAt"]}


async def test_a_change_of_nothing_changes_nothing(admin: Admin) -> None:
    key = await admin.make(**{**FULL, "isActive": True})
    before = await admin.key(key.id)
    told = await admin.change(key.id)
    assert told | {"updatedAt": ""} == before | {"updatedAt": ""}
    # What was read may be sent back as it is.
    told = await admin.change(key.id, **before)
    assert told | {"updatedAt": ""} == before | {"updatedAt": ""}


async def test_changes_at_once_all_hold(admin: Admin) -> None:
    """Nobody's change of one field takes another's of another field back."""
    key = await admin.make()
    wanted = {name: value for name, value in FULL.items() if name != "rateLimitRequests"}
    await asyncio.gather(*(admin.change(key.id, **{name: value}) for name, value in wanted.items()))
    told = await admin.key(key.id)
    assert {name: told[name] for name in wanted} == wanted


async def test_collect_session_to_the_letter(admin: Admin) -> None:
    key = await admin.make()
    path = f"/{key.id}/collect-session"
    for wanted, word in ((True, "enabled"), (True, "enabled"), (False, "disabled")):
        answer = fine(await admin.call("PATCH", path, json={"collectSession": wanted}))
        assert answer == {
            "success": True,
            "message": f"Session collection {word} for API key",
            "data": {"id": key.id, "collectSession": wanted},
        }
        assert list(answer) == ["success", "message", "data"]
        assert (await admin.key(key.id))["collectSession"] is wanted
    await admin.call("PATCH", path, json={"collectSession": True})
    bad: list[Any] = ["true", "false", 1, 0, None, [], {}]
    for each in bad:
        answer = await admin.call("PATCH", path, json={"collectSession": each})
        assert "collectSession" in error_of(answer, 400, "invalid_request_error")
    assert "collectSession" in error_of(await admin.call("PATCH", path, json={}), 400, "invalid_request_error")
    assert (await admin.key(key.id))["collectSession"] is True


async def test_a_deleted_key_is_refused_until_it_is_restored(admin: Admin, db: Db) -> None:
    """Nothing of it is lost: it is still told of by its id, and its use goes on where it was."""
    key = await admin.make(tags=["kept"])
    assert (await key.ask()).status_code == 200
    before = await admin.key(key.id)
    for _ in range(2):
        answer = fine(await admin.call("DELETE", f"/{key.id}"))
        deleted = await admin.key(key.id)
        assert answer == {
            "success": True,
            "message": "API key deleted",
            "data": {"id": key.id, "deletedAt": deleted["deletedAt"]},
        }
        assert TIME.fullmatch(deleted["deletedAt"])
        assert deleted | {"updatedAt": "", "deletedAt": None} == before | {"updatedAt": ""}
        error_of(await key.ask(), 401, "authentication_error")
        assert await listed(admin, search=key.id) == ([], 0)
    for _ in range(2):
        restored = fine(await admin.call("POST", f"/{key.id}/restore"))
        assert restored == before | {"updatedAt": restored["updatedAt"]}
        assert (await listed(admin, search=key.id))[1] == 1
    assert (await key.ask()).status_code == 200
    assert (await admin.used(key.id))[0] == 2
