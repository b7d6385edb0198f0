"""OpenAI's chat completions as a request: what is taken, left out with a warning, or refused. Pure.

Messages, tools and formats are read by hand, so that whatever is wrong with one is said by its own
place and not by that of a union's branch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Final, Literal, cast

import orjson
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from sluicegate.producers.http.compatible import Asked, addressed, left_out, unknown_fields
from sluicegate.producers.http.foreign_parts import (
    build,
    list_at,
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
    Message,
    NonEmpty,
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
    "system": "messages",
    "effort": "reasoning_effort",
    "max_tokens": "max_completion_tokens",
}

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
EFFORTS: Final[dict[Effort, Literal["low", "medium", "high"]]] = {
    "none": "low",
    "minimal": "low",
    "low": "low",
    "medium": "medium",
    "high": "high",
    "xhigh": "high",
    "max": "high",
}

#: Options of a job that are called and written as we do.
_AS_THEY_ARE: Final = (
    "fallbacks",
    "temperature",
    "top_p",
    "stop",
    "metadata",
    "parallel_tool_calls",
)
#: Left out, as they only steer how the answer comes about.
_STEERING: Final = (
    "seed",
    "logit_bias",
    "presence_penalty",
    "frequency_penalty",
    "prediction",
    "verbosity",
)
#: Left out without a word: they mean nothing to the answer.
_SILENT: Final = (
    "user",
    "store",
    "service_tier",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "safety_identifier",
)
#: Refused: the caller would miss what they ask for.
_REFUSED: Final = {
    "logprobs": "is not offered here; leave it out",
    "top_logprobs": "is not offered here; leave it out",
    "audio": "is not offered here; answers are text",
    "functions": "is not taken any more; use tools",
    "function_call": "is not taken any more; use tool_choice",
    "web_search_options": "is not offered here; leave it out",
    "moderation": "is not offered here; leave it out",
}


class StreamOptions(BaseModel):
    """`stream_options`."""

    model_config = ConfigDict(strict=True)

    include_usage: bool = False


_Turn = Annotated[dict[str, Any], turn_of("system", "developer", "user", "assistant", "tool")]


class ChatRequest(BaseModel):
    """The body of `POST /v1/chat/completions`."""

    model_config = ConfigDict(extra="allow", strict=True)

    #: `sluice/<use case>`, `sluice/auto`, a catalogue name or a provider's model id.
    model: Annotated[str, Field(min_length=1, max_length=200)]
    messages: Annotated[list[_Turn], Field(min_length=1, max_length=1000)]
    #: Models to try after `model`.
    fallbacks: Annotated[list[str], Field(max_length=8)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    stop: (
        Annotated[
            list[Annotated[str, Field(min_length=1)]],
            BeforeValidator(
                lambda value: [value] if isinstance(value, str) else value,
                json_schema_input_type=NonEmpty | Annotated[list[NonEmpty], Field(max_length=4)],
            ),
            Field(max_length=4),
        ]
        | None
    ) = None
    n: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    response_format: dict[str, Any] | None = None
    reasoning_effort: Effort | None = None
    modalities: list[str] | None = None
    metadata: Annotated[dict[str, str], Field(max_length=32)] | None = None

    @property
    def wants_usage(self) -> bool:
        """Whether a stream is to end with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage


def asked_of(body: ChatRequest) -> Asked:
    """Bring a request into our words; raise `Problem`."""
    if body.n not in (None, 1):
        raise wrong("n", "must be 1; a request has one answer here")
    if body.modalities not in (None, ["text"]):
        raise wrong("modalities", 'must be ["text"]; answers are text')
    warnings = left_out(body, refused=_REFUSED, steering=_STEERING, silent=_SILENT)
    warnings += unknown_fields(body)
    use_case, model = addressed(body.model)
    given = {name: getattr(body, name) for name in _AS_THEY_ARE}
    options = cast("JobOptions", {name: one for name, one in given.items() if one is not None})
    options |= {"model": model, "stream": bool(body.stream)}
    if (max_tokens := body.max_completion_tokens or body.max_tokens) is not None:
        options["max_tokens"] = max_tokens
    if body.reasoning_effort is not None:
        effort = options["effort"] = EFFORTS[body.reasoning_effort]
        if effort != body.reasoning_effort:
            warnings.append(f"reasoning_effort {body.reasoning_effort} is taken as {effort}")
    options |= _formats(body)
    names = NAMES if body.max_tokens is None else NAMES | {"max_tokens": "max_tokens"}
    asked = Asked(use_case=use_case, options=options, names=names, warnings=warnings)
    _converse(asked, body.messages)
    return asked


def _formats(body: ChatRequest) -> JobOptions:
    options: JobOptions = {}
    if body.tools:
        options["tools"] = [_tool(tool, f"tools.{n}") for n, tool in enumerate(body.tools)]
    if body.tool_choice is not None:
        options["tool_choice"] = _tool_choice(body.tool_choice)
    if body.response_format is not None:
        options["response_format"] = _response_format(body.response_format)
    return options


# Messages


def _converse(asked: Asked, messages: list[dict[str, Any]]) -> None:
    system: list[str] = []
    for n, message in enumerate(messages):
        place = f"messages.{n}"
        match message.get("role"):
            case "system" | "developer":
                if asked.messages:
                    asked.warnings.append(f"{place}: system messages are said before all others")
                system.append("\n".join(texts_at(message.get("content"), f"{place}.content")))
            case "user":
                asked.add(
                    n, "user", parts_at(message.get("content"), f"{place}.content", _attached)
                )
            case "assistant":
                asked.add(n, "assistant", _assistant_parts(message, place))
            case "tool":
                _add_result(asked, n, message, place)
            case None:
                raise wrong(f"{place}.role", "is missing")
            case _:
                raise wrong(f"{place}.role", "must be system, developer, user, assistant or tool")
    asked.check_end("must end with a message of the user or of a tool")
    if any(system):
        asked.options["system"] = "\n\n".join(filter(None, system))


