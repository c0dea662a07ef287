"""What a fresh development machine needs and nobody has set: secrets, made at first start and kept in files.

Its one invariant: such a file is there with its whole content and mode 600, or not at all; of several processes
that make it at once, one does and the others read it.
"""

import contextlib
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from services.relay import sealing
from services.relay.keys import KEY_PREFIX
from services.relay.settings import RelaySettings

USER_ID: Final = "dev"
"""Whose sessions the development key works on; a name that people can type."""


@dataclass(frozen=True, slots=True)
class Secrets:
    """`api_key` is the development key, None outside of development."""

    pepper: str
    admin_token: str
    encryption_keys: tuple[str, ...]
    api_key: str | None


def secrets_of(settings: RelaySettings) -> Secrets:
    """The secrets from the settings; in development those that are missing from files. Raises OSError."""
    pepper = settings.relay_key_pepper.get_secret_value()
    admin_token = settings.relay_admin_token.get_secret_value()
    encryption_keys = tuple(key.get_secret_value() for key in settings.relay_encryption_keys)
    if not settings.is_development:
        return Secrets(pepper, admin_token, encryption_keys, None)
    folder = settings.local_state
    folder.mkdir(parents=True, exist_ok=True)
    return Secrets(
        pepper=pepper or kept(folder / "key.pepper", secrets.token_hex(32)),
        admin_token=admin_token or kept(folder / "admin.token", secrets.token_hex(32)),
        encryption_keys=encryption_keys or (kept(folder / "encryption.key", sealing.new_key("dev")),),
        api_key=kept(folder / "api.key", KEY_PREFIX + secrets.token_hex(32)),
    )


def kept(path: Path, new: str) -> str:
    """What the file holds; when there is none, it is made with `new`."""
    with contextlib.suppress(FileNotFoundError):
        return path.read_text().strip()
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    file = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(file, "w") as out:
            out.write(new + "\n")
            out.flush()
            os.fsync(out.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(draft, path)  # unlike a rename, it never replaces what another process made
    finally:
        draft.unlink()
    return path.read_text().strip()
