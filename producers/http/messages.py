"""`POST /v1/messages`, as Anthropic's: for its SDKs and all like them."""

from __future__ import annotations

from typing import Any, Final, Literal
from uuid import UUID

from pydantic import BaseModel, ConfigDict
from starlette.responses import Response

from sluicegate.producers.http.callers import Rule
from sluicegate.producers.http.compatible import (
    NO_ANSWER,
    UNANSWERED,
    answer,
    extras,
    last_word,
    stream,
    submit,
)
from sluicegate.producers.http.messages_shapes import NAMES, MessagesRequest, asked_of
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
from sluicegate.shared.messages import Usage

_TYPES: Final = {
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    NO_ANSWER: "api_error",
    409: "conflict_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
_STOPS: Final = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
#: Stands for text where tool calls have an index.
_TEXT: Final = -1
_PING: Final = server_sent({"type": "ping"}, event="ping")


def error_body(problem: Problem, request_id: str) -> dict[str, Any]:
    """Word a problem as Anthropic does."""
    kind = "api_error" if problem.status >= 500 else "invalid_request_error"
    details = {"error_code": problem.code, "field": problem.field, "jobId": problem.job_id}
    error = {
        "type": _TYPES.get(problem.status, kind),
        "message": problem.message,
        "details": {name: value for name, value in details.items() if value is not None},
    }
    return {"type": "error", "error": error, "request_id": request_id}


class MessagesError(BaseModel):
    """What went wrong, in Anthropic's words; `details` has the field and the job it is about."""

    type: str
    message: str
    details: dict[str, str]


class MessagesRefused(BaseModel):
    """The body of every error."""

    type: Literal["error"]
    error: MessagesError
    request_id: str


ANTHROPIC: Final = Door(
    name="anthropic",
    error=error_body,
    error_model=MessagesRefused,
    names=NAMES,
    request_id_header="request-id",
    last_word=last_word,
)


class MessagesAnswer(BaseModel):
    """A message: Anthropic's fields, and ours in `sluicegate`."""

    model_config = ConfigDict(extra="allow")

    id: str
    type: str
    role: str
    model: str | None
    content: list[dict[str, Any]]
    stop_reason: str | None
    stop_sequence: str | None
    usage: dict[str, Any]
    sluicegate: dict[str, Any]


async def create(visit: Visit) -> Response:
    """Answer a conversation, whole or as a stream."""
    body = await visit.read(MessagesRequest)
    asked = asked_of(body)
    handle = await submit(visit, asked)
    if body.stream:
        voice = MessagesVoice(handle.id, body.model, asked.warnings, visit.request_id)
        return await stream(visit, handle, voice)
    warnings = asked.warnings
    del body, asked  # may be megabytes, and the wait minutes
    result = await answer(visit, handle)
    return json_response(_message(result, warnings), headers={JOB_HEADER: str(handle.id)})


def _message(result: Result, warnings: list[str]) -> dict[str, Any]:
    content: list[dict[str, Any]] = []
    if result.text or not result.tool_calls:
        content.append({"type": "text", "text": result.text, "citations": None})
    content += [
        {"type": "tool_use", "id": call.id, "name": call.name, "input": call.arguments}
        for call in result.tool_calls
    ]
    return {
        "id": _answer_id(result.job_id),
        "type": "message",
        "role": "assistant",
        "model": result.model,
        "content": content,
        "stop_reason": _stop(result),
        "stop_sequence": None,
        "usage": _usage(result.usage),
        "sluicegate": extras(result, warnings),
    }


def _answer_id(job_id: UUID) -> str:
    return f"msg_{job_id}"


def _stop(result: Result) -> str | None:
    reason = result.finish_reason
    return reason if reason is None else _STOPS.get(reason, reason)


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.input,
        "cache_read_input_tokens": usage.cache_read,
        "cache_creation_input_tokens": usage.cache_write_5m + usage.cache_write_1h,
        "output_tokens": usage.output,
        "output_tokens_details": {"thinking_tokens": usage.reasoning},
    }


class MessagesVoice:
    """Tells an answer in events: a message of blocks, one after another."""

    def __init__(self, job_id: UUID, model: str, warnings: list[str], request_id: str) -> None:
        self._id = _answer_id(job_id)
        self._model = model
        self._warnings = warnings
        self._request_id = request_id
        self._began = False
        #: The blocks so far, and the one that is open: text, or the tool call of this index.
        self._blocks = 0
        self._open: int | None = None
        self._block_of: dict[int, int] = {}

    def begin(self, model: str) -> None:
        """See `Voice`."""
        if not self._began:
            self._model = model

    def more(self, delta: Delta) -> bytes:
        """See `Voice`."""
        said = self._opening()
        if delta.text:
            said += self._enter(_TEXT, {"type": "text", "text": ""})
            said += self._piece(_TEXT, {"type": "text_delta", "text": delta.text})
        for fragment in delta.tool_calls:
            said += self._fragment(fragment)
        return said

    def end(self, result: Result) -> bytes:
        """See `Voice`."""
        stop = {"stop_reason": _stop(result), "stop_sequence": None}
        ended = {
            "type": "message_delta",
            "delta": stop,
            "usage": _usage(result.usage),
            "sluicegate": extras(result, self._warnings),
        }
        return self._opening() + self._leave() + _event(ended) + _event({"type": "message_stop"})

    def error(self, problem: Problem) -> bytes:
        """See `Voice`."""
        return _event(error_body(problem, self._request_id))

    def _opening(self) -> bytes:
        if self._began:
            return b""
        self._began = True
        message: dict[str, Any] = {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            # What it was is known at the end.
            "usage": {"input_tokens": 0, "output_tokens": 0},
        }
        return _event({"type": "message_start", "message": message}) + _PING

    def _fragment(self, fragment: ToolCallDelta) -> bytes:
        said = b""
        if fragment.id is not None:
            block: dict[str, Any] = {
                "type": "tool_use",
                "id": fragment.id,
                "name": fragment.name,
                "input": {},
            }
            said = self._enter(fragment.index, block)
        if fragment.arguments:
            piece = {"type": "input_json_delta", "partial_json": fragment.arguments}
            said += self._piece(fragment.index, piece)
        return said

    def _enter(self, which: int, block: dict[str, Any]) -> bytes:
        if self._open == which:
            return b""
        left = self._leave()
        self._open, number = which, self._blocks
        self._block_of[which] = number
        self._blocks += 1
        begun = {"type": "content_block_start", "index": number, "content_block": block}
        return left + _event(begun)

    def _leave(self) -> bytes:
        if self._open is None:
            return b""
        number = self._block_of[self._open]
        self._open = None
        return _event({"type": "content_block_stop", "index": number})

    def _piece(self, which: int, delta: dict[str, Any]) -> bytes:
        number = self._block_of[which]
        return _event({"type": "content_block_delta", "index": number, "delta": delta})


def _event(data: dict[str, Any]) -> bytes:
    return server_sent(data, event=data["type"])


ROUTES: Final = (
    Route(
        method="POST",
        path="/v1/messages",
        rule=Rule.USER,
        handler=create,
        summary="Answer a conversation, as Anthropic's messages do",
        door=ANTHROPIC,
        tag="compatible",
        body=MessagesRequest,
        headers=(IDEMPOTENCY_KEY,),
        answers={
            200: Answer(description="The answer.", model=MessagesAnswer, media=(SSE,)),
            NO_ANSWER: Answer(description=UNANSWERED, model=MessagesRefused),
        },
        is_stream=True,
    ),
)
