"""Errors a caller sees. The docstring of each is its default message."""

from __future__ import annotations

import inspect
from datetime import datetime
from decimal import Decimal
from enum import StrEnum


class SluiceError(Exception):
    """Sluicegate could not do what was asked."""

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or inspect.getdoc(type(self)))


class SettingsError(SluiceError):
    """A setting is missing or has a value that cannot be used."""


class NothingToChange(SettingsError):
    """There is nothing to change; name an option, see --help."""


class InvalidJob(SluiceError):
    """The job was refused: a field has a value that is not allowed.

    `field` is the name of the field as the caller wrote it; nothing was stored.
    """

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field
        self.problem = problem

    def __reduce__(self) -> tuple[type[InvalidJob], tuple[str, str]]:
        """Pickle by what the error is made of: the base class would call us with the message."""
        return type(self), (self.field, self.problem)


class IdempotencyConflict(SluiceError):
    """This idempotency key was used before with another request; use a new key."""


class NotFound(SluiceError):
    """There is nothing with this id."""


class QueueUnavailable(SluiceError):
    """Postgres or Redis did not answer, so the job was not accepted; try again."""


class BudgetExceeded(SluiceError):
    """The account's budget is full, so the job was not accepted."""

    def __init__(
        self,
        message: str | None = None,
        *,
        account: str = "",
        use_case: str | None = None,
        window: str = "",
        limit: Decimal = Decimal(0),
        spent: Decimal = Decimal(0),
        resets_at: datetime | None = None,
    ) -> None:
        super().__init__(message)
        self.account = account
        #: None: the budget for all use cases together.
        self.use_case = use_case
        #: `day` or `month`.
        self.window = window
        #: In US dollars, exact.
        self.limit = limit
        self.spent = spent
        #: On the account's clock.
        self.resets_at = resets_at


class ResultTimeout(SluiceError, TimeoutError):
    """The job did not end in time; it goes on, and its result can still be read."""


class InvalidAnswer(SluiceError):
    """The job succeeded, but its text is not of the shape that was asked for."""

    def __init__(self, message: str | None = None, *, job_id: str = "") -> None:
        super().__init__(message)
        self.job_id = job_id


class Purged(SluiceError):
    """The request and the answer of this job were purged; its state and its cost are kept."""

    def __init__(self, message: str | None = None, *, job_id: str = "") -> None:
        super().__init__(message)
        self.job_id = job_id


class JobEnded(SluiceError):
    """The job ended without a result."""

    def __init__(
        self,
        message: str | None = None,
        *,
        job_id: str = "",
        state: str = "",
        error_class: ErrorClass | None = None,
    ) -> None:
        super().__init__(message)
        self.job_id = job_id
        self.state = state
        #: Why its last attempt ended as it did, where that is known.
        self.error_class = error_class


class JobFailed(JobEnded):
    """The job failed."""


class JobExpired(JobEnded):
    """The job's deadline passed before it could be answered."""


class JobCancelled(JobEnded):
    """The job was cancelled."""


class IllegalTransition(SluiceError):
    """A job cannot move between these two states."""


class UnknownPrice(SluiceError):
    """The price of this model is not known; set one on the provider row to use it."""


class SchemaOutdated(SluiceError):
    """The database schema is not the one this version needs; run `sluice db upgrade`."""


class ErrorClass(StrEnum):
    """Why an attempt ended without an answer: what retry, routing and the breaker decide on."""

    CONNECT = "connect"  # no connection, or it broke before an answer began
    TIMEOUT = "timeout"  # first token, idle or total deadline
    POOL_TIMEOUT = "pool_timeout"  # our own connection pool was full: not the provider's fault
    RATE_LIMITED = "rate_limited"  # 429 that passes by itself
    QUOTA = "quota"  # 429 or 402 that needs money or a new limit
    BUDGET = "budget"  # the account may not spend more for now
    AUTH = "auth"  # 401, 403, or no key
    NOT_FOUND = "not_found"  # no such model or endpoint
    BAD_REQUEST = "bad_request"  # the provider refuses the request as it is
    CONTEXT_TOO_LONG = "context_too_long"
    CONTENT_FILTER = "content_filter"
    OVERLOADED = "overloaded"  # 529, 503
    SERVER = "server"  # other 5xx
    STREAM_BROKEN = "stream_broken"  # cut, garbage, or an error event inside a stream
    TRUNCATED = "truncated"  # ended without its terminal marker
    GARBAGE = "garbage"  # a 2xx that is not an answer
    INVALID_ANSWER = "invalid_answer"  # an answer that does not fit the schema it was asked for in
    CANCELLED = "cancelled"
    LOST = "lost"  # the worker died or lost the job: the outcome is unknown
    INTERNAL = "internal"  # a defect of ours

    @property
    def transient(self) -> bool:
        """Whether the same request may succeed at the same provider a little later."""
        return self in _TRANSIENT


_TRANSIENT = frozenset(
    {
        ErrorClass.CONNECT,
        ErrorClass.TIMEOUT,
        ErrorClass.POOL_TIMEOUT,
        ErrorClass.RATE_LIMITED,
        ErrorClass.OVERLOADED,
        ErrorClass.SERVER,
        ErrorClass.STREAM_BROKEN,
        ErrorClass.TRUNCATED,
        ErrorClass.GARBAGE,
        ErrorClass.LOST,
    }
)
