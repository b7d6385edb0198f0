"""Any interleaving of what workers, sweeps and operators do to jobs, against a model of it."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar
from uuid import UUID

import pytest
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import Engine, create_engine
from sqlalchemy.pool import NullPool

from sluicegate.producers.steering import CANCEL, FIND_ENDED, REOPENABLE, RETRY, Reopening
from sluicegate.shared.database import BY_KEY
from sluicegate.shared.ids import new_id
from sluicegate.shared.redis_client import make_async_redis
from sluicegate.shared.settings import Settings
from sluicegate.shared.statements import Database
from sluicegate.workers.claims import Claims, Job
from sluicegate.workers.dispatch import Attempt, Dispatcher
from sluicegate.workers.replies import Replies
from sluicegate.workers.settlement import Settlement, settle_all
from sluicegate.workers.sweep.rescuer import resolve_lost
from tests.books import untold
from tests.harness import FULL

T = TypeVar("T")

QUEUE = "general.openai"
RESERVED, COST = 100, 30

_ADD = """
INSERT INTO jobs (id, account_id, use_case, lane, queue, state, max_attempts, deadline_at,
                  published_at, request_hash)
SELECT %(id)s, id, 'general', 'interactive', 'general.openai', 'queued', 20,
       now() + interval '1 day', now(), ''
