"""OpenAI's wire format at the sandbox provider: chat completions, as `openai` 3.54 reads them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import datetime
from typing import ClassVar

import orjson

from sluicegate.workers.local.sandbox_answers import Ask, Stop, json_string
from sluicegate.workers.local.sandbox_checks import RefusedError, check_chat
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


class OpenAIWire:
    """`POST /v1/chat/completions`."""

    name: WireName = "openai"
    request_id_header = "x-request-id"
    malformed_frame = b'data: {"id":"chatcmpl-broken","choices":[{"index":0,"delta":{"con\n\n'

    _FINISH: ClassVar[dict[Stop, str]] = {
        "end": "stop",
        "sequence": "stop",
        "length": "length",
        "tool": "tool_calls",
        "filter": "content_filter",
        "refusal": "stop",
    }
    _PLENTY: ClassVar[dict[Dimension, Level]] = {
        "requests": Level(10_000, 9_999, 0.006),
        "tokens": Level(30_000_000, 29_999_000, 0.002),
    }
    _UNITS: ClassVar[dict[str, str]] = {
        "requests": "requests per min (RPM)",
        "tokens": "tokens per min (TPM)",
        "input_tokens": "input tokens per min (ITPM)",
        "output_tokens": "output tokens per min (OTPM)",
        "concurrent": "concurrent requests",
    }
    _TROUBLES: ClassVar[dict[Fault, Trouble]] = {
        Fault.HTTP_400: Trouble(400, "invalid_request_error", "Invalid request."),
        Fault.HTTP_401: Trouble(
            401, "invalid_request_error", "Incorrect API key provided.", "invalid_api_key"
        ),
        Fault.HTTP_402: Trouble(402, "billing_error", "Insufficient balance."),
        Fault.HTTP_403: Trouble(
            403,
            "request_forbidden",
            "Country, region, or territory not supported",
            "unsupported_country_region_territory",
        ),
        Fault.HTTP_404: Trouble(
            404, "invalid_request_error", "The model does not exist.", "model_not_found"
        ),
        Fault.HTTP_413: Trouble(413, "invalid_request_error", "Request too large."),
        Fault.HTTP_429: Trouble(
            429,
            "tokens",
            "Rate limit reached on tokens per min (TPM). Please try again later.",
            "rate_limit_exceeded",
        ),
        Fault.HTTP_500: Trouble(
            500, "server_error", "The server had an error while processing your request. Sorry!"
        ),
        Fault.HTTP_503: Trouble(
            503, "server_error", "The engine is currently overloaded, please try again later."
        ),
        Fault.HTTP_529: Trouble(529, "server_error", "The server is overloaded."),
        Fault.QUOTA_429: Trouble(
            429,
            "insufficient_quota",
            "You exceeded your current quota, please check your plan and billing details.",
            "insufficient_quota",
        ),
        Fault.CONTEXT_TOO_LONG: Trouble(
            400,
            "invalid_request_error",
            "This model's maximum context length is 128000 tokens. However, your messages resulted"
            " in 250000 tokens. Please reduce the length of the messages.",
            "context_length_exceeded",
        ),
        Fault.CONTENT_POLICY: Trouble(
            400,
            "invalid_request_error",
            "Your request was rejected as a result of our safety system.",
            "content_policy_violation",
        ),
    }

    def headers(self, now: datetime, levels: Mapping[Dimension, Level]) -> dict[str, str]:
        """Return the headers of every answer: of requests and of tokens, and of nothing else."""
        del now  # OpenAI's resets are durations
        headers = {"openai-processing-ms": "42"}
        for dimension, plenty in self._PLENTY.items():
            level = levels.get(dimension, plenty)
            headers[f"x-ratelimit-limit-{dimension}"] = str(level.limit)
            headers[f"x-ratelimit-remaining-{dimension}"] = str(level.remaining)
            headers[f"x-ratelimit-reset-{dimension}"] = duration(level.reset_s)
        return headers

    def shortage(self, model: str, shortage: Shortage) -> str:
        """Word a 429; `Request too large` is one that no waiting helps."""
        numbers = f"Limit {shortage.limit}, Used {shortage.used}, Requested {shortage.requested}."
        unit = self._UNITS[shortage.dimension]
        if shortage.requested > shortage.limit:
            return f"Request too large for {model} on {unit}: {numbers}"
        said = f"Rate limit reached for {model} on {unit}: {numbers}"
        if shortage.retry_after_s is None:
            return said
        return f"{said} Please try again in {duration(shortage.retry_after_s)}."

    def retry_after(self, wait_s: float) -> dict[str, str]:
        """Say it in seconds and in milliseconds, rounded up."""
        milliseconds = math.ceil(wait_s * 1000)
        return {
            "retry-after": str(-(-milliseconds // 1000)),
            "retry-after-ms": str(milliseconds),
        }

    def model(self, name: str) -> Json:
        """Describe a model."""
        return {"id": name, "object": "model", "created": 1_767_225_600, "owned_by": "sandbox"}

    def read(self, request: object) -> Ask:
        """Read a chat completion request. Raises RefusedError."""
        body, model, messages = read_common(request, self.name)
        if body.get("n") not in (None, 1):
            raise RefusedError(Fault.HTTP_400, "n: the sandbox gives one answer a call.", "n")
        check_chat(body, model, messages)
        reading = Reading()
        system, last_user = [], ""
        for message in messages:
            text = reading.content(message.get("content"), "messages")
            match message.get("role"):
                case "system" | "developer":
                    system.append(text)
                case "user" | "tool":
                    last_user = text
                case "assistant" | "function":
                    if message.get("tool_calls"):
                        reading.data(message["tool_calls"])
                case role:
                    raise RefusedError(Fault.HTTP_400, f"messages: no role {role!r}.", "messages")
        tools = read_tools(body, "parameters")
        if tools:
            reading.data(body["tools"])
        stop = body.get("stop")
        options = body.get("stream_options")
        return Ask(
            wire=self.name,
            model=model,
            stream=bool(body.get("stream")),
            include_usage=isinstance(options, dict) and bool(options.get("include_usage")),
            max_tokens=read_limit(body, "max_completion_tokens") or read_limit(body, "max_tokens"),
            stop=read_strings([stop] if isinstance(stop, str) else stop),
            system="\n".join(system),
            last_user=last_user,
            prompt="\n".join(reading.texts),
            images=reading.images,
            files=reading.files,
            tools=tools,
            forced_tool=read_forced_tool(body.get("tool_choice"), tools),
            no_tools=body.get("tool_choice") == "none",
            parallel=body.get("parallel_tool_calls") is not False,
            json_schema=self._schema(body.get("response_format")),
        )

    def whole(self, reply: Reply) -> bytes:
        """Write a chat completion."""
        answer = reply.answer
        text = orjson.Fragment(json_string(answer.text))
        message: Json = {"role": "assistant", "content": text, "refusal": None, "annotations": []}
        if answer.tool is not None:
            made = [(answer.tool, answer.text), *answer.more_tools]
            calls = [
                {
                    "id": call_id(reply, "call", number),
                    "type": "function",
                    "function": {"name": name, "arguments": arguments},
                }
                for number, (name, arguments) in enumerate(made)
            ]
            message |= {"content": None, "tool_calls": calls}
        if answer.stop == "refusal":
            message |= {"content": None, "refusal": text}
        body = {
            "id": f"chatcmpl-{reply.answer_id}",
            "object": "chat.completion",
            "created": reply.created,
            "model": reply.ask.model,
            "choices": [
                {
                    "index": 0,
                    "message": message,
                    "logprobs": None,
                    "finish_reason": self._FINISH[answer.stop] if reply.terminal else None,
                }
            ],
            "service_tier": "default",
            "system_fingerprint": "fp_sandbox",
        }
        if reply.usage:
            body["usage"] = self._usage(answer.usage)
        return orjson.dumps(body)

    def script(self, reply: Reply) -> Script:
        """Write a chat completion as chunks, one a token."""
        answer, ask = reply.answer, reply.ask
        head = orjson.dumps(
            {
                "id": f"chatcmpl-{reply.answer_id}",
                "object": "chat.completion.chunk",
                "created": reply.created,
                "model": ask.model,
                "service_tier": "default",
                "system_fingerprint": "fp_sandbox",
            }
        )
        # Each chunk is the same but for its delta, so it is put together from bytes.
        before = b"data: " + head[:-1] + b',"choices":[{"index":0,"delta":'
        usage = b',"usage":null' if ask.include_usage and reply.usage else b""
        after = b',"logprobs":null,"finish_reason":null}]' + usage + b"}\n\n"
        if answer.tool is None:
            opening = b'{"role":"assistant","content":"","refusal":null}'
            left, right = b'{"content":', b"}"
            if answer.stop == "refusal":
                left = b'{"refusal":'
        else:
            function = {"name": answer.tool, "arguments": ""}
            call = {
                "index": 0,
                "id": call_id(reply, "call"),
                "type": "function",
                "function": function,
            }
            opening = orjson.dumps({"role": "assistant", "content": None, "tool_calls": [call]})
            left, right = b'{"tool_calls":[{"index":0,"function":{"arguments":', b"}}]}"
        left, right = before + left, right + after
        more = b""
        for number, (name, arguments) in enumerate(answer.more_tools, 1):
            call = {
                "index": number,
                "id": call_id(reply, "call", number),
                "type": "function",
                "function": {"name": name, "arguments": arguments},
            }
            more += before + orjson.dumps({"tool_calls": [call]}) + after
        finish = json_string(self._FINISH[answer.stop])
        ending = (
            more
            + before
            + b'{},"logprobs":null,"finish_reason":'
            + finish
            + b"}]"
            + usage
            + b"}\n\n"
        )
        if usage:
            final = orjson.dumps(self._usage(answer.usage))
            ending += b"data: " + head[:-1] + b',"choices":[],"usage":' + final + b"}\n\n"
        return Script(
            prelude=b"",
            opening=before + opening + after,
            frames=[left + json_string(piece) + right for piece in answer.pieces()],
            ending=ending + (b"data: [DONE]\n\n" if reply.terminal else b""),
        )

    def trouble(
        self, fault: Fault, request_id: str, message: str | None = None, param: str | None = None
    ) -> tuple[int, bytes]:
        """Write an error: status and body."""
        del request_id  # OpenAI says it in the header only
        trouble = self._TROUBLES[fault]
        error = {
            "message": message or trouble.message,
            "type": trouble.type,
            "param": param,
            "code": trouble.code,
        }
        return trouble.status, orjson.dumps({"error": error})

    def error_event(self, request_id: str, message: str | None = None) -> bytes:
        """Write a data event that holds an error."""
        return b"data: " + self.trouble(Fault.HTTP_500, request_id, message)[1] + b"\n\n"

    @staticmethod
    def _schema(response_format: object) -> Json | None:
        if not isinstance(response_format, dict):
            return None
        if response_format.get("type") == "json_object":
            return {"type": "object", "properties": {"answer": {"type": "string"}}}
        named = response_format.get("json_schema")
        schema = named.get("schema") if isinstance(named, dict) else None
        return schema if isinstance(schema, dict) else None

    @staticmethod
    def _usage(usage: Usage) -> Json:
        return {
            "prompt_tokens": usage.prompt,
            "completion_tokens": usage.output,
            "total_tokens": usage.prompt + usage.output,
            "prompt_tokens_details": {
                "cached_tokens": usage.cache_read,
                "cache_write_tokens": usage.cache_write_5m,
                "audio_tokens": 0,
            },
            "completion_tokens_details": {
                "reasoning_tokens": usage.reasoning,
                "audio_tokens": 0,
                "accepted_prediction_tokens": 0,
                "rejected_prediction_tokens": 0,
            },
        }


def duration(seconds: float) -> str:
    """Write a duration as OpenAI does, rounded up to milliseconds: `120ms`, `1.2s`, `6m0s`."""
    milliseconds = math.ceil(seconds * 1000)
    if milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, milliseconds = divmod(milliseconds, 60_000)
    hours, minutes = divmod(minutes, 60)
    said = f"{milliseconds / 1000:g}s"
    if hours or minutes:
        said = f"{minutes}m{said}"
    return f"{hours}h{said}" if hours else said
