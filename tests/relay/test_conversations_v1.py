"""V1: start tasks, lists and filters, sandboxes, places, and bad input."""

import asyncio
import base64
import json
from typing import Any

import pytest

from tests.relay.calls import MODEL
from tests.relay.conversing import User, fine, refused, say, until
from tests.upstream.client import TestUpstream

SLOW = {"text": "word " * 40, "event_delay_ms": 100}
STEPS = [
    *("WORKING", "WAITING_FOR_SANDBOX", "PREPARING_REPOSITORY", "RUNNING_SETUP_SCRIPT"),
    *("STARTING_CONVERSATION", "READY"),
]


def quoted(place: str) -> str:
    return base64.urlsafe_b64encode(place.encode()).decode().rstrip("=")


# ── starting ────────────────────────────────────────────────────────────────────────────────────


async def test_a_start_that_is_followed(caller: User) -> None:
    """One JSON array with an element for each step; ids appear as they are known."""
    body = {"llm_model": MODEL, "initial_message": say("Hi", run=False)}
    async with caller.http.stream("POST", "/api/v1/app-conversations/stream-start", json=body) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"] == "application/json"
        steps = json.loads(await answer.aread())
    assert [step["status"] for step in steps] == STEPS
    assert len({step["id"] for step in steps}) == 1
    assert [bool(step["sandbox_id"]) for step in steps] == [False] + [True] * 5
    assert [bool(step["agent_server_url"]) for step in steps] == [False] * 4 + [True] * 2
    assert [bool(step["app_conversation_id"]) for step in steps] == [False] * 5 + [True]
    assert sorted(step["updated_at"] for step in steps) == [step["updated_at"] for step in steps]
    assert await caller.task(steps[-1]["id"]) == steps[-1]


async def test_a_start_goes_on_when_nobody_follows(caller: User) -> None:
    async with caller.http.stream(
        "POST", "/api/v1/app-conversations/stream-start", json={"llm_model": MODEL}
    ) as answer:
        async for piece in answer.aiter_bytes():
            task_id = json.loads(piece.decode().lstrip("[").split(",\n")[0].rstrip("]"))["id"]
            break
    assert (await caller.ended(task_id))["status"] == "READY"


async def test_the_whole_request_is_echoed(caller: User) -> None:
    request = {
        "initial_message": say("Hi", run=False),
        "processors": [{"kind": "any"}],
        "llm_model": MODEL,
        "selected_repository": "me/mine",
        "selected_branch": "main",
        "git_provider": "gitlab",
        "title": "A title",
        "trigger": "slack",
        "pr_number": [1, 2],
        "agent_type": "plan",
    }
    task = await caller.start(**request)
    assert {name: value for name, value in task["request"].items() if value is not None} == request
    app = await caller.app((await caller.ended(task["id"]))["app_conversation_id"])
    for name in (
        "selected_repository",
        "selected_branch",
        "git_provider",
        "title",
        "trigger",
        "pr_number",
        "llm_model",
    ):
        assert app[name] == request[name]


async def test_parents_and_children(caller: User) -> None:
    parent = await caller.conversation(title="Parent")
    child = await caller.conversation(title="Child", parent_conversation_id=parent.session_id)
    assert (await child.app())["parent_conversation_id"] == parent.id
    assert (await parent.app())["sub_conversation_ids"] == [child.id]
    search = "/api/v1/app-conversations/search"
    assert [each["title"] for each in fine(await caller.http.get(search))["items"]] == ["Parent"]
    both = fine(await caller.http.get(search, params={"include_sub_conversations": True}))["items"]
    assert [each["title"] for each in both] == ["Child", "Parent"]
    count = "/api/v1/app-conversations/count"
    assert fine(await caller.http.get(count)) == 1
    assert fine(await caller.http.get(count, params={"include_sub_conversations": True})) == 2
    refused(await caller.http.post("/api/v1/app-conversations", json={"parent_conversation_id": "0" * 32}), 404)


async def test_a_start_that_fails(caller: User) -> None:
    """It says why, and leaves no conversation behind."""
    for request, reason in (
        ({"llm_model": MODEL, "sandbox_id": "0" * 32}, "Sandbox not found"),
        ({"llm_model": MODEL, "initial_message": say("x" * (33 * 2**20))}, None),
    ):
        if reason is None:
            refused(await caller.http.post("/api/v1/app-conversations", json=request), 413)
            continue
        task = await caller.ended((await caller.start(**request))["id"])
        assert (task["status"], task["detail"], task["app_conversation_id"]) == ("ERROR", reason, None)
    assert fine(await caller.http.get("/api/v1/app-conversations/count")) == 0


