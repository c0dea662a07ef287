"""The pool's choosing by itself, with accounts and loads made up: a pure function but for whose turn it is."""

from collections import Counter
from datetime import UTC, datetime
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from services.relay.accounts import Account
from services.relay.members import Member, chosen

NOW = datetime.now(UTC)


def member(number: int, *, priority: int = 0, weight: float = 1.0, in_flight: int = 0) -> Member:
    fields: dict[str, Any] = dict.fromkeys(Account.__dataclass_fields__)
    fields |= {"id": f"a{number}", "provider": "anthropic", "models": [], "created_at": NOW, "updated_at": NOW}
    account = Account(**fields | {"priority": priority, "weight": weight})
    return Member(account, None, in_flight=in_flight)


members = st.lists(st.tuples(st.integers(-2, 2), st.floats(0.1, 100), st.integers(0, 5)), min_size=1, max_size=6).map(
    lambda drawn: [
        member(number, priority=priority, weight=weight, in_flight=in_flight)
        for number, (priority, weight, in_flight) in enumerate(drawn)
    ]
)
ids = st.sampled_from([f"a{number}" for number in range(6)])


@given(members, st.none() | ids, st.sets(ids))
def test_the_order_of_preferences(eligible: list[Member], prefers: str | None, tried: set[str]) -> None:
    """Not yet tried, then the session's own, then the lowest priority number, then the least load by weight."""
    taken = chosen(list(eligible), prefers, tried)
    assert taken is not None
    fresh = [each for each in eligible if each.account.id not in tried] or eligible
    assert taken in fresh
    if prefers in {each.account.id for each in fresh}:
        assert taken.account.id == prefers
        return
    first = [each for each in fresh if each.account.priority == min(each.account.priority for each in fresh)]
    assert taken in first
    assert taken.in_flight / taken.account.weight == min(each.in_flight / each.account.weight for each in first)


def test_nobody_to_choose() -> None:
    assert chosen([], "a0", {"a1"}) is None


@given(st.lists(st.integers(1, 7), min_size=1, max_size=5), st.integers(1, 5))
def test_turns_are_exactly_by_weight(weights: list[int], rounds: int) -> None:
    """In each round of as many requests as all weights together, each comes as often as its weight."""
    eligible = [member(number, weight=weight) for number, weight in enumerate(weights)]
    for _ in range(rounds):
        seen = Counter((chosen(eligible, None, set()) or eligible[0]).account.id for _ in range(sum(weights)))
        assert seen == {f"a{number}": weight for number, weight in enumerate(weights)}


@given(st.lists(st.integers(1, 7), min_size=2, max_size=5))
def test_turns_are_spread(weights: list[int]) -> None:
    """At no moment is an account more than one turn ahead of its share, or more than one behind."""
    eligible = [member(number, weight=weight) for number, weight in enumerate(weights)]
    seen: Counter[str] = Counter()
    for count in range(1, sum(weights) + 1):
        seen[(chosen(eligible, None, set()) or eligible[0]).account.id] += 1
        for each in eligible:
            assert abs(seen[each.account.id] - count * each.account.weight / sum(weights)) < len(weights)


@given(st.lists(st.floats(0.5, 50), min_size=2, max_size=5), st.integers(1, 60))
def test_load_follows_the_weights(weights: list[float], count: int) -> None:
    """Requests that do not end: before its last one nobody was loaded more than anybody else is now."""
    eligible = [member(number, weight=weight) for number, weight in enumerate(weights)]
    for _ in range(count):
        taken = chosen(eligible, None, set())
        assert taken is not None
        taken.in_flight += 1
    for one in eligible:
        for other in eligible:
            assert (one.in_flight - 1) / one.account.weight <= other.in_flight / other.account.weight + 1e-9


@given(st.lists(st.sets(st.integers(0, 4), min_size=1), max_size=200))
def test_turns_never_run_away(rounds: list[set[int]]) -> None:
    """Whoever is eligible or not from one request to the next, no account saves up turns without bound."""
    everyone = [member(number, weight=number + 1) for number in range(5)]
    for some in rounds:
        chosen([everyone[number] for number in some], None, set())
    assert all(abs(each.credit) <= 2 * sum(other.account.weight for other in everyone) for each in everyone)
