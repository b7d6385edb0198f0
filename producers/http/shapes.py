"""What the native routes take and answer: JSON with names in camel case. No I/O here."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Annotated, Any, Final, Literal, NamedTuple, Self
from uuid import UUID

import orjson
from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    StringConstraints,
    WithJsonSchema,
)
from pydantic.alias_generators import to_camel

from sluicegate.producers.submission import MAX_DEADLINE_S, JobOptions
from sluicegate.shared.errors import InvalidJob
from sluicegate.shared.jobs import ModelName, Result, UseCaseName
from sluicegate.shared.messages import Base64, NonEmpty, ToolName


class Shape(BaseModel):
    """A value of the native JSON: strict, and camel case."""

    model_config = ConfigDict(
        alias_generator=to_camel,
        extra="forbid",
        strict=True,
        frozen=True,
    )


class Told(BaseModel):
    """A value that is only ever answered."""

    model_config = ConfigDict(alias_generator=to_camel, serialize_by_alias=True, frozen=True)

    @classmethod
    def of(cls, found: object) -> Self:
        """Tell of an object's attributes, or a mapping's values, those that have a name here."""
        return cls.model_validate(found, from_attributes=True, by_name=True)


# What is asked

#: Text on one line, such as a name.
Line = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f]+$", max_length=255)]
#: With more in it than blanks.
Text = Annotated[str, StringConstraints(pattern=r"[^\s\x00-\x1f]")]
_IMAGE: Final = r"^(https://[^\s]+|data:image/(png|jpeg|gif|webp);base64,[A-Za-z0-9+/]+={0,2}|[A-Za-z0-9+/]+={0,2})$"
_SCHEME: Final = re.compile(
    r"https://\S|data:image/(png|jpeg|gif|webp);base64,[A-Za-z0-9+/]|[^:]+$"
)


def _image_text(text: str) -> str:
    # By how it begins: megabytes of base64 are looked at once, where all jobs pass.
    if not _SCHEME.match(text[:100]):
        raise ValueError("must be an https address, a data: address or base64")
    return text


#: An https address, a `data:` address, or base64 as it is.
ImageText = Annotated[
    str,
    AfterValidator(_image_text),
    WithJsonSchema({"type": "string", "pattern": _IMAGE}),
]
ImageType = Literal["image/png", "image/jpeg", "image/gif", "image/webp"]

#: How base64 of each kind of picture begins.
_KINDS: Final[Mapping[str, ImageType]] = {
    "/9j/": "image/jpeg",
    "R0lGOD": "image/gif",
    "UklGR": "image/webp",
}


class TextShape(Shape):
    """Text in a message."""

    type: Literal["text"]
    text: Text


class ImageShape(Shape):
    """An image: https addresses are passed on to the provider, which fetches them."""

    type: Literal["image"]
    image: ImageText
    media_type: ImageType | None = None


class FileShape(Shape):
    """A PDF in base64."""

    type: Literal["file"]
    data: Base64
    media_type: Literal["application/pdf"] = "application/pdf"
    filename: NonEmpty = "document.pdf"


class ToolCallShape(Shape):
    """A tool call as an answer told it."""

    type: Literal["tool-call"]
    tool_call_id: NonEmpty
    tool_name: ToolName
    args: dict[str, JsonValue]


class ToolResultShape(Shape):
    """What a tool answered: any JSON."""

    type: Literal["tool-result"]
    tool_call_id: NonEmpty
    tool_name: ToolName | None = None
    result: JsonValue
    is_error: bool = False


class SystemTurn(Shape):
    """Standing instructions."""

    role: Literal["system"]
    content: Text


class UserTurn(Shape):
    """What the user says."""

    role: Literal["user"]
    content: (
        Text
        | Annotated[
            tuple[Annotated[TextShape | ImageShape | FileShape, Field(discriminator="type")], ...],
            Field(min_length=1),
        ]
    )


class AssistantTurn(Shape):
    """What the model said."""

    role: Literal["assistant"]
    content: (
        Text
        | Annotated[
            tuple[Annotated[TextShape | ToolCallShape, Field(discriminator="type")], ...],
            Field(min_length=1),
        ]
    )


class ToolTurn(Shape):
    """What tools answered."""

    role: Literal["tool"]
    content: Annotated[tuple[ToolResultShape, ...], Field(min_length=1)]


Turn = Annotated[SystemTurn | UserTurn | AssistantTurn | ToolTurn, Field(discriminator="role")]


class ToolShape(Shape):
    """A tool that the model may ask for."""

    description: str = ""
    #: JSON schema of an object.
    parameters: dict[str, JsonValue] | None = None


class ToolChoice(Shape):
    """The tool that the model has to ask for."""

    type: Literal["tool"] = "tool"
    tool_name: ToolName


class ResponseShape(Shape):
    """The answer is to be JSON that fits a schema."""

    type: Literal["json"] = "json"
    name: ToolName = "answer"
    json_schema: Annotated[dict[str, JsonValue], Field(alias="schema")]

    def wanted(self) -> Mapping[str, Any]:
        """Return it as `submit` takes it."""
        return {"name": self.name, "json_schema": self.json_schema}


def _one_of_two(schema: dict[str, Any]) -> None:
    schema["oneOf"] = [
        {"required": ["prompt"], "properties": {"prompt": {"type": "string"}, "messages": False}},
        {"required": ["messages"], "properties": {"messages": {"type": "array"}, "prompt": False}},
    ]


class Ask(Shape):
    """One job, and how its answer is wanted."""

    model_config = ConfigDict(json_schema_extra=_one_of_two)

    prompt: Text | None = None
    messages: Annotated[tuple[Turn, ...], Field(min_length=1, max_length=1000)] | None = None
    #: Left out: by what the job asks for.
    use_case: UseCaseName | None = None
    system: Text | None = None
    max_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    #: Plain text as it comes, or server-sent events if `Accept` asks for them.
    stream: bool = False
    #: By name.
    tools: (
        Annotated[
            dict[ToolName, ToolShape],
            Field(max_length=128, json_schema_extra={"additionalProperties": False}),
        ]
        | None
    ) = None
    #: `auto`, `none`, `required`, or the name of a tool.
    tool_choice: ToolName | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseShape | None = None
    #: Put before the prompt, or into the last message.
    images: Annotated[tuple[ImageText, ...], Field(max_length=100)] | None = None
    #: A catalogue name or a provider's model id.
    model: ModelName | None = None
    #: Models to try after `model`.
    fallbacks: Annotated[tuple[ModelName, ...], Field(max_length=8)] | None = None
    effort: Literal["low", "medium", "high"] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    stop: Annotated[tuple[NonEmpty, ...], Field(max_length=4)] | None = None
    #: Kept with the job, and told to no provider.
    metadata: Annotated[dict[str, str], Field(max_length=32)] | None = None
    #: In seconds from now, or a moment; after it the job is expired.
    deadline: (
        Annotated[float, Field(gt=0, le=MAX_DEADLINE_S, allow_inf_nan=False)] | AwareDatetime | None
    ) = None
    #: How long the request waits for the answer, in seconds.
    wait: Annotated[float, Field(ge=0, le=MAX_DEADLINE_S, allow_inf_nan=False)] = 60.0

    def request(self) -> Asked:
        """Return what is submitted; raise `InvalidJob` for what cannot be."""
        if self.prompt is None and self.messages is None:
            raise InvalidJob("prompt", "is missing; give it, or messages")
        if self.prompt is not None and self.messages is not None:
            raise InvalidJob("prompt", "is given beside messages; leave one of the two out")
        system = [] if self.system is None else [self.system]
        messages: list[Mapping[str, Any]] = []
        if self.prompt is not None:
            messages.append({"role": "user", "content": [_text(self.prompt)]})
        for turn in self.messages or ():
            if isinstance(turn, SystemTurn):
                system.append(turn.content)
            else:
                messages.append(_message(turn))
        if self.images:
            pictures = [_image(image, None) for image in self.images]
            _attach(messages, pictures)
        given: dict[str, Any] = {
            "system": "\n\n".join(system) or None,
            "max_tokens": self.max_tokens,
            "tools": self._tools(),
            "tool_choice": self._tool_choice(),
            "parallel_tool_calls": self.parallel_tool_calls,
            "response_format": self.response_format and self.response_format.wanted(),
            "model": self.model,
            "fallbacks": self.fallbacks,
            "effort": self.effort,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "stop": self.stop,
            "metadata": self.metadata,
            "deadline": self.deadline,
        }
        options: Any = {name: value for name, value in given.items() if value is not None}
        options["stream"] = self.stream
        return Asked(self.use_case, messages, options)

    def place(self, field: str) -> str:
        """Return where in the request a field of the job comes from."""
        match field.split("."):
            case ["tools", number, *rest] if self.tools and number.isdigit():
                steps = ["tools", list(self.tools)[int(number)], *rest]
            case ["messages", number, *_] if self.messages is None and number.isdigit():
                steps = ["images" if self.images else "prompt"]
            case ["messages", number, *rest] if self.messages and number.isdigit():
                said = [n for n, one in enumerate(self.messages) if one.role != "system"]
                steps = ["messages", str(said[int(number)]), *rest]
            case ["response_format", "json_schema", *rest]:
                steps = ["responseFormat", "schema", *rest]
            case steps:
                pass
        return ".".join(steps)

    def _tools(self) -> list[Mapping[str, Any]] | None:
        if not self.tools:
            return None
        return [
            {"name": name, "description": tool.description}
            | ({} if tool.parameters is None else {"parameters": tool.parameters})
            for name, tool in self.tools.items()
        ]

    def _tool_choice(self) -> str | None:
        choice = self.tool_choice
        return choice.tool_name if isinstance(choice, ToolChoice) else choice


class Asked(NamedTuple):
    """What `submit` takes."""

    use_case: str | None
    messages: Sequence[Mapping[str, Any]]
    options: JobOptions


def _message(turn: UserTurn | AssistantTurn | ToolTurn) -> Mapping[str, Any]:
    role = "assistant" if turn.role == "assistant" else "user"
    if isinstance(turn.content, str):
        return {"role": role, "content": [_text(turn.content)]}
    return {"role": role, "content": [_part(part) for part in turn.content]}


def _part(part: Shape) -> Mapping[str, Any]:
    match part:
        case TextShape():
            return _text(part.text)
        case ImageShape():
            return _image(part.image, part.media_type)
        case FileShape():
            return {"type": "file", "data": part.data, "filename": part.filename}
        case ToolCallShape():
            return {
                "type": "tool_call",
                "id": part.tool_call_id,
                "name": part.tool_name,
                "arguments": part.args,
            }
        case ToolResultShape():
            return {
                "type": "tool_result",
                "tool_call_id": part.tool_call_id,
                "content": _said(part.result),
                "is_error": part.is_error,
            }
        case _:
            raise TypeError(type(part).__name__)


def _said(result: JsonValue) -> str:
    """Return what a tool answered as the text that models read."""
    if isinstance(result, str):
        return result
    try:
        return orjson.dumps(result).decode()
    except orjson.JSONEncodeError as error:
        # A whole number beyond 64 bits.
        raise InvalidJob("messages", f"hold a value that JSON cannot carry: {error}") from None


def _text(text: str) -> Mapping[str, Any]:
    return {"type": "text", "text": text}


def _image(image: str, media_type: ImageType | None) -> Mapping[str, Any]:
    if image.startswith("https://"):
        return {"type": "image", "url": image}
    if image.startswith("data:"):
        head, _, data = image.partition(";base64,")
        return {"type": "image", "data": data, "media_type": head.removeprefix("data:")}
    guessed = next((kind for begin, kind in _KINDS.items() if image.startswith(begin)), None)
    return {"type": "image", "data": image, "media_type": media_type or guessed or "image/png"}


def _attach(messages: list[Mapping[str, Any]], pictures: Sequence[Mapping[str, Any]]) -> None:
    if not messages or messages[-1]["role"] != "user":
        raise InvalidJob("images", "need a message of the user to go with, at the end")
    last = messages[-1]
    messages[-1] = {**last, "content": [*pictures, *last["content"]]}


# What is answered


class UsageTold(Told):
    """Tokens. The input has all of the prompt, cached or not."""

    input_tokens: int
    output_tokens: int
    cached_tokens: int
    total_tokens: int
    reasoning_tokens: int


class CostTold(Told):
    """In US dollars, over all attempts; and what the same tokens cost on the baseline model."""

    usd: float
    baseline_usd: float


class ToolCallTold(Told):
    """A tool that the model asks for."""

    tool_call_id: str
    tool_name: str
    args: dict[str, JsonValue]


class Answered(Told):
    """The answer of a job."""

    id: UUID
    text: str
    use_case: str
    #: The catalogue's name of the provider that answered.
    provider: str | None
    model: str | None
    usage: UsageTold
    cost: CostTold
    tool_calls: tuple[ToolCallTold, ...]
    finish_reason: str | None
    attempts: int
    warnings: tuple[str, ...]
    created_at: datetime | None
    finished_at: datetime | None


class Accepted(Told):
    """The job goes on; where to look for it."""

    id: UUID
    state: str
    url: str


def answered(result: Result) -> dict[str, Any]:
    """Return the JSON of an answer, as `Answered` describes it."""
    usage = result.usage
    return {
        "id": result.job_id,
        "text": result.text,
        "useCase": result.use_case,
        "provider": result.provider,
        "model": result.model,
        "usage": {
            "inputTokens": usage.total_input,
            "outputTokens": usage.output,
            "cachedTokens": usage.cache_read,
            "totalTokens": usage.total_input + usage.output,
            "reasoningTokens": usage.reasoning,
        },
        "cost": {"usd": usd(result.cost_nano_usd), "baselineUsd": usd(result.baseline_nano_usd)},
        "toolCalls": [
            {"toolCallId": call.id, "toolName": call.name, "args": call.arguments}
            for call in result.tool_calls
        ],
        "finishReason": result.finish_reason,
        "attempts": result.attempts,
        "warnings": result.warnings,
        "createdAt": result.created_at,
        "finishedAt": result.finished_at,
    }


def usd(nano_usd: int) -> float:
    """Return an amount in dollars; its nine decimals are exact up to four million dollars."""
    return nano_usd / 1_000_000_000


def job_url(job_id: UUID | str) -> str:
    """Return where a job is looked at, beneath the server's address."""
    return f"/api/llm/jobs/{job_id}"
