"""Conversations: what a provider would refuse in messages and tools, said before a job is stored.

Each of these is a 400 at OpenAI, at Anthropic or at both. A job may go to either, so it is to fit
both.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Final

from sluicegate.shared.errors import InvalidJob
from sluicegate.shared.messages import (
    FilePart,
    ImagePart,
    Message,
    TextPart,
    Tool,
    ToolCallPart,
    ToolResultPart,
)
from sluicegate.shared.schemas import check_schema

_PARTS: Final = {
    "user": (TextPart, ImagePart, FilePart, ToolResultPart),
    "assistant": (TextPart, ToolCallPart),
}
#: How the data of a picture begins, in base64. Anthropic compares it with what it is said to be.
_BEGINNINGS: Final = {
    "iVBORw0KGgo": "image/png",
    "/9j/": "image/jpeg",
    "R0lGOD": "image/gif",
    "UklGR": "image/webp",
}
#: At the top of a tool's parameters neither provider takes these.
_NOT_AT_THE_TOP: Final = ("anyOf", "oneOf", "allOf", "enum", "not")


def check_conversation(messages: Sequence[Message]) -> None:
    """Raise `InvalidJob` that names the message which providers do not take."""
    for n, message in enumerate(messages):
        field = f"messages.{n}.content"
        for part in message.content:
            if not isinstance(part, _PARTS[message.role]):
                raise InvalidJob(field, f"a message of the {message.role} holds no {part.type}")
            if isinstance(part, ImagePart | FilePart):
                _check_data(f"{field}.data", part)
        if all(isinstance(part, TextPart) and not part.text.strip() for part in message.content):
            raise InvalidJob(field, "must hold more than blanks")
    if messages[-1].role != "user":
        raise InvalidJob("messages", "must end with a message of the user")
    _check_calls(messages)


def check_tools(tools: Sequence[Tool], tool_choice: str) -> None:
    """Raise `InvalidJob` that names the tool, or the choice, which providers do not take."""
    names = Counter(tool.name for tool in tools)
    for n, tool in enumerate(tools):
        if names[tool.name] > 1:
            raise InvalidJob(f"tools.{n}.name", f"{tool.name} is the name of another tool as well")
        field = f"tools.{n}.parameters"
        if tool.parameters.get("type", "object") != "object":
            raise InvalidJob(field, "must be a JSON schema of the type object")
        if found := [name for name in _NOT_AT_THE_TOP if name in tool.parameters]:
            raise InvalidJob(field, f"must have no {found[0]} at the top; put it into a property")
        check_schema(tool.parameters, field)
    if tool_choice in ("auto", "none"):
        return
    if not tools:
        raise InvalidJob("tool_choice", "needs tools; leave it out, or give some")
    if tool_choice != "required" and tool_choice not in names:
        raise InvalidJob("tool_choice", f"names no tool of this job: {tool_choice}")


def _check_calls(messages: Sequence[Message]) -> None:
    """Every tool call is answered once, by what the user's side says next."""
    known: set[str] = set()
    waiting: list[str] = []
    for n, message in enumerate(messages):
        field = f"messages.{n}.content"
        if message.role == "assistant" and waiting:
            raise InvalidJob(field, f"comes before the result of tool call {waiting[0]}")
        for part in message.content:
            match part:
                case ToolCallPart(id=call_id):
                    if call_id in known:
                        raise InvalidJob(field, f"{call_id} is the id of an earlier tool call")
                    known.add(call_id)
                    waiting.append(call_id)
                case ToolResultPart(tool_call_id=call_id):
                    if call_id not in waiting:
                        raise InvalidJob(field, f"no tool call {call_id} waits for a result there")
                    waiting.remove(call_id)
                case _:
                    pass
    if waiting:
        raise InvalidJob("messages", f"lack the result of tool call {waiting[0]}")


def _check_data(field: str, part: ImagePart | FilePart) -> None:
    if part.data is None:
        return
    if len(part.data) % 4:
        raise InvalidJob(field, "must be base64 with its padding: a multiple of 4 characters")
    for beginning, media_type in _BEGINNINGS.items():
        if part.data.startswith(beginning) and part.media_type != media_type:
            raise InvalidJob(field, f"is {media_type}, and media_type says {part.media_type}")
