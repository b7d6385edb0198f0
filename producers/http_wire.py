"""What the clients for HTTP say and understand. No I/O here.

A `Call` is one request, with what reads its answer. It says whether it may be sent again: reading
may, and so may a submit, whose jobs bear idempotency keys, made here where the caller gives none.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal, InvalidOperation
from types import EllipsisType
from typing import Any, Final, Generic, TypeVar
from urllib.parse import urlsplit
from uuid import UUID, uuid4

import httpx2
import orjson
from pydantic import BaseModel, TypeAdapter, ValidationError
from tenacity import RetryCallState, retry_if_exception, stop_before_delay

from sluicegate.producers.budgeting import Limit
from sluicegate.producers.listing import JobFilters, JobList, JobSummary
from sluicegate.producers.outcomes import timed_out
from sluicegate.producers.submission import Request
from sluicegate.producers.views import JobView
from sluicegate.shared.accounts import check_name, name_or_id
from sluicegate.shared.budgets import Budget
from sluicegate.shared.errors import (
    BudgetExceeded,
    IdempotencyConflict,
    IllegalTransition,
    InvalidJob,
    NotFound,
    Purged,
    QueueUnavailable,
    ResultTimeout,
    SettingsError,
    SluiceError,
)
from sluicegate.shared.events import BROKEN, OVER, Event, decode
from sluicegate.shared.jobs import State

T = TypeVar("T")

#: The longest that one request for a result waits at the server; then it is asked again.
WAIT_S: Final = 20.0
#: A stream sends something at least every 15 s. After this silence its connection is dead.
SILENCE_S: Final = 45.0
#: Beyond what it may wait, how long the server may take for an answer.
ANSWER_S: Final = 30.0
CONNECT_S: Final = 10.0
#: How long a client goes on trying while the server does not answer.
PATIENCE_S: Final = 60.0
#: Connections for what is answered at once, and for what waits: results and streams.
QUICK_CONNECTIONS: Final = 32
WAITING_CONNECTIONS: Final = 1000

#: What an answer may be late at the caller's deadline, which the server has been told.
_GRACE_S: Final = 1.0
_FIRST_PAUSE_S: Final = 0.1
_LONGEST_PAUSE_S: Final = 5.0
_TOO_BUSY: Final = frozenset({429, 502, 503, 504})
#: The account that requests are for, of those who may name one.
_ACCOUNT: Final = "X-Sluice-Account"


@dataclass(frozen=True, slots=True, kw_only=True)
class Call(Generic[T]):
    """One request, and how its answer is read."""

    method: str
    path: str
    read: Callable[[bytes], T]
    parameters: Mapping[str, str] = field(default_factory=dict)
    content: bytes | None = None
    #: Whether it does no harm twice. What may not is sent again only if it surely did not arrive.
    repeatable: bool = True
    #: Whether its answer may take as long as a job.
    waits: bool = False
    #: How long nothing may come from the server.
    silence_s: float = ANSWER_S

    def timeout(self, left_s: float | None) -> httpx2.Timeout:
        """How long each part of it may take, where the caller has so much time left."""
        if left_s is None:
            return httpx2.Timeout(ANSWER_S, connect=CONNECT_S, read=self.silence_s)
        most_s = max(left_s, 0.0) + _GRACE_S
        return httpx2.Timeout(
            min(ANSWER_S, most_s),
            connect=min(CONNECT_S, most_s),
            read=min(self.silence_s, most_s),
        )


class Busy(Exception):
    """The server, or what stands before it, asks to come back later."""

    def __init__(
        self, error: SluiceError, *, refused: bool = False, retry_after_s: float | None = None
    ) -> None:
        super().__init__(str(error))
        self.error = error
        #: Whether the request surely was not begun.
        self.refused = refused
        self.retry_after_s = retry_after_s


# Addresses and connections


def read_url(url: str) -> str:
    """Check the server's address; raise `SettingsError`."""
    try:
        parts = urlsplit(url.strip())
        fits = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        fits = False
    if not fits:
        raise SettingsError(
            f"url: {url!r} is not the address of `sluice http`, such as https://llm.example.com; "
            "to use a database and Redis yourself, leave it out and set SLUICE_DATABASE_URL"
        )
    return url.strip().rstrip("/")


