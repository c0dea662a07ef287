"""Files in multipart bodies.

Its one invariant: no more of a body is held than its route takes, and nothing of it on disk.
"""

from collections.abc import AsyncGenerator

from fastapi import Request
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from services.relay.attachments import too_large
from services.relay.errors import InvalidRequest


class _InMemory(MultiPartParser):
    spool_max_size = 2**40  # what is larger goes to a file, and the door lets nothing in that is


async def files_of(request: Request, field: str, *, max_body_bytes: int | None = None) -> list[UploadFile]:
    """The files that the body has under this name; raises InvalidRequest, and FileTooLarge for a body over the limit.

    What the door takes is the limit where there is none here.
    """
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise InvalidRequest.at("content-type", "must be multipart/form-data")
    try:
        form = await _InMemory(request.headers, _pieces(request, max_body_bytes)).parse()
    except (MultiPartException, ValueError):  # a ValueError: names in a charset that they are not in
        raise InvalidRequest.at("body", "must be multipart/form-data") from None
    return [value for value in form.getlist(field) if isinstance(value, UploadFile)]


async def _pieces(request: Request, max_bytes: int | None) -> AsyncGenerator[bytes, None]:
    received_bytes = 0
    async for piece in request.stream():
        received_bytes += len(piece)
        if max_bytes is not None and received_bytes > max_bytes:
            raise too_large()
        yield piece