async def test_a_shared_sandbox(caller: User) -> None:
    first = await caller.conversation()
    sandbox_id = (await first.app())["sandbox_id"]
    second = await caller.conversation(sandbox_id=sandbox_id)
    assert (await second.app())["sandbox_id"] == sandbox_id
    fine(await caller.http.post(f"/api/v1/sandboxes/{sandbox_id}/pause", json={}))
    assert {(await each.app())["sandbox_status"] for each in (first, second)} == {"PAUSED"}


async def test_a_shared_sandbox_is_what_the_liveliest_in_it_is(caller: User) -> None:
    first = await caller.conversation()
    sandbox_id = (await first.app())["sandbox_id"]
    second = await caller.conversation(sandbox_id=sandbox_id)
    fine(await caller.http.post(f"/sessions/{first.session_id}/close"))

    async def shown() -> tuple[str, str | None]:
        (box,) = fine(await caller.http.get("/api/v1/sandboxes", params={"id": sandbox_id}))
        return box["status"], box["session_api_key"]

    assert await shown() == ("RUNNING", second.secret)
    path = f"/api/v1/sandboxes/{sandbox_id}"
    fine(await caller.http.post(f"{path}/pause", json={}))
    assert await shown() == ("PAUSED", None)
    fine(await caller.http.post(f"{path}/resume", json={}))
    assert await shown() == ("RUNNING", second.secret)
    assert (await second.app())["sandbox_status"] == "RUNNING"
    fine(await caller.http.post(f"/sessions/{second.session_id}/close"))
    assert await shown() == ("MISSING", None)
    refused(await caller.http.post(f"{path}/resume", json={}), 409)


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"llm_model": 3}, "llm_model"),
        ({"llm_model": ""}, "llm_model"),
        ({"git_provider": "svn"}, "git_provider"),
        ({"trigger": "moon"}, "trigger"),
        ({"pr_number": ["1"]}, "pr_number"),
        ({"pr_number": [True]}, "pr_number"),
        ({"agent_type": "x"}, "agent_type"),
        ({"sandbox_id": "x"}, "sandbox_id"),
        ({"parent_conversation_id": "zz"}, "parent_conversation_id"),
        ({"title": 1}, "title"),
        ({"processors": {}}, "processors"),
        ({"initial_message": {"content": []}}, "initial_message.content"),
        (
            {"initial_message": {"role": "assistant", "content": [{"type": "text", "text": "x"}]}},
            "initial_message.role",
        ),
        ({"initial_message": {"content": [{"type": "text"}]}}, "initial_message.content"),
        ({"initial_message": {"content": [{"type": "video"}]}}, "initial_message.content"),
        ({"initial_message": {"content": [{"type": "text", "text": "x"}], "run": "yes"}}, "initial_message.run"),
        ([], "body"),
    ],
)
async def test_bad_start_requests(caller: User, body: Any, field: str) -> None:
    for path in ("/api/v1/app-conversations", "/api/v1/app-conversations/stream-start"):
        assert field in refused(await caller.http.post(path, json=body), 422)
    assert fine(await caller.http.get("/api/v1/app-conversations/start-tasks/count")) == 0


# ── lists ───────────────────────────────────────────────────────────────────────────────────────


async def test_many_by_their_ids(caller: User) -> None:
    """In the order asked, twins kept, null for what is not there; 1 to 100 of them."""
    first, second = await caller.conversation(title="1"), await caller.conversation(title="2")
    get, path = caller.http.get, "/api/v1/app-conversations"
    ids = [second.id, "0" * 32, first.session_id, second.id]
    found = fine(await get(path, params={"ids": ids}))
    assert [each and each["title"] for each in found] == ["2", None, "1", "2"]
    assert len(fine(await get(path, params={"ids": [first.id] * 100}))) == 100
    for bad in ([first.id] * 101, ["nonsense"], [first.id, ""]):
        assert "ids" in refused(await get(path, params={"ids": bad}), 422)
    refused(await get(path), 422)
    tasks = fine(await get(f"{path}/start-tasks/search"))["items"]
    ids = [tasks[0]["id"], "0" * 32, tasks[0]["id"]]
    found = fine(await get(f"{path}/start-tasks", params={"ids": ids}))
    assert found == [tasks[0], None, tasks[0]]
    refused(await get(f"{path}/start-tasks", params={"ids": ["x"]}), 422)
    sandbox = (await first.app())["sandbox_id"]
    boxes = fine(await get("/api/v1/sandboxes", params={"id": [sandbox, "0" * 32, sandbox]}))
    assert boxes[1] is None
    assert boxes[0] == boxes[2]
    assert set(boxes[0]) == {
        *("id", "created_by_user_id", "sandbox_spec_id", "status", "session_api_key", "exposed_urls", "created_at"),
    }
    assert (boxes[0]["status"], boxes[0]["session_api_key"]) == ("RUNNING", first.secret)
    assert boxes[0]["exposed_urls"][0]["url"].startswith("http")