def read_patience(patience_s: object) -> float:
    """Check it; raise `SettingsError`."""
    if not isinstance(patience_s, int | float) or not 0 <= patience_s < math.inf:
        raise SettingsError("patience_s: must be a number of seconds, 0 or more")
    return float(patience_s)


def headers_of(api_key: str | None, account: str | UUID | None) -> dict[str, str]:
    """Return what every request carries; raise `SettingsError` for what can be none of these."""
    headers = {"Accept": "application/json", "User-Agent": "sluicegate-python"}
    if api_key is not None:
        if not api_key or not api_key.isascii() or not api_key.isprintable() or " " in api_key:
            raise SettingsError("api_key: must be a key such as sk-sluice-…, or a token")
        headers["Authorization"] = f"Bearer {api_key}"
    if account is not None:
        called = name_or_id(str(account))
        try:
            headers[_ACCOUNT] = str(called) if isinstance(called, UUID) else check_name(called)
        except InvalidJob as error:
            raise SettingsError(str(error)) from None
    return headers


def pool(connections: int) -> httpx2.Limits:
    """Return the limits of a pool that keeps what it has opened."""
    return httpx2.Limits(
        max_connections=connections, max_keepalive_connections=connections, keepalive_expiry=60
    )


# Calls


def submit(request: Request) -> Call[UUID]:
    """Accept one job."""
    return Call(
        method="POST",
        path="/api/jobs",
        read=lambda content: _ids(content)[0],
        content=_encode(_job(request)),
    )


def submit_many(requests: Sequence[Request]) -> Call[list[UUID]]:
    """Accept many, all or none."""
    jobs = [_job(request) for request in requests]
    return Call(method="POST", path="/api/jobs/many", read=_ids, content=_encode({"jobs": jobs}))


def look(job_id: UUID) -> Call[JobView]:
    """Look at a job."""
    return Call(method="GET", path=f"/api/jobs/{job_id}", read=JobView.model_validate_json)


def cancel(job_id: UUID) -> Call[State]:
    """Cancel a job."""
    return Call(
        method="DELETE",
        path=f"/api/jobs/{job_id}",
        read=lambda content: State(orjson.loads(content)["state"]),
    )


def retry(job_id: UUID) -> Call[None]:
    """Try an ended job again; the second time it would not be an ended one any more."""
    return Call(
        method="POST",
        path=f"/api/jobs/{job_id}/retry",
        read=lambda _content: None,
        repeatable=False,
    )


def ending(job_id: UUID, wait_s: float) -> Call[Event | None]:
    """Wait for the terminal event, at most so long; None if it has not come."""
    return Call(
        method="GET",
        path=f"/api/jobs/{job_id}/result",
        read=_read_ending,
        parameters={"wait": f"{wait_s:.3f}"},
        waits=True,
        silence_s=wait_s + ANSWER_S,
    )


def events(job_id: UUID, left_s: float | None) -> Call[None]:
    """Follow a job's events, for so long; they are read as they come."""
    return Call(
        method="GET",
        path=f"/api/jobs/{job_id}/events",
        read=lambda _content: None,
        parameters={} if left_s is None else {"wait": f"{left_s:.3f}"},
        waits=True,
        silence_s=SILENCE_S,
    )


def list_jobs(filters: JobFilters) -> Call[list[JobSummary]]:
    """List jobs; raises `InvalidJob` for a filter that is none."""
    return Call(
        method="GET",
        path="/api/jobs",
        read=lambda content: _SUMMARIES.validate_python(orjson.loads(content)["jobs"]),
        parameters=JobList(filters).parameters(),
    )


