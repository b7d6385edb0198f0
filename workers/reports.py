"""Reports: from what happened to a call, what the gates are told. Pure."""

from __future__ import annotations

from sluicegate.shared.admission.gate import Outcome, Report
from sluicegate.shared.errors import ErrorClass
from sluicegate.shared.messages import Usage
from sluicegate.workers.claims import Job
from sluicegate.workers.placement import Plan
from sluicegate.workers.providers.base import Answer, ProviderError

_OUTCOMES = {
    ErrorClass.CONNECT: Outcome.FAILED,
    ErrorClass.SERVER: Outcome.FAILED,
    ErrorClass.STREAM_BROKEN: Outcome.FAILED,
    ErrorClass.TRUNCATED: Outcome.FAILED,
    ErrorClass.GARBAGE: Outcome.FAILED,
    ErrorClass.OVERLOADED: Outcome.OVERLOADED,
    ErrorClass.TIMEOUT: Outcome.TIMED_OUT,
    ErrorClass.RATE_LIMITED: Outcome.THROTTLED,
    ErrorClass.QUOTA: Outcome.REFUSED,
    ErrorClass.AUTH: Outcome.REFUSED,
}


def answered(job: Job, plan: Plan, answer: Answer) -> Report:
    """Report a call that brought an answer."""
    used = _used(answer.usage)
    return _report(job, plan, Outcome.SUCCEEDED, used=used, headroom_of=answer)


def failed(job: Job, plan: Plan, error: ProviderError, *, fair: bool) -> Report:
    """Report a call that brought none.

    fair: it had the time that a call is meant to have, so that a timeout is the provider's fault.
    """
    outcome = _OUTCOMES.get(error.error_class, Outcome.NEUTRAL)
    if not error.sent:
        if outcome is not Outcome.FAILED:
            # A key that is missing, a pool of ours that is full: the provider knows nothing of it.
            return returned(job, plan)
        used: tuple[int | None, int | None] = (0, 0)
    elif error.status is not None and error.status >= 400:
        used = (0, 0)
    else:
        used = _used(error.partial.usage if error.partial.exact else None)
    if outcome is Outcome.TIMED_OUT and not fair:
        outcome = Outcome.NEUTRAL
    if outcome is Outcome.REFUSED:
        # Its headers speak of this account's key, and the row is everybody's.
        return _report(job, plan, outcome, used=used, message=str(error))
    return _report(
        job,
        plan,
        outcome,
        used=used,
        headroom_of=error,
        cooldown_s=error.retry_after_s,
        message=str(error),
    )


def cut_off(job: Job, plan: Plan) -> Report:
    """Report a call that we ended: what it used only the provider knows."""
    return _report(job, plan, Outcome.NEUTRAL, used=(None, None))


def returned(job: Job, plan: Plan) -> Report:
    """Report a call that never left."""
    return _report(job, plan, Outcome.RETURNED, used=(0, 0))


def input_tokens(usage: Usage) -> int:
    """Return all tokens of the prompt, from a cache or not: providers limit their sum."""
    return usage.input + usage.cache_read + usage.cache_write_5m + usage.cache_write_1h


def _used(usage: Usage | None) -> tuple[int | None, int | None]:
    return (None, None) if usage is None else (input_tokens(usage), usage.output)


def _report(
    job: Job,
    plan: Plan,
    outcome: Outcome,
    *,
    used: tuple[int | None, int | None],
    headroom_of: Answer | ProviderError | None = None,
    cooldown_s: float | None = None,
    message: str = "",
) -> Report:
    return Report(
        attempt_id=plan.attempt_id,
        provider=plan.provider,
        account_id=job.account_id,
        lane=job.lane,
        generation=plan.verdict.generation,
        is_probe=plan.verdict.is_probe,
        outcome=outcome,
        reserved_input_tokens=plan.input_tokens,
        reserved_output_tokens=plan.output_tokens,
        used_input_tokens=used[0],
        used_output_tokens=used[1],
        cooldown_s=cooldown_s,
        headroom=None if headroom_of is None else headroom_of.headroom,
        message=message,
    )
