"""OpenAI's chat completions, and every server that is compatible with them.

Chat completions rather than the Responses API because they are the common ground with compatible
servers. The request says `max_completion_tokens`, which OpenAI wants since its reasoning models: a
compatible server that knows only `max_tokens` ignores it and answers up to its own limit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, ClassVar, Final, cast

import httpx2
import openai
import orjson

from sluicegate.shared.answers import strict_schema
from sluicegate.shared.errors import ErrorClass
from sluicegate.shared.jobs import JobSpec
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
from sluicegate.workers.providers.call_ids import wire_id
from sluicegate.workers.providers.decoding import count, load_json, mapping, string
from sluicegate.workers.providers.failures import (
    Fault,
    error_object,
    fault_of_error,
    fault_of_exception,
    fault_of_status,
)
from sluicegate.workers.providers.reading import FILTERED, Reading
from sluicegate.workers.providers.sse import ServerSentEvent
from sluicegate.workers.providers.transport import KEEPALIVE_S, HttpAdapter, tls_context

#: How messages call it; the server may be a compatible one.
_PROVIDER: Final = "the openai provider"
OFFICIAL_URL: Final = "https://api.openai.com/v1"


class OpenAIAdapter(HttpAdapter):
    """Speaks to one endpoint with one key."""

    def __init__(
        self, *, base_url: str | None, api_key: Secret, max_connections: int, use_proxy: bool = True
    ) -> None:
        super().__init__(provider=_PROVIDER, api_key=api_key, max_connections=max_connections)
        self._client = openai.AsyncOpenAI(
            api_key=api_key.get_secret_value(),
            base_url=base_url or OFFICIAL_URL,
            max_retries=0,  # an attempt is paid: only the job decides on another
            http_client=openai.DefaultAioHttpClient(
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
        return OpenAIReading()

    async def _post(self, body: bytes, timeouts: httpx2.Timeout) -> httpx2.Response:
        try:
            response = await self._client.post(
                "/chat/completions",
                content=body,
                cast_to=httpx2.Response,
                stream=True,
                stream_cls=openai.AsyncStream[Any],
                options={"timeout": timeouts},
            )
        except openai.APIStatusError as error:
            raise fault_of_status(
                self._provider, error.status_code, error.response.headers, error.response.content
            ) from None
        except openai.APIConnectionError as error:
            raise fault_of_exception(self._provider, error, answering=False) from None
        # With this `cast_to` the SDK returns the response itself (`_process_response`).
        return cast("httpx2.Response", response)


def build_request(call: Call) -> dict[str, Any]:
    """Return the body of `POST /chat/completions`; nothing of account or metadata is in it.

    Raises Fault, never sent, for parts that this wire cannot say.
    """
    spec = call.spec
    request: dict[str, Any] = {
        "model": call.model,
        "messages": _messages(spec),
        "max_completion_tokens": call.max_tokens,
    }
    if spec.tools:
        request |= _tools(spec)
    if spec.response_format is not None:
        asked = spec.response_format.json_schema
        strict = strict_schema(asked)
        request["response_format"] = {
            "type": "json_schema",
            "json_schema": {
                "name": spec.response_format.name,
                "schema": asked if strict is None else strict,
                # Without it the schema is only a hint; with it some schemas are refused.
                "strict": strict is not None,
            },
        }
    if spec.effort is not None:
        request["reasoning_effort"] = spec.effort
    if spec.temperature is not None:
        request["temperature"] = spec.temperature
    if spec.top_p is not None:
        request["top_p"] = spec.top_p
    if spec.stop:
        request["stop"] = spec.stop
    if call.stream:
        request["stream"] = True
        request["stream_options"] = {"include_usage": True}
    return request


def _tools(spec: JobSpec) -> dict[str, Any]:
    said: dict[str, Any] = {
        "tools": [
            {
                "type": "function",
                "function": {
                    "name": tool.name,
                    **({"description": tool.description} if tool.description else {}),
                    "parameters": {"type": "object", "properties": {}} | tool.parameters,
                },
            }
            for tool in spec.tools
        ]
    }
    if spec.parallel_tool_calls is not None:
        said["parallel_tool_calls"] = spec.parallel_tool_calls
    if spec.tool_choice in ("none", "required"):
        said["tool_choice"] = spec.tool_choice
    elif spec.tool_choice != "auto":
        said["tool_choice"] = {"type": "function", "function": {"name": spec.tool_choice}}
    return said


def _messages(spec: JobSpec) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    if spec.system:
        # Not `developer`: OpenAI takes `system` as that, and compatible servers know only `system`.
        messages.append({"role": "system", "content": spec.system})
    for role, turn in groupby(spec.messages, key=lambda message: message.role):
        said = [*turn]
        messages += _user(said) if role == "user" else map(_assistant, said)
    return messages


def _user(turn: Sequence[Message]) -> list[dict[str, Any]]:
    # Results come first: they must follow the calls that they answer. There is no word for
    # `is_error` here, the content has to tell.
    messages: list[dict[str, Any]] = [
        {"role": "tool", "tool_call_id": wire_id(part.tool_call_id), "content": part.content}
        for message in turn
        for part in message.content
        if isinstance(part, ToolResultPart)
    ]
    for message in turn:
        parts = [part for part in message.content if not isinstance(part, ToolResultPart)]
        if parts:
            messages.append({"role": "user", "content": _content(parts)})
    return messages


def _assistant(message: Message) -> dict[str, Any]:
    parts = [part for part in message.content if not isinstance(part, ToolCallPart)]
    if not all(isinstance(part, TextPart) for part in parts):
        raise Fault(
            ErrorClass.BAD_REQUEST,
            "an assistant message holds a part other than text and tool calls",
            sent=False,
        )
    assistant: dict[str, Any] = {
        "role": "assistant",
        "content": _content(parts) if parts else None,
    }
    calls = [
        {
            "id": wire_id(part.id),
            "type": "function",
            "function": {"name": part.name, "arguments": orjson.dumps(part.arguments).decode()},
        }
        for part in message.content
        if isinstance(part, ToolCallPart)
    ]
    if calls:
        assistant["tool_calls"] = calls
    return assistant


def _content(parts: Sequence[Part]) -> str | list[dict[str, Any]]:
    # One text goes as a string, which compatible servers without vision understand as well.
    if len(parts) == 1 and isinstance(parts[0], TextPart):
        return parts[0].text
    return [_part(part) for part in parts]


def _part(part: Part) -> dict[str, Any]:
    match part:
        case TextPart():
            return {"type": "text", "text": part.text}
        case ImagePart():
            url = part.url or f"data:{part.media_type};base64,{part.data}"
            return {"type": "image_url", "image_url": {"url": url}}
        case FilePart():
            data = f"data:{part.media_type};base64,{part.data}"
            return {"type": "file", "file": {"filename": part.filename, "file_data": data}}
        case _:
            raise Fault(ErrorClass.BAD_REQUEST, "a user message holds a tool call", sent=False)


class OpenAIReading(Reading):
    """Reads a chat completion, or its chunks.

    A streamed answer is complete when it has a finish reason and, with or after it, `[DONE]` or the
    usage that was asked for: without either the stream was cut, perhaps in front of its bill.
    """

    provider = _PROVIDER
    FINISH: ClassVar[Mapping[str, str]] = {
        "stop": "stop",
        "length": "length",
        "tool_calls": "tool_calls",
        "function_call": "tool_calls",
        "content_filter": FILTERED,
    }

    def __init__(self) -> None:
        super().__init__()
        self._refusal: list[str] = []
        self._marked = False

    @property
    def complete(self) -> bool:
        """See the class."""
        return self.stop is not None and self._marked

    def whole(self, body: dict[str, Any]) -> None:
        """Take a chat completion."""
        choice = body["choices"][0]
        message = choice["message"]
        self._take(choice, message)
        for number, call in enumerate(message.get("tool_calls") or ()):
            self._take_call(number, call)
        self._take_frame(body)
        self._marked = True
        self._conclude_so_far()

    def event(self, event: ServerSentEvent) -> None:
        """Take a chunk."""
        if event.data.startswith(b"[DONE]"):
            self.ended = self._marked = True
            self._conclude_so_far()
            return
        chunk = load_json(event.data)
        if chunk.get("error"):
            raise fault_of_error(
                self.provider, error_object(chunk), otherwise=ErrorClass.STREAM_BROKEN
            )
        for choice in chunk.get("choices") or ():
            if choice.get("index"):  # only one answer was asked for
                continue
            delta = choice.get("delta") or {}
            self._take(choice, delta)
            for call in delta.get("tool_calls") or ():
                self._take_call(call.get("index") or 0, call)
        self._take_frame(chunk)
        if self.stop is not None:
            self._marked = self._marked or self.raw_usage is not None
            self._conclude_so_far()

    def usage(self) -> Usage | None:
        """Return the usage; `prompt_tokens` includes what was read from and written to a cache.

        Tokens of images and sound are among them, as predictions that were not used are in
        `completion_tokens`: they cost what text costs, or the model has no price here.
        """
        raw = self.raw_usage or {}
        prompt, output = count(raw.get("prompt_tokens")), count(raw.get("completion_tokens"))
        if prompt is None or output is None:
            return None
        details = mapping(raw.get("prompt_tokens_details"))
        cache_read = min(count(details.get("cached_tokens")) or 0, prompt)
        cache_write = min(count(details.get("cache_write_tokens")) or 0, prompt - cache_read)
        outputs = mapping(raw.get("completion_tokens_details"))
        reasoning = count(outputs.get("reasoning_tokens")) or 0
        if count(raw.get("total_tokens")) == prompt + output + reasoning:
            # Of some compatible servers: reasoning is billed beside the answer, not inside it.
            output += reasoning
        return Usage(
            input=prompt - cache_read - cache_write,
            cache_read=cache_read,
            cache_write_5m=cache_write,
            output=output,
            reasoning=min(reasoning, output),
        )

    def _take(self, choice: dict[str, Any], message: dict[str, Any]) -> None:
        if content := message.get("content"):
            self.add_text(content)
        if refusal := message.get("refusal"):
            self.began = True
            self._refusal.append(str(refusal))
        if message.get("reasoning_content"):  # of compatible servers: the model works
            self.began = True
        self.stop = string(choice.get("finish_reason")) or self.stop
        if (results := choice.get("content_filter_results")) and (filtered := _filtered(results)):
            self.stop_words = filtered

    def _take_call(self, number: int, call: dict[str, Any]) -> None:
        function = call.get("function") or {}
        self.add_tool_call(
            number,
            call_id=call.get("id") or "",
            name=function.get("name") or "",
            arguments=function.get("arguments") or "",
        )

    def _take_frame(self, body: dict[str, Any]) -> None:
        self.model = string(body.get("model")) or self.model
        self.service_tier = string(body.get("service_tier")) or self.service_tier
        if usage := body.get("usage"):
            self.raw_usage = dict(usage)

    def _conclude_so_far(self) -> None:
        """Read what an answer means whose finish reason has come; more chunks may follow."""
        self.usage_is_final = self.raw_usage is not None
        if self._refusal and not self._text:
            # A refusal in a field of its own and with the finish reason `stop` is no answer.
            self.stop = "content_filter"
        if self._refusal and self.stop == "content_filter":
            self.stop_words = "".join(self._refusal)


def _filtered(results: object) -> str | None:
    """Name the categories for which Azure filtered an answer, as it says it: `hate, violence`."""
    named = [name for name, result in mapping(results).items() if mapping(result).get("filtered")]
    return ", ".join(named) or None
