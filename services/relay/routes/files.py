"""/api/file: the files of a conversation, put and fetched by who holds its key; and the same for other routes.

Its one invariant: whose files they are, and of what session, comes from the key alone.
"""

import re
from collections.abc import Sequence
from typing import Annotated, Any, Final
from urllib.parse import quote

from fastapi import APIRouter, Depends, Request, Response
from starlette.datastructures import UploadFile

from services.relay import attachments
from services.relay.attachments import MAX_FILE_BYTES, Skipped, Uploads
from services.relay.errors import InvalidRequest
from services.relay.file_paths import folder_of, path_of
from services.relay.routes.conversation_access import Keyed, RuntimeRoute
from services.relay.routes.multipart import files_of
from services.relay.routes.parameters import AppState
from shared.database import Conn
from shared.door import answer
from shared.session_client import SessionKey

router = APIRouter(prefix="/api/file", tags=["files"], route_class=RuntimeRoute)

# What stands around the file in a body.
_FRAME_BYTES: Final = 64 * 2**10
_NOT_IN_QUOTES: Final = re.compile(r'[^\x20-\x7e]|["\\%]')
_DESCRIBED: Final[dict[str, Any]] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file"],
                    "properties": {"file": {"type": "string", "format": "binary"}},
                }
            }
        },
    }
}


async def _file_path(path: str) -> str:
    return path_of(path)


FilePath = Annotated[str, Depends(_file_path)]


@router.post("/upload/{path:anything}", openapi_extra=_DESCRIBED)
async def upload_file(request: Request, conversation: Keyed, path: FilePath, state: AppState) -> Response:
    """Stores the body's `file` under this path, instead of what had it."""
    files = await files_of(request, "file", max_body_bytes=MAX_FILE_BYTES + _FRAME_BYTES)
    if len(files) != 1:
        raise InvalidRequest.at("file", "must be there once, as a file")
    await state.uploads.put(conversation.session, path, await files[0].read(), files[0].content_type)
    return answer({"success": True})


@router.get("/download/{path:anything}")
async def download_file(conversation: Keyed, path: FilePath, state: AppState) -> Response:
    """The file, byte for byte."""
    file = await attachments.get(state.database, conversation.session, path)
    headers = {
        "content-type": file.content_type or "application/octet-stream",
        "content-disposition": _disposition(path.rpartition("/")[2]),
        "x-content-type-options": "nosniff",
    }
    return Response(file.content, headers=headers)


def _disposition(name: str) -> str:
    """The name for browsers, and for those that know no other characters than ASCII's, one that is like it."""
    like_it = _NOT_IN_QUOTES.sub("_", name)
    exactly = "" if like_it == name else f"; filename*=UTF-8''{quote(name, safe='')}"
    return f'attachment; filename="{like_it}"{exactly}'


async def list_files(conn: Conn, key: SessionKey, path: str) -> list[str]:
    """The paths of the files in this folder and below it, sorted; of all when it is empty. Raises InvalidRequest."""
    return await attachments.list_paths(conn, key, folder_of(path))


async def upload_files(uploads: Uploads, key: SessionKey, files: Sequence[UploadFile]) -> dict[str, list[Any]]:
    """Stores the files that can be, by their names; tells the paths of these, and why the others cannot."""
    offered = [await uploads.offer(key, file.filename or "", await file.read(), file.content_type) for file in files]
    return {
        "uploaded_files": [each for each in offered if isinstance(each, str)],
        "skipped_files": [each for each in offered if isinstance(each, Skipped)],
    }
