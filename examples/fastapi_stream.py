"""A FastAPI endpoint that streams an answer as server-sent events.

    pip install sluicegate fastapi uvicorn
    uvicorn fastapi_stream:app
    curl -N 'http://127.0.0.1:8000/answer?question=Who+do+I+call+at+ten'

A browser reads it with `new EventSource("/answer?question=...")`. One that was cut off comes back
by itself with the id of the last event it has seen, and gets the rest of the same answer.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Annotated

from fastapi import FastAPI, Header, Request
from fastapi.responses import StreamingResponse

from sluicegate import AsyncJobHandle, AsyncSluice

ANSWER_WITHIN_S = 60


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Keep one client for all requests of this process."""
    async with AsyncSluice() as sluice:
        app.state.sluice = sluice
        yield


app = FastAPI(lifespan=lifespan)


@app.get("/answer")
async def answer(
    request: Request, question: str, last_event_id: Annotated[str | None, Header()] = None
) -> StreamingResponse:
    """Submit the question, or find it again, and stream what becomes of it."""
    sluice: AsyncSluice = request.app.state.sluice
    if last_event_id:
        job_id, _, seen = last_event_id.partition("/")
        job = sluice.handle(job_id)
    else:
        job = await sluice.submit("voice", question, stream=True)
        seen = "0"
    return StreamingResponse(_events(job, seen), media_type="text/event-stream")


async def _events(job: AsyncJobHandle, last_id: str) -> AsyncIterator[str]:
    # Closed at once when the browser goes away; the job goes on.
    async with aclosing(job.events(last_id, timeout=ANSWER_WITHIN_S)) as events:
        async for event in events:
            data = event.payload.model_dump_json()  # one line
            yield f"id: {job.id}/{event.id}\nevent: {event.type}\ndata: {data}\n\n"
