"""What is said to a model, and what it says back: one shape for both wire formats."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, StringConstraints

#: The longest request that is taken, all text and data together.
MAX_REQUEST_BYTES = 1_000_000
#: Its images and files together, in base64, which is a third larger than the file. Copying this
#: much, into a statement or out of JSON, is measured not to hold up an event loop for 50 ms; twice
#: as much does.
MAX_ATTACHMENT_BYTES = 10_000_000
#: From here on a request is large: it is encoded and decoded beside the event loop.
LARGE_BYTES = 2_000_000


class Frozen(BaseModel):
    """A value: immutable, and strict about unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")


NonEmpty = Annotated[str, StringConstraints(min_length=1)]
HttpsUrl = Annotated[str, StringConstraints(pattern=r"^https://[^\s]+$", max_length=4096)]


def _base64(text: str) -> str:
    # A third of what a regular expression takes: twenty megabytes may come.
    if not text.isascii() or text.rstrip("=").encode().translate(None, _BASE64):
        raise ValueError("must be base64")
    return text


_BASE64 = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
Base64 = Annotated[
    NonEmpty,
    AfterValidator(_base64),
    Field(json_schema_extra={"pattern": "^[A-Za-z0-9+/]+={0,2}$"}),
]
ToolName = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


class TextPart(Frozen):
    """Plain text."""

    type: Literal["text"] = "text"
    text: NonEmpty


class ImagePart(Frozen):
    """An image: either an https `url` that the provider fetches, or base64 `data`."""

    type: Literal["image"] = "image"
    url: HttpsUrl | None = None
    data: Base64 | None = None
    media_type: Literal["image/png", "image/jpeg", "image/gif", "image/webp"] = "image/png"

    def model_post_init(self, _context: object, /) -> None:
        """Refuse an image with both sources or none."""
        if (self.url is None) == (self.data is None):
            raise ValueError("an image needs either url or data")


class FilePart(Frozen):
    """A PDF as base64 `data`."""

    type: Literal["file"] = "file"
    data: Base64
    media_type: Literal["application/pdf"] = "application/pdf"
    filename: NonEmpty = "document.pdf"


class ToolCallPart(Frozen):
    """The model asks for a tool; `arguments` is an object."""

    type: Literal["tool_call"] = "tool_call"
    id: NonEmpty
    name: ToolName
    arguments: dict[str, JsonValue]


class ToolResultPart(Frozen):
    """What the tool answered, for the model to read on."""

    type: Literal["tool_result"] = "tool_result"
    tool_call_id: NonEmpty
    content: str
    is_error: bool = False


Part = Annotated[
    TextPart | ImagePart | FilePart | ToolCallPart | ToolResultPart, Field(discriminator="type")
]


class Message(Frozen):
    """One turn. System text is not a turn: it has a field of its own in the job."""

    role: Literal["user", "assistant"]
    content: Annotated[tuple[Part, ...], Field(min_length=1)]

    @classmethod
    def user(cls, text: str) -> Message:
        """Build a user turn of plain text."""
        return cls(role="user", content=(TextPart(text=text),))


def attachment_bytes(messages: Iterable[Message]) -> int:
    """Return how long the images and files in these are together, in base64."""
    return sum(
        len(part.data or "")
        for message in messages
        for part in message.content
        if isinstance(part, ImagePart | FilePart)
    )


class Tool(Frozen):
    """A function the model may ask for; `parameters` is a JSON Schema object."""

    name: ToolName
    description: str = ""
    parameters: dict[str, Any] = Field(default_factory=lambda: {"type": "object", "properties": {}})


class ResponseFormat(Frozen):
    """The answer is JSON that fits `json_schema`; `name` labels the schema for the provider."""

    name: ToolName = "answer"
    json_schema: dict[str, Any]


class Usage(Frozen):
    """Tokens of one call in disjoint classes; `reasoning` is a part of `output`."""

    input: Annotated[int, Field(ge=0)] = 0
    cache_read: Annotated[int, Field(ge=0)] = 0
    cache_write_5m: Annotated[int, Field(ge=0)] = 0
    cache_write_1h: Annotated[int, Field(ge=0)] = 0
    output: Annotated[int, Field(ge=0)] = 0
    reasoning: Annotated[int, Field(ge=0)] = 0

    @property
    def total_input(self) -> int:
        """All prompt tokens, cached or not."""
        return self.input + self.cache_read + self.cache_write_5m + self.cache_write_1h
