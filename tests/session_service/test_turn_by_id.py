"""A turn by its id alone: whichever of the user's sessions it belongs to, and nobody else's."""

import asyncpg
import httpx
import pytest

from services.session_service import turns
from shared.database import compile_statement
from tests.session_service.calls import Db, Json, User, fine, invalid, refused, said
from tests.session_service.creations import exported
from tests.session_service.exports import taken_back
from tests.session_service.test_plans import _explained, _statements

NOT_FOUND = b'{"detail":"Turn not found","code":"turn_not_found"}'


async def look(user: User, turn_id: str) -> httpx.Response:
    return await user.http.get(f"/turns/{turn_id}", params=user.params)


async def found(user: User, turn_id: str) -> Json:
    return fine(await look(user, turn_id))


async def test_a_turn_of_any_session(user: User) -> None:
    one, other = await user.chat(session_id="one"), await user.chat(session_id="other")
    first, second = await one.open(said("q")), await other.open(said("q"))
    for chat, turn in ((one, first), (other, second)):
        shown = await found(user, turn.id)
        assert shown == await turn.get()
        assert (shown["turn_id"], shown["session_id"], shown["status"]) == (turn.id, chat.id, "open")
        assert turn.token not in str(shown)
    done = await first.complete(said("a", "assistant"), usage={"output_tokens": 2}, cost_usd=0.5, model="m")
    assert await found(user, first.id) == done["turn"]
    assert (await found(user, second.id))["status"] == "open"
    fine(await one.end())
    assert await found(user, first.id) == done["turn"]


async def test_a_turn_of_another_user_is_as_if_it_did_not_exist(user: User) -> None:
    turn = await (await user.chat()).open(said("secret"))
    stranger = user.other()
    answers = [await look(stranger, turn.id), await look(stranger, "nothing"), await look(user, "nothing")]
    for answer in answers:
        refused(answer, 404, "turn_not_found", "Turn not found")
        assert answer.content == NOT_FOUND
    assert len({frozenset(answer.headers) for answer in answers}) == 1


async def test_of_several_the_newest_opened(user: User, db: Db) -> None:
    """A session that was taken back under another id holds the same turns, opened at the same moment."""
    chat = await user.chat(session_id="b")
    turn = await chat.open(said("q"))
    await turn.complete(said("a", "assistant"))
    file = await exported(chat)
    for session_id in ("a", "c"):
        await taken_back(user, file, session_id=session_id)
    assert {(await found(user, turn.id))["session_id"] for _ in range(3)} == {"a"}
    moved = "UPDATE dev.session_turns SET opened_at = opened_at + interval '1 s' WHERE user_id = $1 AND session_id = $2"
    for session_id in ("c", "b", "b"):
        await db.execute(moved, user.id, session_id)
        assert (await found(user, turn.id))["session_id"] == session_id
    await db.execute(moved, user.id, "a")
    assert (await found(user, turn.id))["session_id"] == "b"
    fine(await user.http.delete(f"/users/{user.id}"))
    refused(await look(user, turn.id), 404, "turn_not_found")


@pytest.mark.parametrize("bad", ["x" * 256, "a%00b", "a%0A", "%7F", "%C2%80"])
async def test_bad_ids(user: User, bad: str) -> None:
    invalid(await look(user, bad), "path", "turn_id")
    invalid(await user.http.get("/turns/t"), "query", "user_id")
    invalid(await user.http.get("/turns/t", params={"user_id": ""}), "query", "user_id")


async def test_it_is_described(user: User) -> None:
    described = (await user.http.get(f"{str(user.http.base_url).removesuffix('/api/v1/')}/openapi.json")).json()
    operation = described["paths"]["/api/v1/turns/{turn_id}"]["get"]
    assert operation["tags"] == ["turns"]
    assert "turn_not_found" in operation["responses"]["404"]["description"]
    assert {each["name"] for each in operation["parameters"]} == {"turn_id", "user_id"}


async def test_it_is_found_by_an_index_of_its_own(own_database: str) -> None:
    """A walk through all turns of the user would be no scan of the table, and yet grow with them."""
    assert "turns.FIND" in dict(_statements())
    connection = await asyncpg.connect(own_database)
    try:
        if connection.get_server_version().major < 16:
            pytest.skip("EXPLAIN (GENERIC_PLAN) came with PostgreSQL 16")
        plan = await _explained(connection, compile_statement(turns.FIND, "dev").sql)
    finally:
        await connection.close()
    assert "session_turns_by_turn_id_idx" in str(plan)
