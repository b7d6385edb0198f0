"""What a failure or the end of a job means to the caller."""

from __future__ import annotations

import math
from typing import Any, Final

from sqlalchemy.exc import SQLAlchemyError
from tenacity import retry_if_exception, stop_after_attempt, wait_random_exponential

from sluicegate.shared.database import is_conflict, is_disconnect, sqlstate
from sluicegate.shared.errors import (
    InvalidJob,
    JobCancelled,
    JobEnded,
    JobExpired,
    JobFailed,
    QueueUnavailable,
    ResultTimeout,
    SchemaOutdated,
    SluiceError,
)
from sluicegate.shared.events import Completed, Event, Failed
from sluicegate.shared.jobs import Result, State

#: How statements are repeated, all of which may be: a server that restarts, a deadlock.
REPEAT: Final[dict[str, Any]] = {
    "retry": retry_if_exception(lambda error: is_disconnect(error) or is_conflict(error)),
    "stop": stop_after_attempt(3),
    "wait": wait_random_exponential(multiplier=0.1, max=1),
    "reraise": True,
}

#: What a statement raises when Postgres cannot answer it.
DATABASE_ERRORS: Final = (SQLAlchemyError, OSError)

_NO_SUCH_TABLE = ("42P01", "42703")
_FOREIGN_KEY = "23503"

_ENDED: Final[dict[State, type[JobEnded]]] = {
    State.FAILED: JobFailed,
    State.EXPIRED: JobExpired,
    State.CANCELLED: JobCancelled,
}


def explain(error: Exception) -> SluiceError:
    """Say in one sentence what an error of the database means."""
    code = sqlstate(error)
    if is_disconnect(error):
        return QueueUnavailable("Postgres did not answer; try again, and check SLUICE_DATABASE_URL")
    if code in _NO_SUCH_TABLE:
        return SchemaOutdated()
    if code == _FOREIGN_KEY:
        return InvalidJob("account", "was deleted just now")
    reason = str(getattr(error, "orig", None) or error).partition("\n")[0]
    return QueueUnavailable(f"Postgres refused the statement: {reason}")


def result_of(event: Event) -> Result:
    """Return the answer that a terminal event brings; raise the `JobEnded` that says why not."""
    assert isinstance(event.payload, Completed | Failed)
    result = event.payload.result
    kind = _ENDED.get(result.state)
    if kind is None:
        return result
    message = result.error.message if result.error is not None else None
    raise kind(message, job_id=str(result.job_id), state=result.state.value)


def check_timeout(timeout: object) -> float | None:
    """Return the timeout in seconds; raise `InvalidJob` if it is none."""
    if timeout is None:
        return None
    if not isinstance(timeout, int | float) or math.isnan(timeout) or timeout < 0:
        raise InvalidJob("timeout", "must be a number of seconds, 0 or more, or None")
    return float(timeout)


def timed_out(job_id: object, timeout: float | None) -> ResultTimeout:
    """Build the error of a wait that took too long."""
    return ResultTimeout(
        f"job {job_id} did not end within {timeout:g} s; it goes on, and its result can still "
        "be read"
    )
