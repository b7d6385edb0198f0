"""A route: what it is for, who may use it, what it takes and answers. All stand in one table.

The table is what requests are matched against, what the OpenAPI document is written from, and what
a test walks through with every role.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, TypeVar, Unpack

import orjson
from pydantic import BaseModel, ValidationError
from starlette.requests import Request
from starlette.responses import Response

from sluicegate.producers.http.backlog import Backlog
from sluicegate.producers.http.callers import Caller, Rule
from sluicegate.producers.http.idempotency import HEADER as KEY_HEADER
from sluicegate.producers.http.idempotency import PATTERN as KEY_PATTERN
from sluicegate.producers.http.idempotency import check_key, stored_key
from sluicegate.producers.http.problems import Problem, ProblemTold, body_of, invalid, wrong
from sluicegate.producers.http.rates import Rates
from sluicegate.producers.http.request_body import Bodies, check_values
from sluicegate.producers.http.streams import COMMENT, RETRY_HINT, Stream, Streams
from sluicegate.producers.submission import use_case_of
from sluicegate.shared.audit import Actor, sign
from sluicegate.shared.database import DATABASE_ERRORS, explain
from sluicegate.shared.errors import NotFound
from sluicegate.shared.settings import Settings

if TYPE_CHECKING:
    import redis.asyncio
    from sqlalchemy import Connection
    from sqlalchemy.ext.asyncio import AsyncEngine

    from sluicegate.producers.async_client import AsyncSluice
    from sluicegate.producers.handles import AsyncJobHandle
    from sluicegate.producers.submission import JobOptions, Prompt
    from sluicegate.producers.views import JobView
    from sluicegate.shared.jobs import Result

T = TypeVar("T")
Body = TypeVar("Body", bound=BaseModel)

JSON: Final = "application/json"
SSE: Final = "text/event-stream"
TEXT: Final = "text/plain"

#: Tells the job that an answer comes from.
JOB_HEADER: Final = "X-Sluice-Job-Id"


def json_response(
    content: object, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """Answer with JSON; `content` may hold what orjson takes, and pydantic models."""
    return Response(
        orjson.dumps(content, default=_dump),
        status_code=status,
        headers=dict(headers or {}),
        media_type=JSON,
    )


def _dump(value: object) -> object:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", by_alias=True)
    raise TypeError(type(value).__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """What all requests of a process share."""

    client: AsyncSluice
    #: Small pools of the process's own, so that it is not held up by what jobs ask.
    engine: AsyncEngine
    redis: redis.asyncio.Redis
    rates: Rates
    backlog: Backlog
    streams: Streams
    bodies: Bodies


@dataclass(frozen=True, slots=True, kw_only=True)
class Visit:
    """One request on its way through a handler."""

    request: Request
    #: Given or made here; on the response, in logs and in the job.
    request_id: str
    #: Of a route that anyone may use: whoever has no credentials is nobody.
    caller: Caller | None
    services: Services
    settings: Settings
    #: Among what this process holds open, on a route that is a stream; a stream takes it over.
    place: ExitStack = field(default_factory=ExitStack)

    @property
    def client(self) -> AsyncSluice:
        """What jobs are submitted and read with."""
        return self.services.client

    @property
    def known(self) -> Caller:
        """The caller, on a route that needs one."""
        if self.caller is None:
            raise TypeError("this route is for anyone")
        return self.caller

    def accepts(self, media_type: str) -> bool:
        """Whether the request names this media type among those it wants."""
        return media_type in self.request.headers.get("accept", "").lower()

    # Reading

    async def read(self, model: type[Body]) -> Body:
        """Read the body as this model, whatever its content type says; raise `Problem`.

        pydantic's parser refuses what is nested more than 200 deep.
        """
        content = await self.body()
        check_values(content)
        try:
            return model.model_validate_json(content or b"{}")
        except ValidationError as error:
            raise invalid(error, _loads(content)) from None

    def query(self, model: type[Body]) -> Body:
        """Read the parameters of the query as this model; raise `Problem`."""
        given = dict(self.request.query_params)
        if "" in given:
            raise wrong("query", "has a parameter without a name")
        for name, value in given.items():
            if "\0" in value:
                raise wrong(name, "must be text without control characters")
        try:
            return model.model_validate_strings(given)
        except ValidationError as error:
            raise invalid(error, given) from None

    async def body(self) -> bytes:
        """Read the body; raise `Problem` if it is longer, or slower, than the settings allow."""
        return await self.services.bodies.read(self.request)

    # Jobs

    async def submit(
        self, use_case: str | None, prompt: Prompt, **options: Unpack[JobOptions]
    ) -> AsyncJobHandle:
        """Accept a job of the caller's account, in the caller's name; its errors are the client's.

        The header `Idempotency-Key` counts unless `options` have a key. Raises `Problem` (429)
        while jobs of this use case wait for too long already.
        """
        caller = self.known
        await self.check_backlog(use_case, prompt, options)
        key = options.get("idempotency_key") or self.request.headers.get(KEY_HEADER)
        if key is not None:
            options["idempotency_key"] = stored_key(check_key(key), caller)
        options["account"] = str(caller.account_id)
        options["submitted_by"] = caller.subject
        options["request_id"] = self.request_id
        handle = await self.client.submit(use_case, prompt, **options)  # type: ignore[arg-type,unused-ignore]
        # Whatever goes wrong from here on is told with it.
        self.request.state.job_id = str(handle.id)
        return handle

    async def check_backlog(
        self, use_case: str | None, prompt: Prompt, options: JobOptions
    ) -> None:
        """Raise `Problem` (429) while jobs like this one wait for too long; also `InvalidJob`."""
        backlog = self.services.backlog
        if options.get("lane") == "bulk" or not backlog.is_late():
            return
        if use_case is None:
            # Checks the whole request, which may be long: only while it matters.
            use_case = await asyncio.to_thread(use_case_of, prompt, options)
        backlog.check(use_case)

    async def wait(self, handle: AsyncJobHandle, seconds: float) -> Result | None:
        """Wait for a job; None if it goes on after so long, its client left, or the process stops.

        Raises as `AsyncJobHandle.result` does.
        """
        try:
            async with self.patience(seconds):
                return await handle.result()
        except TimeoutError:
            return None

    def patience(self, seconds: float) -> AbstractAsyncContextManager[None]:
        """Limit a wait of a route that is a stream, once the body has been read.

        Raises `TimeoutError` after so long, when the client has left, and when the process stops.
        """
        most_s = min(seconds, self.settings.http_max_wait_s)
        return self.services.streams.patience(most_s, self.request.receive)

    async def job(self, job_id: str) -> JobView:
        """Look at a job; one that the caller may not read raises what an unknown one does."""
        view = await self.client.get(job_id)
        if not self.known.may_read(account_id=view.account_id, submitted_by=view.submitted_by):
            raise NotFound(f"there is no job {view.id}")
        return view

    # What commands do, too

    async def look(self, work: Callable[[Connection], T]) -> T:
        """Do work that reads the database; raise `SluiceError`."""
        try:
            async with self.services.engine.connect() as connection:
                return await connection.run_sync(work)
        except DATABASE_ERRORS as error:
            raise explain(error) from error

    async def change(self, work: Callable[[Connection], T]) -> T:
        """Do work that changes the database, in one transaction and in the caller's name."""
        actor = Actor(name=self.known.subject, request_id=self.request_id)

        def signed(connection: Connection) -> T:
            sign(connection, actor)
            return work(connection)

        try:
            async with self.services.engine.connect() as connection:
                await connection.execution_options(isolation_level="READ COMMITTED")
                async with connection.begin():
                    return await connection.run_sync(signed)
        except DATABASE_ERRORS as error:
            raise explain(error) from error

    # Answers that stay open

    def stream(
        self,
        pieces: AsyncGenerator[bytes, None],
        *,
        media_type: str = SSE,
        headers: Mapping[str, str] | None = None,
    ) -> Response:
        """Answer piece by piece, on a route that is a stream.

        Server-sent events have comments in silence, and a hint to come back when the process stops
        or the stream is too old. What is in another form is cut then.
        """
        is_sse = media_type == SSE
        return Stream(
            self.services.streams,
            self.place,
            pieces,
            media_type=media_type,
            headers=headers,
            keep_alive=COMMENT if is_sse else b"",
            farewell=RETRY_HINT if is_sse else None,
        )


