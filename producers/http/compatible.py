"""What the compatible doors share: a foreign request becomes a job, its answer awaited or told.

A door translates: its request into an `Asked`, a `Result` into its answer, a `Problem` into its
error. All between is the same for each of them, and is here.

Nobody who gave up waiting is charged twice: what is wrong with a job, such as an answer that is
still to come, has a status that no client repeats. What they would repeat without a gain before
there is a job, a full budget, says `x-should-retry: false`, which the SDKs obey.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import Any, Final, Literal, Protocol
from uuid import UUID

from pydantic import BaseModel
from starlette.responses import Response

from sluicegate.producers.handles import AsyncJobHandle
from sluicegate.producers.http.idempotency import HEADER as KEY_HEADER
from sluicegate.producers.http.problems import Problem, problem_of, wrong
from sluicegate.producers.http.routes import JOB_HEADER, SSE, Visit
from sluicegate.producers.http.shapes import job_url
from sluicegate.producers.http.splicing import Diverged, Splice
from sluicegate.producers.http.streams import COMMENT, Stream
from sluicegate.producers.outcomes import result_of
from sluicegate.producers.submission import JobOptions
from sluicegate.shared.errors import ErrorClass, InvalidJob, ResultTimeout, SluiceError
from sluicegate.shared.events import Completed, Delta, Event, Failed, Reset, Started
from sluicegate.shared.jobs import Result
from sluicegate.shared.messages import Message, Part

#: `whole`: a stream that tells the answer in one piece once it is complete.
STREAM_HEADER: Final = "X-Sluice-Stream"
#: What `model` begins with when it is none, but a use case.
USE_CASE_PREFIX: Final = "sluice/"
#: The use case that is detected.
AUTO: Final = "auto"

#: The status of a job without an answer. SDKs repeat 408, 409, 429 and what is from 500 on;
#: LangChain.js repeats all but 400 to 407 and 409, of which no other could mean this.
NO_ANSWER: Final = 406
UNANSWERED: Final = "The job ended without an answer, or goes on; the error has its id."
#: These are left alone by all of them: what was asked for is to blame.
_BLAMED: Final = (400, 402, 404)
_NEVER_AGAIN: Final = {"x-should-retry": "false"}
_STILL_RUNNING: Final = "the job goes on; its answer will be at {url}"
#: How much sooner than its client a request gives up, so that the client hears of the job.
_AHEAD_S: Final = 1.0
#: Unknown fields that an answer warns of: more are no mistake.
_WARNED_MAX: Final = 20
#: A job that is over its deadline is ended by the sweep, soon after.
_SWEPT_S: Final = 30.0


@dataclass(slots=True, kw_only=True)
class Asked:
    """A foreign request in our words."""

    #: None: by what it asks for.
    use_case: str | None
    options: JobOptions
    #: What the caller calls the fields that we call otherwise, by our name.
    names: Mapping[str, str]
    messages: list[Message] = field(default_factory=list)
    #: Where each of the messages stood in the request: system messages are none of ours.
    places: list[int] = field(default_factory=list)
    #: What is not done quite as asked, a sentence each.
    warnings: list[str] = field(default_factory=list)

    def add(self, place: int, role: Literal["user", "assistant"], parts: Iterable[Part]) -> None:
        """Add the message that stood there in the request; one of the assistant may be empty."""
        content = tuple(parts)
        if content:
            self.messages.append(Message(role=role, content=content))
            self.places.append(place)
        elif role == "user":
            raise wrong(f"messages.{place}.content", "must not be empty")

    def check_end(self, problem: str) -> None:
        """Raise `Problem` with these words unless it is the assistant's turn."""
        if not self.messages or self.messages[-1].role != "user":
            raise wrong("messages", problem)


def addressed(model: str) -> tuple[str | None, str | None]:
    """Read a foreign `model`: the use case and the model of a job, None where it names none."""
    if not model.startswith(USE_CASE_PREFIX):
        return None, model
    use_case = model.removeprefix(USE_CASE_PREFIX)
    return (None if use_case == AUTO else use_case), None


def left_out(
    body: BaseModel,
    *,
    refused: Mapping[str, str],
    steering: Sequence[str],
    silent: Sequence[str],
) -> list[str]:
    """Take the fields that are known and not taken out of a body's extra ones; return warnings.

    refused: whoever gives one of them hears why, by a `Problem`. steering: warned of. silent: not.
    """
    extra = body.model_extra or {}
    for name, problem in refused.items():
        if extra.get(name):
            raise wrong(name, problem)
    warnings = [
        f"{name} is not taken here and was left out" for name in steering if extra.get(name)
    ]
    for name in (*steering, *silent, *refused):
        extra.pop(name, None)
    return warnings


def unknown_fields(body: BaseModel) -> list[str]:
    """Return the warnings about fields that no door knows."""
    extra = sorted(body.model_extra or ())[:_WARNED_MAX]
    return [f"{name[:64]} is not known here and was left out" for name in extra]


# A job of it


async def submit(visit: Visit, asked: Asked) -> AsyncJobHandle:
    """Have the job stored on behalf of the caller; raise `Problem`, `SluiceError`."""
    if visit.request.headers.get(STREAM_HEADER) == "whole":
        asked.options["stream"] = False
    try:
        return await visit.submit(asked.use_case, asked.messages, **asked.options)
    except InvalidJob as error:
        raise _refused(error, asked) from None