async def test_pages_and_filters(make_user: Any) -> None:
    user: User = await make_user()
    made = [await user.conversation(title=f"Number {number} of Five") for number in range(5)]
    get, search = user.http.get, "/api/v1/app-conversations/search"
    seen: list[str] = []
    page: dict[str, Any] = {"next_page_id": None}
    for _ in range(3):
        params = {"limit": 2} | ({"page_id": page["next_page_id"]} if page["next_page_id"] else {})
        page = fine(await get(search, params=params))
        seen += [each["id"] for each in page["items"]]
    assert page["next_page_id"] is None
    assert seen == [each.id for each in reversed(made)]
    found = fine(await get(search, params={"title__contains": "number 3"}))["items"]
    assert [each["id"] for each in found] == [made[3].id]
    middle = (await made[2].app())["created_at"]
    later = fine(await get(search, params={"created_at__gte": middle}))["items"]
    assert [each["id"] for each in later] == [each.id for each in reversed(made[2:])]
    earlier = fine(await get(search, params={"created_at__lt": middle, "title__contains": "five"}))["items"]
    assert [each["id"] for each in earlier] == [made[1].id, made[0].id]
    assert fine(await get("/api/v1/app-conversations/count", params={"created_at__lt": middle})) == 2
    assert fine(await get("/api/v1/app-conversations/count", params={"updated_at__gte": "2999-01-01"})) == 0
    for name, value in (*(("limit", 0), ("limit", 101), ("limit", "x"), ("page_id", "x"), ("created_at__gte", "x")),):
        assert name in refused(await get(search, params={name: value}), 422)


@pytest.mark.parametrize(
    ("path", "field"),
    [
        ("/api/v1/app-conversations/search?title__contains=a%00b", "title__contains"),
        ("/api/v1/app-conversations/count?title__contains=a%00b", "title__contains"),
        ("/api/conversations?selected_repository=%00", "selected_repository"),
        ("/api/conversations?conversation_trigger=%00", "conversation_trigger"),
        ("/api/v1/app-conversations/search?created_at__gte=0001-01-01T00:00:00%2B14:00", "created_at__gte"),
        ("/api/v1/app-conversations/count?updated_at__lt=9999-12-31T23:59:59-14:00", "updated_at__lt"),
        ("/api/v1/app-conversations/start-tasks/search?created_at__gte=9999-12-31T23:59:59-14:00", "created_at__gte"),
        ("/api/v1/app-conversations/start-tasks/count?created_at__gte=9999-12-31T23:59:59-14:00", "created_at__gte"),
        (f"/api/v1/app-conversations/search?page_id={quoted('0001-01-01T00:00:00+14:00 ' + '0' * 32)}", "page_id"),
        (f"/api/v1/app-conversations/search?page_id={quoted('2026-01-01T00:00:00Z x')}", "page_id"),
        ("/api/v1/app-conversations?ids=%00", "ids"),
        ("/api/v1/sandboxes?id=%00", "id"),
        ("/api/v1/events/count?conversation_id__eq=%00", "conversation_id__eq"),
    ],
)
async def test_odd_queries(caller: User, path: str, field: str) -> None:
    assert field in refused(await caller.http.get(path), 422)


async def test_start_tasks_in_their_orders(make_user: Any) -> None:
    user: User = await make_user()
    made = [await user.ended((await user.start(llm_model=MODEL))["id"]) for _ in range(3)]
    ids = [task["id"] for task in made]
    get, search = user.http.get, "/api/v1/app-conversations/start-tasks/search"
    for order in ("CREATED_AT", "CREATED_AT_DESC", "UPDATED_AT", "UPDATED_AT_DESC"):
        seen: list[str] = []
        page_id: str | None = None
        while True:
            params = {"sort_order": order, "limit": 1} | ({"page_id": page_id} if page_id else {})
            page = fine(await get(search, params=params))
            seen += [each["id"] for each in page["items"]]
            page_id = page["next_page_id"]
            if page_id is None:
                break
        assert seen == (ids[::-1] if order.endswith("DESC") else ids), order
    wanted = {"conversation_id__eq": made[1]["app_conversation_id"]}
    assert [each["id"] for each in fine(await get(search, params=wanted))["items"]] == [ids[1]]
    count = "/api/v1/app-conversations/start-tasks/count"
    assert fine(await get(count)) == 3
    assert fine(await get(count, params=wanted)) == 1
    assert fine(await get(count, params={"created_at__gte": made[1]["created_at"]})) == 2
    refused(await get(search, params={"sort_order": "x"}), 422)


