"""The routes that the Python client speaks: our own types and words, with nothing lost.

`Sluice("https://…")` is to do what `Sluice()` does, to the letter of an error. So jobs go in as
`submit` takes them, and views and events come out as the types that they are here.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Annotated, Any, Final, cast
from uuid import UUID

import orjson
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, WithJsonSchema
from starlette.responses import Response

from sluicegate.producers.http.callers import Role, Rule
from sluicegate.producers.http.event_stream import EVENT_ID
from sluicegate.producers.http.gate import log_defect
from sluicegate.producers.http.idempotency import given_key, stored_key
from sluicegate.producers.http.problems import Problem, body_of, problem_of
from sluicegate.producers.http.request_body import VALUES_MAX, check_values
from sluicegate.producers.http.routes import JSON, SSE, Answer, Door, Route, Visit, json_response
from sluicegate.producers.http.shapes import Line
from sluicegate.producers.http.streams import LAST_EVENT_ID, server_sent
from sluicegate.producers.listing import JobSummary, read_parameters
from sluicegate.producers.submission import (
    MAX_DEADLINE_S,
    MAX_JOBS,
    JobOptions,
    Prompt,
    read_request,
    use_case_of,
)
from sluicegate.producers.views import JobView
from sluicegate.shared.errors import (
    BudgetExceeded,
    InvalidJob,
    NotFound,
    ResultTimeout,
    SluiceError,
)
from sluicegate.shared.events import BROKEN, OVER, Payload
from sluicegate.shared.jobs import JobSpec, Lane, State
from sluicegate.shared.replies import parse_event_id


class Detailed(Problem):
    """A problem of which a program is told more than a sentence."""

    def __init__(self, problem: Problem, details: Mapping[str, Any]) -> None:
        super().__init__(
            problem.status,
            problem.code,
            problem.message,
            field=problem.field,
            job_id=problem.job_id,
            headers=problem.headers,
        )
        self.details = dict(details)


def _told(problem: Problem, request_id: str) -> dict[str, Any]:
    body = body_of(problem, request_id)
    if isinstance(problem, Detailed):
        body["error"]["details"] = problem.details
    return body


_NO_OPTIONS: Final = ("use_case", "prompt")
#: Of a list of jobs, ten each: far fewer than ten have most.
_VALUES_OF_MANY: Final = 10 * MAX_JOBS

#: The native manners, and what else the client makes its errors of.
CLIENT: Final = Door(name="sluicegate-python", error=_told)


def _as_submitted(schema: dict[str, Any]) -> None:
    """Tell of a prompt where a stored job has messages, and nothing that `submit` adds itself."""
    told = schema["properties"]
    messages = told.pop("messages")
    del told["version"], told["use_case_detected"]
    told["prompt"] = {"anyOf": [{"type": "string", "minLength": 1}, messages]}
    schema["required"] = ["prompt"]


class Submission(JobSpec):
    """A job as `submit` takes it. Read as `submit` reads it, so this is for the document alone."""

    model_config = ConfigDict(title="JobOfThePythonClient", json_schema_extra=_as_submitted)

    account: str | None = None
    lane: Lane = Lane.INTERACTIVE
    #: In seconds from now.
    deadline: Annotated[float, Field(gt=0, le=MAX_DEADLINE_S)] | None = None
    max_attempts: Annotated[int, Field(ge=1, le=20)] | None = None
    idempotency_key: Line | None = None
    reply_to: str | None = None
    request_id: str | None = None
    submitted_by: str | None = None


class Submissions(BaseModel):
    """Jobs that are accepted together or not at all."""

    jobs: list[Submission]


class AcceptedJobs(BaseModel):
    """The jobs that were accepted, in the order in which they were given."""

    ids: list[UUID]


class Cancelled(BaseModel):
    """What state a job is in after a wish to cancel it."""

    state: State


class Listed(BaseModel):
    """Jobs, newest first."""

    jobs: list[JobSummary]


class ClientEvent(BaseModel):
    """An event of a job."""

    id: str
    payload: Payload


class Ending(BaseModel):
    """The terminal event; null while the job goes on."""

    event: ClientEvent | None


def _like(pattern: str) -> WithJsonSchema:
    """Tell in the document what `list_jobs` checks."""
    return WithJsonSchema({"type": "string", "pattern": f"^({pattern})$"})


_STATES: Final = "|".join(State)
_Name = Annotated[str, StringConstraints(max_length=255)]


class Filters(BaseModel):
    """Which jobs are listed: those that meet all that is given."""

    model_config = ConfigDict(extra="forbid")

    #: One or several, with commas between.
    state: Annotated[str, _like(rf"({_STATES})(,({_STATES}))*")] | None = None
    use_case: _Name | None = None
    account: _Name | None = None
    lane: Annotated[str, _like("|".join(Lane))] | None = None
    queue: _Name | None = None
    batch: Annotated[str, _like("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")] | None = None
    since: Annotated[str, WithJsonSchema({"type": "string", "format": "date-time"})] | None = None
    submitted_by: _Name | None = None
    limit: Annotated[str, _like("[1-9][0-9]{0,3}|10000")] | None = None


class Patience(BaseModel):
    """How long to wait for the end of a job, in seconds."""

    model_config = ConfigDict(extra="forbid")

    wait: Annotated[float, Field(ge=0, le=60, allow_inf_nan=False)] = 20.0


class Following(BaseModel):
    """From where on, and for how many seconds, events are sent."""

    model_config = ConfigDict(extra="forbid")

    #: As the header `Last-Event-ID`, for whoever cannot set one.
    last_id: Annotated[str, StringConstraints(pattern=EVENT_ID)] = "0"
    wait: Annotated[float, Field(ge=0, le=MAX_DEADLINE_S, allow_inf_nan=False)] | None = None


async def submit(visit: Visit) -> Response:
    """Accept one job."""
    job = await _object(visit, VALUES_MAX)
    use_case, prompt, options = _options(visit, job)
    await visit.check_backlog(use_case, prompt, options)
    try:
        handle = await visit.client.submit(use_case, prompt, **options)
    except BudgetExceeded as error:
        raise Detailed(
            problem_of(error),
            {
                "account": error.account,
                "use_case": error.use_case,
                "window": error.window,
                "limit": str(error.limit),
                "spent": str(error.spent),
                "resets_at": error.resets_at and error.resets_at.isoformat(),
            },
        ) from error
    return json_response({"ids": [handle.id]}, 202)


async def submit_many(visit: Visit) -> Response:
    """Accept many jobs, all or none."""
    given = (await _object(visit, _VALUES_OF_MANY)).get("jobs")
    if not isinstance(given, list) or not all(isinstance(job, dict) for job in given):
        raise InvalidJob("jobs", "must be a list of jobs, each an object")
    if len(given) > MAX_JOBS:
        raise InvalidJob("jobs", f"are more than {MAX_JOBS:,}; submit them in parts")
    # The request itself has been counted.
    await visit.services.rates.charge(visit.known.subject, len(given) - 1)
    # Takes seconds for many, which belong to other requests.
    jobs = await asyncio.to_thread(_read_many, visit, given)
    if visit.services.backlog.is_late():
        for use_case in await asyncio.to_thread(_use_cases_of, jobs):
            visit.services.backlog.check(use_case)
    handles = await visit.client.submit_many(None, jobs)
    return json_response({"ids": [handle.id for handle in handles]}, 202)


def _read_many(visit: Visit, given: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    jobs = []
    for n, job in enumerate(given):
        try:
            use_case, prompt, options = _options(visit, job)
        except InvalidJob as error:
            raise InvalidJob(error.field, f"{error.problem} (job {n} of the list)") from None
        jobs.append({"use_case": use_case, "prompt": prompt, **options})
    return jobs


def _use_cases_of(jobs: Sequence[Mapping[str, Any]]) -> set[str]:
    """Return what the interactive ones of these are for."""
    found = set()
    for job in jobs:
        options = {name: job[name] for name in job if name not in _NO_OPTIONS}
        if options.get("lane") != Lane.BULK:
            use_case = job["use_case"]
            found.add(use_case_of(job["prompt"], options) if use_case is None else str(use_case))
    return found


async def list_jobs(visit: Visit) -> Response:
    """List the jobs that the caller may read."""
    given = visit.query(Filters).model_dump(exclude_none=True)
    caller = visit.known
    named = given.pop("account", None)
    try:
        account = caller.account_meant(named)
    except NotFound as error:
        raise InvalidJob("account", str(error)) from None
    if account is not None:
        given["account"] = account
    if caller.role is Role.USER:
        if given.get("submitted_by", caller.subject) != caller.subject:
            return json_response(Listed(jobs=[]))
        given["submitted_by"] = caller.subject
    filters: Any = read_parameters(given)
    return json_response(Listed(jobs=await visit.client.list_jobs(**filters)))


async def look(visit: Visit) -> Response:
    """Show a job as it stands."""
    job = await _readable(visit)
    key = given_key(job.idempotency_key, job.submitted_by)
    shown = job.model_copy(update={"idempotency_key": key})
    return Response(shown.model_dump_json(), media_type=JSON)


async def cancel(visit: Visit) -> Response:
    """Cancel a job."""
    job = await _readable(visit)
    return json_response({"state": await visit.client.cancel(job.id)})


async def retry(visit: Visit) -> Response:
    """Try a job that has ended once more."""
    job = await _readable(visit)
    again = await visit.client.retry(job.id)
    return json_response({"ids": [again.id]}, 202)


async def result(visit: Visit) -> Response:
    """Wait for the end of a job."""
    wait_s = visit.query(Patience).wait
    job = await _readable(visit)
    try:
        async with visit.patience(wait_s):
            event = await visit.client.handle(job.id).ending()
    except TimeoutError:
        return json_response({"event": None})
    return Response(
        b'{"event":{"id":%b,"payload":%b}}'
        % (orjson.dumps(event.id), event.payload.model_dump_json().encode()),
        media_type=JSON,
    )


async def events(visit: Visit) -> Response:
    """Send the events of a job as they come, those first that came before."""
    asked = visit.query(Following)
    last_id = visit.request.headers.get(LAST_EVENT_ID, asked.last_id)
    parse_event_id(last_id)
    job = await _readable(visit)
    return visit.stream(_events(visit, job.id, last_id, asked.wait))


async def _events(
    visit: Visit, job_id: UUID, last_id: str, wait_s: float | None
) -> AsyncGenerator[bytes, None]:
    try:
        async with aclosing(visit.client.handle(job_id).events(last_id, wait_s)) as found:
            async for event in found:
                data = event.payload.model_dump_json().encode()
                yield server_sent(data, event=event.type, event_id=event.id)
        yield server_sent({}, event=OVER.decode())
    except ResultTimeout:
        return  # whoever asked for so long knows what it means
    except SluiceError as error:
        problem = problem_of(error)
        if problem.status == 500:
            log_defect(error, visit.request_id)
        # Without an id: it is no event of the job's.
        yield server_sent(_told(problem, visit.request_id), event=BROKEN.decode())


async def _readable(visit: Visit) -> JobView:
    return await visit.job(visit.request.path_params["id"])


async def _object(visit: Visit, values_max: int) -> dict[str, Any]:
    body = await visit.body()
    check_values(body, values_max)
    try:
        content = orjson.loads(body or b"{}")
    except orjson.JSONDecodeError as error:
        raise InvalidJob("body", f"must be JSON: {error}") from None
    if not isinstance(content, dict):
        raise InvalidJob("body", "must be an object")
    return content


def _options(visit: Visit, job: Mapping[str, Any]) -> tuple[str, Prompt, JobOptions]:
    """Return what `submit` takes, on behalf of the caller's account."""
    caller = visit.known
    options = {name: value for name, value in job.items() if name not in _NO_OPTIONS}
    if options.keys() - JobOptions.__annotations__.keys():
        read_request(None, None, options)  # says which is not known
    named = options.get("account")
    if not isinstance(named, str | None):
        raise InvalidJob("account", "must be text: an account's name or id")
    try:
        meant = caller.account_meant(named)
    except NotFound:
        raise InvalidJob("account", f"there is no active account {named!r}") from None
    options["account"] = str(caller.account_id) if meant is None else meant
    if caller.role is not Role.ADMIN:
        for name in ("submitted_by", "reply_to"):
            if options.get(name) is not None:
                raise InvalidJob(name, "can be set by an administrator alone; leave it out")
        options["submitted_by"] = caller.subject
    options["submitted_by"] = options.get("submitted_by") or caller.subject
    key = options.get("idempotency_key")
    if isinstance(key, str):
        options["idempotency_key"] = stored_key(key, caller)
    options["request_id"] = options.get("request_id") or visit.request_id
    # They are checked by `submit` itself, which takes anything and says what is wrong with it.
    return (
        cast("str", job.get("use_case")),
        cast("Prompt", job.get("prompt")),
        cast("JobOptions", options),
    )