def _add_result(asked: Asked, n: int, message: dict[str, Any], place: str) -> None:
    """Take the answer of a tool; those of one turn are one message of ours."""
    part = build(
        ToolResultPart,
        place,
        tool_call_id=text_at(message.get("tool_call_id"), f"{place}.tool_call_id"),
        content="\n".join(texts_at(message.get("content"), f"{place}.content")),
    )
    last = asked.messages[-1] if asked.messages else None
    if last is not None and last.role == "user" and isinstance(last.content[0], ToolResultPart):
        asked.messages[-1] = Message(role="user", content=(*last.content, part))
    else:
        asked.add(n, "user", [part])


def _attached(part: dict[str, Any], place: str) -> Iterator[Part]:
    match part.get("type"):
        case "image_url":
            yield _image(part.get("image_url"), f"{place}.image_url")
        case "file":
            yield _file(mapping_at(part.get("file"), f"{place}.file"), f"{place}.file")
        case _:
            raise wrong(f"{place}.type", "must be text, image_url or file")


def _image(image: object, place: str) -> ImagePart:
    if isinstance(image, dict):
        image, place = image.get("url"), f"{place}.url"
    url = text_at(image, place)
    if url.startswith("https://"):
        return build(ImagePart, place, url=url)
    media_type, data = _data_url(url, place)
    return build(ImagePart, place, data=data, media_type=media_type.replace("/jpg", "/jpeg"))


def _data_url(url: str, place: str) -> tuple[str, str]:
    head, comma, data = url.partition(",")
    media_type = head.removeprefix("data:").removesuffix(";base64")
    if not comma or head != f"data:{media_type};base64":
        raise wrong(place, "must be an https address or data:<media type>;base64,<data>")
    return media_type, data


def _file(file: dict[str, Any], place: str) -> FilePart:
    if "file_id" in file:
        raise wrong(f"{place}.file_id", "names a file that is not kept here; send file_data")
    place = f"{place}.file_data"
    data = text_at(file.get("file_data"), place)
    media_type = "application/pdf"
    if data.startswith("data:"):
        media_type, data = _data_url(data, place)
    filename = file.get("filename") or "document.pdf"
    return build(FilePart, place, data=data, media_type=media_type, filename=filename)


def _assistant_parts(message: dict[str, Any], place: str) -> Iterator[Part]:
    if message.get("function_call"):
        raise wrong(f"{place}.function_call", "is not taken any more; use tool_calls")
    content = message.get("content")
    if isinstance(content, list):
        content = "\n".join(
            text_at(part.get(str(part.get("type"))), f"{place}.content.{m}")
            for m, part in enumerate(
                mapping_at(p, f"{place}.content.{m}") for m, p in enumerate(content)
            )
        )
    if content := content or message.get("refusal"):
        yield TextPart(text=text_at(content, f"{place}.content"))
    for m, call in enumerate(list_at(message.get("tool_calls") or [], f"{place}.tool_calls")):
        yield _call(mapping_at(call, f"{place}.tool_calls.{m}"), f"{place}.tool_calls.{m}")


def _call(call: dict[str, Any], place: str) -> ToolCallPart:
    call_id = text_at(call.get("id"), f"{place}.id")
    place = f"{place}.function"
    function = mapping_at(call.get("function"), place)
    written = text_at(function.get("arguments"), f"{place}.arguments")
    try:
        arguments = orjson.loads(written or "{}")
    except orjson.JSONDecodeError:
        arguments = None
    if not isinstance(arguments, dict):
        raise wrong(f"{place}.arguments", "must be a JSON object as text")
    return build(ToolCallPart, place, id=call_id, name=function.get("name"), arguments=arguments)


# Tools and formats


def _tool(tool: dict[str, Any], place: str) -> Tool:
    if tool.get("type", "function") != "function":
        raise wrong(f"{place}.type", "must be function")
    place = f"{place}.function"
    function = mapping_at(tool.get("function"), place)
    given = {
        name: function[name]
        for name in ("description", "parameters")
        if function.get(name) is not None
    }
    return build(Tool, place, name=text_at(function.get("name"), f"{place}.name"), **given)


def _tool_choice(choice: str | dict[str, Any]) -> str:
    if isinstance(choice, str):
        if choice not in ("auto", "none", "required"):
            raise wrong("tool_choice", "must be auto, none, required, or name a function")
        return choice
    if choice.get("type") != "function":
        raise wrong("tool_choice.type", "must be function")
    function = mapping_at(choice.get("function"), "tool_choice.function")
    return text_at(function.get("name"), "tool_choice.function.name")


def _response_format(wanted: dict[str, Any]) -> ResponseFormat | None:
    match wanted.get("type"):
        case "text":
            return None
        case "json_object":
            return ResponseFormat(json_schema={"type": "object"})
        case "json_schema":
            place = "response_format.json_schema"
            named = mapping_at(wanted.get("json_schema"), place)
            schema = mapping_at(named.get("schema"), f"{place}.schema")
            name = named.get("name") or "answer"
            return build(ResponseFormat, f"{place}.name", name=name, json_schema=schema)
        case _:
            raise wrong("response_format.type", "must be text, json_object or json_schema")
