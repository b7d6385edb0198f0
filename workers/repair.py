"""Repair: an answer that does not fit its JSON schema is asked for once more. Pure.

The second call is an attempt like any other: it is admitted, reserved for and booked, and counts
among the job's attempts. It continues the conversation in this worker; a job that leaves it in
between is called for anew, and not repaired again.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import jsonschema_rs  # noqa: F401 - when the worker starts, and not on its loop

from sluicegate.shared.errors import ErrorClass
from sluicegate.shared.jobs import JobSpec
from sluicegate.shared.messages import Message, TextPart
from sluicegate.shared.schemas import misfit
from sluicegate.workers.claims import Job
from sluicegate.workers.placement import Plan
from sluicegate.workers.providers.base import Answer, Partial, ProviderError

#: More would pay again and again for what the model cannot do.
MAX_REPAIRS: Final = 1


def misfit_of(spec: JobSpec, answer: Answer) -> str | None:
    """Say in what an answer does not fit what was asked for; None: it does.

    Only an answer that is whole is checked: not a tool call, nor what `max_tokens` has cut, which
    the same limit would cut again.
    """
    if spec.response_format is None or answer.tool_calls or answer.finish_reason != "stop":
        return None
    try:
        return misfit(answer.text, spec.response_format.json_schema)
    except ValueError:
        return None  # it was stored before schemas were checked, and is none


def error_of(answer: Answer, problem: str) -> ProviderError:
    """Return the error of the attempt that brought such an answer; it is paid for."""
    return ProviderError(
        f"the answer does not fit its JSON schema: {problem}",
        error_class=ErrorClass.INVALID_ANSWER,
        status=200,
        request_id=answer.request_id,
        partial=Partial(
            text=answer.text,
            usage=answer.usage,
            raw_usage=answer.raw_usage,
            exact=answer.usage is not None,
            model=answer.model,
            service_tier=answer.service_tier,
        ),
    )


def is_worth_it(job: Job) -> bool:
    """Whether a job whose attempt has brought such an answer may be called for again."""
    return job.repairs < MAX_REPAIRS and job.attempts_used + 1 < job.max_attempts


def repairing(job: Job, plan: Plan, answer: Answer, problem: str, cost_nano_usd: int) -> Job:
    """Return the job as it goes on: with the answer, and what is wrong with it, in its messages."""
    wrong = (
        f"This answer does not fit the JSON schema that was asked for: {problem}. "
        "Answer again, with JSON alone that fits it."
    )
    said = [Message.user(wrong)]
    if answer.text.strip():
        said.insert(0, Message(role="assistant", content=(TextPart(text=answer.text),)))
    return replace(
        job,
        spec=job.spec.model_copy(update={"messages": (*job.spec.messages, *said)}),
        repairs=job.repairs + 1,
        attempts_used=job.attempts_used + 1,
        cost_nano_usd=job.cost_nano_usd + cost_nano_usd,
        tried=(*job.tried, plan.provider.id),
    )
