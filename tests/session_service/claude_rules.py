"""Whether a context is a request that Claude's rules accept: the upstream's rules, and what the contract adds.

Its one invariant: `problem` is None only for a context that could be sent as it is, once the calls that the
receipt names as pending have been answered.
"""

from itertools import pairwise
from typing import Any

from tests.session_service.calls import Json
from tests.upstream import rules

MAX_CACHE_BREAKPOINTS = 4


def problem(messages: list[Json], pending: list[str], system: str = "") -> str | None:
    """The first thing that is wrong, or None; no messages at all are no request, and so no wrong one."""
    if not messages:
        return "calls are pending in nothing" if pending else None
    for before, after in pairwise(messages):
        if before["role"] == after["role"]:
            return f"two messages of {after['role']} in a row"
    if found := sum(_breakpoints(message["content"]) for message in messages) > MAX_CACHE_BREAKPOINTS:
        return f"{found} cache breakpoints"
    if _says(messages, "incomplete"):
        return "a block says that it is incomplete"
    if _open_calls(messages) != pending:
        return f"pending are {_open_calls(messages)}, named are {pending}"
    if pending:
        results = [{"type": "tool_result", "tool_use_id": call_id, "content": "x"} for call_id in pending]
        messages = [*messages, {"role": "user", "content": results}]
    body = {"model": "m", "max_tokens": 1, "messages": messages, **({"system": system} if system else {})}
    return rules.problem(body)


def _breakpoints(content: Any) -> int:
    if not isinstance(content, list):
        return 0
    inner = sum(_breakpoints(block.get("content")) for block in content if isinstance(block, dict))
    return inner + sum(bool(block.get("cache_control")) for block in content if isinstance(block, dict))


def _says(value: Any, key: str) -> bool:
    if isinstance(value, dict):
        return key in value or any(_says(below, key) for name, below in value.items() if name != "input")
    return isinstance(value, list) and any(_says(each, key) for each in value)


def _open_calls(messages: list[Json]) -> list[str]:
    last = messages[-1]
    if last["role"] != "assistant" or isinstance(last["content"], str):
        return []
    return [block["id"] for block in last["content"] if block["type"] == "tool_use"]
