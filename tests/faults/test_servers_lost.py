"""Postgres and Valkey go away, come back, and lose everything, while jobs run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from uuid import UUID

import pytest

from sluicegate.workers.local.sandbox_control import SandboxControl
from sluicegate.workers.local.servers import LocalServers
from tests.harness import FULL, Rig, open_rig
from tests.polling import eventually

JOBS = 100 if FULL else 30
#: Longer than the beats are good for, either way.
OUTAGE_S = 90.0 if FULL else 10.0

pytestmark = pytest.mark.timeout(400 if FULL else 150)


@pytest.fixture(scope="module")
def module_rig(
    servers: LocalServers,
    _sandbox_process: SandboxControl,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Rig]:
    with open_rig(
        database_url=servers.database_url,
        redis_url=servers.redis_url,
        sandbox=_sandbox_process,
        folder=tmp_path_factory.mktemp("rig"),
        # What gives up before the outage is over must have nothing to lose.
        grace_s=2.0,
        catalogue_ttl_s=2.0,
    ) as rig:
        rig.start_sweep()
        yield rig


@pytest.fixture
def rig(module_rig: Rig, sandbox: SandboxControl) -> Rig:
    assert module_rig.sandbox is sandbox
    _serve(module_rig)
    return module_rig


def _serve(rig: Rig) -> None:
    """See to it that a worker runs: the tests here may kill it."""
    if not [service for service in rig.services if service.name.startswith("w")]:
        rig.start_worker("openai", ["general"])


def _calls_made(rig: Rig, job_ids: list[UUID]) -> None:
    def made() -> bool:
        calls = rig.calls(job_ids)
        assert len(calls) == len(job_ids), len(calls)
        return True

    eventually(made)


def _stop_in_full_swing(rig: Rig, servers: LocalServers) -> tuple[list[UUID], list[UUID]]:
    """Stop Postgres; return the jobs that are answered after that, and those anywhere else.

    Returns when the journal has those answers.
    """
    rig.sandbox.settings(latency_ms=5000, latency_jitter_ms=2000)
    slow = rig.submit("general", JOBS)
    _calls_made(rig, slow)
    rig.sandbox.settings(latency_ms=20, latency_jitter_ms=0)
    others = rig.submit("general", 5 * JOBS)
    servers.postgres.stop()
    stopped_at = time.time()
    try:
        eventually(lambda: rig.sandbox.bill()["in_flight"] == 0)
        calls = rig.calls(slow)
        late = [job_id for job_id in slow if calls[job_id][0]["finished_at"] > stopped_at]
        assert late, "this machine is too slow: all was over before Postgres was stopped"

        def kept() -> bool:
            missing = set(late) - rig.journaled()
            assert not missing, missing
            return True

        eventually(kept)
    except BaseException:
        servers.postgres.start()
        raise
    return late, others + sorted(set(slow) - set(late))


def _check_all_paid_once(rig: Rig, job_ids: list[UUID]) -> None:
    """A job may have been dispatched for a call that never left: that attempt is void."""
    rig.await_over(job_ids)
    assert rig.states(job_ids) == {"succeeded": len(job_ids)}
    assert {len(calls) for calls in rig.calls(job_ids).values()} == {1}
    rig.check_books(job_ids)
    eventually(lambda: not rig.journaled())


def test_paid_results_outlast_an_outage_of_postgres(rig: Rig, servers: LocalServers) -> None:
    stopped_at = time.monotonic()
    paid, others = _stop_in_full_swing(rig, servers)
    try:
        eventually(lambda: time.monotonic() - stopped_at > OUTAGE_S, OUTAGE_S + 10)
    finally:
        servers.postgres.start()
    _check_all_paid_once(rig, paid + others)
    rig.check_once(paid)
    # And it goes on.
    more = rig.submit("general", 3)
    rig.await_over(more)
    rig.check_once(more)


def test_paid_results_outlast_postgres_and_their_worker(rig: Rig, servers: LocalServers) -> None:
    paid, others = _stop_in_full_swing(rig, servers)
    try:
        for worker in rig.services:
            if worker.name.startswith("w"):
                worker.kill()
    finally:
        servers.postgres.start()
    _serve(rig)
    rig.await_over(paid + others)
    rig.check_once(paid)
    assert rig.states(others) == {"succeeded": len(others)}
    rig.check_books(others)
    eventually(lambda: not rig.journaled())


def test_postgres_restarts_during_load(rig: Rig, servers: LocalServers) -> None:
    rig.sandbox.settings(latency_ms=500)
    ids = rig.submit("general", 4 * JOBS)
    _calls_made(rig, ids[:1])
    servers.postgres.stop()
    servers.postgres.start()
    rig.await_over(ids)
    rig.check_once(ids)


def test_valkey_restarts_during_load(rig: Rig, servers: LocalServers) -> None:
    rig.sandbox.settings(latency_ms=1500)
    first = rig.submit("general", JOBS)
    _calls_made(rig, first)
    servers.valkey.stop()
    servers.valkey.start()
    more = rig.submit("general", JOBS, stream=True)
    rig.await_over([*first, *more])
    rig.check_once([*first, *more])


def test_valkey_is_flushed_during_load(rig: Rig) -> None:
    rig.sandbox.settings(latency_ms=1500)
    # More than fit into the worker at once: messages wait, and are lost.
    ids = rig.submit("general", rig.settings.jobs_in_flight + JOBS)
    _calls_made(rig, ids[: JOBS // 2])
    rig.redis.flushall()
    more = rig.submit("general", JOBS)
    rig.await_over([*ids, *more])
    rig.check_once([*ids, *more])
