"""Cursors of keyset pages: a time and an id, opaque to callers.

Its one invariant: a cursor serves only the list, in the order, that gave it.
"""

import base64
import binascii
from datetime import UTC, datetime

import orjson

from shared.errors import ValidationFailed
from shared.json import rfc3339


def encode(kind: str, moment: datetime, last_id: str) -> str:
    place = orjson.dumps([kind, rfc3339(moment), last_id])
    return base64.urlsafe_b64encode(place).decode().rstrip("=")


def decode(cursor: str, kind: str) -> tuple[datetime, str]:
    """The time and id that a list of this kind put in; else ValidationFailed."""
    try:
        padded = cursor + "=" * (-len(cursor) % 4)
        found, moment, last_id = orjson.loads(base64.urlsafe_b64decode(padded))
        place = datetime.fromisoformat(moment).astimezone(UTC)
        if found == kind and isinstance(last_id, str) and "\0" not in last_id:
            return place, last_id
    except (binascii.Error, ValueError, TypeError, OverflowError):
        pass
    raise ValidationFailed.at("query", "cursor", msg="Not a cursor of this list in this order")
