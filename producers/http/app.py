"""The application: the table of routes behind one way in, which knows callers and problems."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager
from typing import Final

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route as Path

from sluicegate.producers.async_client import AsyncSluice
from sluicegate.producers.http import (
    admin,
    chat,
    client_budgets,
    client_jobs,
    health,
    jobs,
    llm,
    messages,
    models,
    openapi,
    usage,
)
from sluicegate.producers.http.backlog import Backlog
from sluicegate.producers.http.callers import Caller, Rule
from sluicegate.producers.http.gate import REQUEST_ID, Gate, log_defect
from sluicegate.producers.http.idempotency import HEADER as KEY_HEADER
from sluicegate.producers.http.problems import Problem, problem_of
from sluicegate.producers.http.rates import Rates
from sluicegate.producers.http.request_body import Bodies
from sluicegate.producers.http.routes import (
    JOB_HEADER,
    NATIVE,
    Door,
    Route,
    Services,
    Visit,
    json_response,
)
from sluicegate.producers.http.shapes import job_url
from sluicegate.producers.http.streams import Streams
from sluicegate.shared.database import make_async_engine
from sluicegate.shared.errors import SluiceError
from sluicegate.shared.redis_client import make_async_redis
from sluicegate.shared.settings import Settings

log = logging.getLogger(__name__)

#: Every route there is, but for the document's own.
ROUTES: Final[tuple[Route, ...]] = (
    *llm.ROUTES,
    *jobs.ROUTES,
    *client_jobs.ROUTES,
    *client_budgets.ROUTES,
    *usage.ROUTES,
    *chat.ROUTES,
    *messages.ROUTES,
    *models.ROUTES,
    *health.ROUTES,
    *admin.ROUTES,
)

#: Says whose request it is; None without credentials. Raises `Problem` for credentials that are
#: no good.
Identify = Callable[[Request], Awaitable[Caller | None]]

#: Connections to Postgres and to Redis for what is not a job.
_OWN_POOL: Final = 4
#: What a request may take beyond the longest wait for a job.
_MARGIN_S: Final = 60.0

#: What a page of another origin may read of an answer's headers.
_EXPOSED: Final = (REQUEST_ID, JOB_HEADER, KEY_HEADER, "Location", "Retry-After", "x-should-retry")

_WORDS: Final[Mapping[int, tuple[str, str]]] = {
    404: ("not_found", "there is nothing at this path"),
    405: ("method_not_allowed", "this path does not take this method"),
}


def make_app(
    settings: Settings,
    *,
    identify: Identify,
    routes: Sequence[Route] = ROUTES,
) -> Starlette:
    """Build the ASGI application; its connections open when it starts and close when it ends.

    What is running has its `Services` as `app.state.services`.
    """

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        engine = make_async_engine(settings, application_name="sluice http", pool_size=_OWN_POOL)
        redis = make_async_redis(settings, pool_size=_OWN_POOL)
        backlog = Backlog(engine, settings)
        try:
            async with AsyncSluice(settings) as client:
                app.state.services = Services(
                    client=client,
                    engine=engine,
                    redis=redis,
                    rates=Rates(redis, settings),
                    backlog=backlog,
                    streams=Streams(settings),
                    bodies=Bodies(settings),
                )
                yield
        finally:
            await backlog.close()
            await redis.aclose()
            await engine.dispose()

    every = (*routes, *openapi.routes(routes))
    by_path: dict[str, dict[str, Route]] = {}
    for route in every:
        by_path.setdefault(route.path, {})[route.method] = route
    paths = [
        Path(path, _endpoint(by_method, settings, identify), methods=list(by_method))
        for path, by_method in by_path.items()
    ]

    async def unmatched(request: Request, error: Exception) -> Response:
        if not isinstance(error, HTTPException):
            raise TypeError(type(error).__name__)
        code, message = _WORDS.get(error.status_code, ("invalid_request", error.detail))
        problem = Problem(error.status_code, code, message, headers=error.headers)
        return _refused(problem, _door(request.url.path, every), request.state.request_id)

    app = Starlette(
        routes=paths,
        lifespan=lifespan,
        middleware=[Middleware(Gate), *_cors(settings, every)],
        exception_handlers={HTTPException: unmatched},
    )
    # A redirect would be an answer that no route of the table gives.
    app.router.redirect_slashes = False
    return app


def _endpoint(
    by_method: Mapping[str, Route], settings: Settings, identify: Identify
) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        method = request.method
        route = by_method["GET" if method == "HEAD" else method]
        request.state.route = route.path
        request_id: str = request.state.request_id  # the gate has set it
        services: Services = request.app.state.services
        try:
            async with asyncio.timeout(settings.http_max_wait_s + _MARGIN_S):
                caller = _admitted(route, await identify(request))
                if caller is not None:
                    await services.rates.take(caller.subject)
                with services.streams.take() if route.is_stream else ExitStack() as place:
                    visit = Visit(
                        request=request,
                        request_id=request_id,
                        caller=caller,
                        services=services,
                        settings=settings,
                        place=place,
                    )
                    return _marked(await route.handler(visit), route.door, request_id)
        except Exception as error:  # noqa: BLE001 - whatever it is, the caller gets an answer
            problem = _problem(error, route.door, getattr(request.state, "job_id", None))
            if problem.status == 500:
                log_defect(error, request_id)
            return _refused(problem, route.door, request_id)

    return endpoint


def _problem(error: Exception, door: Door, job_id: str | None) -> Problem:
    """Return what is told of an error; job_id: what was submitted before."""
    match error:
        case Problem():
            problem = error
        case SluiceError():
            problem = problem_of(error, door.names)
        case TimeoutError() if job_id is not None:
            goes_on = f"the job goes on; its answer will be at {job_url(job_id)}"
            problem = Problem(504, "still_running", goes_on)
        case TimeoutError():
            problem = Problem(503, "unavailable", "this took too long; try again", retry_after_s=5)
        case _:
            problem = problem_of(SluiceError())
    problem.job_id = problem.job_id or job_id
    return problem


def _admitted(route: Route, caller: Caller | None) -> Caller | None:
    if route.rule is Rule.ANYONE:
        return caller
    if caller is None:
        raise Problem(
            401,
            "unauthorized",
            "no credentials: send an API key or a token as `Authorization: Bearer …`",
            headers={"WWW-Authenticate": "Bearer"},
        )
    if not route.rule.allows(caller.role):
        raise Problem(
            403, "forbidden", f"this needs the role {route.rule}, and the caller is {caller.role}"
        )
    return caller


def _refused(problem: Problem, door: Door, request_id: str) -> Response:
    if door.last_word is not None:
        door.last_word(problem)
    headers = problem.headers
    if problem.job_id is not None:
        headers |= {JOB_HEADER: problem.job_id, "Location": job_url(problem.job_id)}
    response = json_response(door.error(problem, request_id), problem.status, headers)
    return _marked(response, door, request_id)


def _marked(response: Response, door: Door, request_id: str) -> Response:
    """Have an answer carry the request's id where the door's clients look for it."""
    if door.request_id_header is not None:
        response.headers[door.request_id_header] = request_id
    return response


def _door(path: str, routes: Sequence[Route]) -> Door:
    """Return the door that a path without a route belongs to, by how it begins."""
    steps = path.split("/")
    for depth in range(len(steps), 1, -1):
        begin = steps[:depth]
        for route in routes:
            if route.path.split("/")[:depth] == begin:
                return route.door
    return NATIVE


def _cors(settings: Settings, routes: Sequence[Route]) -> list[Middleware]:
    origins = [one.strip() for one in settings.http_cors_origins.split(",") if one.strip()]
    if not origins:
        return []
    ids = {name for route in routes if (name := route.door.request_id_header) is not None}
    return [
        Middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=sorted({route.method for route in routes}),
            allow_headers=["*"],
            expose_headers=[*_EXPOSED, *sorted(ids)],
            max_age=600,
        )
    ]
