"""Anthropic's messages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Final, cast

import anthropic
import httpx2
import orjson

from sluicegate.shared.errors import ErrorClass
from sluicegate.shared.messages import (
    FilePart,
    ImagePart,
    Message,
    Part,
    TextPart,
    ToolCallPart,
    ToolResultPart,
    Usage,
)
from sluicegate.shared.secrets import Secret
from sluicegate.workers.providers.base import Call
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
            {"role": message.role, "content": _content(message)} for message in spec.messages
        ],
    }
    if spec.system:
        request["system"] = spec.system
    if spec.tools:
        request["tools"] = [
            {
                "name": tool.name,
                **({"description": tool.description} if tool.description else {}),
                "input_schema": tool.parameters,
            }
            for tool in spec.tools
        ]
        if spec.tool_choice != "auto":
            request["tool_choice"] = {"none": {"type": "none"}, "required": {"type": "any"}}.get(
                spec.tool_choice, {"type": "tool", "name": spec.tool_choice}
            )
    output: dict[str, Any] = {}
    if spec.response_format is not None:
        output["format"] = {"type": "json_schema", "schema": spec.response_format.json_schema}
    if spec.effort is not None:
        output["effort"] = spec.effort
    if output:
        request["output_config"] = output
    if call.stream:
        request["stream"] = True
    return request


def _content(message: Message) -> str | list[dict[str, Any]]:
    if len(message.content) == 1 and isinstance(message.content[0], TextPart):
        return message.content[0].text
    # Results come first: the API wants them right after the calls that they answer.
    parts = sorted(message.content, key=lambda part: not isinstance(part, ToolResultPart))
    allowed = (
        (TextPart, ImagePart, FilePart, ToolResultPart)
        if message.role == "user"
        else (TextPart, ToolCallPart)
    )
    for part in parts:
        if not isinstance(part, allowed):
            raise Fault(
                ErrorClass.BAD_REQUEST,
                f"a message of the {message.role} holds a {part.type} part",
                sent=False,
            )
    return [_part(part) for part in parts]


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
            return {"type": "tool_use", "id": part.id, "name": part.name, "input": part.arguments}
        case ToolResultPart():
            result: dict[str, Any] = {
                "type": "tool_result",
                "tool_use_id": part.tool_call_id,
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
