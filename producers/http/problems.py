"""What went wrong, as a caller is told: one sentence, a code, the field, the status."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Final

from pydantic import BaseModel, Field, ValidationError

from sluicegate.shared.errors import (
    BudgetExceeded,
    ErrorClass,
    IdempotencyConflict,
    IllegalTransition,
    InvalidJob,
    JobCancelled,
    JobEnded,
    JobExpired,
    JobFailed,
    NotFound,
    Purged,
    QueueUnavailable,
    ResultTimeout,
    SchemaOutdated,
    SettingsError,
    SluiceError,
)
from sluicegate.shared.refusals import first_errors, problem_words


class Problem(Exception):
    """A request that is not answered as asked.

    code: a word for programs, which stays as it is. field: the field or parameter that is to blame,
    by the name that the caller gave it. job_id: the job that it is about, from which more can be
    read. headers: what the response has besides.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        field: str | None = None,
        job_id: str | None = None,
        retry_after_s: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.field = field
        self.job_id = job_id
        self.headers = dict(headers or {})
        if retry_after_s is not None:
            self.headers["Retry-After"] = str(retry_after_s)


def wrong(field: str, problem: str) -> Problem:
    """Say what is wrong with a field, a parameter or a header of the request."""
    return Problem(400, "invalid_request", f"{field}: {problem}", field=field)


#: By kind of error, the more special first: status and code.
_KINDS: Final[tuple[tuple[type[SluiceError], int, str], ...]] = (
    (IdempotencyConflict, 409, "idempotency_conflict"),
    (NotFound, 404, "not_found"),
    (Purged, 410, "purged"),
    (BudgetExceeded, 402, "budget_exceeded"),
    (IllegalTransition, 409, "illegal_transition"),
    (JobExpired, 504, "job_expired"),
    (JobCancelled, 409, "job_cancelled"),
    (JobFailed, 502, "job_failed"),
    (ResultTimeout, 504, "still_running"),
    (QueueUnavailable, 503, "unavailable"),
    (SchemaOutdated, 503, "unavailable"),
    (SettingsError, 500, "misconfigured"),
)
#: Why a job failed, where that is not the provider's fault: status and code.
_FAILURES: Final[Mapping[str, tuple[int, str]]] = {
    ErrorClass.BUDGET.value: (402, "budget_exceeded"),
    ErrorClass.BAD_REQUEST.value: (422, "refused_by_provider"),
    ErrorClass.CONTEXT_TOO_LONG.value: (422, "context_too_long"),
    ErrorClass.CONTENT_FILTER.value: (422, "content_filter"),
    ErrorClass.INVALID_ANSWER.value: (422, "invalid_answer"),
}
_RETRY_AFTER_S: Final = 2


def problem_of(error: SluiceError, names: Mapping[str, str] | None = None) -> Problem:
    """Return what a caller is told of this error; anything else than the known is ours, a 500.

    names: what the caller calls the fields that we call otherwise, by our name.
    """
    if isinstance(error, InvalidJob):
        return wrong(renamed(error.field, names or {}), error.problem)
    for kind, usual, word in _KINDS:
        if isinstance(error, kind):
            status, code = usual, word
            if isinstance(error, JobFailed) and error.error_class is not None:
                status, code = _FAILURES.get(error.error_class.value, (status, code))
            return Problem(
                status,
                code,
                str(error),
                job_id=(error.job_id or None) if isinstance(error, JobEnded | Purged) else None,
                retry_after_s=_RETRY_AFTER_S if status == 503 else None,
            )
    return Problem(500, "internal", "something went wrong here; it is logged with the request id")


def invalid(error: ValidationError, given: object = None) -> Problem:
    """Return what a caller is told of a body that pydantic refuses: the first field at fault.

    given: the body as it came, by which the field's path is written as the caller wrote it.
    """
    errors = first_errors(error, _ERRORS_MAX)
    places = [_place(one["loc"], one["type"], given) for one in errors]
    # Of a field that may be of several kinds each has its errors: the deepest one is meant.
    n = max(range(len(places)), key=lambda n: (places[n][:1] == places[0][:1], len(places[n])))
    found = errors[n]
    place = ".".join(map(str, places[n])) or "body"
    problem = problem_words(found["type"], found["msg"], place)
    if found["type"] == "string_pattern_mismatch":
        is_key = found["loc"][-1] == "[key]"
        problem = _NAME if is_key else _PATTERNS.get(place.rpartition(".")[2], problem)
    elif found["type"] == "union_tag_invalid" and (tags := _TAGS.search(problem)):
        place, problem = f"{place}.{tags[1]}", f"must be one of {tags[2].replace(chr(39), '')}"
    elif found["type"].startswith("model_"):
        problem = "must be an object"
    elif "recursion limit" in problem:
        problem = "is nested too deep; 200 levels are allowed"
    return wrong(place, problem)


#: Errors of one body among which the one that is told is chosen.
_ERRORS_MAX: Final = 100
_TAGS: Final = re.compile(r"found using '(\w+)' .* expected tags: (.*)")
_NAME: Final = "must have a name of 1 to 64 letters, digits, - or _"
_BLANK: Final = "must be text with more in it than blanks"
_PATTERNS: Final[Mapping[str, str]] = {
    "prompt": _BLANK,
    "content": _BLANK,
    "text": _BLANK,
    "system": _BLANK,
    "image": "must be an https address, a data: address or base64",
    "useCase": "must be the name of a use case, such as draft",
    "toolChoice": "must be auto, none, required or the name of a tool",
    "toolName": "must be 1 to 64 letters, digits, - or _",
}


def _place(loc: Sequence[int | str], kind: str, given: object) -> tuple[int | str, ...]:
    """Leave out of pydantic's path the steps that no JSON has: which kind of value was tried."""
    place: list[int | str] = []
    value = given
    for n, step in enumerate(loc):
        if _has(value, step):
            value = value[step]  # type: ignore[index]  # it has
        elif not (kind == "missing" and n == len(loc) - 1):
            continue
        place.append(step)
    return tuple(place)


def _has(value: object, step: int | str) -> bool:
    if isinstance(value, list):
        return isinstance(step, int) and step < len(value)
    return isinstance(value, dict) and step in value


class ErrorTold(BaseModel):
    """What is wrong."""

    #: A word for programs, which stays as it is.
    code: str
    #: One sentence for people.
    message: str
    #: The field, parameter or header that is to blame, if one is.
    field: str | None
    #: The job that it is about, if there is one.
    job_id: Annotated[str | None, Field(alias="jobId")]
    request_id: Annotated[str, Field(alias="requestId")]


class ProblemTold(BaseModel):
    """How every native route says that something went wrong."""

    error: ErrorTold


def renamed(field: str, names: Mapping[str, str]) -> str:
    """Return the path of a field as the caller writes it; only its first step is renamed."""
    head, dot, rest = field.partition(".")
    return f"{names.get(head, head)}{dot}{rest}"


def body_of(problem: Problem, request_id: str) -> dict[str, Any]:
    """Return the JSON that native routes answer a problem with."""
    return {
        "error": {
            "code": problem.code,
            "message": problem.message,
            "field": problem.field,
            "jobId": problem.job_id,
            "requestId": request_id,
        }
    }
