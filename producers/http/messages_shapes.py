"""Anthropic's messages as a request: what is taken, left out with a warning, or refused. Pure.

As in `chat_shapes`, messages and tools are read by hand, so that each is blamed by its own place.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Final, Literal, cast

from pydantic import BaseModel, ConfigDict, Field

from sluicegate.producers.http.compatible import Asked, addressed, left_out, unknown_fields
from sluicegate.producers.http.foreign_parts import (
    build,
    mapping_at,
    parts_at,
    text_at,
    texts_at,
    turn_of,
)
from sluicegate.producers.http.problems import wrong
from sluicegate.producers.submission import JobOptions
from sluicegate.shared.messages import (
    FilePart,
    ImagePart,
    Part,
    ResponseFormat,
    TextPart,
    Tool,
    ToolCallPart,
    ToolResultPart,
)

#: What the door calls the fields of a job.
NAMES: Final = {
    "prompt": "messages",
    "stop": "stop_sequences",
    "effort": "output_config.effort",
    "response_format": "output_config.format",
    "parallel_tool_calls": "tool_choice.disable_parallel_tool_use",
}

#: Left out, as they only steer how the answer comes about.
_STEERING: Final = ("top_k", "speed")
#: Left out without a word: they mean nothing to the answer.
_SILENT: Final = (
    "service_tier",
    "inference_geo",
    "cache_control",
    "diagnostics",
    "user_profile_id",
    "workspace_id",
    "betas",
)
#: Refused: the caller would miss what they ask for.
_REFUSED: Final = {
    "container": "is not offered here; leave it out",
    "mcp_servers": "is not offered here; give their tools as tools",
    "context_management": "is not offered here; leave it out",
    "prefill": "is not taken: newer models refuse it; say in system how to begin",
}


class OutputConfig(BaseModel):
    """`output_config`."""

    model_config = ConfigDict(strict=True)

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: dict[str, Any] | None = None


_Turn = Annotated[dict[str, Any], turn_of("user", "assistant")]


class MessagesRequest(BaseModel):
    """The body of `POST /v1/messages`."""

    model_config = ConfigDict(extra="allow", strict=True)

    #: `sluice/<use case>`, `sluice/auto`, a catalogue name or a provider's model id.
    model: Annotated[str, Field(min_length=1, max_length=200)]
    messages: Annotated[list[_Turn], Field(min_length=1, max_length=1000)]
    #: Models to try after `model`.
    fallbacks: Annotated[list[str], Field(max_length=8)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    system: str | list[dict[str, Any]] | None = None
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    stop_sequences: (
        Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=4)] | None
    ) = None
    stream: bool | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None
    output_config: OutputConfig | None = None
    thinking: dict[str, Any] | None = None
    metadata: dict[str, Any] | None = None


def asked_of(body: MessagesRequest) -> Asked:
    """Bring a request into our words; raise `Problem`."""
    warnings = left_out(body, refused=_REFUSED, steering=_STEERING, silent=_SILENT)
    if body.thinking is not None and body.thinking.get("type") != "disabled":
        warnings.append("thinking is not taken here and was left out; use output_config.effort")
    warnings += unknown_fields(body)
    use_case, model = addressed(body.model)
    given = {
        "fallbacks": body.fallbacks,
        "max_tokens": body.max_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "stop": body.stop_sequences,
    }
    options = cast("JobOptions", {name: one for name, one in given.items() if one is not None})
    options |= {"model": model, "stream": bool(body.stream)}
    options |= _output(body.output_config or OutputConfig(), warnings)
    if body.tools:
        options["tools"] = [_tool(tool, f"tools.{n}") for n, tool in enumerate(body.tools)]
    if body.tool_choice is not None:
        options |= _tool_choice(body.tool_choice)
    if body.system is not None and (system := "\n\n".join(texts_at(body.system, "system"))):
        options["system"] = system
    asked = Asked(use_case=use_case, options=options, names=NAMES, warnings=warnings)
    _converse(asked, body.messages)
    return asked


def _output(config: OutputConfig, warnings: list[str]) -> JobOptions:
    options: JobOptions = {}
    match config.effort:
        case "xhigh" | "max":
            options["effort"] = "high"
            warnings.append(f"output_config.effort {config.effort} is taken as high")
        case "low" | "medium" | "high":
            options["effort"] = config.effort
        case None:
            pass
    if config.format is not None:
        place = "output_config.format"
        if config.format.get("type") != "json_schema":
            raise wrong(f"{place}.type", "must be json_schema")
        schema = mapping_at(config.format.get("schema"), f"{place}.schema")
        options["response_format"] = ResponseFormat(json_schema=schema)
    return options


# Messages


def _converse(asked: Asked, messages: list[dict[str, Any]]) -> None:
    def assistants(block: dict[str, Any], place: str) -> Iterator[Part]:
        return _called(block, place, asked.warnings)

    for n, message in enumerate(messages):
        content, place = message.get("content"), f"messages.{n}.content"
        match message.get("role"):
            case "user":
                asked.add(n, "user", parts_at(content, place, _given))
            case "assistant":
                asked.add(n, "assistant", parts_at(content, place, assistants))
            case None:
                raise wrong(f"messages.{n}.role", "is missing")
            case _:
                raise wrong(f"messages.{n}.role", "must be user or assistant")
    asked.check_end("must end with a message of the user")


def _given(block: dict[str, Any], place: str) -> Iterator[Part]:
    """Read what a user gives beside text."""
    match block.get("type"):
        case "image":
            yield _image(mapping_at(block.get("source"), f"{place}.source"), f"{place}.source")
        case "document":
            yield from _document(block, f"{place}.source")
        case "tool_result":
            yield build(
                ToolResultPart,
                place,
                tool_call_id=text_at(block.get("tool_use_id"), f"{place}.tool_use_id"),
                content="\n".join(texts_at(block.get("content") or "", f"{place}.content")),
                is_error=block.get("is_error") or False,
            )
        case _:
            raise wrong(f"{place}.type", "must be text, image, document or tool_result")


def _image(source: dict[str, Any], place: str) -> ImagePart:
    match source.get("type"):
        case "base64":
            return build(
                ImagePart,
                place,
                data=text_at(source.get("data"), f"{place}.data"),
                media_type=source.get("media_type"),
            )
        case "url":
            return build(ImagePart, f"{place}.url", url=text_at(source.get("url"), f"{place}.url"))
        case _:
            raise wrong(f"{place}.type", "must be base64 or url; files are not kept here")


def _document(block: dict[str, Any], place: str) -> Iterator[Part]:
    source = mapping_at(block.get("source"), place)
    match source.get("type"):
        case "base64":
            yield build(
                FilePart,
                place,
                data=text_at(source.get("data"), f"{place}.data"),
                media_type=source.get("media_type"),
                filename=block.get("title") or "document.pdf",
            )
        case "text":
            if text := text_at(source.get("data"), f"{place}.data"):
                yield TextPart(text=text)
        case "content":
            content = source.get("content")
            for text in texts_at(content, f"{place}.content"):
                if text:
                    yield TextPart(text=text)
        case _:
            raise wrong(f"{place}.type", "must be base64, text or content")


def _called(block: dict[str, Any], place: str, warnings: list[str]) -> Iterator[Part]:
    """Read what an assistant said beside text."""
    match block.get("type"):
        case "tool_use":
            yield build(
                ToolCallPart,
                place,
                id=text_at(block.get("id"), f"{place}.id"),
                name=text_at(block.get("name"), f"{place}.name"),
                arguments=mapping_at(block.get("input"), f"{place}.input"),
            )
        case "thinking" | "redacted_thinking":
            warnings.append(f"{place}: thinking is not taken here and was left out")
        case _:
            raise wrong(f"{place}.type", "must be text or tool_use")


# Tools


def _tool(tool: dict[str, Any], place: str) -> Tool:
    if tool.get("type") not in (None, "custom"):
        raise wrong(f"{place}.type", "must be custom; tools that run elsewhere are not offered")
    name = text_at(tool.get("name"), f"{place}.name")
    schema = mapping_at(tool.get("input_schema"), f"{place}.input_schema")
    description = tool.get("description") or ""
    return build(Tool, place, name=name, description=description, parameters=schema)


def _tool_choice(choice: dict[str, Any]) -> JobOptions:
    options: JobOptions = {}
    match choice.get("type"):
        case "auto" | "none" as kind:
            options["tool_choice"] = kind
        case "any":
            options["tool_choice"] = "required"
        case "tool":
            options["tool_choice"] = text_at(choice.get("name"), "tool_choice.name")
        case _:
            raise wrong("tool_choice.type", "must be auto, any, tool or none")
    if choice.get("disable_parallel_tool_use"):
        options["parallel_tool_calls"] = False
    return options
