"""JSON at the edges: strict in, fast out.

Its one invariant: what `parse` accepts, `dumps` gives back with the same value, and Postgres can store.
"""

import json
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import orjson
from pydantic import BaseModel
from pydantic_core import from_json

from shared.errors import ValidationFailed

_MAY_OVERFLOW = re.compile(rb"[0-9][eE]\+?[0-9]{2}|[0-9]{300}")
_ESCAPED_NUL = b"\\u0000"
_UTC = "+00:00"
MAX_DEPTH = 180
"""What is read here is written again some levels deeper in answers, and many parsers, ours too, stop at 200."""


def parse(body: bytes | bytearray) -> Any:
    """The value of a UTF-8 JSON text; raises ValidationFailed naming the position or the place.

    Refuses what RFC 8259 does not know (NaN, Infinity, a byte order mark) and what cannot be stored:
    U+0000, lone surrogates, numbers that overflow; and more than MAX_DEPTH levels. Integers keep all their digits.
    """
    try:
        value = from_json(body, allow_inf_nan=False, cache_strings="keys")
    except ValueError as error:
        raise ValidationFailed.at("body", msg=f"Invalid JSON: {error}", type="json_invalid") from None
    if _ESCAPED_NUL in body or _MAY_OVERFLOW.search(body):
        for path, problem in _unstorable(value, ()):
            raise ValidationFailed.at("body", *path, msg=problem)
    # Hardly any text has so many brackets; only those that do are looked at level by level.
    if body.count(b"[") + body.count(b"{") > MAX_DEPTH and _is_deeper(value, MAX_DEPTH):
        fields = value.items() if isinstance(value, dict) else ()
        place = [name for name, below in fields if _is_deeper(below, MAX_DEPTH - 1)][:1]
        raise ValidationFailed.at("body", *place, msg=f"Nested more than {MAX_DEPTH} levels deep")
    return value


def _is_deeper(value: Any, levels: int) -> bool:
    """Whether objects and arrays stand in one another more than so many times."""
    layer = [value]
    for _ in range(levels + 1):
        layer = [each for each in layer if isinstance(each, dict | list)]
        if not layer:
            return False
        layer = [below for each in layer for below in (each.values() if isinstance(each, dict) else each)]
    return True


def _unstorable(value: Any, path: tuple[str | int, ...]) -> Iterator[tuple[tuple[str | int, ...], str]]:
    if isinstance(value, str):
        if "\0" in value:
            yield path, "U+0000 cannot be stored"
    elif isinstance(value, float):
        if value in {float("inf"), float("-inf")}:
            yield path, "Number out of range"
    elif isinstance(value, dict):
        for key, below in value.items():
            if "\0" in key:
                yield path, "U+0000 cannot be stored, in a key neither"
            yield from _unstorable(below, (*path, key))
    elif isinstance(value, list):
        for index, below in enumerate(value):
            yield from _unstorable(below, (*path, index))


def rfc3339(moment: datetime) -> str:
    """A time as our APIs write it: UTC, microseconds always, `Z`."""
    text = moment.isoformat(timespec="microseconds")
    if not text.endswith(_UTC):
        text = moment.astimezone(UTC).isoformat(timespec="microseconds")
    return text.removesuffix(_UTC) + "Z"


def _default(value: Any) -> Any:
    if isinstance(value, datetime):
        return rfc3339(value)
    if isinstance(value, Decimal):
        return float(value)
    if isinstance(value, BaseModel):
        return value.__dict__
    raise TypeError(f"not JSON: {type(value).__name__}")


def dumps(value: Any) -> bytes:
    """Compact UTF-8 JSON; models, datetimes and Decimals included, integers of any size."""
    try:
        return orjson.dumps(value, default=_default, option=orjson.OPT_PASSTHROUGH_DATETIME)
    except TypeError:  # orjson stops at 64 bits, JSON does not
        text = json.dumps(value, default=_default, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        return text.encode()


def dumps_sorted(value: Any) -> bytes:
    """`dumps` with the keys of objects in order: the same bytes however a body was written."""
    try:
        return orjson.dumps(value, default=_default, option=orjson.OPT_PASSTHROUGH_DATETIME | orjson.OPT_SORT_KEYS)
    except TypeError:  # as in `dumps`
        return json.dumps(value, default=_default, sort_keys=True, separators=(",", ":")).encode()


def dump_text(value: Any) -> str:
    """`dumps` as text, for columns of type json and jsonb."""
    return dumps(value).decode()


def loads(text: str | bytes) -> Any:
    """A value that `dumps` wrote; integers keep all their digits."""
    return from_json(text)


def equal(one: Any, other: Any) -> bool:
    """Whether two JSON values are the same: numbers by value, `true` never the same as 1."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(equal(value, other[key]) for key, value in one.items())
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(equal, one, other))
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    return bool(one == other)
