"""Paths of files: absolute ones in a folder that is nowhere but here.

Its one invariant: a path that passes names one file below FOLDER, however it is read.
"""

import re
from typing import Final

from services.relay.errors import InvalidRequest

FOLDER: Final = "/workspace/"
MAX_CHARACTERS: Final = 4096
_MAX_SEGMENT_CHARACTERS: Final = 255
# Surrogates are no characters of UTF-8's: a path with one cannot be stored.
_UNSAFE: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def path_of(raw: str) -> str:
    """`raw`, decoded as its protocol says, if it names a file; raises InvalidRequest that says why it does not."""
    if (problem := _problem_of(raw)) is not None:
        raise InvalidRequest.at("path", problem)
    return raw


def path_of_name(name: str) -> str:
    """The path of a file that came with a name only; a name that is a path already stays as it is."""
    return path_of(name if name.startswith("/") else FOLDER + name)


def folder_of(raw: str) -> str:
    """The folder that is meant, without a slash at its end; the one of all files when `raw` is empty."""
    folder = raw.removesuffix("/")
    return path_of(folder) if raw and folder + "/" != FOLDER else FOLDER.removesuffix("/")


def _problem_of(raw: str) -> str | None:
    if _UNSAFE.search(raw):
        return "must not hold control characters"
    if "\\" in raw:
        return "must not hold a backslash"
    if not raw.startswith(FOLDER):
        return f"must be absolute and begin with {FOLDER}"
    if len(raw) > MAX_CHARACTERS:
        return f"must have at most {MAX_CHARACTERS} characters"
    segments = raw.removeprefix(FOLDER).split("/")
    if "" in segments:
        return "must not hold an empty segment"
    if "." in segments or ".." in segments:
        return "must not hold a segment . or .."
    if max(map(len, segments)) > _MAX_SEGMENT_CHARACTERS:
        return f"must not hold a segment of more than {_MAX_SEGMENT_CHARACTERS} characters"
    return None
