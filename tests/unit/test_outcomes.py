"""Outcomes: what a settlement books and moves for each way a call can end."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import orjson
import pytest

from sluicegate.shared.catalogue import Provider
from sluicegate.shared.errors import ErrorClass
from sluicegate.shared.events import decode, terminal_id
from sluicegate.shared.jobs import Lane, State, build_spec
from sluicegate.shared.messages import Usage
from sluicegate.workers import outcomes
from sluicegate.workers.claims import Job
from sluicegate.workers.dispatch import Attempt
from sluicegate.workers.providers.base import Answer, Partial, ProviderError
from sluicegate.workers.settlement import Settled

NOW = datetime(2026, 11, 23, 12, tzinfo=UTC)

JOB = Job(
    id=UUID(int=1),
    claim_id=UUID(int=2),
    worker_id=UUID(int=3),
    fence=5,
    account_id=UUID(int=4),
    use_case="general",
    lane=Lane.INTERACTIVE,
    queue="general.openai",
    attempts_used=1,
    unknown_attempts=0,
    max_attempts=4,
    cost_nano_usd=1_000,
    created_at=NOW,
    deadline_s=100.0,
    spec=build_spec("general", "hi"),
)
ATTEMPT = Attempt(
    attempt_id=UUID(int=9),
    job_id=JOB.id,
    worker_id=JOB.worker_id,
    fence=JOB.fence,
    number=2,
    provider_id=UUID(int=7),
    provider="openai-gpt-6-luna",
    model="gpt-6-luna",
    reserved_nano_usd=50_000,
    baseline_reserved_nano_usd=900_000,
)
PROVIDER = Provider(
    id=UUID(int=7),
    name="openai-gpt-6-luna",
    provider="openai",
    model="gpt-6-luna",
    base_url=None,
    is_default=True,
    use_case=frozenset({"general"}),
    failover=frozenset(),
    max_tokens=64_000,
    context_tokens=1_000_000,
    capabilities=frozenset(),
    account_id=None,
    catalogue="current",
    priority=100,
    retires_at=None,
    successor=None,
    price_override=None,
)
ANSWER = Answer(
    text="Dear Ada",
    tool_calls=(),
    finish_reason="stop",
    model="gpt-6-luna-2026",
    usage=Usage(input=100, cache_read=50, output=20, reasoning=5),
    raw_usage={"prompt_tokens": 150},
    request_id="req_1",
    first_token_ms=None,
    duration_ms=300,
    service_tier=None,
)
#: $0.10, $0.01 and $0.50 a million tokens.
COST = 100 * 100 + 50 * 10 + 20 * 500


def _error(error_class: ErrorClass = ErrorClass.SERVER, **fields: Any) -> ProviderError:
    return ProviderError("It broke.", error_class=error_class, **fields)


def test_an_answer_books_what_the_provider_reported() -> None:
    settlement = outcomes.succeeded(JOB, ATTEMPT, PROVIDER, ANSWER, "gpt-4o")
    assert (settlement["kind"], settlement["amount_nano_usd"]) == ("actual", COST)
    assert (settlement["job_state"], settlement["attempt_state"]) == ("succeeded", "succeeded")
    assert (settlement["fence"], settlement["request_id"]) == (5, "req_1")
    assert settlement["baseline_nano_usd"] > COST
    body = settlement["body"]
    assert body["cost_nano_usd"] == 1_000 + COST
    assert (body["attempts"], body["provider"], body["text"]) == (2, ATTEMPT.provider, "Dear Ada")
    orjson.dumps(settlement)


def test_what_was_not_done_as_asked_is_in_the_result() -> None:
    assert "warnings" not in outcomes.succeeded(JOB, ATTEMPT, PROVIDER, ANSWER, "gpt-4o")["body"]
    spec = build_spec(
        "general",
        "hi",
        effort="low",
        response_format={"json_schema": {"type": "object"}},
        use_case_detected=True,
    )
    cut = replace(ANSWER, finish_reason="length")
    job = replace(JOB, spec=spec, repairs=1)
    assert outcomes.succeeded(job, ATTEMPT, PROVIDER, cut, "gpt-4o")["body"]["warnings"] == [
        "no use case was named, and the job was taken for general",
        "effort is not taken by gpt-6-luna and was left out",
        "an answer did not fit the JSON schema, and was asked for once more",
        "the answer was cut by max_tokens, so it is no whole JSON",
    ]


def test_a_call_is_booked_at_the_tier_that_served_it() -> None:
    # Twice the price, in a project whose settings say so.
    answer = replace(ANSWER, service_tier="priority")
    settlement = outcomes.succeeded(JOB, ATTEMPT, PROVIDER, answer, "gpt-4o")
    assert settlement["amount_nano_usd"] == 2 * COST
    partial = Partial(usage=ANSWER.usage, exact=True, service_tier="priority")
    settlement = outcomes.ended_attempt(ATTEMPT, PROVIDER, _error(partial=partial), "gpt-4o")
    assert settlement["amount_nano_usd"] == 2 * COST


def test_what_has_lost_its_price_during_the_call_is_booked_at_its_reservation() -> None:
    gone = replace(PROVIDER, model="gpt-0")
    settlement = outcomes.succeeded(JOB, ATTEMPT, gone, ANSWER, "gpt-4o")
    assert (settlement["kind"], settlement["amount_nano_usd"]) == ("estimate", 50_000)
    assert settlement["raw_usage"] == {"prompt_tokens": 150}
    assert settlement["body"]["usage"]["output"] == 20


def test_an_answer_without_usage_is_booked_at_its_reservation() -> None:
    settlement = outcomes.succeeded(JOB, ATTEMPT, PROVIDER, replace(ANSWER, usage=None), "gpt-4o")
    assert (settlement["kind"], settlement["amount_nano_usd"]) == ("estimate", 50_000)


def test_explicit_zero_usage_is_zero() -> None:
    settlement = outcomes.succeeded(
        JOB, ATTEMPT, PROVIDER, replace(ANSWER, usage=Usage()), "gpt-4o"
    )
    assert (settlement["kind"], settlement["amount_nano_usd"]) == ("actual", 0)


@pytest.mark.parametrize(
    ("error", "booked"),
    [
        (_error(ErrorClass.CONNECT, sent=False), None),
        (_error(ErrorClass.SERVER, status=500), None),
        (_error(ErrorClass.RATE_LIMITED, status=429), None),
        (_error(ErrorClass.TIMEOUT), ("estimate", 50_000)),
        (_error(ErrorClass.GARBAGE, status=200), ("estimate", 50_000)),
        (
            _error(ErrorClass.STREAM_BROKEN, partial=Partial(usage=ANSWER.usage, exact=False)),
            ("estimate", 50_000),
        ),
        (
            _error(ErrorClass.CONTENT_FILTER, partial=Partial(usage=ANSWER.usage, exact=True)),
            ("actual", COST),
        ),
    ],
    ids=["never left", "500", "429", "timeout", "garbage", "lower bound", "exact"],
)
def test_what_failed_is_booked_unless_it_was_certainly_free(
    error: ProviderError, booked: tuple[str, int] | None
) -> None:
    ended = outcomes.ended_attempt(ATTEMPT, PROVIDER, error, "gpt-4o")
    assert ended["attempt_state"] == "failed"
    assert ended["error_class"] == error.error_class.value
    assert ended["error_message"] == "It broke."
    if booked is None:
        assert "kind" not in ended
    else:
        assert (ended["kind"], ended["amount_nano_usd"]) == booked


def test_a_cancelled_call_is_booked_at_its_reservation() -> None:
    ended = outcomes.cut_off_attempt(ATTEMPT, State.CANCELLED)
    assert (ended["attempt_state"], ended["amount_nano_usd"]) == ("cancelled", 50_000)


def test_a_failed_job_says_why_and_what_it_cost() -> None:
    error = _error(ErrorClass.TIMEOUT, request_id="req_2")
    ended = outcomes.ended_attempt(ATTEMPT, PROVIDER, error, "gpt-4o")
    settlement = outcomes.failed(
        JOB, State.FAILED, error, attempt=ATTEMPT, ended=ended, why="all 2 attempts are used"
    )
    body = settlement["body"]
    assert body["error"]["message"] == "It broke; all 2 attempts are used"
    assert (body["error"]["error_class"], body["error"]["request_id"]) == ("timeout", "req_2")
    assert (body["attempts"], body["cost_nano_usd"]) == (2, 51_000)
    assert settlement["job_state"] == "failed"


def test_a_job_that_was_never_sent_names_no_attempt() -> None:
    settlement = outcomes.failed(JOB, State.EXPIRED, outcomes.refusal("Too late."))
    assert "attempt_id" not in settlement
    assert (settlement["body"]["attempts"], settlement["body"]["cost_nano_usd"]) == (1, 1_000)


def test_another_try_moves_the_job_and_ends_the_attempt() -> None:
    ended = outcomes.ended_attempt(ATTEMPT, PROVIDER, _error(status=503), "gpt-4o")
    settlement = outcomes.again(JOB, 45.0, ended, held_back="It broke.")
    assert (settlement["job_state"], settlement["after_s"]) == ("parked", 45.0)
    assert (settlement["attempt_state"], settlement["held_back"]) == ("failed", "It broke.")
    assert "body" not in settlement
    settlement = outcomes.again(JOB, 5.0, ended, held_back=None)
    assert (settlement["job_state"], settlement["held_back"]) == ("queued", None)


def test_a_job_that_goes_to_its_next_candidate_stays_with_what_it_has_learned() -> None:
    ended = outcomes.ended_attempt(ATTEMPT, PROVIDER, _error(status=503), "gpt-4o")
    job = replace(JOB, refused=(PROVIDER.id,), ruled_out=(ATTEMPT.provider_id,))
    settlement = outcomes.kept(job, ended)
    assert (settlement["job_state"], settlement["attempt_state"]) == ("running", "failed")
    assert (settlement["refused"], settlement["ruled_out"]) == (job.refused, job.ruled_out)


def test_a_hand_off_names_the_queue_and_who_said_no() -> None:
    settlement = outcomes.handed_off(replace(JOB, refused=(PROVIDER.id,)), "draft.anthropic")
    assert (settlement["job_state"], settlement["queue"]) == ("queued", "draft.anthropic")
    assert settlement["refused"] == (PROVIDER.id,)
    # It keeps its place: it is due already, and has stood in no line.
    assert "after_s" not in settlement
    assert "attempt_id" not in settlement


def test_bulk_work_is_handed_off_through_the_stager() -> None:
    job = replace(JOB, lane=Lane.BULK, refused=(PROVIDER.id,))
    settlement = outcomes.handed_off(job, "draft.anthropic.bulk")
    assert (settlement["job_state"], settlement["queue"]) == ("parked", "draft.anthropic.bulk")
    assert settlement["refused"] == (PROVIDER.id,)


def test_a_job_that_nobody_takes_waits_in_postgres_and_says_why() -> None:
    settlement = outcomes.parked(JOB, 12.0, "openai-x: its breaker is open")
    assert (settlement["job_state"], settlement["after_s"]) == ("parked", 12.0)
    assert settlement["held_back"] == "openai-x: its breaker is open"
    # Whoever said no may say something else by then.
    assert "refused" not in settlement


def test_a_call_that_never_left_is_void() -> None:
    settlement = outcomes.released(JOB, ATTEMPT)
    assert (settlement["job_state"], settlement["attempt_state"]) == ("queued", "void")
    assert "kind" not in settlement


@pytest.mark.parametrize("state", [State.SUCCEEDED, State.FAILED, State.EXPIRED])
def test_the_terminal_event_can_be_read(state: State) -> None:
    if state is State.SUCCEEDED:
        body = outcomes.succeeded(JOB, ATTEMPT, PROVIDER, ANSWER, "gpt-4o")["body"]
    else:
        body = outcomes.failed(JOB, state, _error())["body"]
    payload = outcomes.terminal_payload(JOB, body, Settled(moved=True, finished_at=NOW))
    event = decode(terminal_id(JOB.fence), payload)
    assert event.terminal
    assert event.payload.type == ("completed" if state is State.SUCCEEDED else "failed")
    assert event.payload.result.state is state
    assert event.payload.result.finished_at == NOW
