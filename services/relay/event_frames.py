"""Events as clients of the V1 and the V0 API know them, and messages' contents in the forms of all sides.

Its one invariant: every frame has an id, a time and a source, and one event has the same ones wherever it is shown.
"""

from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field
from uuid_utils import uuid7

from services.relay.events import Event
from shared.json import dump_text, rfc3339

Block = dict[str, Any]
Part = dict[str, Any]

_V0_STATES: Final = {
    "idle": "awaiting_user_input",
    "running": "running",
    "paused": "paused",
    "waiting_for_confirmation": "awaiting_user_confirmation",
    "finished": "finished",
    "error": "error",
    "stuck": "error",
}
_V0_HIDDEN: Final = frozenset({"thinking", "redacted_thinking"})


class _PartModel(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", hide_input_in_errors=True)


class TextPart(_PartModel):
    type: Literal["text"]
    text: str


class _ImageUrl(_PartModel):
    url: Annotated[str, Field(min_length=1)]


class ImageUrlPart(_PartModel):
    type: Literal["image_url"]
    image_url: _ImageUrl


class ImagePart(_PartModel):
    type: Literal["image"]
    image_urls: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)]


ContentPart = Annotated[TextPart | ImageUrlPart | ImagePart, Field(discriminator="type")]


# ── contents ────────────────────────────────────────────────────────────────────────────────────


def blocks_of(parts: list[Part]) -> list[Block]:
    """The Claude content blocks that say the same as these parts; texts without a character are left out."""
    blocks: list[Block] = []
    for part in parts:
        if part["type"] == "text":
            if part["text"]:
                blocks.append({"type": "text", "text": part["text"]})
        elif part["type"] == "image_url":
            blocks.append(_image(part["image_url"]["url"]))
        else:
            blocks += [_image(url) for url in part["image_urls"]]
    return blocks


def _image(url: str) -> Block:
    if url.startswith("data:") and ";base64," in url:
        media_type, _, data = url.removeprefix("data:").partition(";base64,")
        return {"type": "image", "source": {"type": "base64", "media_type": media_type, "data": data}}
    return {"type": "image", "source": {"type": "url", "url": url}}


def parts_of(content: str, blocks: list[Block] | None) -> list[Part]:
    """What a stored message shows to people: texts and images; of other blocks their JSON, of thinking nothing."""
    if blocks is None:
        return [{"type": "text", "text": content}]
    parts = [_part(block) for block in blocks if block.get("type") not in _V0_HIDDEN]
    return parts or [{"type": "text", "text": ""}]


def _part(block: Block) -> Part:
    if block.get("type") == "text":
        return {"type": "text", "text": block.get("text", "")}
    source = block.get("source")
    if block.get("type") == "image" and isinstance(source, dict):
        if source.get("type") == "url":
            return {"type": "image", "image_urls": [str(source.get("url"))]}
        if source.get("type") == "base64":
            return {"type": "image", "image_urls": [f"data:{source.get('media_type')};base64,{source.get('data')}"]}
    return {"type": "text", "text": dump_text(block)}


def text_of(parts: list[Part]) -> str:
    return "".join(part["text"] for part in parts if part["type"] == "text")


def images_of(parts: list[Part]) -> list[str]:
    urls: list[str] = []
    for part in parts:
        if part["type"] == "image_url":
            urls.append(part["image_url"]["url"])
        elif part["type"] == "image":
            urls += part["image_urls"]
    return urls


# ── frames ──────────────────────────────────────────────────────────────────────────────────────


def v1(event: Event) -> dict[str, Any]:
    """The event as a client of the V1 API gets it."""
    frame: dict[str, Any] = {"id": event.id, "timestamp": rfc3339(event.created_at), "source": event.source}
    if event.kind == "message":
        return frame | {
            "kind": "MessageEvent",
            "llm_message": event.payload,
            "activated_microagents": [],
            "extended_content": [],
        }
    if event.kind == "state":
        return frame | {"kind": "ConversationStateUpdateEvent", **event.payload}
    if event.kind == "error":
        return frame | {"kind": "ConversationErrorEvent", **event.payload}
    return frame | {"kind": "OtherEvent", "event": event.payload}


def now(kind: str, timestamp: str, **fields: Any) -> dict[str, Any]:
    """A frame that is made for one client, and kept nowhere."""
    return {"id": str(uuid7()), "timestamp": timestamp, "source": "environment", "kind": kind, **fields}


def v0(event: Event) -> dict[str, Any]:
    """The event as a client of the V0 API gets it; its id there is its number."""
    frame: dict[str, Any] = {"id": event.seq, "timestamp": rfc3339(event.created_at), "source": event.source}
    if event.kind == "message":
        text = text_of(event.payload["content"])
        arguments = {
            "content": text,
            "image_urls": images_of(event.payload["content"]),
            "file_urls": [],
            "wait_for_response": event.source == "agent",
        }
        return frame | {"message": text, "action": "message", "args": arguments}
    if event.kind == "other":
        return {**event.payload, **frame}
    if event.kind == "error":
        detail = event.payload["detail"]
        return frame | {"message": detail, "observation": "error", "content": detail, "extras": {}}
    if event.payload["key"] != "execution_status":  # its clients read no state of a sandbox here
        return frame | {"message": "", "observation": "null", "content": "", "extras": event.payload}
    extras = {"agent_state": _V0_STATES[event.payload["value"]], "reason": ""}
    return frame | {"message": "", "observation": "agent_state_changed", "content": "", "extras": extras}
