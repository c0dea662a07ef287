"""Many clients at one session: no gap, no twin, no lost figure."""

import asyncio
import random

import httpx

from tests.session_service.calls import Chat, Db, Turn, User, check_counters, fine, refused, said


async def test_fifty_clients_append_forty_each_to_one_session(user: User, crowd: httpx.AsyncClient, db: Db) -> None:
    chat = (await user.chat()).of(user.at(crowd))

    async def client(name: int) -> list[int]:
        found = []
        for number in range(40):
            message = await chat.append(f"{name}/{number}", tokens_used=1, cost_usd=0.000001)
            found.append(message["seq"])
        return found

    by_client = await asyncio.gather(*(client(name) for name in range(50)))
    assert sorted(seq for found in by_client for seq in found) == list(range(1, 2001))
    assert all(found == sorted(found) for found in by_client)
    session = await check_counters(db, chat)
    assert (session["message_count"], session["total_tokens"], session["total_cost"]) == (2000, 2000, 0.002)
    assert session["version"] == 2001
    listed = (await chat.messages(page_size=1000))["messages"] + (await chat.messages(page_size=1000, page=2))[
        "messages"
    ]
    for name, found in enumerate(by_client):
        assert [listed[seq - 1]["content"] for seq in found] == [f"{name}/{number}" for number in range(40)]
    times = [each["created_at"] for each in listed]
    assert times == sorted(times)


async def test_two_hundred_open_one_new_session(user: User, crowd: httpx.AsyncClient, db: Db) -> None:
    chat = Chat(user.at(crowd), "wanted-by-all")
    answers = await asyncio.gather(*(chat.turn(said(f"m{n}"), create_session={"title": str(n)}) for n in range(200)))
    won = [answer for answer in answers if answer.status_code == 200]
    assert len(won) == 1
    turn = Turn(chat, won[0].json())
    for answer in answers:
        if answer is not won[0]:
            assert refused(answer, 409, "turn_in_progress")["turn_id"] == turn.id
    assert (await user.sessions())["total"] == 1
    turns = fine(await chat.call("GET", "/turns"))["turns"]
    assert [each["turn_id"] for each in turns] == [turn.id]
    session = await check_counters(db, chat)
    assert session["message_count"] == 1
    assert f"m{session['title']}" == (await chat.contents())[0]


async def test_turns_and_appends_at_once_keep_every_rule(user: User, crowd: httpx.AsyncClient, db: Db) -> None:
    """Everything that writes, at once; what was acknowledged is there, in one order for all."""
    chat = (await user.chat()).of(user.at(crowd))
    acknowledged: dict[str, int] = {}
    chance = random.Random(7)

    async def appender(name: int) -> None:
        for number in range(15):
            answer = await chat.post(f"a{name}/{number}", message_id=f"{chat.id}/a{name}/{number}", tokens_used=2)
            if answer.status_code == 200:
                acknowledged[answer.json()["content"]] = answer.json()["seq"]
            else:
                refused(answer, 409, "turn_in_progress")
            await asyncio.sleep(chance.random() / 100)

    async def talker(name: int) -> None:
        for number in range(5):
            turn = await chat.open(said(f"q{name}/{number}", tokens_used=1), wait_seconds=30)
            acknowledged[f"q{name}/{number}"] = turn.opened["messages"][0]["seq"]
            done = await turn.complete(said(f"r{name}/{number}", "assistant"), usage={"output_tokens": 3}, cost_usd=0.1)
            acknowledged[f"r{name}/{number}"] = done["messages"][0]["seq"]
            assert done["messages"][0]["seq"] == turn.opened["messages"][-1]["seq"] + 1

    async def reader() -> None:
        for _ in range(20):
            listed = await chat.messages(page_size=1000)
            assert [each["seq"] for each in listed["messages"]] == list(range(1, len(listed["messages"]) + 1))
            fine(await chat.put(metadata={"n": chance.random()}))
            await chat.context()

    await asyncio.gather(*(appender(n) for n in range(6)), *(talker(n) for n in range(4)), reader(), reader())
    session = await check_counters(db, chat)
    assert session["message_count"] == len(acknowledged)
    stored = (await chat.messages(page_size=1000))["messages"]
    assert {each["content"]: each["seq"] for each in stored} == acknowledged
    statuses = {each["status"] for each in fine(await chat.call("GET", "/turns"))["turns"]}
    assert statuses == {"completed"}


async def test_rewinding_turns_against_each_other(user: User, crowd: httpx.AsyncClient, db: Db) -> None:
    chat = (await user.chat()).of(user.at(crowd))
    await chat.append("root")

    async def rewinder(name: int) -> None:
        for number in range(4):
            turn = await chat.open(said(f"{name}/{number}"), rewind_to_seq=1, wait_seconds=30)
            messages = turn.opened["context"]["messages"]
            assert [block["text"] for block in messages[0]["content"]] == ["root", f"{name}/{number}"]
            await turn.complete(said("a", "assistant"))

    await asyncio.gather(*(rewinder(name) for name in range(6)))
    session = await check_counters(db, chat)
    assert session["message_count"] == 3
    assert (await chat.messages(include_superseded=True))["total"] == 1 + 2 * 24


async def test_many_puts_at_once_are_each_whole(user: User, crowd: httpx.AsyncClient) -> None:
    chat = (await user.chat()).of(user.at(crowd))
    answers = await asyncio.gather(
        *(chat.put(title=str(n), metadata={"n": n}, conversation_data={"n": [n]}) for n in range(30))
    )
    versions = [fine(answer)["version"] for answer in answers]
    assert sorted(versions) == list(range(2, 32))
    for answer in answers:
        body = answer.json()
        assert body["metadata"] == {"n": int(body["title"])}
        assert body["conversation_data"] == {"n": [int(body["title"])]}
    last = max(answers, key=lambda answer: int(answer.json()["version"]))
    assert await chat.get() == last.json()


async def test_many_ends_at_once(user: User, crowd: httpx.AsyncClient) -> None:
    chat = (await user.chat()).of(user.at(crowd))
    answers = await asyncio.gather(*(chat.end() for _ in range(20)))
    assert {fine(answer)["message"] for answer in answers} == {"Session ended successfully"}
    assert (await chat.get())["version"] == 2
