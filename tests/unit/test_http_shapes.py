"""The native JSON: what of it is submitted, and how a field's place is told."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any
from uuid import uuid4

import pytest
from pydantic import ValidationError

from sluicegate.producers.http.callers import Caller, Role
from sluicegate.producers.http.idempotency import check_key, given_key, stored_key
from sluicegate.producers.http.problems import Problem, invalid, problem_of
from sluicegate.producers.http.shapes import Ask, answered
from sluicegate.shared.errors import (
    BudgetExceeded,
    ErrorClass,
    IdempotencyConflict,
    InvalidJob,
    JobCancelled,
    JobExpired,
    JobFailed,
    NotFound,
    Purged,
    QueueUnavailable,
    SluiceError,
)
from sluicegate.shared.jobs import Result, State, build_spec
from sluicegate.shared.messages import ToolCallPart, Usage


def ask(**body: Any) -> Ask:
    return Ask.model_validate_json(json.dumps(body))


def spec_of(asked: Ask) -> Any:
    use_case, messages, options = asked.request()
    given = {name: value for name, value in options.items() if name != "deadline"}
    return build_spec(use_case or "general", list(messages), **given)  # type: ignore[arg-type]


def test_a_prompt() -> None:
    use_case, messages, options = ask(prompt="Hello").request()
    assert use_case is None
    assert messages == [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
    assert options == {"stream": False}


def test_all_that_there_is() -> None:
    asked = ask(
        messages=[
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Look."}]},
            {
                "role": "assistant",
                "content": [
                    {"type": "tool-call", "toolCallId": "1", "toolName": "look", "args": {"n": 1}}
                ],
            },
            {
                "role": "tool",
                "content": [{"type": "tool-result", "toolCallId": "1", "result": {"seen": True}}],
            },
            {"role": "user", "content": [{"type": "image", "image": "https://x.y/z"}]},
        ],
        system="In English.",
        useCase="complex",
        maxTokens=100,
        tools={"look": {"description": "Looks."}},
        toolChoice={"type": "tool", "toolName": "look"},
        parallelToolCalls=False,
        responseFormat={"name": "task", "schema": {"type": "object"}},
        model="gpt-6-luna",
        fallbacks=["claude-haiku-5-5"],
        effort="low",
        temperature=0.5,
        topP=0.9,
        stop=["END"],
        metadata={"lead": "7"},
        deadline="2030-01-01T00:00:00+02:00",
        stream=True,
    )
    spec = spec_of(asked)
    assert spec.system == "In English.\n\nBe brief."
    assert [message.role for message in spec.messages] == ["user", "assistant", "user", "user"]
    assert spec.messages[2].content[0].content == '{"seen":true}'
    assert [tool.name for tool in spec.tools] == ["look"]
    assert spec.tool_choice == "look"
    assert (spec.temperature, spec.top_p, spec.stop) == (0.5, 0.9, ("END",))
    deadline = asked.request().options["deadline"]
    assert isinstance(deadline, datetime)
    assert deadline.utcoffset() is not None


@pytest.mark.parametrize(
    ("image", "part"),
    [
        ("https://x.y/z.png", {"url": "https://x.y/z.png"}),
        ("data:image/gif;base64,R0lGODlh", {"data": "R0lGODlh", "media_type": "image/gif"}),
        ("R0lGODlh", {"data": "R0lGODlh", "media_type": "image/gif"}),
        ("/9j/4AAQ", {"data": "/9j/4AAQ", "media_type": "image/jpeg"}),
        ("iVBORw0KGgo=", {"data": "iVBORw0KGgo=", "media_type": "image/png"}),
    ],
)
def test_images_go_with_the_last_message(image: str, part: dict[str, str]) -> None:
    _, messages, _ = ask(prompt="What is it?", images=[image]).request()
    assert messages[-1]["content"][0] == {"type": "image", **part}


@pytest.mark.parametrize(
    ("asked", "field", "place"),
    [
        (ask(prompt="a"), "messages.0.content", "prompt"),
        (ask(prompt="a", images=["AAAA"]), "messages.0.content.data", "images"),
        (ask(prompt="a", tools={"x": {}, "y": {}}), "tools.1.parameters", "tools.y.parameters"),
        (ask(prompt="a"), "max_tokens", "max_tokens"),
        (ask(prompt="a"), "response_format.json_schema", "responseFormat.schema"),
        (
            ask(messages=[{"role": "system", "content": "s"}, {"role": "user", "content": "a"}]),
            "messages.0.content",
            "messages.1.content",
        ),
    ],
)
def test_a_field_is_named_as_it_was_written(asked: Ask, field: str, place: str) -> None:
    assert asked.place(field) == place


@pytest.mark.parametrize(
    "body",
    [
        "{}",
        '{"prompt": "a", "messages": [{"role": "user", "content": "b"}]}',
        '{"messages": [{"role": "system", "content": "a"}], "images": ["AAAA"]}',
    ],
)
def test_what_cannot_be_a_job(body: str) -> None:
    with pytest.raises(InvalidJob):
        Ask.model_validate_json(body).request()


def test_the_deepest_field_is_named_without_what_was_tried() -> None:
    body = {"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]}
    with pytest.raises(ValidationError) as caught:
        Ask.model_validate_json(json.dumps(body))
    problem = invalid(caught.value, body)
    assert (problem.field, problem.message) == (
        "messages.0.content.0.text",
        "messages.0.content.0.text: must be text",
    )


class Counting(dict[str, Any]):
    """Counts how often it is looked into."""

    looks = 0

    def __contains__(self, key: object) -> bool:
        self.looks += 1
        return super().__contains__(key)


def test_of_thousands_of_errors_the_first_are_looked_at() -> None:
    body = Counting({'"]},é\n': 0} | {f"k{n}": n for n in range(24_000)})
    with pytest.raises(ValidationError) as caught:
        Ask.model_validate_json(json.dumps(body))
    assert caught.value.error_count() == 24_001
    problem = invalid(caught.value, body)
    assert (problem.status, problem.field) == (400, '"]},é\n')
    assert problem.message.endswith(": is not known here")
    assert 1 < body.looks <= 100


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (InvalidJob("max_tokens", "is bad"), 400, "invalid_request"),
        (IdempotencyConflict(), 409, "idempotency_conflict"),
        (NotFound(), 404, "not_found"),
        (Purged(), 410, "purged"),
        (BudgetExceeded(), 402, "budget_exceeded"),
        (QueueUnavailable(), 503, "unavailable"),
        (JobExpired(), 504, "job_expired"),
        (JobCancelled(), 409, "job_cancelled"),
        (JobFailed(error_class=ErrorClass.SERVER), 502, "job_failed"),
        (JobFailed(error_class=ErrorClass.BUDGET), 402, "budget_exceeded"),
        (JobFailed(error_class=ErrorClass.CONTENT_FILTER), 422, "content_filter"),
        (SluiceError("a secret"), 500, "internal"),
    ],
)
def test_an_error_has_a_status_and_a_word(error: SluiceError, status: int, code: str) -> None:
    problem = problem_of(error, {"max_tokens": "maxTokens"})
    assert (problem.status, problem.code) == (status, code)
    assert ("Retry-After" in problem.headers) == (status == 503)
    assert "secret" not in problem.message
    assert problem.field == ("maxTokens" if isinstance(error, InvalidJob) else None)


def test_a_users_key_is_his_own_and_an_owners_the_accounts() -> None:
    def caller(role: Role, subject: str) -> Caller:
        return Caller(subject=subject, role=role, account_id=uuid4(), account="acme")

    ann, ben = caller(Role.USER, "jwt:ann"), caller(Role.USER, "jwt:ben")
    assert stored_key("k", ann) != stored_key("k", ben)
    assert stored_key("k", caller(Role.OWNER, "key:1")) == "k"
    assert given_key(stored_key("k", ann), "jwt:ann") == "k"
    assert given_key("k", "key:1") == "k"
    assert given_key(None, "key:1") is None
    assert len(stored_key("k" * 200, ann)) <= 255
    for bad in ("", "k" * 201, "a b", "ä", "k\n"):
        with pytest.raises(Problem):
            check_key(bad)


def test_an_answer() -> None:
    result = Result(
        job_id=uuid4(),
        state=State.SUCCEEDED,
        use_case="draft",
        text="Hi",
        tool_calls=(ToolCallPart(id="1", name="look", arguments={"n": 1}),),
        usage=Usage(input=10, cache_read=5, cache_write_5m=3, output=7, reasoning=2),
        cost_nano_usd=1234567,
        baseline_nano_usd=2000000000,
    )
    told = answered(result)
    assert told["usage"] == {
        "inputTokens": 18,
        "outputTokens": 7,
        "cachedTokens": 5,
        "totalTokens": 25,
        "reasoningTokens": 2,
    }
    assert told["cost"] == {"usd": 0.001234567, "baselineUsd": 2.0}
    assert told["toolCalls"] == [{"toolCallId": "1", "toolName": "look", "args": {"n": 1}}]
