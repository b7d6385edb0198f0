"""From what happened to a call, the settlement that records it. Pure."""

from __future__ import annotations

from typing import Any

from sluicegate.shared import endings
from sluicegate.shared.catalogue import Provider
from sluicegate.shared.errors import ErrorClass, UnknownPrice
from sluicegate.shared.fitting import left_out
from sluicegate.shared.jobs import AttemptState, Lane, State
from sluicegate.shared.messages import Usage
from sluicegate.shared.pricing import baseline_nano_usd, price_version
from sluicegate.shared.routing import detection_said
from sluicegate.workers.claims import Job
from sluicegate.workers.dispatch import Attempt
from sluicegate.workers.providers.base import Answer, Partial, ProviderError
from sluicegate.workers.settlement import Settled, Settlement

_NO_USAGE: dict[str, int] = Usage().model_dump()


def succeeded(
    job: Job, attempt: Attempt, provider: Provider, answer: Answer, baseline_model: str
) -> Settlement:
    """Book the cost of an attempt that answered, and end the job with the result."""
    booking = booked(attempt, provider, answer, baseline_model)
    body = _body(job, State.SUCCEEDED, booking) | {
        "text": answer.text,
        "tool_calls": [call.model_dump(mode="json") for call in answer.tool_calls],
        "finish_reason": answer.finish_reason,
        "provider": attempt.provider,
        "model": answer.model,
        "usage": _NO_USAGE if answer.usage is None else answer.usage.model_dump(),
        "attempts": attempt.number,
    }
    if warnings := _warnings(job, provider, answer):
        body["warnings"] = warnings
    return (
        _move(job, State.SUCCEEDED)
        | _ended(attempt, AttemptState.SUCCEEDED)
        | booking
        | {"body": body, "request_id": answer.request_id}
        | took(answer)
    )


def took(answer: Answer) -> Settlement:
    """Say how long an answer took: its own part of a settlement."""
    return {"first_token_ms": answer.first_token_ms, "duration_ms": answer.duration_ms}


def ended_attempt(
    attempt: Attempt, provider: Provider, error: ProviderError, baseline_model: str
) -> Settlement:
    """Book an attempt that ended without an answer: its own part of a settlement.

    A call that certainly never left costs nothing, nor does one that the provider refused with a
    status. Whatever else may have been generated and billed, so it is booked: by the usage that
    the provider reported, or at the whole reservation, never at zero.
    """
    booking: Settlement = {}
    partial = error.partial
    if partial.exact and partial.usage is not None:
        booking = booked(attempt, provider, partial, baseline_model)
    elif error.sent and (error.status is None or error.status < 400):
        booking = estimate(attempt)
    return _ended(attempt, AttemptState.FAILED) | booking | _reason(error)


def cut_off_attempt(attempt: Attempt, state: State) -> Settlement:
    """Book a call that was cut off in the middle: what it cost only the provider knows."""
    return _ended(attempt, AttemptState(state.value)) | estimate(attempt)


def void_attempt(attempt: Attempt) -> Settlement:
    """End an attempt whose call certainly never left: its own part of a settlement."""
    return _ended(attempt, AttemptState.VOID)


def failed(
    job: Job,
    state: State,
    error: ProviderError,
    *,
    attempt: Attempt | None = None,
    ended: Settlement | None = None,
    why: str = "",
) -> Settlement:
    """End the job without an answer, readable: what went wrong, and why it was not tried again."""
    message = f"{str(error).rstrip('.')}; {why}" if why else str(error)
    body = _body(job, state, ended or {}) | {
        "attempts": job.attempts_used + (attempt is not None),
        "error": {
            "error_class": error.error_class.value,
            "message": message,
            "provider": attempt.provider if attempt else None,
            "status": error.status,
            "request_id": error.request_id,
        },
    }
    return _move(job, state) | (ended or {}) | {"body": body}


def again(job: Job, after_s: float, ended: Settlement, held_back: str | None) -> Settlement:
    """Have the job called for again later; `held_back` is why it waits in Postgres until then."""
    state = State.QUEUED if held_back is None else State.PARKED
    waits: Settlement = {"after_s": after_s, "held_back": held_back}
    if held_back is None:
        waits["refused"] = job.refused
    return _move(job, state) | ended | waits


def kept(job: Job, ended: Settlement) -> Settlement:
    """Book an attempt of a job that goes on here, with what it has learned of its candidates."""
    said = {"refused": job.refused, "ruled_out": job.ruled_out}
    return _move(job, State.RUNNING) | ended | said


