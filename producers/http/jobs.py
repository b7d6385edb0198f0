"""Jobs: looked at, cancelled, and followed as they run."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from datetime import datetime
from typing import Annotated, Any, Final
from uuid import UUID

from pydantic import BaseModel, ConfigDict, StringConstraints
from pydantic.alias_generators import to_camel
from starlette.responses import Response

from sluicegate.producers.http.callers import Rule
from sluicegate.producers.http.event_stream import EVENT_ID, EventTold, event_pieces
from sluicegate.producers.http.idempotency import given_key
from sluicegate.producers.http.problems import body_of, problem_of
from sluicegate.producers.http.routes import (
    JOB_HEADER,
    SSE,
    Answer,
    Header,
    Route,
    Visit,
    json_response,
)
from sluicegate.producers.http.shapes import Answered, Told, answered, usd
from sluicegate.producers.http.streams import LAST_EVENT_ID
from sluicegate.producers.outcomes import result_of
from sluicegate.producers.views import JobView
from sluicegate.shared.errors import ErrorClass, InvalidJob, NotFound, SluiceError
from sluicegate.shared.events import Event, terminal_event
from sluicegate.shared.jobs import AttemptState, Lane, State


class AttemptTold(Told):
    """One paid call."""

    number: int
    provider: str
    model: str
    state: AttemptState
    error_class: ErrorClass | None
    error_message: str | None
    status: int | None
    request_id: str | None
    dispatched_at: datetime
    ended_at: datetime | None
    first_token_ms: int | None
    duration_ms: int | None
    #: In US dollars; null while nothing is booked.
    usd: float | None


class JobTold(Told):
    """A job as it stands."""

    id: UUID
    state: State
    use_case: str
    lane: Lane
    account: str
    attempts: int
    max_attempts: int
    #: What its calls have cost so far, in US dollars.
    usd: float
    created_at: datetime
    #: Not started before.
    run_at: datetime
    deadline_at: datetime
    finished_at: datetime | None
    #: While the gates keep it parked: what each of its providers said.
    held_back: str | None
    #: When its request and its answer were removed.
    purged_at: datetime | None
    cancel_requested_at: datetime | None
    idempotency_key: str | None
    request_id: str | None
    submitted_by: str | None
    metadata: dict[str, str]
    history: tuple[AttemptTold, ...]
    #: None until the job has succeeded.
    answer: Answered | None
    #: Why there is none; None unless the job ended without one.
    error: dict[str, Any] | None


class StateTold(Told):
    """A job's state after a wish to cancel it; `running`: its worker has been asked to."""

    id: UUID
    state: State


class From(BaseModel):
    """From where on events are sent."""

    model_config = ConfigDict(alias_generator=to_camel, extra="forbid")

    #: As the header `Last-Event-ID`, for whoever cannot set one.
    last_event_id: Annotated[str, StringConstraints(pattern=EVENT_ID)] | None = None


async def look(visit: Visit) -> Response:
    """Look at a job."""
    view = await _view(visit)
    return json_response(_told(view, visit.request_id), headers={JOB_HEADER: str(view.id)})


async def cancel(visit: Visit) -> Response:
    """Cancel a job that is not over; one that runs is cut off by its worker."""
    view = await _view(visit)
    state = await visit.client.cancel(view.id)
    return json_response(StateTold(id=view.id, state=state), headers={JOB_HEADER: str(view.id)})


async def events(visit: Visit) -> Response:
    """Follow a job from an event on, until it is over; 204 if that event was its last."""
    given = visit.query(From).last_event_id
    last_id = visit.request.headers.get(LAST_EVENT_ID) if given is None else given
    view = await _view(visit)
    try:
        following = visit.client.handle(view.id).events(last_id or "0")
    except InvalidJob as error:
        raise InvalidJob("last_id" if given is None else "lastEventId", error.problem) from None
    headers = {JOB_HEADER: str(view.id)}
    if view.state.terminal:
        # Of a stream without an event a browser would think that it broke, and come back for ever.
        first = await anext(following, None)
        if first is None:
            return Response(status_code=204, headers=headers)
        following = _resumed(first, following)
    pieces = event_pieces(following, job_id=view.id, request_id=visit.request_id)
    return visit.stream(pieces, headers=headers)


async def _resumed(first: Event, rest: AsyncGenerator[Event, None]) -> AsyncGenerator[Event, None]:
    async with aclosing(rest):
        yield first
        async for event in rest:
            yield event


async def _view(visit: Visit) -> JobView:
    job_id = visit.request.path_params["id"]
    try:
        return await visit.job(job_id)
    except InvalidJob:
        raise NotFound(f"there is no job {job_id}") from None


def _told(view: JobView, request_id: str) -> dict[str, Any]:
    told = {
        name: getattr(view, name)
        for name in JobTold.model_fields
        if name not in ("usd", "idempotency_key", "history", "answer", "error")
    }
    history = [
        {to_camel(name): value for name, value in one if name != "cost_nano_usd"}
        | {"usd": None if one.cost_nano_usd is None else usd(one.cost_nano_usd)}
        for one in view.history
    ]
    answer = error = None
    if view.result is not None:
        try:
            answer = answered(result_of(terminal_event(0, view.result)))
        except SluiceError as problem:
            error = body_of(problem_of(problem), request_id)["error"]
    return {to_camel(name): value for name, value in told.items()} | {
        "usd": usd(view.cost_nano_usd),
        "idempotencyKey": given_key(view.idempotency_key, view.submitted_by),
        "history": history,
        "answer": answer,
        "error": error,
    }


_PATH: Final = "/api/llm/jobs/{id}"

ROUTES: Final = (
    Route(
        method="GET",
        path=_PATH,
        rule=Rule.USER,
        handler=look,
        summary="Look at a job",
        answers={200: Answer(description="The job as it stands.", model=JobTold)},
    ),
    Route(
        method="DELETE",
        path=_PATH,
        rule=Rule.USER,
        handler=cancel,
        summary="Cancel a job",
        answers={200: Answer(description="Its state after that.", model=StateTold)},
    ),
    Route(
        method="GET",
        path=f"{_PATH}/events",
        rule=Rule.USER,
        handler=events,
        summary="Follow a job, from the event after `Last-Event-ID` on",
        query=From,
        headers=(
            Header(
                name=LAST_EVENT_ID,
                description="The id of the last event that was seen.",
                pattern=EVENT_ID,
            ),
        ),
        answers={
            200: Answer(
                description="Server-sent events, until the job is over.",
                media=(SSE,),
                event=EventTold,
            ),
            204: Answer(description="The last event was seen; nothing follows."),
        },
        is_stream=True,
    ),
)
