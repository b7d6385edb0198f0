"""`POST /v1/chat/completions`, as OpenAI's: for its SDKs, the Vercel AI SDK and all like them."""

from __future__ import annotations

import time
from typing import Annotated, Any, Final
from uuid import UUID

import orjson
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from sluicegate.producers.http.callers import Rule
from sluicegate.producers.http.chat_shapes import NAMES, ChatRequest, asked_of
from sluicegate.producers.http.compatible import (
    NO_ANSWER,
    UNANSWERED,
    answer,
    extras,
    last_word,
    stream,
    submit,
)
from sluicegate.producers.http.problems import Problem
from sluicegate.producers.http.routes import (
    IDEMPOTENCY_KEY,
    JOB_HEADER,
    SSE,
    Answer,
    Door,
    Route,
    Visit,
    json_response,
)
from sluicegate.producers.http.streams import server_sent
from sluicegate.shared.events import Delta, ToolCallDelta
from sluicegate.shared.jobs import Result
from sluicegate.shared.messages import ToolCallPart, Usage

_TYPES: Final = {
    401: "authentication_error",
    402: "insufficient_quota",
    403: "permission_error",
    NO_ANSWER: "server_error",
    429: "rate_limit_error",
}
#: What OpenAI calls what we call otherwise.
_CODES: Final = {
    "unauthorized": "invalid_api_key",
    "budget_exceeded": "insufficient_quota",
    "rate_limited": "rate_limit_exceeded",
    "context_too_long": "context_length_exceeded",
}


def error_body(problem: Problem, request_id: str) -> dict[str, Any]:
    """Word a problem as OpenAI does; the request's id stands in a header there."""
    del request_id
    kind = "server_error" if problem.status >= 500 else "invalid_request_error"
    error = {
        "message": problem.message,
        "type": _TYPES.get(problem.status, kind),
        "param": problem.field,
        "code": _CODES.get(problem.code, problem.code),
    }
    if problem.job_id is not None:
        error["jobId"] = problem.job_id
    return {"error": error}


class ChatError(BaseModel):
    """What went wrong, in OpenAI's words."""

    message: str
    type: str
    #: The field that is to blame.
    param: str | None
    code: str
    #: The job that it is about.
    job_id: Annotated[str | None, Field(alias="jobId")] = None


class ChatRefused(BaseModel):
    """The body of every error."""

    error: ChatError


OPENAI: Final = Door(
    name="openai",
    error=error_body,
    error_model=ChatRefused,
    names=NAMES,
    last_word=last_word,
)


class ChatAnswer(BaseModel):
    """A chat completion: OpenAI's fields, and ours in `sluicegate`."""

    model_config = ConfigDict(extra="allow")

    id: str
    object: str
    created: int
    model: str | None
    choices: list[dict[str, Any]]
    usage: dict[str, Any]
    sluicegate: dict[str, Any]


async def complete(visit: Visit) -> Response:
    """Answer a conversation, whole or as a stream."""
    body = await visit.read(ChatRequest)
    asked = asked_of(body)
    handle = await submit(visit, asked)
    if body.stream:
        voice = ChatVoice(handle.id, body, asked.warnings)
        return await stream(visit, handle, voice)
    warnings = asked.warnings
    del body, asked  # may be megabytes, and the wait minutes
    result = await answer(visit, handle)
    return json_response(_completion(result, warnings), headers={JOB_HEADER: str(handle.id)})


def _completion(result: Result, warnings: list[str]) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": result.text, "refusal": None}
    if result.tool_calls:
        message["content"] = result.text or None
        message["tool_calls"] = [_call(call) for call in result.tool_calls]
    choice = {
        "index": 0,
        "message": message,
        "logprobs": None,
        "finish_reason": result.finish_reason,
    }
    return {
        "id": _answer_id(result.job_id),
        "object": "chat.completion",
        "created": int(result.created_at.timestamp() if result.created_at else time.time()),
        "model": result.model,
        "choices": [choice],
        "usage": _usage(result.usage),
        "sluicegate": extras(result, warnings),
    }


def _answer_id(job_id: UUID) -> str:
    return f"chatcmpl-{job_id}"


def _call(call: ToolCallPart) -> dict[str, Any]:
    arguments = orjson.dumps(call.arguments).decode()
    return {
        "id": call.id,
        "type": "function",
        "function": {"name": call.name, "arguments": arguments},
    }


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.total_input,
        "completion_tokens": usage.output,
        "total_tokens": usage.total_input + usage.output,
        "prompt_tokens_details": {"cached_tokens": usage.cache_read},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning},
    }


class ChatVoice:
    """Tells an answer in chunks."""

    def __init__(self, job_id: UUID, body: ChatRequest, warnings: list[str]) -> None:
        self._head: dict[str, Any] = {
            "id": _answer_id(job_id),
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": body.model,
        }
        self._wants_usage = body.wants_usage
        self._warnings = warnings
        self._began = False

    def begin(self, model: str) -> None:
        """See `Voice`."""
        if not self._began:
            self._head["model"] = model

    def more(self, delta: Delta) -> bytes:
        """See `Voice`."""
        content: dict[str, Any] = {}
        if delta.text:
            content["content"] = delta.text
        if delta.tool_calls:
            content["tool_calls"] = [_fragment(fragment) for fragment in delta.tool_calls]
        return self._opening() + self._chunk(content)

    def end(self, result: Result) -> bytes:
        """See `Voice`."""
        said = self._opening()
        said += self._chunk({}, result.finish_reason, sluicegate=extras(result, self._warnings))
        if self._wants_usage:
            said += server_sent({**self._head, "choices": [], "usage": _usage(result.usage)})
        return said + server_sent(b"[DONE]")

    def error(self, problem: Problem) -> bytes:
        """See `Voice`."""
        return server_sent(error_body(problem, ""))

    def _opening(self) -> bytes:
        if self._began:
            return b""
        self._began = True
        return self._chunk({"role": "assistant", "content": ""})

    def _chunk(self, delta: dict[str, Any], finish: str | None = None, **more: Any) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        chunk = {**self._head, "choices": [choice], **more}
        return server_sent({**chunk, "usage": None} if self._wants_usage else chunk)


def _fragment(fragment: ToolCallDelta) -> dict[str, Any]:
    if fragment.id is None:
        return {"index": fragment.index, "function": {"arguments": fragment.arguments}}
    function = {"name": fragment.name, "arguments": fragment.arguments}
    return {"index": fragment.index, "id": fragment.id, "type": "function", "function": function}


ROUTES: Final = (
    Route(
        method="POST",
        path="/v1/chat/completions",
        rule=Rule.USER,
        handler=complete,
        summary="Answer a conversation, as OpenAI's chat completions do",
        door=OPENAI,
        tag="compatible",
        body=ChatRequest,
        headers=(IDEMPOTENCY_KEY,),
        answers={
            200: Answer(description="The answer.", model=ChatAnswer, media=(SSE,)),
            NO_ANSWER: Answer(description=UNANSWERED, model=ChatRefused),
        },
        is_stream=True,
    ),
)