async def test_events_are_counted(caller: User, upstream: TestUpstream) -> None:
    mine = await caller.conversation()
    path = "/api/v1/events/count"
    before = fine(await caller.http.get(path, params={"conversation_id__eq": mine.session_id}))
    await mine.answered("Hi")
    after = fine(await caller.http.get(path, params={"conversation_id__eq": mine.id}))
    assert after == before + 4  # what was said and answered, running, finished
    refused(await caller.http.get(path), 422)


# ── sandboxes and places ────────────────────────────────────────────────────────────────────────


async def test_a_sandbox_pauses_and_resumes(caller: User, upstream: TestUpstream) -> None:
    mine = await caller.conversation()
    sandbox = f"/api/v1/sandboxes/{(await mine.app())['sandbox_id']}"
    upstream.script(SLOW, {"text": "done"})
    await mine.say("Count")
    await upstream.until(lambda state: state["running"] > 0)
    await asyncio.sleep(0.7)
    assert fine(await caller.http.post(f"{sandbox}/pause", json={})) == {"success": True}
    app = await mine.app()
    shown = ("sandbox_status", "execution_status", "conversation_url", "session_api_key")
    assert [app[name] for name in shown] == ["PAUSED", None, None, None]
    assert (await mine.turns())[0]["status"] == "interrupted"
    assert fine(await caller.http.post(f"{sandbox}/pause", json={})) == {"success": True}
    assert fine(await caller.http.post(f"{sandbox}/resume", json={})) == {"success": True}
    app = await mine.app()
    assert [app[name] for name in shown[:2]] == ["RUNNING", "paused"]
    assert app["session_api_key"] == mine.secret
    fine(await mine.call("run"))
    await mine.until_status("finished")


async def test_so_many_run_and_the_oldest_idle_one_is_paused(make_user: Any, upstream: TestUpstream) -> None:
    user: User = await make_user()
    made = [await user.conversation() for _ in range(5)]
    upstream.script(SLOW | {"repeat": 1})
    await made[0].say("Count")  # the oldest is busy
    await made[0].until_status("running")
    sixth = await user.conversation()
    statuses = [(await each.app())["sandbox_status"] for each in [*made, sixth]]
    assert statuses == ["RUNNING", "PAUSED", "RUNNING", "RUNNING", "RUNNING", "RUNNING"]
    fine(await made[0].call("pause"))


async def test_parallel_starts_never_exceed_the_places(make_user: Any) -> None:
    user: User = await make_user()
    tasks = [await user.start(llm_model=MODEL) for _ in range(12)]
    ended = await asyncio.gather(*(user.ended(task["id"]) for task in tasks))
    assert {task["status"] for task in ended} == {"READY"}
    found = fine(await user.http.get("/api/v1/app-conversations/search"))["items"]
    assert [each["sandbox_status"] for each in found].count("RUNNING") == 5
    assert len(found) == 12


async def test_a_conversation_whose_session_has_ended_is_missing(caller: User) -> None:
    mine = await caller.conversation(initial_message=say("Hi", run=False))
    fine(await caller.http.post(f"/sessions/{mine.session_id}/close"))
    app = await mine.app()
    assert (app["sandbox_status"], app["execution_status"], app["session_api_key"]) == ("MISSING", None, None)
    info = fine(await caller.http.get(mine.path))
    assert (info["status"], info["runtime_status"]) == ("ARCHIVED", None)
    refused(await caller.http.post(f"{mine.path}/start", json={}), 409)
    refused(await mine.call("events", say("More")), 409)
    refused(await mine.call("run"), 409)
    assert await mine.told() == [("user", "Hi")]


async def test_what_upstream_refuses_ends_the_run_with_an_error(caller: User, upstream: TestUpstream) -> None:
    mine = await caller.conversation()
    error = {"type": "error", "error": {"type": "invalid_request_error", "message": "no such thing"}}
    upstream.script({"status": 400, "body": error}, {"text": "Now it works"})
    await mine.say("Hi")
    app = await mine.until_status("error")
    assert app["sandbox_status"] == "RUNNING"
    info = fine(await caller.http.get(mine.path))
    assert info["runtime_status"] == "STATUS$ERROR"
    failed = [event for event in await mine.events() if event.get("observation") == "error"]
    assert "no such thing" in failed[0]["message"]

    async def has_answered() -> bool:
        return bool((await mine.app())["execution_status"] == "finished")

    await mine.say("Again")
    await until(has_answered)
    assert (await mine.stored())[-1] == ("assistant", "Now it works")
