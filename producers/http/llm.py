"""`POST /api/llm`: one job, and its answer whole or as it comes."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Final

from starlette.responses import Response

from sluicegate.producers.handles import AsyncJobHandle
from sluicegate.producers.http.callers import Rule
from sluicegate.producers.http.event_stream import EventTold, event_pieces
from sluicegate.producers.http.routes import (
    IDEMPOTENCY_KEY,
    JOB_HEADER,
    SSE,
    TEXT,
    Answer,
    Route,
    Visit,
    json_response,
)
from sluicegate.producers.http.shapes import Accepted, Answered, Ask, answered, job_url
from sluicegate.producers.http.splicing import Diverged, Splice
from sluicegate.producers.http.streams import Broken
from sluicegate.producers.outcomes import result_of
from sluicegate.shared.errors import InvalidJob, SluiceError
from sluicegate.shared.events import Completed, Delta, Event, Failed, Reset


async def ask(visit: Visit) -> Response:
    """Accept one job, and wait for its answer or send it as it comes.

    The job goes on whatever becomes of the client, and can be read under the URL in `Location`.
    """
    asked = await visit.read(Ask)
    use_case, messages, options = asked.request()
    try:
        handle = await visit.submit(use_case, messages, **options)
    except InvalidJob as error:
        raise InvalidJob(asked.place(error.field), error.problem) from None
    headers = {JOB_HEADER: str(handle.id), "Location": job_url(handle.id)}
    is_stream, wait_s = asked.stream, asked.wait
    del asked, messages, options  # may be megabytes, and the wait minutes
    if not is_stream:
        result = await visit.wait(handle, wait_s)
        if result is not None:
            return json_response(answered(result), headers=headers)
    elif visit.accepts(SSE):
        pieces = event_pieces(handle.events(), job_id=handle.id, request_id=visit.request_id)
        return visit.stream(pieces, headers=headers)
    else:
        response = await _plain_text(visit, handle, wait_s, headers)
        if response is not None:
            return response
    return _still_going(handle, headers)


def _still_going(handle: AsyncJobHandle, headers: dict[str, str]) -> Response:
    content = Accepted(id=handle.id, state="accepted", url=job_url(handle.id))
    return json_response(content, 202, {**headers, "Retry-After": "1"})


async def _plain_text(
    visit: Visit, handle: AsyncJobHandle, wait_s: float, headers: dict[str, str]
) -> Response | None:
    """Answer in plain text once there is some; None if there is none yet after so long.

    Until then an error can still be told as such. Raises as `AsyncJobHandle.result` does.
    """
    pieces = _texts(handle.events())
    try:
        async with visit.patience(wait_s):
            first = await anext(pieces, b"")
    except TimeoutError:
        await pieces.aclose()
        return None
    except SluiceError:
        await pieces.aclose()
        raise
    return visit.stream(_rest(first, pieces), media_type=f"{TEXT}; charset=utf-8", headers=headers)


async def _rest(first: bytes, pieces: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    async with aclosing(pieces):
        yield first
        try:
            async for piece in pieces:
                yield piece
        except SluiceError as error:
            # The head is gone, with a 200: all that can be said is that this is not the whole.
            raise Broken from error


async def _texts(events: AsyncGenerator[Event, None]) -> AsyncGenerator[bytes, None]:
    """Return the text of an answer as it comes, never from two attempts; raises `Broken`."""
    splice = Splice()
    async with aclosing(events):
        async for event in events:
            more: Delta | None = None
            try:
                match event.payload:
                    case Delta() as delta:
                        more = splice.add(delta)
                    case Reset():
                        splice.restart()
                    case Completed() | Failed():
                        more = splice.finish(result_of(event))
                    case _:
                        pass
            except Diverged as error:
                raise Broken from error
            if more is not None and more.text:
                yield more.text.encode()


ROUTES: Final = (
    Route(
        method="POST",
        path="/api/llm",
        rule=Rule.USER,
        handler=ask,
        summary="Ask a model, and have the answer whole or as it comes",
        tag="llm",
        body=Ask,
        headers=(IDEMPOTENCY_KEY,),
        answers={
            200: Answer(
                description="The answer; with `stream`, as plain text or server-sent events.",
                model=Answered,
                media=(TEXT, SSE),
                event=EventTold,
            ),
            202: Answer(
                description="The job goes on; `Location` says where to look for it.",
                model=Accepted,
            ),
        },
        is_stream=True,
    ),
)