FROM accounts WHERE name = 'default'
"""
_ADD_BODY = """
INSERT INTO job_bodies (job_id, request) VALUES (%(id)s,
    '{"version": 1, "use_case": "general",
      "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]}')
"""
_ENTER = """
INSERT INTO workers (id, name, pool, lane, queues)
VALUES (%(id)s, 'w', 'openai', 'interactive', '{general.openai}')
"""
_UNPARK = "UPDATE jobs SET state = 'queued', fence = fence + 1 WHERE state = 'parked'"


class Lines:
    """A loop, and connections on it, for all examples of a run."""

    def __init__(self, settings: Settings) -> None:
        self.runner = asyncio.Runner()
        self.engine: Engine = create_engine(
            settings.database_dsn, poolclass=NullPool, isolation_level="AUTOCOMMIT"
        )
        self.connection = self.engine.connect()
        self.db = Database(settings, application_name="test", size=4, planner=BY_KEY)
        self.redis = make_async_redis(settings)
        self.replies = Replies(settings.model_copy(update={"spacing_s": 0}), self.redis)
        self.dispatcher = Dispatcher(db=self.db, max_items=100, spacing_s=0, told=untold)

    def wait(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(coroutine)

    def run(self, statement: str, **values: Any) -> list[Any]:
        result = self.connection.exec_driver_sql(statement, values)
        return list(result.all()) if result.returns_rows else []

    async def _close(self) -> None:
        await self.replies.close()
        await self.db.close()
        await self.redis.aclose()

    def close(self) -> None:
        self.wait(self._close())
        self.runner.close()
        self.connection.close()
        self.engine.dispose()


class JobStates(RuleBasedStateMachine):
    """Three jobs, two workers that may die at any moment and go on as if nothing had happened."""

    lines: Lines
    held: Bundle[Job] = Bundle("held")
    calls: Bundle[tuple[Job, Attempt]] = Bundle("calls")

    def __init__(self) -> None:
        super().__init__()
        self.jobs = [new_id() for _ in range(3)]
        for job_id in self.jobs:
            self.lines.run(_ADD, id=job_id)
            self.lines.run(_ADD_BODY, id=job_id)
        self.workers = [self._enter() for _ in range(2)]
        self.fences = dict.fromkeys(self.jobs, 0)
        self.over: dict[UUID, str] = {}
        self.opened = 0

    def teardown(self) -> None:
        # Whoever is left dies, so that the next example begins with nobody.
        self.lines.run("DELETE FROM workers")
        self.lines.run("DELETE FROM cost_entries")
        self.lines.run("DELETE FROM jobs")

    def _enter(self) -> Claims:
        worker_id = new_id()
        self.lines.run(_ENTER, id=worker_id)
        return Claims(
            db=self.lines.db,
            worker_id=worker_id,
            queues=[QUEUE],
            max_items=100,
            spacing_s=0,
            give_up_after_s=5,
        )

    @rule(target=held, worker=st.integers(0, 1), which=st.sets(st.integers(0, 2), min_size=1))
    def claim(self, worker: int, which: set[int]) -> Any:
        claims = self.workers[worker]
        found = self.lines.wait(claims.claim([self.jobs[n] for n in sorted(which)]))
        for job in found:
            (row,) = self.lines.run(
                "SELECT cancel_requested_at FROM jobs WHERE id = %(id)s", id=job.id
            )
            assert job.unwanted == (row.cancel_requested_at is not None)
        return multiple(*found)

    @rule(target=calls, job=held)
    def dispatch(self, job: Job) -> Any:
        attempt = Attempt(
            attempt_id=new_id(),
            job_id=job.id,
            worker_id=job.worker_id,
            fence=job.fence,
            number=job.attempts_used + 1,
            provider_id=new_id(),
            provider="p",
            model="m",
            reserved_nano_usd=RESERVED,
            baseline_reserved_nano_usd=RESERVED,
        )
        holds = self._holds(job)
        opened = self.lines.wait(self.lines.dispatcher.open(attempt))
        assert opened == holds
        self.opened += opened
        return multiple((job, attempt)) if opened else multiple()

    def _holds(self, job: Job) -> bool:
        (row,) = self.lines.run("SELECT state, fence FROM jobs WHERE id = %(id)s", id=job.id)
        alive = self.lines.run("SELECT FROM workers WHERE id = %(id)s", id=job.worker_id)
        return bool(alive) and (row.state, row.fence) == ("running", job.fence)

    @rule(call=calls, end=st.sampled_from(["succeeded", "failed", "queued", "parked", "void"]))
    def settle(self, call: tuple[Job, Attempt], end: str) -> None:
        job, attempt = call
        settlement: Settlement = {
            "job_id": job.id,
            "fence": job.fence,
            "job_state": "queued" if end == "void" else end,
            "attempt_id": attempt.attempt_id,
            "attempt_state": end if end in ("succeeded", "void") else "failed",
        }
        if end in ("succeeded", "failed"):
            settlement["body"] = {"state": end}
        else:
            settlement["after_s"] = 0.0
        if end != "void":
            settlement |= {
                "kind": "actual",
                "amount_nano_usd": COST,
                "baseline_nano_usd": COST,
            }
        self.lines.wait(settle_all(self.lines.db, [settlement], untold))

    @rule(worker=st.integers(0, 1))
    def die(self, worker: int) -> None:
        self.lines.run("DELETE FROM workers WHERE id = %(id)s", id=self.workers[worker].worker_id)
        self.workers[worker] = self._enter()

    @rule()
    def resolve(self) -> None:
        self.lines.wait(resolve_lost(self.lines.db, self.lines.replies, untold))

    @rule()
    def resolve_twice_at_once(self) -> None:
        async def both() -> None:
            await asyncio.gather(
                *(resolve_lost(self.lines.db, self.lines.replies, untold) for _ in range(2))
            )

        self.lines.wait(both())

    @rule(worker=st.integers(0, 1))
    def release(self, worker: int) -> None:
        self.lines.wait(self.workers[worker].release_lost())

    @rule(which=st.integers(0, 2))
    def cancel(self, which: int) -> None:
        (before,) = self._rows(which)
        self.lines.run(CANCEL, job_ids=[self.jobs[which]])
        (after,) = self._rows(which)
        match before.state:
            case "queued" | "parked":
                assert (after.state, after.fence) == ("cancelled", before.fence + 1)
            case "running":
                assert (after.state, after.fence) == ("running", before.fence)
                assert after.cancel_requested_at is not None
            case _:
                assert after == before

    @rule(which=st.integers(0, 2), late=st.booleans())
    def retry(self, which: int, late: bool) -> None:
        job_id = self.jobs[which]
        (row,) = self.lines.run(FIND_ENDED, job_id=job_id)
        # Late: somebody else has retried it meanwhile, and it has come to the same end again.
        again = Reopening(job_id=job_id, queue=QUEUE, fence=row.fence - late, deadline_s=1000)
        (told,) = self.lines.run(RETRY, **again.parameters)
        (after,) = self._rows(which)
        if row.state in REOPENABLE and not late:
            assert told.reopened
            assert (after.state, after.fence) == ("queued", row.fence + 1)
            assert (after.attempts_used, after.cancel_requested_at) == (0, None)
            del self.over[job_id]
        else:
            assert (after.state, after.fence) == (row.state, row.fence)
            assert told.reopened == (late and row.state == "queued")

    def _rows(self, which: int) -> list[Any]:
        return self.lines.run("SELECT * FROM jobs WHERE id = %(id)s", id=self.jobs[which])

    @rule()
    def unpark(self) -> None:
        self.lines.run(_UNPARK)

    @invariant()
    def fences_only_grow_and_the_end_is_the_end(self) -> None:
        for row in self.lines.run("SELECT id, fence, state FROM jobs"):
            assert row.fence >= self.fences[row.id]
            self.fences[row.id] = row.fence
            if row.state in ("succeeded", "failed", "cancelled"):
                assert self.over.setdefault(row.id, row.state) == row.state
            else:
                assert row.id not in self.over

    @invariant()
    def a_job_has_one_result_and_at_most_one_call_that_counts(self) -> None:
        for row in self.lines.run(
            "SELECT j.id, j.state, j.fence, r.body, r.fence AS result_fence,"
            " (SELECT count(*) FROM attempts a WHERE a.job_id = j.id AND a.state = 'succeeded'"
            "  ) AS succeeded, (SELECT count(*) FROM attempts a JOIN workers w"
            "  ON w.id = a.worker_id WHERE a.job_id = j.id AND a.state = 'dispatching') AS open"
            " FROM jobs j LEFT JOIN results r ON r.job_id = j.id"
        ):
            assert (row.body is not None) == (row.state in ("succeeded", "failed", "cancelled"))
            if row.body is not None:
                assert (row.body["state"], row.result_fence) == (row.state, row.fence)

    @invariant()
    def money_is_booked_once(self) -> None:
        rows = self.lines.run(
            "SELECT a.id, a.state, a.job_id,"
            " array_agg(c.kind::text ORDER BY c.kind) FILTER (WHERE c.id IS NOT NULL) AS kinds,"
            " coalesce(sum(c.amount_nano_usd), 0)::int AS booked"
            " FROM attempts a LEFT JOIN cost_entries c ON c.attempt_id = a.id GROUP BY 1, 2, 3"
        )
        assert len(rows) == self.opened
        booked = dict.fromkeys(self.jobs, 0)
        for row in rows:
            match row.state:
                case "dispatching" | "void":
                    assert (row.kinds, row.booked) == (None, 0)
                case "succeeded" | "failed":
                    assert (row.kinds, row.booked) == (["actual"], COST)
                case "unknown":
                    assert (row.kinds, row.booked) == (["estimate"], RESERVED)
                case "corrected":
                    assert row.kinds == ["correction", "estimate"]
                    assert row.booked in (COST, 0)
                case other:
                    raise AssertionError(other)
            booked[row.job_id] += row.booked
        for job in self.lines.run("SELECT id, cost_nano_usd FROM jobs"):
            assert job.cost_nano_usd == booked[job.id]


@pytest.mark.timeout(900 if FULL else 120)
def test_job_states(settings: Settings) -> None:
    lines = Lines(settings)
    machine = type("JobStatesHere", (JobStates,), {"lines": lines})
    try:
        run_state_machine_as_test(
            machine,
            settings=hypothesis_settings(
                max_examples=500 if FULL else 60,
                stateful_step_count=30,
                suppress_health_check=list(HealthCheck),
            ),
        )
    finally:
        lines.close()
