"""A job's events as server-sent events, in the native JSON."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Any, Final, Literal
from uuid import UUID

from pydantic import Field

from sluicegate.producers.http.problems import Problem, body_of, problem_of
from sluicegate.producers.http.shapes import Answered, Told, answered
from sluicegate.producers.http.streams import server_sent
from sluicegate.producers.outcomes import result_of
from sluicegate.shared.errors import SluiceError
from sluicegate.shared.events import Completed, Delta, Event, Failed, Reset, Started

#: What the id of an event looks like; `0` stands before all of them.
EVENT_ID: Final = r"^[0-9]{1,19}(-([0-9]{1,19}|18446744073709551615))?$"


class BegunTold(Told):
    """The first attempt has begun, or (`reset`) a new one: discard what came before."""

    type: Literal["started", "reset"]
    model: str
    attempt: int


class FragmentTold(Told):
    """A piece of a tool call; `args` is a piece of JSON text."""

    index: int
    tool_call_id: str | None
    tool_name: str | None
    args: str


class DeltaTold(Told):
    """More of the answer."""

    type: Literal["delta"]
    text: str
    tool_calls: tuple[FragmentTold, ...]


class CompletedTold(Answered):
    """The whole answer; nothing follows."""

    type: Literal["completed"]


class FailedTold(Told):
    """The job ended without an answer; nothing follows."""

    type: Literal["failed"]
    #: As the errors of all native routes.
    error: dict[str, Any]


#: What the data of an event is, for the document.
EventTold = Annotated[
    BegunTold | DeltaTold | CompletedTold | FailedTold, Field(discriminator="type")
]


async def event_pieces(
    events: AsyncGenerator[Event, None], *, job_id: UUID, request_id: str
) -> AsyncGenerator[bytes, None]:
    """Write a job's events as they come, each with the id from which a reader can go on."""
    async with aclosing(events):
        try:
            async for event in events:
                yield server_sent(_told(event, request_id), event=event.type, event_id=event.id)
        except SluiceError as error:
            # Without an id: it is no event of the job's, and a reader may come back.
            problem = problem_of(error)
            problem.job_id = str(job_id)
            yield server_sent(_failed(problem, request_id), event="error")


def _told(event: Event, request_id: str) -> dict[str, Any]:
    payload = event.payload
    match payload:
        case Delta():
            calls = [
                {
                    "index": one.index,
                    "toolCallId": one.id,
                    "toolName": one.name,
                    "args": one.arguments,
                }
                for one in payload.tool_calls
            ]
            return {"type": "delta", "text": payload.text, "toolCalls": calls}
        case Started() | Reset():
            return {"type": payload.type, "model": payload.model, "attempt": payload.attempt}
        case Completed() | Failed():
            try:
                return {"type": "completed", **answered(result_of(event))}
            except SluiceError as error:
                return _failed(problem_of(error), request_id)


def _failed(problem: Problem, request_id: str) -> dict[str, Any]:
    return {"type": "failed", **body_of(problem, request_id)}