def set_budget(
    account: str | UUID,
    use_case: str | None,
    daily: Limit,
    monthly: Limit,
    thresholds: Sequence[int] | None,
) -> Call[Budget]:
    """Set a budget to what is given, which may be done twice."""
    body: dict[str, Any] = {"account": str(account), "use_case": use_case}
    for name, limit in (("daily", daily), ("monthly", monthly)):
        if not isinstance(limit, EllipsisType):
            body[name] = None if limit is None else str(limit)
    if thresholds is not None:
        body["thresholds"] = list(thresholds)
    return Call(
        method="PUT",
        path="/api/budgets",
        read=_BUDGET.validate_json,
        content=_encode(body),
    )


def budgets(account: str | UUID | None) -> Call[list[Budget]]:
    """Read the budgets of an account, or of all."""
    return Call(
        method="GET",
        path="/api/budgets",
        read=lambda content: _BUDGETS.validate_python(orjson.loads(content)["budgets"]),
        parameters={} if account is None else {"account": str(account)},
    )


def clear_budget(account: str | UUID, use_case: str | None) -> Call[None]:
    """Take a budget away; the second time it would not be there."""
    named = {} if use_case is None else {"use_case": use_case}
    return Call(
        method="DELETE",
        path="/api/budgets",
        read=lambda _content: None,
        parameters={"account": str(account), **named},
        repeatable=False,
    )


_SUMMARIES: Final = TypeAdapter(list[JobSummary])
_BUDGET: Final = TypeAdapter(Budget)
_BUDGETS: Final = TypeAdapter(list[Budget])


def _ids(content: bytes) -> list[UUID]:
    return [UUID(one) for one in orjson.loads(content)["ids"]]


def _read_ending(content: bytes) -> Event | None:
    event = orjson.loads(content)["event"]
    return None if event is None else decode(event["id"], orjson.dumps(event["payload"]))


def _job(request: Request) -> dict[str, Any]:
    terms = request.terms.model_dump(mode="json", exclude_unset=True)
    if terms.get("idempotency_key") is None:
        # A repeat whose first try had arrived after all finds its job by it.
        terms["idempotency_key"] = f"auto-{uuid4()}"
    return {
        "use_case": request.use_case,
        "prompt": request.prompt,
        **request.fields,
        **terms,
    }


def _encode(value: object) -> bytes:
    try:
        return orjson.dumps(value, default=_plain)
    except orjson.JSONEncodeError as error:
        raise InvalidJob("job", f"holds a value that JSON cannot carry: {error}") from None


def _plain(value: object) -> object:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return list(value)
    raise TypeError(f"a {type(value).__name__}")


# Answers


def check(url: str, response: httpx2.Response) -> None:
    """Raise what an answer that is no success says; `Busy` if it may be asked for again later."""
    status = response.status_code
    if response.is_success:
        return
    is_busy = status in _TOO_BUSY
    told = _told(response.content)
    if told is None:
        said = f"{url} answered {status}, and not as `sluice http` does; is this its address?"
        error = QueueUnavailable(said) if status >= 500 else SluiceError(said)
    else:
        error = _error(told, QueueUnavailable if is_busy else SluiceError)
    if not is_busy:
        raise error
    raise Busy(
        error,
        # Any other 503 may come from what was done by half, and from proxies.
        refused=status == 429 or (told is not None and _is_not_begun(told["code"])),
        retry_after_s=_seconds(response.headers.get("Retry-After")),
    )


def _told(content: bytes) -> dict[str, Any] | None:
    """Return the error that an answer of ours tells; None: it is somebody else's."""
    try:
        told: dict[str, Any] = orjson.loads(content)["error"]
        return {**told, "code": str(told["code"]), "message": str(told["message"])}
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return None


def _is_not_begun(code: str) -> bool:
    return code.startswith("too_many_") or code == "stopping"


