"""Repair: which answers are asked for once more, and how."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import pytest

from sluicegate.shared.errors import ErrorClass
from sluicegate.shared.jobs import Lane, build_spec
from sluicegate.shared.messages import ToolCallPart, Usage
from sluicegate.workers import outcomes, repair
from sluicegate.workers.claims import Job
from sluicegate.workers.dispatch import Attempt
from sluicegate.workers.gates import UNASKED
from sluicegate.workers.placement import Plan
from sluicegate.workers.providers.base import Answer
from tests.unit.test_routing import row

SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
SPEC = build_spec("draft", "How many?", response_format={"json_schema": SCHEMA})
JOB = Job(
    id=UUID(int=1),
    claim_id=UUID(int=2),
    worker_id=UUID(int=3),
    fence=5,
    account_id=UUID(int=4),
    use_case="draft",
    lane=Lane.INTERACTIVE,
    queue="draft.openai",
    attempts_used=0,
    unknown_attempts=0,
    max_attempts=3,
    cost_nano_usd=7,
    created_at=datetime(2026, 11, 23, tzinfo=UTC),
    deadline_s=100.0,
    spec=SPEC,
)
ROW = row("gpt")
PLAN = Plan(
    provider=ROW,
    catalogue=None,  # type: ignore[arg-type]  # nobody looks
    attempt_id=UUID(int=9),
    verdict=UNASKED,
    max_tokens=10,
    output_tokens=10,
    prompt_tokens=10,
    input_tokens=10,
    reserved_nano_usd=50,
    baseline_reserved_nano_usd=60,
    left=(),
    later=(),
)
ATTEMPT = Attempt(
    attempt_id=UUID(int=9),
    job_id=JOB.id,
    worker_id=JOB.worker_id,
    fence=JOB.fence,
    number=1,
    provider_id=ROW.id,
    provider=ROW.name,
    model=ROW.model,
    reserved_nano_usd=50_000,
    baseline_reserved_nano_usd=60_000,
)


def answer(text: str, **values: Any) -> Answer:
    given: dict[str, Any] = {
        "text": text,
        "tool_calls": (),
        "finish_reason": "stop",
        "model": ROW.model,
        "usage": Usage(input=100, output=20),
        "raw_usage": {"prompt_tokens": 100},
        "request_id": "req_1",
        "first_token_ms": None,
        "duration_ms": 300,
        "service_tier": None,
    }
    return Answer(**(given | values))


def test_what_fits_and_what_does_not() -> None:
    assert repair.misfit_of(SPEC, answer('{"n": 3}')) is None
    assert repair.misfit_of(SPEC, answer('{"n": "three"}')) == 'n is not of type "integer"'
    assert repair.misfit_of(build_spec("draft", "Hi"), answer("Hello.")) is None


@pytest.mark.parametrize(
    "more",
    [
        {"finish_reason": "length"},
        {
            "finish_reason": "tool_calls",
            "tool_calls": (ToolCallPart(id="c", name="t", arguments={}),),
        },
        {"finish_reason": "pause_turn"},
    ],
    ids=str,
)
def test_only_a_whole_answer_is_checked(more: dict[str, Any]) -> None:
    assert repair.misfit_of(SPEC, answer("{", **more)) is None


def test_what_was_stored_before_schemas_were_checked_is_passed_on() -> None:
    asked = SPEC.response_format
    assert asked is not None
    wrong = asked.model_copy(update={"json_schema": {"type": "objekt"}})
    assert (
        repair.misfit_of(SPEC.model_copy(update={"response_format": wrong}), answer("{}")) is None
    )


@pytest.mark.parametrize(
    ("repairs", "used", "worth_it"), [(0, 0, True), (0, 1, True), (0, 2, False), (1, 1, False)]
)
def test_it_is_asked_for_once_more_while_attempts_are_left(
    repairs: int, used: int, worth_it: bool
) -> None:
    assert repair.is_worth_it(replace(JOB, repairs=repairs, attempts_used=used)) == worth_it


def test_the_model_reads_what_it_said_and_what_is_wrong_with_it() -> None:
    job = repair.repairing(JOB, PLAN, answer('{"n": "x"}'), "n is no number", 30)
    question, said, wrong = job.spec.messages
    assert question == SPEC.messages[0]
    assert (said.role, wrong.role) == ("assistant", "user")
    assert '{"n": "x"}' in str(said)
    assert "n is no number" in str(wrong)
    assert job.spec.response_format == SPEC.response_format
    assert (job.repairs, job.attempts_used, job.cost_nano_usd) == (1, 1, 37)
    # The same row may take it: it has not refused the job.
    assert (job.tried, job.refused, job.ruled_out) == ((ROW.id,), (), ())


def test_an_answer_without_a_word_is_not_quoted() -> None:
    job = repair.repairing(JOB, PLAN, answer(" \n"), "it is not JSON", 0)
    assert [message.role for message in job.spec.messages] == ["user", "user"]


def test_the_attempt_is_booked_as_what_it_cost() -> None:
    error = repair.error_of(answer("{"), "it is not JSON")
    assert error.error_class is ErrorClass.INVALID_ANSWER
    booked = outcomes.ended_attempt(ATTEMPT, ROW, error, "gpt-4o")
    assert (booked["attempt_state"], booked["kind"]) == ("failed", "actual")
    assert (booked["input_tokens"], booked["output_tokens"]) == (100, 20)
    assert booked["request_id"] == "req_1"
    # Without usage it is the reservation, and never nothing.
    error = repair.error_of(answer("{", usage=None, raw_usage=None), "it is not JSON")
    booked = outcomes.ended_attempt(ATTEMPT, ROW, error, "gpt-4o")
    assert (booked["kind"], booked["amount_nano_usd"]) == ("estimate", 50_000)
