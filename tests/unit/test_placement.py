"""Placement: who takes a job now; the gates are real, on a fake Redis that knows Lua."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import pytest
from fakeredis import aioredis

from sluicegate.shared.catalogue import Catalogue, Pauses, Provider, UseCase
from sluicegate.shared.errors import ErrorClass, UnknownPrice
from sluicegate.shared.jobs import Lane, build_spec
from sluicegate.shared.settings import Settings
from sluicegate.workers.claims import Job
from sluicegate.workers.estimates import TokenEstimates
from sluicegate.workers.gates import Gates
from sluicegate.workers.placement import HandOff, Held, OverBudget, Placement, Plan, after_failure
from sluicegate.workers.presence import Presence
from tests.gate_row import provider

_NOTHING = Pauses()
OPENAI, ANTHROPIC, LARGE = UUID(int=11), UUID(int=12), UUID(int=13)


class Served:
    """Answers the one question that presence asks of Postgres."""

    def __init__(self, *queues: str) -> None:
        self._queues = queues

    async def execute(self, _sql: str, **_values: Any) -> list[Any]:
        return [type("Row", (), {"queue": queue}) for queue in self._queues]


def _job(queue: str = "voice.openai", **values: Any) -> Job:
    given: dict[str, Any] = {
        "id": UUID(int=1),
        "claim_id": UUID(int=2),
        "worker_id": UUID(int=3),
        "fence": 1,
        "account_id": UUID(int=4),
        "use_case": "voice",
        "lane": Lane.INTERACTIVE,
        "queue": queue,
        "attempts_used": 0,
        "unknown_attempts": 0,
        "max_attempts": 5,
        "cost_nano_usd": 0,
        "created_at": datetime(2026, 11, 23, tzinfo=UTC),
        "deadline_s": asyncio.get_running_loop().time() + 60,
        "spec": build_spec("voice", "hi"),
    }
    return Job(**(given | values))


def _row(id_: UUID, pool: str, **values: Any) -> Provider:
    model = "gpt-6-luna" if pool == "openai" else "claude-haiku-5-5"
    use_case = frozenset({"voice"})
    given = {"id": id_, "name": f"{pool}-{id_.int}", "provider": pool, "model": model}
    return provider(**(given | {"use_case": use_case} | values))


def _catalogue(*rows: Provider, prefer: Any = "priority", pauses: Pauses = _NOTHING) -> Catalogue:
    voice = UseCase(
        name="voice", description="", prefer=prefer, max_tokens=100, unknown_policy="fail"
    )
    return Catalogue(rows, {"voice": voice}, pauses=pauses)


class Desk:
    """A worker's placement, for one catalogue."""

    def __init__(self, *served: str) -> None:
        settings = Settings(_env_file=None, spacing_s=0)
        self.gates = Gates(client=aioredis.FakeRedis(), settings=settings)
        self.placement = Placement(
            settings=settings,
            gates=self.gates,
            presence=Presence(db=Served(*served), dead_after_s=15),  # type: ignore[arg-type]
            estimates=TokenEstimates(),
        )

    async def find(
        self, job: Job, catalogue: Catalogue, first_token_ms: dict[UUID, float] | None = None
    ) -> Plan | HandOff | OverBudget | Held:
        async def read() -> Catalogue:
            return catalogue

        known = first_token_ms or {}
        return await self.placement.find(job, read, said={}, first_token_ms=known)


@pytest.mark.parametrize(
    ("queue", "own"), [("voice.openai", OPENAI), ("voice.anthropic", ANTHROPIC)]
)
async def test_nobody_hands_off_to_rows_that_he_has_not_measured(queue: str, own: UUID) -> None:
    catalogue = _catalogue(_row(OPENAI, "openai"), _row(ANTHROPIC, "anthropic"), prefer="fastest")
    desk = Desk("voice.openai", "voice.anthropic")
    place = await desk.find(_job(queue), catalogue, {own: 400.0})
    assert isinstance(place, Plan)
    assert place.provider.id == own


async def test_a_price_that_is_not_known_takes_no_slot() -> None:
    row = _row(OPENAI, "openai", model="nobody-knows-it", max_concurrent=1)
    desk = Desk()
    for _ in range(2):
        with pytest.raises(UnknownPrice):
            await desk.find(_job(), _catalogue(row))
    priced = replace(row, price_override={"input": 1.0, "output": 1.0})
    assert isinstance(await desk.find(_job(), _catalogue(priced)), Plan)


async def test_an_open_row_of_another_pool_gets_the_job_and_who_has_said_no() -> None:
    catalogue = _catalogue(
        _row(OPENAI, "openai", breaker="forced_open"), _row(ANTHROPIC, "anthropic", priority=2)
    )
    served = await Desk("voice.anthropic").find(_job(), catalogue)
    assert served == HandOff("voice.anthropic", (OPENAI,))
    alone = await Desk().find(_job(), catalogue)
    assert isinstance(alone, Held)
    assert alone.why == (
        "openai-11: its breaker is forced open; anthropic-12: no worker serves voice.anthropic"
    )


async def test_nobody_stands_at_a_gate_past_his_deadline() -> None:
    row = _row(OPENAI, "openai", requests_per_minute=60)
    desk = Desk()
    for _ in range(2):
        while isinstance(place := await desk.find(_job(deadline_s=0.0), _catalogue(row)), Plan):
            continue
    assert isinstance(place, Held)
    assert place.why == "openai-11: it is at its limit of requests a minute"


@pytest.mark.parametrize(
    ("pauses", "why"),
    [
        (Pauses(use_cases=frozenset({"voice"})), "the use case voice is paused"),
        (Pauses(accounts=frozenset({UUID(int=4)})), "the account is paused"),
        (Pauses(providers=frozenset({OPENAI})), "openai-11: it is paused"),
    ],
)
async def test_what_is_paused_waits(pauses: Pauses, why: str) -> None:
    place = await Desk().find(_job(), _catalogue(_row(OPENAI, "openai"), pauses=pauses))
    assert place == Held(900.0, why)


async def test_a_prompt_too_long_goes_only_where_more_fits() -> None:
    catalogue = _catalogue(
        _row(OPENAI, "openai"),
        _row(ANTHROPIC, "openai", model="gpt-4o", context_tokens=100_000),
        _row(LARGE, "openai", model="gpt-6.1-sol", context_tokens=400_000, priority=9),
    )
    desk = Desk()
    job = _job()
    first = await desk.find(job, catalogue)
    assert isinstance(first, Plan)
    taught = after_failure(job, first, ErrorClass.CONTEXT_TOO_LONG, 0)
    second = await desk.find(taught, catalogue)
    assert isinstance(second, Plan)
    assert second.provider.id == LARGE
    taught = after_failure(taught, second, ErrorClass.CONTEXT_TOO_LONG, 0)
    last = await desk.find(taught, catalogue)
    assert isinstance(last, Held)
    assert (last.after_s, last.error_class) == (None, ErrorClass.CONTEXT_TOO_LONG)
