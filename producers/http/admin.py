"""Routes for administrators: gates and pauses, and with them those of the other modules."""

from __future__ import annotations

from datetime import datetime
from typing import Final, Literal
from uuid import UUID

import redis
from sqlalchemy import Connection
from starlette.responses import Response

from sluicegate.producers.http import admin_accounts, admin_keys, admin_providers
from sluicegate.producers.http.admin_providers import ProviderOf
from sluicegate.producers.http.administering import at_gates, change, look, redis_client
from sluicegate.producers.http.callers import Rule
from sluicegate.producers.http.routes import Answer, Handler, Route, Visit, json_response
from sluicegate.producers.http.shapes import Line, Shape, Told
from sluicegate.shared.accounts import account_id_of
from sluicegate.shared.admission import states
from sluicegate.shared.gate_changes import (
    Lever,
    PauseKind,
    end_suspensions,
    list_pauses,
    pull_lever,
    set_pause,
)
from sluicegate.shared.gate_views import describe, read_gates
from sluicegate.shared.pausing import pause_subject
from sluicegate.shared.provider_changes import find_provider

# Breakers


class SuspensionTold(Told):
    """An account that does without the provider for so long."""

    account: str
    left_s: float


class BreakerTold(Told):
    """The gate of a provider: what was ordered, and how it is."""

    id: UUID
    name: str
    #: Whose provider row it is; null: everybody's.
    account: str | None
    state: Literal["closed", "open", "half_open", "paused", "forced_open", "disabled"]
    since: datetime | None
    breaker: Literal["closed", "open", "half_open"]
    lever: Lever
    paused: bool
    generation: int
    half_open_in_s: float
    probes: int
    calls: int
    failures: int
    streak: int
    cooldown_left_s: float
    in_flight: int
    in_flight_bulk: int
    concurrency_cap: int | None
    requests_per_minute: int | None
    tokens_per_minute: int | None
    input_tokens_per_minute: int | None
    output_tokens_per_minute: int | None
    max_concurrent: int | None
    suspended: list[SuspensionTold]


class BreakersTold(Told):
    """The gates of all active providers."""

    breakers: list[BreakerTold]


class Reset(ProviderOf):
    """Whose provider row it is, and who is to use it again."""

    #: Only let this account, which is suspended, use it again.
    suspended: Line | None = None


class LeverTold(Told):
    """What a lever was set to, and whether that was news."""

    name: str
    account: str | None
    lever: Lever
    changed: bool


class ResetTold(LeverTold):
    """A breaker that is left to itself again."""

    #: How many suspended accounts were let in again.
    lifted: int


async def breakers(visit: Visit) -> Response:
    """List gates."""
    prefix = visit.settings.redis_prefix
    # Redis is asked while the connection to Postgres is open: both are of one moment.
    found = await look(visit, lambda line: _read_gates(visit, line, prefix))
    return json_response({"breakers": found})


def _read_gates(visit: Visit, line: Connection, prefix: str) -> list[BreakerTold]:
    with redis_client(visit.settings) as client:
        return [BreakerTold.of(describe(one)) for one in read_gates(line, client, prefix)]


def _pulling(lever: Lever) -> Handler:
    async def pull(visit: Visit) -> Response:
        name, asked = visit.request.path_params["name"], visit.query(ProviderOf)

        def work(line: Connection) -> bool:
            return pull_lever(line, find_provider(line, name, asked.account), lever)

        changed = await change(visit, work, catalogue=True)
        told = LeverTold(name=name, account=asked.account, lever=lever, changed=changed)
        return json_response(told)

    return pull


async def reset(visit: Visit) -> Response:
    """Close a breaker and leave it to itself, end its rest, let suspended accounts use it again."""
    name, asked = visit.request.path_params["name"], visit.query(Reset)
    prefix = visit.settings.redis_prefix

    def work(line: Connection) -> tuple[UUID, UUID | None, bool]:
        row = find_provider(line, name, asked.account)
        account_id = account_id_of(line, asked.suspended)
        changed = account_id is None and pull_lever(line, row, "auto")
        end_suspensions(line, row.id, account_id)
        return row.id, account_id, changed

    row_id, account_id, changed = await change(visit, work, catalogue=True)

    def at_redis(client: redis.Redis) -> int:
        if account_id is None:
            states.reset(client, prefix, row_id, reason="reset by command")
        return states.lift_suspension(
            client, prefix, row_id, account_id, reason="lifted by command"
        )

    lifted = await at_gates(visit, at_redis)
    return json_response(
        ResetTold(name=name, account=asked.account, lever="auto", changed=changed, lifted=lifted)
    )