_TAG: Final = "Python client"

ROUTES: Final = (
    Route(
        method="POST",
        path="/api/jobs",
        rule=Rule.USER,
        handler=submit,
        summary="Accept a job",
        door=CLIENT,
        tag=_TAG,
        body=Submission,
        answers={202: Answer(description="It is stored.", model=AcceptedJobs)},
    ),
    Route(
        method="POST",
        path="/api/jobs/many",
        rule=Rule.USER,
        handler=submit_many,
        summary="Accept many jobs, all or none",
        door=CLIENT,
        tag=_TAG,
        body=Submissions,
        answers={202: Answer(description="They are stored.", model=AcceptedJobs)},
    ),
    Route(
        method="GET",
        path="/api/jobs",
        rule=Rule.USER,
        handler=list_jobs,
        summary="List jobs, newest first",
        door=CLIENT,
        tag=_TAG,
        query=Filters,
        answers={200: Answer(description="The newest that meet the filters.", model=Listed)},
    ),
    Route(
        method="GET",
        path="/api/jobs/{id}",
        rule=Rule.USER,
        handler=look,
        summary="Look at a job, its attempts and its result",
        door=CLIENT,
        tag=_TAG,
        answers={200: Answer(description="The job as it stands.", model=JobView)},
    ),
    Route(
        method="DELETE",
        path="/api/jobs/{id}",
        rule=Rule.USER,
        handler=cancel,
        summary="Cancel a job",
        door=CLIENT,
        tag=_TAG,
        answers={200: Answer(description="The state it is in then.", model=Cancelled)},
    ),
    Route(
        method="POST",
        path="/api/jobs/{id}/retry",
        rule=Rule.USER,
        handler=retry,
        summary="Try a failed, cancelled or expired job again",
        door=CLIENT,
        tag=_TAG,
        answers={202: Answer(description="It waits for a worker.", model=AcceptedJobs)},
    ),
    Route(
        method="GET",
        path="/api/jobs/{id}/result",
        rule=Rule.USER,
        handler=result,
        summary="Wait for the end of a job",
        door=CLIENT,
        tag=_TAG,
        query=Patience,
        answers={200: Answer(description="How it ended, or that it goes on.", model=Ending)},
        is_stream=True,
    ),
    Route(
        method="GET",
        path="/api/jobs/{id}/events",
        rule=Rule.USER,
        handler=events,
        summary="Follow a job",
        door=CLIENT,
        tag=_TAG,
        query=Following,
        answers={200: Answer(description="Its events, each with its id.", media=(SSE,))},
        is_stream=True,
    ),
)
