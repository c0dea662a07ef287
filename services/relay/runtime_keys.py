"""Runtime keys: each conversation has one, and whoever shows it may drive that conversation and no other.

Its one invariant: the key itself is stored nowhere. It is derived from a secret of the settings and 32 random bytes of
the conversation, and found by its keyed hash.
"""

import hashlib
import hmac
import secrets
import string
from typing import Final

from services.relay import keys

_ALPHABET: Final = string.digits + string.ascii_uppercase + string.ascii_lowercase
_CHARACTERS: Final = 43  # as many as 256 bits take in base 62


def new_nonce() -> bytes:
    return secrets.token_bytes(32)


def secret_of(pepper: str, conversation_id: str, nonce: bytes) -> str:
    """The conversation's key: 32 bytes that nobody can tell from random ones, in base 62."""
    derived = hmac.digest(pepper.encode(), b"runtime key\0" + conversation_id.encode() + nonce, hashlib.sha256)
    number, text = int.from_bytes(derived), ""
    for _ in range(_CHARACTERS):
        number, digit = divmod(number, len(_ALPHABET))
        text += _ALPHABET[digit]
    return text


def digest(pepper: str, secret: str) -> bytes:
    """The keyed hash by which a conversation is found."""
    return keys.digest(pepper, "runtime:" + secret)