def _loads(content: bytes) -> object:
    try:
        return orjson.loads(content)
    except orjson.JSONDecodeError:
        return None


Handler = Callable[[Visit], Awaitable[Response]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Door:
    """The manners of a protocol: how its routes say that something went wrong."""

    name: str
    #: The body of an error, from what is wrong and the request's id.
    error: Callable[[Problem, str], dict[str, Any]]
    #: What that body is, for the document.
    error_model: Any = None
    #: What its callers call the fields that we call otherwise, by our name.
    names: Mapping[str, str] = field(default_factory=dict)
    #: The header that carries the request's id, besides `X-Request-Id`.
    request_id_header: str | None = None
    #: Changes a problem before it is told, for clients that would try again where it gains nothing.
    last_word: Callable[[Problem], None] | None = None


#: What the native routes call the fields of a job, by our name.
NATIVE_NAMES: Final[Mapping[str, str]] = {
    "use_case": "useCase",
    "max_tokens": "maxTokens",
    "tool_choice": "toolChoice",
    "parallel_tool_calls": "parallelToolCalls",
    "response_format": "responseFormat",
    "top_p": "topP",
    "max_attempts": "maxAttempts",
    "reply_to": "replyTo",
    "idempotency_key": KEY_HEADER,
    "request_id": "X-Request-Id",
    "last_id": "Last-Event-ID",
    "job": "body",
}

NATIVE: Final = Door(name="sluicegate", error=body_of, error_model=ProblemTold, names=NATIVE_NAMES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One way in which a route answers."""

    description: str
    #: What JSON holds; None: the route's other media types only, or no body.
    model: Any = None
    #: Other media types that it may come in.
    media: tuple[str, ...] = ()
    #: What the data of its server-sent events is.
    event: Any = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """A header that a route reads, for the document."""

    name: str
    description: str
    pattern: str


IDEMPOTENCY_KEY: Final = Header(
    name=KEY_HEADER,
    description="The same key and request give the same job, however often they are sent.",
    pattern=KEY_PATTERN,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """One method on one path."""

    method: str
    #: With `{names}` of its parameters, which are text.
    path: str
    rule: Rule
    handler: Handler
    #: One line for the document.
    summary: str
    door: Door = NATIVE
    #: Its group in the document.
    tag: str = "jobs"
    body: type[BaseModel] | None = None
    query: type[BaseModel] | None = None
    headers: tuple[Header, ...] = ()
    #: What a success is, by status; problems are the door's and every route has them.
    answers: Mapping[int, Answer] = field(default_factory=dict)
    #: Whether its answers may stay open, or wait for a job: each request counts against the cap on
    #: streams, from before its body is read and its job stored until the answer has ended.
    is_stream: bool = False
