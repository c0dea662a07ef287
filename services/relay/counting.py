"""Counting the tokens of a request: upstream's figure, neither stored nor limited.

Its one invariant: nothing of it touches a session.
"""

from services.relay import outcomes
from services.relay.answers import Answer
from services.relay.attempts import Asking, Attempt
from services.relay.outcomes import Ended
from services.relay.parts import Caller
from services.relay.request import ClaudeRequest
from services.relay.upstream import COUNT_TOKENS_PATH, UpstreamAnswer, UpstreamRequest


async def count(asking: Asking, caller: Caller, request: ClaudeRequest) -> Ended:
    """Upstream's answer; raises the RelayError that a failure comes to."""
    asked = UpstreamRequest(COUNT_TOKENS_PATH, caller.query, caller.headers, request.body)
    ended = await asking.ask(asked, _take)
    if ended.error is not None:
        raise ended.error
    return ended


async def _take(answer: UpstreamAnswer, _attempt: Attempt) -> Ended:
    content = await answer.read()
    return Ended(Answer("completed"), headers=outcomes.passed_headers(answer.headers), content=content)
