"""What clients of the conversation APIs send: the bodies that start a conversation, and messages for one.

Its one invariant: what is accepted here can be stored and echoed as it is; what has no effect is checked all the same.
"""

import re
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from services.relay.event_frames import ContentPart

GitProvider = Literal["github", "gitlab", "bitbucket", "enterprise_sso"]
Trigger = Literal[
    "resolver",
    "gui",
    "suggested_task",
    "openhands_api",
    "slack",
    "microagent_management",
    "jira",
    "jira_dc",
    "linear",
    "bitbucket",
]
_HEX: Final = re.compile(r"[0-9a-f]{32}")
_HYPHENATED: Final = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
_TEXT_CHARACTERS: Final = 2**20
_NAME_CHARACTERS: Final = 500


def hex_of(value: str) -> str | None:
    """The 32 hex digits of a UUID in either form; None for what is none."""
    lower = value.lower()
    if _HEX.fullmatch(lower) or _HYPHENATED.fullmatch(lower):
        return lower.replace("-", "")
    return None


def _uuid(value: str) -> str:
    found = hex_of(value)
    if found is None:
        raise ValueError("must be a UUID")
    return found


Uuid = Annotated[str, AfterValidator(_uuid)]
Text = Annotated[str, Field(max_length=_TEXT_CHARACTERS)]
Name = Annotated[str, Field(max_length=_NAME_CHARACTERS)]


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", hide_input_in_errors=True)


def _as_parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


Parts = Annotated[list[ContentPart], BeforeValidator(_as_parts), Field(min_length=1)]


def _says_something(parts: list[ContentPart]) -> list[ContentPart]:
    if all(part.type == "text" and not part.text.strip() for part in parts):
        raise ValueError("must hold a text or an image")
    return parts


class UserMessage(_Body):
    """A message of the user; with `run` the conversation answers it."""

    role: Literal["user"] = "user"
    content: Annotated[Parts, AfterValidator(_says_something)]
    run: bool = False

    @property
    def parts(self) -> list[dict[str, Any]]:
        return [part.model_dump() for part in self.content]


class StartRequest(_Body):
    """How to start a conversation. Repository, branch, provider, numbers and processors are echoed, and do nothing."""

    sandbox_id: Uuid | None = None
    initial_message: UserMessage | None = None
    processors: list[dict[str, Any]] | None = None
    llm_model: Annotated[str, Field(min_length=1, max_length=255)] | None = None
    selected_repository: Name | None = None
    selected_branch: Name | None = None
    git_provider: GitProvider | None = None
    title: Name | None = None
    trigger: Trigger | None = None
    pr_number: Annotated[list[Annotated[int, Field(ge=-(2**53), le=2**53)]], Field(max_length=1000)] | None = None
    parent_conversation_id: Uuid | None = None
    agent_type: Literal["default", "plan"] | None = None


class V0Start(_Body):
    """How the V0 API starts a conversation; fields that it does not know are refused."""

    model_config = ConfigDict(strict=True, extra="forbid", hide_input_in_errors=True)

    repository: Name | None = None
    git_provider: GitProvider | None = None
    selected_branch: Name | None = None
    initial_user_msg: Text | None = None
    suggested_task: dict[str, Any] | None = None
    conversation_instructions: Text | None = None
    create_microagent: dict[str, Any] | None = None
    image_urls: list[Annotated[str, Field(min_length=1)]] | None = None
    replay_json: Text | None = None
    mcp_config: dict[str, Any] | None = None

    @property
    def first_message(self) -> list[dict[str, Any]]:
        """Its content parts; none where nothing is said."""
        parts: list[dict[str, Any]] = []
        if self.initial_user_msg and self.initial_user_msg.strip():
            parts.append({"type": "text", "text": self.initial_user_msg})
        if self.image_urls:
            parts.append({"type": "image", "image_urls": self.image_urls})
        return parts

    @property
    def trigger(self) -> str:
        if self.suggested_task is not None:
            return "suggested_task"
        return "microagent_management" if self.create_microagent is not None else "gui"


class NewTitle(_Body):
    model_config = ConfigDict(strict=True, extra="forbid", str_strip_whitespace=True, hide_input_in_errors=True)

    title: Annotated[str, Field(min_length=1, max_length=200)]


class V0Message(_Body):
    message: Annotated[str, Field(min_length=1, max_length=_TEXT_CHARACTERS)]


class Confirmation(_Body):
    accept: bool
    reason: Text | None = None
