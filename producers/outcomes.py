"""What the end of a job means to the caller, and what a lost server does."""

from __future__ import annotations

import math
from typing import Any, Final

from pydantic import BaseModel
from tenacity import retry_if_exception, stop_after_attempt, wait_random_exponential

from sluicegate.shared.database import is_conflict, is_disconnect
from sluicegate.shared.errors import (
    InvalidJob,
    JobCancelled,
    JobEnded,
    JobExpired,
    JobFailed,
    NotFound,
    ResultTimeout,
)
from sluicegate.shared.events import Completed, Event, Failed
from sluicegate.shared.jobs import Result, State


def is_passing(error: BaseException) -> bool:
    """Whether a statement met what is soon over: a server that restarts, a deadlock."""
    return is_disconnect(error) or is_conflict(error)


#: How statements are repeated, all of which may be.
REPEAT: Final[dict[str, Any]] = {
    "retry": retry_if_exception(is_passing),
    "stop": stop_after_attempt(3),
    "wait": wait_random_exponential(multiplier=0.1, max=1),
    "reraise": True,
}

_ENDED: Final[dict[State, type[JobEnded]]] = {
    State.FAILED: JobFailed,
    State.EXPIRED: JobExpired,
    State.CANCELLED: JobCancelled,
}


def result_of(event: Event) -> Result:
    """Return the answer that a terminal event brings; raise the `JobEnded` that says why not.

    Raises `Purged` for an answer that is not kept any more.
    """
    assert isinstance(event.payload, Completed | Failed)
    result = event.payload.result
    kind = _ENDED.get(result.state)
    if kind is None:
        result.check_kept()
        return result
    ended = f"job {result.job_id} {result.state}"
    message = ended if result.error is None else f"{ended}: {result.error.message}"
    raise kind(
        message,
        job_id=str(result.job_id),
        state=result.state.value,
        error_class=None if result.error is None else result.error.error_class,
    )


def expecting(event: Event, model: type[BaseModel] | None) -> Event:
    """Return the event; if it is the terminal one, with a result that is read as `model`."""
    payload = event.payload
    if model is None or not isinstance(payload, Completed | Failed):
        return event
    result = payload.result.expecting(model)
    return Event(event.id, payload.model_copy(update={"result": result}))


def not_committed(job_id: object) -> NotFound:
    """Build the error of a job that was submitted inside a transaction and is not there."""
    return NotFound(
        f"there is no job {job_id}: the transaction that it was submitted in has not committed, "
        "or was rolled back"
    )


def check_timeout(timeout: object) -> float | None:
    """Return the timeout in seconds; raise `InvalidJob` if it is none."""
    if timeout is None:
        return None
    if not isinstance(timeout, int | float) or math.isnan(timeout) or timeout < 0:
        raise InvalidJob("timeout", "must be a number of seconds, 0 or more, or None")
    return float(timeout)


def timed_out(job_id: object, timeout: float | None, *, unheard: bool = False) -> ResultTimeout:
    """Build the error of a wait that took too long; `unheard`: no server answered meanwhile."""
    if unheard:
        return ResultTimeout(
            f"neither Postgres nor Redis answered within {timeout:g} s, so nobody knows how job "
            f"{job_id} stands; ask again, and check SLUICE_DATABASE_URL and SLUICE_REDIS_URL"
        )
    return ResultTimeout(
        f"job {job_id} did not end within {timeout:g} s; it goes on, and its result can still "
        "be read"
    )
