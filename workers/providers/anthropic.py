"""Anthropic's messages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, ClassVar, Final, cast

import anthropic
import httpx2
import orjson

from sluicegate.shared.answers import strict_schema
from sluicegate.shared.errors import ErrorClass
from sluicegate.shared.jobs import JobSpec
from sluicegate.shared.messages import (
    FilePart,
    ImagePart,
    Part,
    TextPart,
    ToolCallPart,
    ToolResultPart,
    Usage,
)
from sluicegate.shared.secrets import Secret
from sluicegate.workers.providers.base import Call
from sluicegate.workers.providers.call_ids import wire_id
from sluicegate.workers.providers.decoding import count, load_json, mapping, string
from sluicegate.workers.providers.failures import (
    Fault,
    error_object,
    fault_of_error,
    fault_of_exception,
    fault_of_status,
)
from sluicegate.workers.providers.reading import CONTEXT_FULL, FILTERED, Reading
from sluicegate.workers.providers.sse import ServerSentEvent
from sluicegate.workers.providers.transport import KEEPALIVE_S, HttpAdapter, tls_context

#: How messages call it.
_PROVIDER: Final = "the anthropic provider"
OFFICIAL_URL: Final = "https://api.anthropic.com"
_IN_WORDS: Final = (
    "Answer with JSON alone, without a code fence around it, that fits this JSON schema:\n"
)


class AnthropicAdapter(HttpAdapter):
    """Speaks to one endpoint with one key."""

    def __init__(
        self, *, base_url: str | None, api_key: Secret, max_connections: int, use_proxy: bool = True
    ) -> None:
        super().__init__(provider=_PROVIDER, api_key=api_key, max_connections=max_connections)
        self._client = anthropic.AsyncAnthropic(
            api_key=api_key.get_secret_value(),
            base_url=base_url or OFFICIAL_URL,
            max_retries=0,  # an attempt is paid: only the job decides on another
            open_telemetry=False,  # the worker has spans of its own
            http_client=anthropic.DefaultAioHttpClient(
                verify=tls_context(),
                trust_env=use_proxy,
                follow_redirects=False,  # a redirect would carry the prompt to another host
                limits=httpx2.Limits(max_connections=max_connections, keepalive_expiry=KEEPALIVE_S),
            ),
        )

    async def close(self) -> None:
        """Close all connections."""
        await self._client.close()

    def _request(self, call: Call) -> dict[str, Any]:
        return build_request(call)

    def _reading(self) -> Reading:
        return AnthropicReading()

    async def _post(self, body: bytes, timeouts: httpx2.Timeout) -> httpx2.Response:
        try:
            response = await self._client.post(
                "/v1/messages",
                content=body,
                cast_to=httpx2.Response,
                stream=True,
                stream_cls=anthropic.AsyncStream[Any],
                options={"timeout": timeouts},
            )
        except anthropic.APIStatusError as error:
            raise fault_of_status(
                self._provider, error.status_code, error.response.headers, error.response.content
            ) from None
        except anthropic.APIConnectionError as error:
            raise fault_of_exception(self._provider, error, answering=False) from None
        # With this `cast_to` the SDK returns the response itself (`_process_response`).
        return cast("httpx2.Response", response)


def build_request(call: Call) -> dict[str, Any]:
    """Return the body of `POST /v1/messages`; nothing of account or metadata is in it.

    Raises Fault, never sent, for parts that this wire cannot say.
    """
    spec = call.spec
    request: dict[str, Any] = {
        "model": call.model,
        "max_tokens": call.max_tokens,
        "messages": [
            {"role": role, "content": _content(role, [*parts])} for role, parts in _turns(spec)
        ],
    }
    if spec.system:
        request["system"] = spec.system
    if spec.tools:
        request["tools"] = [
            {
                "name": tool.name,
                **({"description": tool.description} if tool.description else {}),
                "input_schema": {"type": "object", "properties": {}} | tool.parameters,
            }
            for tool in spec.tools
        ]
        if choice := _tool_choice(spec):
            request["tool_choice"] = choice
    output: dict[str, Any] = {}
    if spec.response_format is not None:
        strict = strict_schema(spec.response_format.json_schema)
        if strict is not None:
            output["format"] = {"type": "json_schema", "schema": strict}
        else:
            # The API refuses such a schema. Asked for in words, what comes is checked all the same.
            schema = orjson.dumps(spec.response_format.json_schema).decode()
            request["system"] = "\n\n".join(filter(None, [spec.system, _IN_WORDS + schema]))
    if spec.effort is not None:
        output["effort"] = spec.effort
    if output:
        request["output_config"] = output
    if spec.stop:
        request["stop_sequences"] = spec.stop
    if call.stream:
        request["stream"] = True
    return request


def _tool_choice(spec: JobSpec) -> dict[str, Any]:
    """Return what to say of the tools besides their list; nothing if it is the usual."""
    usual = {"auto": "auto", "none": "none", "required": "any"}
    choice: dict[str, Any] = {"type": usual.get(spec.tool_choice, "tool")}
    if choice["type"] == "tool":
        choice["name"] = spec.tool_choice
    if spec.parallel_tool_calls is False and choice["type"] != "none":
        choice["disable_parallel_tool_use"] = True
    return {} if choice == {"type": "auto"} else choice


def _turns(spec: JobSpec) -> Iterator[tuple[str, Iterator[Part]]]:
    """Make one of messages of the same side in a row: results have to come in one message."""
    for role, messages in groupby(spec.messages, key=lambda message: message.role):
        yield role, (part for message in messages for part in message.content)


def _content(role: str, parts: Sequence[Part]) -> str | list[dict[str, Any]]:
    # Text of blanks alone is refused; beside another part it says nothing.
    said = [part for part in parts if not isinstance(part, TextPart) or part.text.strip()]
    if len(said) == 1 and isinstance(said[0], TextPart):
        return said[0].text
    allowed = (
        (TextPart, ImagePart, FilePart, ToolResultPart)
        if role == "user"
        else (TextPart, ToolCallPart)
    )
    for part in said:
        if not isinstance(part, allowed):
            raise Fault(
                ErrorClass.BAD_REQUEST,
                f"a message of the {role} holds a {part.type} part",
                sent=False,
            )
    # Results come first: the API wants them right after the calls that they answer.
    return [_part(part) for part in sorted(said, key=lambda p: not isinstance(p, ToolResultPart))]


def _part(part: Part) -> dict[str, Any]:
    match part:
        case TextPart():
            return {"type": "text", "text": part.text}
        case ImagePart(url=str(url)):
            return {"type": "image", "source": {"type": "url", "url": url}}
        case ImagePart():
            return {"type": "image", "source": _base64(part.media_type, part.data)}
        case FilePart():
            return {
                "type": "document",
                "source": _base64(part.media_type, part.data),
                "title": part.filename,
            }
        case ToolCallPart():
            return {
                "type": "tool_use",
                "id": wire_id(part.id),
                "name": part.name,
                "input": part.arguments,
            }
        case ToolResultPart():
            result: dict[str, Any] = {
                "type": "tool_result",
                "tool_use_id": wire_id(part.tool_call_id),
                "content": part.content,
            }
            if part.is_error:
                result["is_error"] = True
            return result


def _base64(media_type: str, data: str | None) -> dict[str, Any]:
    return {"type": "base64", "media_type": media_type, "data": data}


class AnthropicReading(Reading):
    """Reads a message, or its events. A streamed answer is complete at `message_stop`."""

    provider = _PROVIDER
    FINISH: ClassVar[Mapping[str, str]] = {
        "end_turn": "stop",
        "stop_sequence": "stop",
        "max_tokens": "length",
        "tool_use": "tool_calls",
        "refusal": FILTERED,
        "model_context_window_exceeded": CONTEXT_FULL,
    }

    @property
    def complete(self) -> bool:
        """See the class."""
        return self.ended

    def whole(self, body: dict[str, Any]) -> None:
        """Take a message."""
        for number, block in enumerate(body["content"]):
            if block["type"] == "text":
                self.add_text(block["text"])
            elif block["type"] == "tool_use":
                self.add_tool_call(
                    number,
                    call_id=block["id"],
                    name=block["name"],
                    arguments=orjson.dumps(block["input"]).decode(),
                )
        self._take_message(body)
        self._take_stop(body)
        self.usage_is_final = self.raw_usage is not None
        self.ended = True

    def event(self, event: ServerSentEvent) -> None:
        """Take an event; kinds that are not known, and pings, are passed over."""
        data = load_json(event.data)
        match data["type"]:
            case "content_block_delta":
                self._take_delta(data["index"], data["delta"])
            case "content_block_start":
                block = data["content_block"]
                if block["type"] == "tool_use":
                    self.add_tool_call(data["index"], call_id=block["id"], name=block["name"])
                elif block["type"] == "text" and block.get("text"):
                    self.add_text(block["text"])
            case "message_start":
                self._take_message(data["message"])
            case "message_delta":
                self._take_stop(data["delta"])
                self._take_usage(data.get("usage"))
                self.usage_is_final = self.raw_usage is not None
            case "message_stop":
                self.ended = True
            case "error":
                raise fault_of_error(
                    self.provider, error_object(data), otherwise=ErrorClass.STREAM_BROKEN
                )
            case _:
                pass

    def usage(self) -> Usage | None:
        """Return the usage; `input_tokens` excludes what was read from and written to a cache."""
        raw = self.raw_usage or {}
        prompt, output = count(raw.get("input_tokens")), count(raw.get("output_tokens"))
        if prompt is None or output is None:
            return None
        written = count(raw.get("cache_creation_input_tokens")) or 0
        creation = mapping(raw.get("cache_creation"))
        one_hour = count(creation.get("ephemeral_1h_input_tokens")) or 0
        five_minutes = count(creation.get("ephemeral_5m_input_tokens")) or 0
        details = mapping(raw.get("output_tokens_details"))
        return Usage(
            input=prompt,
            cache_read=count(raw.get("cache_read_input_tokens")) or 0,
            # What the breakdown does not account for is of the ordinary kind.
            cache_write_5m=max(five_minutes, written - one_hour),
            cache_write_1h=one_hour,
            output=output,
            reasoning=min(count(details.get("thinking_tokens")) or 0, output),
        )

    def _take_delta(self, number: int, delta: dict[str, Any]) -> None:
        match delta["type"]:
            case "text_delta":
                self.add_text(delta["text"])
            case "input_json_delta":
                if delta["partial_json"]:
                    self.add_tool_call(number, arguments=delta["partial_json"])
            case "thinking_delta":
                self.began = True  # the model works, although there is nothing to pass on
            case _:
                pass

    def _take_message(self, message: dict[str, Any]) -> None:
        self.model = string(message.get("model")) or self.model
        self._take_usage(message.get("usage"))

    def _take_usage(self, usage: dict[str, Any] | None) -> None:
        """Merge: the end of a stream repeats only some of what its start said."""
        if usage:
            given = {name: value for name, value in usage.items() if value is not None}
            self.raw_usage = {**(self.raw_usage or {}), **given}
            self.service_tier = string(self.raw_usage.get("service_tier"))

    def _take_stop(self, message: dict[str, Any]) -> None:
        self.stop = string(message.get("stop_reason")) or self.stop
        details = mapping(message.get("stop_details"))
        self.stop_words = string(details.get("explanation")) or string(details.get("category"))
