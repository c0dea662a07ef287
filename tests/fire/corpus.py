"""Hostile input: bodies that are no bodies, values that are no values, ids that are no ids, headers that lie.

Its one invariant: cases are made from rows of the table of rights, so that a new route gets its share by itself.
"""

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote_from_bytes

from tests.fire.rows import SOCKET, Row

BODIES: dict[str, bytes] = {
    "no body": b"",
    "blanks": b" \r\n\t",
    "half": b'{"a":',
    "two values": b"{}{}",
    "trailing comma": b'{"a":1,}',
    "array": b"[]",
    "string": b'"x"',
    "number": b"7",
    "null": b"null",
    "byte order mark": b"\xef\xbb\xbf{}",
    "UTF-16": "{}".encode("utf-16"),
    "Latin-1": b'{"a":"\xe9"}',
    "overlong": b'{"a":"\xc0\xaf"}',
    "surrogate bytes": b'{"a":"\xed\xa0\x80"}',
    "raw NUL": b'{"a":"\x00"}',
    "NaN": b'{"a":NaN}',
    "Infinity": b'{"a":-Infinity}',
    "very deep": b"[" * 50_000 + b"]" * 50_000,
    "deep object": b'{"a":' * 20_000 + b"1" + b"}" * 20_000,
    "many digits": b'{"a":' + b"9" * 50_000 + b"}",
    "form": b"a=1&b=2",
    "multipart": b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\n1\r\n--x--\r\n',
    "gzip": b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03\xab\xae\x05\x00\x43\xbf\xa6\xa3\x02\x00\x00\x00",
    "garbage": bytes(range(256)),
}

VALUES: dict[str, bytes] = {
    "null": b"null",
    "true": b"true",
    "number": b"7",
    "fraction": b"1.5",
    "minus one": b"-1",
    "2^31": b"2147483648",
    "2^63": b"9223372036854775808",
    "2^400": str(2**400).encode(),
    "1e999": b"1e999",
    "NaN": b"NaN",
    "empty text": b'""',
    "blank text": b'" \\u3000"',
    "NUL": b'"a\\u0000b"',
    "lone surrogate": b'"\\ud800"',
    "noncharacter": b'"\\uffff\\ufdd0"',
    "long text": b'"' + b"x" * 70_000 + b'"',
    "combining": b'"e' + b"\\u0301" * 2_000 + b'"',
    "right to left": b'"\\u202egnp.exe"',
    "quotes": json.dumps("'; DROP TABLE messages; --").encode(),
    "template": b'"{{7*7}}${7*7}%s%n%x"',
    "path": b'"../../../../etc/passwd"',
    "header": json.dumps("x\r\nset-cookie: a=b").encode(),
    "array": b"[]",
    "array of nulls": b"[null,null]",
    "object": b"{}",
    "prototype": b'{"__proto__":{"a":1},"constructor":1}',
    "deep": b"[" * 200 + b"]" * 200,
}

SEGMENTS: dict[str, bytes] = {
    "NUL": b"a%00b",
    "new line": b"a%0d%0ab",
    "C1 control": "a\x85b".encode(),
    "slash": b"a%2fb",
    "backslash": b"a%5cb",
    "dots": b"%2e%2e",
    "dot": b".",
    "no UTF-8": b"%ff%fe",
    "overlong": b"%c0%ae",
    "surrogate": b"%ed%a0%80",
    "half an escape": b"%e",
    "no escape": b"%zz",
    "blank": b"%20",
    "long": b"x" * 256,
    "very long": b"x" * 20_000,
    "emoji": "\U0001f469‍\U0001f469".encode(),
    "percent": b"%25",
    "semicolon": b"a;b=c",
    "quotes": b"'%20OR%20'1'='1",
}

