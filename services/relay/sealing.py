"""Secrets at rest: sealed with AES-256-GCM under a key from the settings, whose id is kept beside them.

Its one invariant: what was sealed for one owner opens for no other, and nothing of a secret is in any message.

Keys are rotated by putting a new one first in RELAY_ENCRYPTION_KEYS and running `python -m services.relay.reseal`;
after that the old one may go.
"""

import base64
import os
from collections.abc import Sequence
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from services.relay.accounts import Account
from shared.json import dumps, loads

KEY_BYTES: Final = 32
_NONCE_BYTES: Final = 12

Secrets = dict[str, str]


class Unsealable(Exception):
    """The key is not among the settings', or what is there was not sealed with it for this owner."""


class Sealer:
    """Seals with the first of the keys (`id:base64 of 32 bytes`) and opens with any. Raises ValueError for bad keys."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._keys = dict(map(_parsed, keys))
        if len(self._keys) != len(keys) or not keys:
            raise ValueError("RELAY_ENCRYPTION_KEYS: at least one key, and no id twice")
        self.key_id = next(iter(self._keys))

    def seal(self, owner_id: str, secrets: Secrets) -> bytes:
        nonce = os.urandom(_NONCE_BYTES)
        return nonce + self._keys[self.key_id].encrypt(nonce, dumps(secrets), _bound_to(owner_id, self.key_id))

    def secrets_of(self, account: Account) -> Secrets:
        """The account's secrets; raises Unsealable, which names the key's id only."""
        if account.secrets is None or account.secrets_key_id is None:
            return {}
        return self.unseal(account.id, account.secrets, account.secrets_key_id)

    def unseal(self, owner_id: str, sealed: bytes, key_id: str) -> Secrets:
        key = self._keys.get(key_id)
        if key is None:
            raise Unsealable(f"encryption key {key_id!r} is not in RELAY_ENCRYPTION_KEYS")
        nonce, content = sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:]
        try:
            secrets: Secrets = loads(key.decrypt(nonce, content, _bound_to(owner_id, key_id)))
        except (InvalidTag, ValueError):
            raise Unsealable(f"encryption key {key_id!r} does not open the account's secrets") from None
        return secrets


def new_key(key_id: str) -> str:
    """A fresh key as the settings hold it."""
    return f"{key_id}:{base64.b64encode(os.urandom(KEY_BYTES)).decode()}"


def _parsed(key: str) -> tuple[str, AESGCM]:
    key_id, _, encoded = key.partition(":")
    try:
        secret = base64.b64decode(encoded, validate=True)
    except ValueError:
        secret = b""
    if not key_id or len(secret) != KEY_BYTES:
        raise ValueError("RELAY_ENCRYPTION_KEYS: each must be an id, a colon and the base64 of 32 bytes")
    return key_id, AESGCM(secret)


def _bound_to(owner_id: str, key_id: str) -> bytes:
    return f"relay_accounts\0{owner_id}\0{key_id}".encode()
