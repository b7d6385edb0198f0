"""Health: whether this process lives, and whether it can take work."""

from __future__ import annotations

from typing import Final, Literal

import redis
from pydantic import BaseModel
from starlette.responses import Response

from sluicegate.producers.http.callers import Rule
from sluicegate.producers.http.problems import Problem
from sluicegate.producers.http.routes import Answer, Route, Visit, json_response
from sluicegate.shared.database import DATABASE_ERRORS, check_schema, explain


class Live(BaseModel):
    """The process answers."""

    status: Literal["live"] = "live"


class Ready(BaseModel):
    """The process can take work."""

    status: Literal["ready"] = "ready"


async def live(visit: Visit) -> Response:
    """Say that the process answers."""
    del visit
    return json_response(Live())


async def ready(visit: Visit) -> Response:
    """Look whether Postgres answers with this version's schema, and Redis at all."""
    services = visit.services
    if services.streams.stopping.is_set():
        raise Problem(503, "stopping", "this process is about to stop", retry_after_s=1)
    try:
        async with services.engine.connect() as connection:
            await connection.run_sync(check_schema)
    except DATABASE_ERRORS as error:
        raise explain(error) from error
    try:
        await services.redis.ping()
    except (redis.RedisError, OSError):
        raise Problem(
            503, "unavailable", "Redis does not answer; check SLUICE_REDIS_URL", retry_after_s=2
        ) from None
    return json_response(Ready())


ROUTES: Final = (
    Route(
        method="GET",
        path="/health/live",
        rule=Rule.ANYONE,
        handler=live,
        summary="Whether the process answers",
        tag="health",
        answers={200: Answer(description="It does.", model=Live)},
    ),
    Route(
        method="GET",
        path="/health/ready",
        rule=Rule.ANYONE,
        handler=ready,
        summary="Whether work is taken: Postgres with this version's schema, and Redis, answer",
        tag="health",
        answers={200: Answer(description="It is.", model=Ready)},
    ),
)
