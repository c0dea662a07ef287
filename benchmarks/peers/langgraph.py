"""langgraph with its Postgres saver: python -m benchmarks.peers.langgraph URL."""

import asyncio
import sys
from typing import Any

from langchain_core.messages import HumanMessage
from langgraph.checkpoint.postgres.aio import AsyncPostgresSaver
from langgraph.graph import END, START, MessagesState, StateGraph

from benchmarks.peers.driver import LAST, TEXT, serve


class Langgraph:
    """A graph whose state is its messages; the saver keeps a checkpoint after each step."""

    def __init__(self, saver: AsyncPostgresSaver) -> None:
        builder = StateGraph(MessagesState)
        builder.add_node("answer", lambda state: {})
        builder.add_edge(START, "answer")
        builder.add_edge("answer", END)
        self._graph = builder.compile(checkpointer=saver)

    async def fill(self, session: str, count: int) -> None:
        await self._update(session, [HumanMessage(TEXT) for _ in range(count)])

    async def append(self, session: str, text: str) -> None:
        await self._update(session, [HumanMessage(text)])

    async def _update(self, session: str, messages: list[HumanMessage]) -> None:
        await self._graph.aupdate_state(_config(session), {"messages": messages}, as_node="answer")

    async def last(self, session: str) -> list[str]:
        state = await self._graph.aget_state(_config(session))
        return [message.content for message in state.values["messages"][-LAST:]]


def _config(session: str) -> Any:
    return {"configurable": {"thread_id": session}}


async def main() -> None:
    async with AsyncPostgresSaver.from_conn_string(sys.argv[1]) as saver:
        await saver.setup()
        await serve(Langgraph(saver))


if __name__ == "__main__":
    asyncio.run(main())