def _error(told: Mapping[str, Any], other: type[SluiceError]) -> SluiceError:
    """Return what the server raised, as far as its code says; `other` if it does not."""
    code, message = told["code"], told["message"]
    field_name, details = told.get("field"), told.get("details") or {}
    match code:
        case "invalid_request" if field_name:
            problem = message.removeprefix(f"{field_name}: ")
            return InvalidJob("account" if field_name == _ACCOUNT else field_name, problem)
        case "budget_exceeded":
            return _budget_exceeded(message, details)
        case "internal":
            return SluiceError(f"{message} (request id: {told.get('requestId')})")
    return _KINDS.get(code, other)(message)


_KINDS: Final[Mapping[str, type[SluiceError]]] = {
    "idempotency_conflict": IdempotencyConflict,
    "not_found": NotFound,
    "purged": Purged,
    "illegal_transition": IllegalTransition,
    "unavailable": QueueUnavailable,
}


def _budget_exceeded(message: str, details: Mapping[str, Any]) -> BudgetExceeded:
    try:
        return BudgetExceeded(
            message,
            account=details["account"],
            use_case=details["use_case"],
            window=details["window"],
            limit=Decimal(details["limit"]),
            spent=Decimal(details["spent"]),
            resets_at=datetime.fromisoformat(details["resets_at"]),
        )
    except (KeyError, TypeError, ValueError, InvalidOperation):
        return BudgetExceeded(message)


def _seconds(retry_after: str | None) -> float | None:
    return float(retry_after) if retry_after is not None and retry_after.isdigit() else None


class EventText:
    """Reads a stream of events, in whatever pieces it comes."""

    def __init__(self) -> None:
        #: Whether the server has said that nothing follows.
        self.over = False
        #: Whether an event has come, or the comment of a stream that goes on in silence.
        self.is_alive = False
        self._rest = b""
        self._id = ""
        self._kind = b""
        self._data: list[bytes] = []

    def feed(self, piece: bytes) -> Iterator[Event]:
        """Take in a piece; return what is whole with it. A line ends with LF or CRLF alone.

        Raises what the server says that went wrong: `Busy` if it may be asked again.
        """
        *lines, self._rest = (self._rest + piece).split(b"\n")
        for line in lines:
            name, _, value = line.removesuffix(b"\r").partition(b":")
            value = value.removeprefix(b" ")
            if name == b"id":
                self._id = value.decode()
            elif name == b"event":
                self._kind = value
            elif name == b"data":
                self._data.append(value)
            elif not name and value:
                self.is_alive = True  # a comment
            elif not name and not value and self._data:
                kind, data = self._kind, b"\n".join(self._data)
                self._kind, self._data = b"", []
                if kind == OVER:
                    self.over = True
                elif kind == BROKEN:
                    raise _broken(data)
                else:
                    self.is_alive = True
                    yield _event(self._id, data)


def _event(event_id: str, data: bytes) -> Event:
    try:
        return decode(event_id, data)
    except ValidationError:
        raise SluiceError(
            "an event cannot be read: is the server of a later version than this client?"
        ) from None


def _broken(data: bytes) -> SluiceError | Busy:
    told = _told(data)
    if told is None:
        return SluiceError("the server cannot go on with this job's events; its log says why")
    error = _error(told, SluiceError)
    return Busy(error) if isinstance(error, QueueUnavailable) else error


# Trying again


def repeat(call: Call[Any], patience_s: float) -> dict[str, Any]:
    """Return how tenacity repeats a call while the server is away, busy or restarts."""

    def again(error: BaseException) -> bool:
        if isinstance(error, Busy):
            return call.repeatable or error.refused
        if isinstance(error, _NOT_SENT):
            return True
        return call.repeatable and isinstance(error, httpx2.TransportError)

    return {
        "retry": retry_if_exception(again),
        "stop": stop_before_delay(patience_s),
        "wait": _pause_after,
        "reraise": True,
    }


