"""Anthropic's wire format at the sandbox provider: messages, as `anthropic` 2.12 reads them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import ClassVar

import orjson

from sluicegate.workers.local.sandbox_answers import Answer, Ask, Stop, json_string
from sluicegate.workers.local.sandbox_checks import RefusedError, check_messages
from sluicegate.workers.local.sandbox_faults import Fault
from sluicegate.workers.local.sandbox_limits import Dimension, Level, Shortage
from sluicegate.workers.local.sandbox_prices import Usage, WireName
from sluicegate.workers.local.sandbox_wire import (
    Json,
    Reading,
    Reply,
    Script,
    Trouble,
    call_id,
    read_common,
    read_forced_tool,
    read_limit,
    read_strings,
    read_tools,
)


class AnthropicWire:
    """`POST /v1/messages`."""

    name: WireName = "anthropic"
    request_id_header = "request-id"
    malformed_frame = (
        b"event: content_block_delta\n"
        b'data: {"type":"content_block_delta","index":0,"delta":{"type":"text_de\n\n'
    )

    _STOP: ClassVar[dict[Stop, str]] = {
        "end": "end_turn",
        "sequence": "stop_sequence",
        "length": "max_tokens",
        "tool": "tool_use",
        "filter": "refusal",
        "refusal": "refusal",
    }
    _PLENTY: ClassVar[dict[Dimension, Level]] = {
        "requests": Level(10_000, 9_999, 1),
        "tokens": Level(12_000_000, 11_999_000, 1),
        "input_tokens": Level(10_000_000, 9_999_000, 1),
        "output_tokens": Level(2_000_000, 1_999_000, 1),
    }
    _TROUBLES: ClassVar[dict[Fault, Trouble]] = {
        Fault.HTTP_400: Trouble(400, "invalid_request_error", "Invalid request."),
        Fault.HTTP_401: Trouble(401, "authentication_error", "invalid x-api-key"),
        Fault.HTTP_402: Trouble(
            402, "billing_error", "There is a problem with your organization's billing."
        ),
        Fault.HTTP_403: Trouble(
            403, "permission_error", "Your API key does not have permission to use this resource."
        ),
        Fault.HTTP_404: Trouble(404, "not_found_error", "model: not found"),
        Fault.HTTP_413: Trouble(
            413, "request_too_large", "Request exceeds the maximum allowed number of bytes."
        ),
        Fault.HTTP_429: Trouble(
            429, "rate_limit_error", "This request would exceed your organization's rate limit."
        ),
        Fault.HTTP_500: Trouble(500, "api_error", "Internal server error"),
        Fault.HTTP_503: Trouble(503, "api_error", "Service temporarily unavailable"),
        Fault.HTTP_529: Trouble(529, "overloaded_error", "Overloaded"),
        Fault.QUOTA_429: Trouble(
            429,
            "rate_limit_error",
            "Your organization has crossed the monthly usage threshold of its tier.",
            "enforced_spend_limit_reached",
        ),
        Fault.CONTEXT_TOO_LONG: Trouble(
            400, "invalid_request_error", "prompt is too long: 250000 tokens > 200000 maximum"
        ),
        Fault.CONTENT_POLICY: Trouble(
            400, "invalid_request_error", "Output blocked by content filtering policy"
        ),
    }

    def headers(self, now: datetime, levels: Mapping[Dimension, Level]) -> dict[str, str]:
        """Return the headers of every answer; resets are times in whole seconds, rounded up."""
        headers = {}
        for dimension, plenty in self._PLENTY.items():
            what = dimension.replace("_", "-")
            level = levels.get(dimension, plenty)
            at = datetime.fromtimestamp(math.ceil(now.timestamp() + level.reset_s), UTC)
            headers[f"anthropic-ratelimit-{what}-limit"] = str(level.limit)
            headers[f"anthropic-ratelimit-{what}-remaining"] = str(level.remaining)
            headers[f"anthropic-ratelimit-{what}-reset"] = f"{at:%Y-%m-%dT%H:%M:%SZ}"
        return headers

    def shortage(self, model: str, shortage: Shortage) -> str:
        """Word a 429."""
        if shortage.dimension == "concurrent":
            return "Number of concurrent connections has exceeded your rate limit."
        unit = shortage.dimension.replace("_", " ")
        return (
            "This request would exceed your organization's rate limit of "
            f"{shortage.limit:,} {unit} per minute (model: {model})."
        )

    def retry_after(self, wait_s: float) -> dict[str, str]:
        """Say it in whole seconds, rounded up."""
        return {"retry-after": str(math.ceil(wait_s))}

    def model(self, name: str) -> Json:
        """Describe a model."""
        return {
            "type": "model",
            "id": name,
            "display_name": name,
            "created_at": "2026-01-01T00:00:00Z",
            "lifecycle": "active",
        }

    def read(self, request: object) -> Ask:
        """Read a messages request. Raises RefusedError."""
        body, model, messages = read_common(request, self.name)
        max_tokens = read_limit(body, "max_tokens")
        if max_tokens is None:
            raise RefusedError(Fault.HTTP_400, "max_tokens: Field required", "max_tokens")
        check_messages(body, model, messages)
        reading = Reading()
        system = reading.content(body.get("system"), "system")
        last_user = ""
        for message in messages:
            text = reading.content(message.get("content"), "messages")
            match message.get("role"):
                case "user":
                    last_user = text
                case "system":
                    system = f"{system}\n{text}"
                case "assistant":
                    pass
                case role:
                    raise RefusedError(Fault.HTTP_400, f"messages: no role {role!r}.", "messages")
        tools = read_tools(body, "input_schema")
        if tools:
            reading.data(body["tools"])
        choice = body.get("tool_choice")
        choice = choice if isinstance(choice, dict) else {}
        output = body.get("output_config")
        output_format = output.get("format") if isinstance(output, dict) else None
        schema = output_format.get("schema") if isinstance(output_format, dict) else None
        return Ask(
            wire=self.name,
            model=model,
            stream=bool(body.get("stream")),
            include_usage=True,
            max_tokens=max_tokens,
            stop=read_strings(body.get("stop_sequences")),
            system=system,
            last_user=last_user,
            prompt="\n".join(reading.texts),
            images=reading.images,
            files=reading.files,
            tools=tools,
            forced_tool=read_forced_tool(body.get("tool_choice"), tools),
            no_tools=choice.get("type") == "none",
            parallel=not choice.get("disable_parallel_tool_use"),
            json_schema=schema if isinstance(schema, dict) else None,
        )

    def whole(self, reply: Reply) -> bytes:
        """Write a message."""
        answer = reply.answer
        text = orjson.Fragment(json_string(answer.text))
        content: list[Json] = []
        if answer.tool is not None:
            # Half an object is no object.
            first = "{}" if answer.stop == "length" else answer.text
            content = [
                {
                    "type": "tool_use",
                    "id": call_id(reply, "toolu", number),
                    "name": name,
                    "input": orjson.Fragment(arguments.encode()),
                }
                for number, (name, arguments) in enumerate(
                    [(answer.tool, first), *answer.more_tools]
                )
            ]
        elif answer.text:
            content = [{"type": "text", "text": text}]
        message = self._message(reply, content) | self._stop(answer)
        return orjson.dumps(message if reply.terminal else message | {"stop_reason": None})

    def script(self, reply: Reply) -> Script:
        """Write a message as events, one delta a token."""
        answer = reply.answer
        start = self._message(reply, []) | {"stop_reason": None, "stop_sequence": None}
        if reply.usage:
            start["usage"] = self._usage(answer.usage.cut(min(1, answer.usage.output)))
        block: Json = {"type": "text", "text": ""}
        kind, key = b'"text_delta"', b'"text"'
        if answer.tool is not None:
            block = {
                "type": "tool_use",
                "id": call_id(reply, "toolu"),
                "name": answer.tool,
                "input": {},
            }
            kind, key = b'"input_json_delta"', b'"partial_json"'
        left = (
            b'event: content_block_delta\ndata: {"type":"content_block_delta","index":0,'
            b'"delta":{"type":' + kind + b"," + key + b":"
        )
        delta: Json = {"type": "message_delta", "delta": self._stop(answer)}
        if reply.usage:
            delta["usage"] = self._usage(answer.usage)
        ending = _event({"type": "content_block_stop", "index": 0})
        for number, (name, arguments) in enumerate(answer.more_tools, 1):
            ending += _tool_block(number, call_id(reply, "toolu", number), name, arguments)
        ending += _event(delta)
        return Script(
            prelude=_event({"type": "message_start", "message": start}) + _event({"type": "ping"}),
            opening=_event({"type": "content_block_start", "index": 0, "content_block": block}),
            frames=[left + json_string(piece) + b"}}\n\n" for piece in answer.pieces()],
            ending=ending + (_event({"type": "message_stop"}) if reply.terminal else b""),
        )

    def trouble(
        self, fault: Fault, request_id: str, message: str | None = None, param: str | None = None
    ) -> tuple[int, bytes]:
        """Write an error: status and body."""
        del param  # Anthropic says it in the message
        trouble = self._TROUBLES[fault]
        error: Json = {"type": trouble.type, "message": message or trouble.message}
        if trouble.code is not None:
            error["details"] = {"error_code": trouble.code}
        body = {"type": "error", "error": error, "request_id": request_id}
        return trouble.status, orjson.dumps(body)

    def error_event(self, request_id: str, message: str | None = None) -> bytes:
        """Write the `error` event: overloaded in the middle of an answer."""
        body = self.trouble(Fault.HTTP_529, request_id, message)[1]
        return b"event: error\ndata: " + body + b"\n\n"

    def _message(self, reply: Reply, content: list[Json]) -> Json:
        message: Json = {
            "id": f"msg_{reply.answer_id}",
            "type": "message",
            "role": "assistant",
            "model": reply.ask.model,
            "content": content,
        }
        if reply.usage:
            message["usage"] = self._usage(reply.answer.usage)
        return message

    def _stop(self, answer: Answer) -> Json:
        stop: Json = {
            "stop_reason": self._STOP[answer.stop],
            "stop_sequence": answer.stop_sequence,
        }
        if answer.stop in ("filter", "refusal"):
            stop["stop_details"] = {
                "type": "refusal",
                "category": "general_harms",
                "explanation": "The answer was withheld.",
            }
        return stop

    @staticmethod
    def _usage(usage: Usage) -> Json:
        return {
            "input_tokens": usage.input,
            "cache_read_input_tokens": usage.cache_read,
            "cache_creation_input_tokens": usage.cache_write_5m + usage.cache_write_1h,
            "cache_creation": {
                "ephemeral_5m_input_tokens": usage.cache_write_5m,
                "ephemeral_1h_input_tokens": usage.cache_write_1h,
            },
            "output_tokens": usage.output,
            "output_tokens_details": {"thinking_tokens": usage.reasoning},
            "service_tier": "standard",
        }


def _tool_block(number: int, tool_id: str, name: str, arguments: str) -> bytes:
    block: Json = {"type": "tool_use", "id": tool_id, "name": name, "input": {}}
    delta: Json = {"type": "input_json_delta", "partial_json": arguments}
    return (
        _event({"type": "content_block_start", "index": number, "content_block": block})
        + _event({"type": "content_block_delta", "index": number, "delta": delta})
        + _event({"type": "content_block_stop", "index": number})
    )


def _event(data: Json) -> bytes:
    name: str = data["type"]
    return b"event: " + name.encode() + b"\ndata: " + orjson.dumps(data) + b"\n\n"
