"""Counting the tokens of a request: upstream's figure, neither stored nor limited.

Its one invariant: nothing of it touches a session.
"""

from services.relay import outcomes
from services.relay.accounts import Account, choose
from services.relay.answers import Answer
from services.relay.outcomes import Ended
from services.relay.parts import Caller
from services.relay.request import ClaudeRequest
from services.relay.upstream import COUNT_TOKENS_PATH, UpstreamError, UpstreamRequest


async def count(accounts: list[Account], caller: Caller, request: ClaudeRequest) -> Ended:
    """Upstream's answer; raises the RelayError that a failure comes to."""
    account = choose(accounts, request.model)
    asked = UpstreamRequest(COUNT_TOKENS_PATH, caller.query, caller.headers, request.body)
    try:
        async with await account.upstream.open(asked) as answer:
            content = await answer.read()
            if answer.status == 200:
                return Ended(Answer("completed"), 200, outcomes.passed_headers(answer.headers), content)
            ended = outcomes.declined(answer.status, answer.headers, content)
    except UpstreamError as failure:
        ended = outcomes.failed(failure, None)
    if ended.error is not None:
        raise ended.error
    return ended