_NOT_SENT: Final = (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout)


def _pause_after(state: RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome is not None else None
    return _pause_s(state.attempt_number, error)


def _pause_s(attempt: int, error: BaseException | None) -> float:
    asked_s = error.retry_after_s if isinstance(error, Busy) else None
    longest = min(_FIRST_PAUSE_S * 2 ** min(attempt, 10), _LONGEST_PAUSE_S)
    # Jitter, so that not all clients of a server that restarts come at once.
    return (asked_s or 0.0) + random.uniform(_FIRST_PAUSE_S / 2, longest)  # noqa: S311


class Waiting:
    """Somebody waits for a job: until when, what he has seen, since when it does not go on."""

    def __init__(
        self, url: str, job_id: UUID, last_id: str, timeout: float | None, patience_s: float
    ) -> None:
        #: The id of the last event that was seen.
        self.last_id = last_id
        #: On the monotonic clock, as all moments here.
        self.deadline = None if timeout is None else time.monotonic() + timeout
        self._url = url
        self._job_id = job_id
        self._timeout = timeout
        self._patience_s = patience_s
        self._heard = False
        self._failing_since: float | None = None
        self._failures = 0

    def left_s(self) -> float | None:
        """How long until the deadline."""
        return None if self.deadline is None else max(0.0, self.deadline - time.monotonic())

    def wait_s(self) -> float:
        """How long the next request for the result waits."""
        left_s = self.left_s()
        return WAIT_S if left_s is None else min(WAIT_S, left_s)

    def heard(self) -> None:
        """Note that the server is there, which need not mean that it can do what is asked."""
        self._heard = True

    def progressed(self) -> None:
        """Note that it goes on: patience begins anew with the next failure."""
        self._heard, self._failing_since, self._failures = True, None, 0

    def check_deadline(self) -> None:
        """Raise `ResultTimeout` if it has passed."""
        if self.left_s() != 0.0:
            return
        if self._heard:
            raise timed_out(self._job_id, self._timeout)
        raise ResultTimeout(
            f"{self._url} did not answer within {self._timeout:g} s, so nobody knows how job "
            f"{self._job_id} stands; ask again"
        )

    def pause_after(self, error: Exception | None = None) -> float:
        """Return how long to wait before it connects again, in seconds.

        error: why the last connection ended, if not by the server's will. Raises `ResultTimeout` at
        the deadline, `QueueUnavailable` if nothing has come for too long.
        """
        self.check_deadline()
        now = time.monotonic()
        if self._failing_since is None:
            self._failing_since = now
        if now - self._failing_since > self._patience_s:
            if isinstance(error, Busy):
                raise error.error
            raise unanswered(self._url, error)
        self._failures += 1
        left_s = self.left_s()
        pause_s = _pause_s(self._failures, error)
        return pause_s if left_s is None else min(pause_s, left_s)


# Errors


def refuse_connection(connection: object) -> None:
    """Raise `InvalidJob` for a transaction of the caller's, which the server is no part of."""
    if connection is not None:
        raise InvalidJob(
            "connection",
            "cannot be joined over HTTP; leave it out, or use a client beside the database",
        )


def not_here(what: str) -> SluiceError:
    """Build the error for what needs the database or Redis itself."""
    return SluiceError(
        f"{what} cannot be had over HTTP; use a client beside the database: `Sluice()` with "
        "SLUICE_DATABASE_URL and SLUICE_REDIS_URL"
    )


def closed() -> SluiceError:
    """Build the error for a client after `close`."""
    return SluiceError("this client is closed; make a new one")


def unanswered(url: str, error: Exception | None) -> QueueUnavailable:
    """Build the error for a server that cannot be reached, or ends whatever it begins."""
    reason = "it ends each answer at once" if error is None else str(error) or type(error).__name__
    return QueueUnavailable(f"{url} did not answer ({reason}); try again")
