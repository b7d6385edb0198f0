"""Answers in the events of foreign protocols, as their readers put them together."""

from __future__ import annotations

from decimal import Decimal
from typing import Any
from uuid import UUID

import orjson
import pytest

from sluicegate.producers.http.chat import ChatVoice
from sluicegate.producers.http.chat_shapes import ChatRequest
from sluicegate.producers.http.compatible import last_word
from sluicegate.producers.http.messages import MessagesVoice
from sluicegate.producers.http.problems import Problem, problem_of
from sluicegate.shared.errors import (
    ErrorClass,
    IdempotencyConflict,
    JobCancelled,
    JobExpired,
    JobFailed,
    Purged,
    QueueUnavailable,
    ResultTimeout,
    SluiceError,
)
from sluicegate.shared.events import Delta, ToolCallDelta
from sluicegate.shared.jobs import Result, State
from sluicegate.shared.messages import Usage

JOB = UUID(int=1)
RESULT = Result(
    job_id=JOB,
    state=State.SUCCEEDED,
    use_case="draft",
    finish_reason="tool_calls",
    provider="row",
    model="model-1",
    usage=Usage(input=5, cache_read=3, output=7, reasoning=2),
    cost_nano_usd=1_500,
    attempts=1,
    warnings=("theirs",),
)


def events(said: bytes) -> list[Any]:
    """Read server-sent events: their data, and that their names are those of the data."""
    found: list[Any] = []
    for event in said.decode().split("\n\n")[:-1]:
        *name, line = event.split("\n")
        written = line.removeprefix("data: ")
        data: Any = written if written == "[DONE]" else orjson.loads(written)
        assert name in ([], [f"event: {data['type']}"] if "type" in data else [])
        found.append(data)
    return found


def fragment(index: int, arguments: str = "", name: str | None = None) -> ToolCallDelta:
    call_id = None if name is None else f"id-{index}"
    return ToolCallDelta(index=index, id=call_id, name=name, arguments=arguments)


def messages_voice() -> MessagesVoice:
    return MessagesVoice(JOB, "sluice/draft", ["ours"], "request")


