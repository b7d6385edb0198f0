"""What the two wire formats of the sandbox provider have in common.

A wire reads a request into an `Ask`, and writes an `Answer` as a body or as the pieces of a
stream. Nothing here knows about sockets, clocks or bills.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple, Protocol

import orjson

from sluicegate.workers.local.sandbox_answers import Answer, Ask
from sluicegate.workers.local.sandbox_checks import RefusedError
from sluicegate.workers.local.sandbox_faults import Fault
from sluicegate.workers.local.sandbox_limits import Dimension, Level, Shortage
from sluicegate.workers.local.sandbox_prices import WireName, serves

Json = dict[str, Any]
MAX_MODEL_CHARS = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What one answer needs besides itself."""

    ask: Ask
    answer: Answer
    answer_id: str
    created: int
    usage: bool = True
    #: False leaves out what tells the reader that the answer is whole.
    terminal: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Script:
    """A stream, serialised: each part is whole events."""

    #: Sent at once, with the headers. Empty: the headers wait for the first token.
    prelude: bytes
    #: Sent with the first token.
    opening: bytes
    #: One a token, after the reasoning tokens, which show nothing.
    frames: list[bytes]
    #: Everything after the last token.
    ending: bytes


class Trouble(NamedTuple):
    """How a wire words one error."""

    status: int
    type: str
    message: str
    code: str | None = None


class Wire(Protocol):
    """One wire format."""

    name: WireName
    request_id_header: str
    #: An event whose JSON is broken off.
    malformed_frame: bytes

    def headers(self, now: datetime, levels: Mapping[Dimension, Level]) -> dict[str, str]:
        """Return the headers of every answer; limits of no level here are far away."""

    def shortage(self, model: str, shortage: Shortage) -> str:
        """Say why a limit turns a call away."""

    def retry_after(self, wait_s: float) -> dict[str, str]:
        """Return the headers that say when to come again."""

    def model(self, name: str) -> Json:
        """Describe a model."""

    def read(self, request: object) -> Ask:
        """Read a request. Raises RefusedError."""

    def whole(self, reply: Reply) -> bytes:
        """Write a whole answer."""

    def script(self, reply: Reply) -> Script:
        """Write an answer as a stream."""

    def trouble(
        self, fault: Fault, request_id: str, message: str | None = None, param: str | None = None
    ) -> tuple[int, bytes]:
        """Write an error: status and body."""

    def error_event(self, request_id: str, message: str | None = None) -> bytes:
        """Write the event that ends a stream with an error."""


def read_common(body: object, wire: WireName) -> tuple[Json, str, list[Json]]:
    """Check what both wires require; return the body, the model and the messages."""
    if not isinstance(body, dict):
        raise RefusedError(Fault.HTTP_400, "The request body must be a JSON object.")
    model = body.get("model")
    if not isinstance(model, str) or not model:
        raise RefusedError(Fault.HTTP_400, "You must provide a model parameter.", "model")
    if len(model) > MAX_MODEL_CHARS or not serves(model, wire):
        known = model[:MAX_MODEL_CHARS]
        raise RefusedError(Fault.HTTP_404, f"The model `{known}` does not exist here.", "model")
    messages = body.get("messages")
    if (
        not isinstance(messages, list)
        or not messages
        or not all(isinstance(message, dict) for message in messages)
    ):
        raise RefusedError(Fault.HTTP_400, "messages: a list of at least one message.", "messages")
    return body, model, messages


def read_limit(body: Json, name: str) -> int | None:
    """Read a token limit: a positive integer, or None where there is none."""
    value = body.get(name)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise RefusedError(Fault.HTTP_400, f"{name}: must be an integer of at least 1.", name)
    return value


def read_tools(body: Json, schema_of: str) -> Json:
    """Read the tools as name to JSON schema."""
    tools = body.get("tools") or []
    if not isinstance(tools, list):
        raise RefusedError(Fault.HTTP_400, "tools: must be a list.", "tools")
    read: Json = {}
    for tool in tools:
        inner = tool.get("function", tool) if isinstance(tool, dict) else None
        name = inner.get("name") if isinstance(inner, dict) else None
        if not isinstance(inner, dict) or not isinstance(name, str):
            raise RefusedError(Fault.HTTP_400, "tools: each tool needs a name.", "tools")
        schema = inner.get(schema_of)
        read[name] = schema if isinstance(schema, dict) else {"type": "object"}
    return read


def read_forced_tool(choice: object, tools: Json) -> str | None:
    """Say which tool `tool_choice` demands, if it demands one."""
    if choice in ("required", "any") or (isinstance(choice, dict) and choice.get("type") == "any"):
        return next(iter(tools), None)
    if isinstance(choice, dict):
        function = choice.get("function")
        name = function.get("name") if isinstance(function, dict) else choice.get("name")
        if name is not None and not (isinstance(name, str) and name in tools):
            raise RefusedError(
                Fault.HTTP_400, f"tool_choice: no tool named {name!r}.", "tool_choice"
            )
        return name
    return None


class Reading:
    """Gathers the text and counts the attachments of a request."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.images = 0
        self.files = 0

    def content(self, content: object, where: str) -> str:
        """Read a message's content, text or parts, and return its text."""
        if content is None:
            return ""
        if isinstance(content, str):
            self.texts.append(content)
            return content
        if not isinstance(content, list):
            raise RefusedError(Fault.HTTP_400, f"{where}: must be a string or a list.", where)
        first = len(self.texts)
        for part in content:
            if not isinstance(part, dict):
                raise RefusedError(Fault.HTTP_400, f"{where}: each part must be an object.", where)
            self._part(part, where)
        return "\n".join(self.texts[first:])

    def data(self, value: object) -> None:
        """Count JSON that the model reads, such as tool definitions."""
        try:
            self.texts.append(orjson.dumps(value, option=orjson.OPT_SORT_KEYS).decode())
        except orjson.JSONEncodeError:
            raise RefusedError(Fault.HTTP_400, "messages: nested too deeply.") from None

    def _part(self, part: Json, where: str) -> None:
        match part.get("type"):
            case "text" | "refusal" if isinstance(text := part.get(str(part["type"])), str):
                self.texts.append(text)
            case "image_url" | "image":
                self.images += 1
            case "file" | "document":
                self.files += 1
            case "tool_use":
                self.data(part.get("input"))
            case "tool_result":
                self.content(part.get("content"), where)
            case "thinking" | "redacted_thinking":
                pass
            case other:
                raise RefusedError(Fault.HTTP_400, f"{where}: part {other!r} is not valid.", where)


def call_id(reply: Reply, prefix: str, number: int = 0) -> str:
    """Name a tool call of the answer."""
    return f"{prefix}_{reply.answer_id}" + (f"_{number}" if number else "")


def read_strings(values: object) -> tuple[str, ...]:
    """Read a list of strings; anything else in it is left out."""
    return tuple(v for v in values if isinstance(v, str)) if isinstance(values, list) else ()
