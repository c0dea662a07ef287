"""Errors cross the wire and come out as what they were."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared import errors
from shared.errors import Internal, ServiceError, Unavailable, ValidationFailed, by_code, decode
from shared.json import dumps

CLASSES = sorted(by_code().values(), key=lambda cls: cls.code)
names = st.text("abcdefghij_", min_size=1, max_size=10).map("x_".__add__)
scalars = st.none() | st.booleans() | st.integers() | st.text(max_size=10)


def over_the_wire(error: ServiceError) -> ServiceError:
    return decode(error.status, json.loads(dumps(error.body())), error.headers().get("retry-after"))


@pytest.mark.parametrize("cls", CLASSES)
def test_every_class_comes_back_as_itself(cls: type[ServiceError]) -> None:
    for error in (cls(), cls("told otherwise"), cls(turn_id="t", over_by_tokens=3), cls(retry_after_seconds=7)):
        back = over_the_wire(error)
        assert type(back) is cls
        assert (back.status, back.code, back.detail, back.data) == (error.status, error.code, error.detail, error.data)
        assert (back.body(), back.headers()) == (error.body(), error.headers())


@given(
    st.sampled_from(CLASSES),
    st.none()
    | st.text()
    | st.lists(st.fixed_dictionaries({"type": st.text(), "loc": st.lists(st.text()), "msg": st.text()})),
    st.dictionaries(names, scalars),
    st.none() | st.floats(0, 1e6),
)
def test_whatever_they_carry(cls: type[ServiceError], detail: Any, data: dict[str, Any], seconds: float | None) -> None:
    error = cls(detail, **data) if seconds is None else cls(detail, retry_after_seconds=seconds, **data)
    back = over_the_wire(error)
    assert type(back) is cls
    assert back.body() == error.body()
    assert back.headers() == error.headers()


json_values = st.recursive(scalars, lambda below: st.lists(below) | st.dictionaries(st.text(), below), max_leaves=5)
bodies = json_values | st.dictionaries(
    st.sampled_from(["detail", "code", "retry_after_seconds", "self", "status", "cls", "args", "turn_id", ""]),
    json_values,
)


@given(st.integers(100, 599), bodies, st.none() | st.text() | st.sampled_from(["²", "1.5", "-1", "1e9", "9" * 400]))
def test_any_answer_at_all_is_some_error(status: int, body: Any, retry_after: str | None) -> None:
    error = decode(status, body, retry_after)
    assert isinstance(error, ServiceError)
    assert dumps(error.body())
    error.headers()


@pytest.mark.parametrize(
    ("status", "cls"), [(500, Internal), (501, Internal), (502, Unavailable), (503, Unavailable), (504, Unavailable)]
)
def test_unknown_codes_are_taken_by_their_status(status: int, cls: type[ServiceError]) -> None:
    unknown: list[Any] = [{"code": "new_code", "detail": "d"}, {}, None, [], "text", {"code": 5}]
    for body in unknown:
        assert type(decode(status, body)) is cls


def test_codes_are_unique_and_each_has_its_place_in_the_drawing() -> None:
    drawn = errors.__doc__ or ""
    leaves = [cls for cls in by_code().values() if not cls.__subclasses__()]
    assert len({cls.code for cls in leaves}) == len(leaves)
    for cls in leaves:
        assert f"{cls.__name__} " in drawn, cls
        assert cls.code in drawn, cls


def test_validation_names_its_place() -> None:
    error = ValidationFailed.at("body", "messages", 0, "role", msg="No such role")
    assert error.body() == {
        "detail": [{"type": "value_error", "loc": ["body", "messages", 0, "role"], "msg": "No such role"}],
        "code": "validation_error",
    }


@pytest.mark.parametrize(
    ("seconds", "header"), [(0, "1"), (0.2, "1"), (1, "1"), (1.4, "1"), (59.9, "60"), (600, "600")]
)
def test_retry_after_is_whole_seconds_and_at_least_one(seconds: float, header: str) -> None:
    assert errors.TurnInProgress(retry_after_seconds=seconds).headers() == {"retry-after": header}
    assert errors.DatabaseUnavailable().headers() == {"retry-after": "1"}
    assert errors.SessionNotFound().headers() == {}