def _refused(error: InvalidJob, asked: Asked) -> Problem:
    if error.field in ("model", "use_case"):
        message = f"model: {error.problem}"
        return Problem(404, "model_not_found", message, field="model")
    head, _, rest = error.field.partition(".")
    number, _, rest = rest.partition(".")
    if head == "messages" and number.isdigit() and int(number) < len(asked.places):
        place = ".".join(filter(None, (head, str(asked.places[int(number)]), rest)))
        return wrong(place, error.problem)
    return problem_of(error, {"idempotency_key": KEY_HEADER, **asked.names})


async def answer(visit: Visit, handle: AsyncJobHandle) -> Result:
    """Wait for the answer, for as long as the client will; raise `Problem`."""
    try:
        result = await visit.wait(handle, patience_s(visit))
    except SluiceError as error:
        raise _ended(error, handle.id) from None
    if result is None:
        raise _unanswered("still_running", _STILL_RUNNING, handle.id)
    return result


def patience_s(visit: Visit) -> float:
    """Say how long to wait: a little less than the client, if its SDK says how long that is."""
    most = visit.settings.http_max_wait_s
    headers = visit.request.headers
    said = headers.get("x-stainless-read-timeout") or headers.get("x-stainless-timeout")
    try:
        theirs = float(said or most)
    except ValueError:
        return most
    if not 0 < theirs < most:  # not a number, too
        return most
    return max(theirs - _AHEAD_S, theirs / 2)


def _unanswered(code: str, message: str, job_id: UUID) -> Problem:
    return Problem(NO_ANSWER, code, message.format(url=job_url(job_id)), job_id=str(job_id))


def _ended(error: SluiceError, job_id: UUID) -> Problem:
    if isinstance(error, ResultTimeout):
        return _unanswered("still_running", _STILL_RUNNING, job_id)
    problem = problem_of(error)
    problem.job_id = str(job_id)
    last_word(problem)
    return problem


def last_word(problem: Problem) -> None:
    """Say to clients that repeating it gains nothing; a job had attempts of its own."""
    if problem.job_id is not None:
        if problem.status == 422 and problem.code != ErrorClass.INVALID_ANSWER:
            problem.status = 400  # which their clients know: it was the request
        elif problem.status not in _BLAMED:
            problem.status = NO_ANSWER
        # The next attempt would be another job: this is no time for one.
        problem.headers.pop("Retry-After", None)
    if problem.job_id is not None or problem.status in (402, 409):
        problem.headers |= _NEVER_AGAIN


def extras(result: Result, warnings: Sequence[str]) -> dict[str, Any]:
    """Return what we say of an answer beyond what the protocol has words for."""
    return {
        "jobId": str(result.job_id),
        "provider": result.provider,
        "costUsd": float(result.cost),
        "baselineUsd": float(result.baseline_cost),
        "attempts": result.attempts,
        "warnings": [*warnings, *result.warnings],
    }


# As a stream


class Voice(Protocol):
    """How a protocol tells one answer, in server-sent events."""

    def begin(self, model: str) -> None:
        """Learn which model answers, before the answer begins."""

    def more(self, delta: Delta) -> bytes:
        """Tell more of the answer; it begins with the first of these."""

    def end(self, result: Result) -> bytes:
        """Tell that this was the answer."""

    def error(self, problem: Problem) -> bytes:
        """Tell that there is none, and that what was told is void."""


async def stream(visit: Visit, handle: AsyncJobHandle, voice: Voice) -> Response:
    """Answer with the job's events; raise `Problem` for a job that soon ends without any."""
    told = _tell(visit, handle, voice)
    first = asyncio.ensure_future(anext(told))
    patient_s = min(patience_s(visit), visit.settings.http_keep_alive_s)
    try:
        # As long as nothing was sent, a failure can still be told by its status.
        with suppress(TimeoutError):
            async with visit.patience(patient_s):
                await asyncio.wait((first,))
        if first.done():
            first.result()
        stopping = "this server stops; the answer will be at {url}"
        farewell = voice.error(_unanswered("stopping", stopping, handle.id))
        return Stream(
            visit.services.streams,
            visit.place,
            _pieces(first, told, voice),
            media_type=SSE,
            headers={JOB_HEADER: str(handle.id)},
            keep_alive=COMMENT,
            farewell=farewell,
        )
    except BaseException:
        await _close(first, told)
        raise


async def _pieces(
    first: asyncio.Future[bytes], rest: AsyncGenerator[bytes, None], voice: Voice
) -> AsyncGenerator[bytes, None]:
    try:
        yield await first
        async for piece in rest:
            yield piece
    except Problem as problem:
        yield voice.error(problem)
    finally:
        await _close(first, rest)


async def _close(first: asyncio.Future[bytes], rest: AsyncGenerator[bytes, None]) -> None:
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    await rest.aclose()


async def _tell(visit: Visit, handle: AsyncJobHandle, voice: Voice) -> AsyncGenerator[bytes, None]:
    splice = Splice()
    most_s = visit.settings.interactive_deadline_s + _SWEPT_S
    try:
        async with aclosing(handle.events(timeout=most_s)) as events:
            async for event in events:
                if piece := _said(event, splice, voice):
                    yield piece
    except Diverged:
        said = (
            "the provider failed in the middle of its answer, and another attempt answered "
            "otherwise; the whole answer will be at {url}"
        )
        raise _unanswered("restarted", said, handle.id) from None
    except SluiceError as error:
        raise _ended(error, handle.id) from None


def _said(event: Event, splice: Splice, voice: Voice) -> bytes:
    match event.payload:
        case Started(model=model) | Reset(model=model):
            splice.restart()
            voice.begin(model)
            return b""
        case Delta() as delta:
            more = splice.add(delta)
            return voice.more(more) if more else b""
        case Completed() | Failed():
            result = result_of(event)
            rest = splice.finish(result)
            return (voice.more(rest) if rest else b"") + voice.end(result)