# Pauses


class Subject(Shape):
    """What is to be paused, or let go on."""

    kind: PauseKind
    #: The provider's or use case's name, or the account's name or id.
    name: Line
    #: Of a provider: whose row it is; everybody's if not given.
    account: Line | None = None


class PauseTold(Told):
    """What is paused, and since when."""

    kind: PauseKind
    name: str
    account: str | None
    since: datetime


class PausesTold(Told):
    """All that is paused, the newest first."""

    paused: list[PauseTold]


class PauseStateTold(Told):
    """Whether it is paused now, and whether that is news."""

    kind: PauseKind
    name: str
    account: str | None
    state: Literal["paused", "running"]
    changed: bool


async def pauses(visit: Visit) -> Response:
    """List what is paused."""
    found = await look(visit, list_pauses)
    return json_response({"paused": [PauseTold.of(one) for one in found]})


def _pausing(*, paused: bool) -> Handler:
    async def switch(visit: Visit) -> Response:
        asked = await visit.read(Subject)
        of = asked.account if asked.kind == "provider" else None

        def work(line: Connection) -> tuple[str, bool]:
            subject, name = pause_subject(line, asked.kind, asked.name, of)
            return name, set_pause(line, asked.kind, subject, paused=paused)

        name, changed = await change(visit, work, catalogue=True)
        state: Literal["paused", "running"] = "paused" if paused else "running"
        told = PauseStateTold(kind=asked.kind, name=name, account=of, state=state, changed=changed)
        return json_response(told)

    return switch


def _levers() -> tuple[Route, ...]:
    words: tuple[tuple[str, Lever, str], ...] = (
        ("force-open", "forced_open", "Send no call to a provider until its breaker is reset"),
        ("disable", "disabled", "Have a breaker never open until it is reset"),
    )
    return tuple(
        Route(
            method="POST",
            path=f"/api/breakers/{{name}}/{word}",
            rule=Rule.ADMIN,
            handler=_pulling(lever),
            summary=summary,
            tag="gates",
            query=ProviderOf,
            answers={200: Answer(description="How the lever stands.", model=LeverTold)},
        )
        for word, lever, summary in words
    )


_PAUSE: Final = Answer(description="Whether it is paused now.", model=PauseStateTold)

ROUTES: Final[tuple[Route, ...]] = (
    *admin_keys.ROUTES,
    *admin_accounts.ROUTES,
    *admin_providers.ROUTES,
    Route(
        method="GET",
        path="/api/breakers",
        rule=Rule.ADMIN,
        handler=breakers,
        summary="List the gates of providers: breakers, limits, suspended accounts",
        tag="gates",
        answers={200: Answer(description="The gates of active providers.", model=BreakersTold)},
    ),
    *_levers(),
    Route(
        method="POST",
        path="/api/breakers/{name}/reset",
        rule=Rule.ADMIN,
        handler=reset,
        summary="Close a breaker, and leave it to itself",
        tag="gates",
        query=Reset,
        answers={200: Answer(description="What was reset.", model=ResetTold)},
    ),
    Route(
        method="GET",
        path="/api/pauses",
        rule=Rule.ADMIN,
        handler=pauses,
        summary="List what is paused",
        tag="gates",
        answers={200: Answer(description="All that is paused.", model=PausesTold)},
    ),
    Route(
        method="POST",
        path="/api/pause",
        rule=Rule.ADMIN,
        handler=_pausing(paused=True),
        summary="Stop new calls to a provider, or of an account or a use case, within 2 s",
        tag="gates",
        body=Subject,
        answers={200: _PAUSE},
    ),
    Route(
        method="POST",
        path="/api/resume",
        rule=Rule.ADMIN,
        handler=_pausing(paused=False),
        summary="Let go on what was paused",
        tag="gates",
        body=Subject,
        answers={200: _PAUSE},
    ),
)