def handed_off(job: Job, queue: str) -> Settlement:
    """Pass the job to another pool's queue; it keeps its place, being due already.

    Bulk work goes through the stager, which bounds what waits in a queue.
    """
    state = State.PARKED if job.lane is Lane.BULK else State.QUEUED
    said = {"refused": job.refused, "ruled_out": job.ruled_out}
    return _move(job, state) | said | {"queue": queue}


def parked(job: Job, after_s: float, why: str) -> Settlement:
    """Have the job wait in Postgres until one of its candidates may take it; then all may."""
    return _move(job, State.PARKED) | {
        "after_s": after_s,
        "held_back": why,
        "ruled_out": job.ruled_out,
    }


def released(job: Job, attempt: Attempt | None = None) -> Settlement:
    """Give the job back: its call certainly never left. One that is unwanted ends with that."""
    ended = {} if attempt is None else void_attempt(attempt)
    return _move(job, State.QUEUED) | ended


def booked(
    attempt: Attempt, provider: Provider, said: Answer | Partial, baseline_model: str
) -> Settlement:
    """Book what the provider reported, or the reservation if it reported nothing."""
    if said.usage is None:
        return estimate(attempt)
    try:
        return actual(provider, said.usage, said, baseline_model)
    except UnknownPrice:
        # The fleet has adopted a price list during the call that lacks the model.
        return estimate(attempt) | {"raw_usage": said.raw_usage}


def actual(
    provider: Provider, usage: Usage, said: Answer | Partial, baseline_model: str
) -> Settlement:
    """Book a usage at the price of the tier that the provider says served it."""
    card = provider.card_of(said.service_tier)
    return {
        "kind": "actual",
        "amount_nano_usd": card.cost_nano_usd(usage),
        "baseline_nano_usd": baseline_nano_usd(usage, baseline_model),
        "input_tokens": usage.input,
        "cache_read_tokens": usage.cache_read,
        "cache_write_5m_tokens": usage.cache_write_5m,
        "cache_write_1h_tokens": usage.cache_write_1h,
        "output_tokens": usage.output,
        "reasoning_tokens": usage.reasoning,
        "raw_usage": said.raw_usage,
        "price_version": card.version,
    }


def estimate(attempt: Attempt) -> Settlement:
    """Book the whole reservation: less would let a correction break the budget's invariant."""
    return {
        "kind": "estimate",
        "amount_nano_usd": attempt.reserved_nano_usd,
        "baseline_nano_usd": attempt.baseline_reserved_nano_usd,
        "price_version": price_version(),
    }


def terminal_payload(job: Job, body: dict[str, Any], settled: Settled) -> bytes:
    """Encode the terminal event, as it would be made from Postgres."""
    return endings.terminal_payload(body, job.created_at, settled.finished_at)


def refusal(message: str, error_class: ErrorClass = ErrorClass.BAD_REQUEST) -> ProviderError:
    """Make the error of a job that was never sent."""
    return ProviderError(message, error_class=error_class, sent=False)


def _warnings(job: Job, provider: Provider, answer: Answer) -> list[str]:
    """Say what was not done quite as asked."""
    spec = job.spec
    said = [*detection_said(spec), *left_out(spec, provider)]
    if job.repairs:
        said.append("an answer did not fit the JSON schema, and was asked for once more")
    if spec.response_format is not None and answer.finish_reason == "length":
        said.append("the answer was cut by max_tokens, so it is no whole JSON")
    return said


def _move(job: Job, state: State) -> Settlement:
    return {"job_id": job.id, "fence": job.fence, "job_state": state.value}


def _ended(attempt: Attempt, state: AttemptState) -> Settlement:
    return {"attempt_id": attempt.attempt_id, "attempt_state": state.value}


def _reason(error: ProviderError) -> Settlement:
    return {
        "error_class": error.error_class.value,
        "error_message": str(error)[:2000],
        "status": error.status,
        "request_id": error.request_id,
    }


def _body(job: Job, state: State, booking: Settlement) -> dict[str, Any]:
    return {
        "version": 1,
        "job_id": str(job.id),
        "state": state.value,
        "use_case": job.use_case,
        "cost_nano_usd": job.cost_nano_usd + booking.get("amount_nano_usd", 0),
        "baseline_nano_usd": booking.get("baseline_nano_usd", 0),
    }
