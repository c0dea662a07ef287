"""JSON at the edges: what is accepted comes back with the same value, whatever else is refused in one way."""

import json
import math
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import ValidationFailed
from shared.json import MAX_DEPTH, dump_text, dumps, loads, parse, rfc3339

texts = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"))
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts
values = st.recursive(scalars, lambda below: st.lists(below) | st.dictionaries(texts, below), max_leaves=20)


@given(values)
def test_what_was_written_is_read_again(value: Any) -> None:
    written = dumps(value)
    for read in (parse(written), loads(written), loads(written.decode()), parse(bytearray(written))):
        assert repr(read) == repr(value)  # types and order of keys too: 1, 1.0 and true are three
    assert dump_text(value).encode() == written
    assert json.loads(written) == value


@given(values, st.sampled_from([None, 0, 3]), st.booleans())
def test_what_others_write_is_read(value: Any, indent: int | None, ascii_only: bool) -> None:
    assert repr(parse(json.dumps(value, indent=indent, ensure_ascii=ascii_only).encode())) == repr(value)


def unstorable(value: Any) -> bool:
    if isinstance(value, str):
        return "\0" in value
    if isinstance(value, float):
        return not math.isfinite(value)
    if isinstance(value, dict):
        return any(unstorable(key) or unstorable(below) for key, below in value.items())
    return isinstance(value, list) and any(map(unstorable, value))


SYNTAX = ["[", "]", "{", "}", ":", ",", '"', "\\", " ", "\n", "\ufeff", "\x00", "null", "true", "NaN", "Infinity"]
NUMBERS = ["1", "-0", "0.1", "1e5", "1e400", "-1e999", "1E+308", "9" * 320, "9" * 320 + ".0"]
STRINGS = ['"a"', '"é"', '"\\u0000"', '"\\ud800"', '"\\ud83d\\ude00"', '"\\x"']
fragments = st.sampled_from([*SYNTAX, *NUMBERS, *STRINGS])


@given(st.lists(fragments, max_size=12).map("".join).map(str.encode) | st.binary(max_size=40))
def test_any_bytes_are_a_storable_value_or_refused_in_one_way(body: bytes) -> None:
    try:
        value = parse(body)
    except ValidationFailed as refusal:
        told = refusal.body()["detail"]
    else:
        told = None
    if told is not None:
        [detail] = told
        assert list(detail) == ["type", "loc", "msg"]
        assert detail["loc"][0] == "body"
        return
    assert not unstorable(value)
    assert repr(value) == repr(json.loads(body))
    assert parse(dumps(value)) == value


PLACES: list[tuple[bytes, list[str | int]]] = [
    (b'"\\u0000"', ["body"]),
    (b'{"a":"x\\u0000"}', ["body", "a"]),
    (b'{"a":[1,{"b":"\\u0000"}]}', ["body", "a", 1, "b"]),
    (b"[1e400]", ["body", 0]),
    (b'{"a":{"b":-1e400}}', ["body", "a", "b"]),
    (b'{"a":[[],[0,1.5E+999]]}', ["body", "a", 1, 1]),
    (b'{"a":' + b"9" * 400 + b".5}", ["body", "a"]),
]


@pytest.mark.parametrize(("body", "place"), PLACES)
def test_the_place_is_named(body: bytes, place: list[str | int]) -> None:
    with pytest.raises(ValidationFailed) as raised:
        parse(body)
    assert isinstance(raised.value.detail, list)
    assert raised.value.detail[0]["loc"] == place


def test_so_many_levels_and_no_more() -> None:
    for opening, closing in ((b"[", b"]"), (b'{"a":', b"}")):
        assert parse(b"[" + opening * (MAX_DEPTH - 1) + b"1" + closing * (MAX_DEPTH - 1) + b",[]]")
        with pytest.raises(ValidationFailed):
            parse(b"[1," + opening * MAX_DEPTH + b"1" + closing * MAX_DEPTH + b"]")
    assert parse(b"[" + b"[]," * 1000 + b"{}]")[1000] == {}


def test_a_key_with_a_nul_is_refused() -> None:
    with pytest.raises(ValidationFailed):
        parse(b'{"a":{"b\\u0000":1}}')


def test_an_escaped_backslash_before_u0000_is_no_nul() -> None:
    assert parse(b'"\\\\u0000"') == "\\u0000"


def test_large_integers_keep_their_digits() -> None:
    for number in (2**53 + 1, 2**64, -(2**63) - 1, 10**300 + 7):
        assert parse(str(number).encode()) == number
        assert dumps({"a": [number]}) == f'{{"a":[{number}]}}'.encode()


moments = st.datetimes(
    min_value=datetime(1900, 1, 1),  # noqa: DTZ001 - the strategy adds the zone
    max_value=datetime(9000, 1, 1),  # noqa: DTZ001
    timezones=st.integers(-840, 840).map(lambda m: timezone(timedelta(minutes=m))),
)


@given(moments)
def test_times_are_utc_with_microseconds(moment: datetime) -> None:
    text = rfc3339(moment)
    assert len(text) == 27
    assert text[-8] == "."
    assert text.endswith("Z")
    assert datetime.fromisoformat(text) == moment
    assert datetime.fromisoformat(text).tzinfo == UTC
    assert dumps(moment) == f'"{text}"'.encode()


def test_what_is_no_json_is_not_written() -> None:
    assert dumps({"cost": Decimal("0.100000")}) == b'{"cost":0.1}'
    for value in (object(), {1, 2}, b"bytes", 1j):
        with pytest.raises(TypeError):
            dumps({"a": value})