def test_blocks_follow_one_another() -> None:
    voice = messages_voice()
    voice.begin("model-1")
    said = events(
        voice.more(Delta(text="Let me "))
        + voice.more(Delta(text="look.", tool_calls=(fragment(0, name="one"),)))
        + voice.more(Delta(tool_calls=(fragment(0, '{"a"'), fragment(0, ":1}"))))
        + voice.more(Delta(tool_calls=(fragment(1, "{}", name="two"),)))
        + voice.more(Delta(text="Done."))
        + voice.end(RESULT)
    )
    assert said[0]["message"]["model"] == "model-1"
    assert [(one["type"], one.get("index")) for one in said] == [
        ("message_start", None),
        ("ping", None),
        ("content_block_start", 0),
        ("content_block_delta", 0),
        ("content_block_delta", 0),
        ("content_block_stop", 0),
        ("content_block_start", 1),
        ("content_block_delta", 1),
        ("content_block_delta", 1),
        ("content_block_stop", 1),
        ("content_block_start", 2),
        ("content_block_delta", 2),
        ("content_block_stop", 2),
        ("content_block_start", 3),
        ("content_block_delta", 3),
        ("content_block_stop", 3),
        ("message_delta", None),
        ("message_stop", None),
    ]
    ended = said[-2]
    assert ended["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    assert (ended["usage"]["input_tokens"], ended["usage"]["cache_read_input_tokens"]) == (5, 3)
    assert ended["sluicegate"]["warnings"] == ["ours", "theirs"]


def test_fragments_of_two_calls_may_come_mixed() -> None:
    voice = messages_voice()
    said = events(
        voice.more(Delta(tool_calls=(fragment(0, "{", name="one"), fragment(1, "[", name="two"))))
        + voice.more(Delta(tool_calls=(fragment(0, "}"), fragment(1, "]"))))
    )
    pieces: dict[int, str] = {}
    for one in said:
        if one["type"] == "content_block_delta":
            pieces[one["index"]] = pieces.get(one["index"], "") + one["delta"]["partial_json"]
    assert pieces == {0: "{}", 1: "[]"}


def test_an_empty_answer_is_a_message_too() -> None:
    kinds = [one["type"] for one in events(messages_voice().end(RESULT))]
    assert kinds == ["message_start", "ping", "message_delta", "message_stop"]


def test_chunks_are_of_one_answer() -> None:
    body = ChatRequest.model_validate(
        {"model": "sluice/draft", "messages": [{}], "stream_options": {"include_usage": True}}
    )
    voice = ChatVoice(JOB, body, ["ours"])
    voice.begin("model-1")
    *said, done = events(
        voice.more(Delta(text="Let me look.", tool_calls=(fragment(0, "{", name="one"),)))
        + voice.more(Delta(tool_calls=(fragment(0, "}"),)))
        + voice.end(RESULT)
    )
    assert done == "[DONE]"
    assert {(one["id"], one["model"]) for one in said} == {(f"chatcmpl-{JOB}", "model-1")}
    role, first, second, last, usage = said
    assert role["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert first["choices"][0]["delta"] == {
        "content": "Let me look.",
        "tool_calls": [
            {
                "index": 0,
                "id": "id-0",
                "type": "function",
                "function": {"name": "one", "arguments": "{"},
            }
        ],
    }
    assert second["choices"][0]["delta"] == {
        "tool_calls": [{"index": 0, "function": {"arguments": "}"}}]
    }
    assert last["choices"][0]["finish_reason"] == "tool_calls"
    assert last["sluicegate"] == {
        "jobId": str(JOB),
        "provider": "row",
        "costUsd": float(Decimal("0.0000015")),
        "baselineUsd": 0.0,
        "attempts": 1,
        "warnings": ["ours", "theirs"],
    }
    assert usage["choices"] == []
    assert usage["usage"] == {
        "prompt_tokens": 8,
        "completion_tokens": 7,
        "total_tokens": 15,
        "prompt_tokens_details": {"cached_tokens": 3},
        "completion_tokens_details": {"reasoning_tokens": 2},
    }
    assert all(one["usage"] is None for one in said[:-1])


def test_an_error_names_its_job() -> None:
    problem = Problem(502, "restarted", "It began again.", job_id=str(JOB))
    body = ChatRequest.model_validate({"model": "m", "messages": [{}]})
    (told,) = events(ChatVoice(JOB, body, []).error(problem))
    assert told["error"] == {
        "message": "It began again.",
        "type": "server_error",
        "param": None,
        "code": "restarted",
        "jobId": str(JOB),
    }
    (told,) = events(messages_voice().error(problem))
    assert told == {
        "type": "error",
        "error": {
            "type": "api_error",
            "message": "It began again.",
            "details": {"error_code": "restarted", "jobId": str(JOB)},
        },
        "request_id": "request",
    }


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (JobFailed(job_id=str(JOB)), 406, "job_failed"),
        (JobFailed(error_class=ErrorClass.INVALID_ANSWER), 406, "invalid_answer"),
        (JobFailed(error_class=ErrorClass.CONTENT_FILTER), 400, "content_filter"),
        (JobFailed(error_class=ErrorClass.BUDGET), 402, "budget_exceeded"),
        (JobCancelled(), 406, "job_cancelled"),
        (JobExpired(), 406, "job_expired"),
        (ResultTimeout(), 406, "still_running"),
        (QueueUnavailable(), 406, "unavailable"),
        (SluiceError(), 406, "internal"),
        (Purged(), 406, "purged"),
    ],
)
def test_no_client_repeats_a_job(error: SluiceError, status: int, code: str) -> None:
    problem = problem_of(error)
    problem.job_id = str(JOB)
    last_word(problem)
    assert (problem.status, problem.code) == (status, code)
    assert problem.headers == {"x-should-retry": "false"}


def test_what_is_no_job_yet_keeps_its_status() -> None:
    busy, conflict = problem_of(QueueUnavailable()), problem_of(IdempotencyConflict())
    for problem in (busy, conflict):
        last_word(problem)
    assert (busy.status, conflict.status) == (503, 409)
    assert "x-should-retry" not in busy.headers
    assert "Retry-After" in busy.headers
    assert conflict.headers == {"x-should-retry": "false"}