HEADERS: dict[str, dict[bytes, bytes]] = {
    "content-type text": {b"content-type": b"text/plain"},
    "content-type nonsense": {b"content-type": b";;;=\xff"},
    "content-type UTF-16": {b"content-type": b"application/json; charset=utf-16"},
    "gzip that is none": {b"content-encoding": b"gzip"},
    "request id": {b"x-request-id": b"a b\xff\tc"},
    "long request id": {b"x-request-id": b"x" * 5_000},
    "session id latin": {b"x-session-id": b"caf\xe9"},
    "session id control": {b"x-session-id": b"a\x01b"},
    "session id long": {b"x-session-id": b"x" * 3_000},
    "session id escaped NUL": {b"x-session-id": b"a%00b"},
    "session id path": {b"x-session-id": b"../../stats"},
    "agent id": {b"x-claude-code-session-id": b"%00", b"x-claude-code-agent-id": b"/" * 300},
    "session id reserved": {b"x-session-id": b"stats"},
    "conflict nonsense": {b"x-session-conflict": b"explode"},
    "busy nonsense": {b"x-session-busy": b"\xff"},
    "empty key": {b"idempotency-key": b""},
    "blank key": {b"idempotency-key": b"a b"},
    "long key": {b"idempotency-key": b"k" * 256},
    "key of bytes": {b"idempotency-key": b"\xf0\x9f\x98\x80"},
    "if-match nonsense": {b"if-match": b'W/"x", "'},
    "if-match huge": {b"if-match": b'"' + b"9" * 400 + b'"'},
    "range": {b"range": b"bytes=0-18446744073709551615"},
    "expect": {b"expect": b"200-maybe"},
    "forwarded": {b"x-forwarded-for": b"127.0.0.1", b"x-forwarded-proto": b"gopher", b"forwarded": b"for=_x"},
    "override": {b"x-http-method-override": b"DELETE"},
    "version": {b"anthropic-version": b"\x7f", b"anthropic-beta": b"," * 3_000},
    "origin": {b"origin": b"null"},
    "cookie": {b"cookie": b"=;" * 2_000},
    "last event": {b"last-event-id": b"-1"},
    "host nonsense": {b"host": b"<script>alert(1)</script>"},
    "host empty": {b"host": b""},
}

QUERIES: dict[str, bytes] = {
    "twice": b"user_id=a&user_id=b",
    "empty name": b"=x&&&=",
    "no UTF-8": b"q=%ff&page=%c0%80",
    "huge page": b"page=99999999999999999999",
    "page zero": b"page=0&page_size=0&limit=0",
    "negative": b"page=-1&limit=-5&after_seq=-9&max_tokens=-1",
    "fraction": b"page=1.5&page_size=1e3&limit=0x10",
    "other digits": "page=٣&limit=１".encode(),
    "nonsense": b"status=nope&order=sideways&role=x&format=yaml&bucket=eon&active_only=maybe&from=yesterday",
    "cursor": b"cursor=AAAA&after_id=%00&before_id=%00",
    "cursor bytes": b"cursor=" + quote_from_bytes(bytes(range(128, 200))).encode(),
    "times": b"from=9999-12-31T23:59:59Z&to=0001-01-01T00:00:00Z&bucket=hour",
    "long": b"q=" + b"x" * 3_000,
    "words": b"q=%22%22%22&limit=1",
    "NUL": b"q=a%00b&search=a%00b&tag=%00",
    "many": b"&".join(b"a%d=1" % number for number in range(2_000)),
}


@dataclass(frozen=True)
class Case:
    """One request. `body` is None for none; `query` is added to what the row needs."""

    name: str
    row: Row
    target: str
    body: bytes | None
    headers: dict[bytes, bytes]
    query: bytes = b""
    raw_segment: tuple[str, bytes] | None = None


def cases(rows: list[Row]) -> Iterator[Case]:
    """All cases of a service. Routes that are the same under another prefix are taken once."""
    for row in rows:
        if row.method == SOCKET or row.path.startswith(("/api/v1/claude-kiro", "/claude-kiro", "/docs", "/redoc")):
            continue
        plain = None if row.body is None else json.dumps(row.body).encode()
        where = f"{row.method} {row.path}"
        if row.method in {"POST", "PUT", "PATCH"}:
            for name, body in BODIES.items():
                yield Case(f"{where} body {name}", row, row.path, body, {})
            for path, name, body in _with_values(row.body):
                yield Case(f"{where} {path} {name}", row, row.path, body, {})
        for name, headers in HEADERS.items():
            yield Case(f"{where} header {name}", row, row.path, plain, headers)
        for name, query in QUERIES.items():
            yield Case(f"{where} query {name}", row, row.path, plain, {}, query)
        for name, segment in SEGMENTS.items():
            for parameter in _parameters(row.path):
                yield Case(f"{where} {parameter} {name}", row, row.path, plain, {}, raw_segment=(parameter, segment))


def _parameters(path: str) -> list[str]:
    return [piece.partition("}")[0] for piece in path.split("{")[1:]]


def _with_values(body: Any) -> Iterator[tuple[str, str, bytes]]:
    """The body with each of its fields, deep ones too, made each of the values."""
    for path in _places(body):
        for name, value in VALUES.items():
            changed = copy.deepcopy(body)
            at = changed
            for step in path[:-1]:
                at = at[step]
            at[path[-1]] = "@@"
            yield ".".join(map(str, path)), name, json.dumps(changed).encode().replace(b'"@@"', value)


def _places(value: Any, *before: Any) -> Iterator[tuple[Any, ...]]:
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in pairs:
        yield (*before, key)
        yield from _places(each, *before, key)
