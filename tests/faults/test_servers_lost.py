"""Postgres and Valkey go away, come back, and lose everything, while jobs run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID

import pytest

from sluicegate.shared import migrations
from sluicegate.shared.settings import Settings
from sluicegate.workers.local.sandbox_control import SandboxControl
from sluicegate.workers.local.servers import LocalServers
from tests.harness import FULL, Rig, open_rig
from tests.polling import eventually

JOBS = 100 if FULL else 30
#: Longer than the beats are good for, either way.
OUTAGE_S = 90.0 if FULL else 5.0

pytestmark = pytest.mark.timeout(400 if FULL else 150)


@pytest.fixture(scope="module")
def servers(server_folder: Path) -> Iterator[LocalServers]:
    """Return servers that may be stopped: the other tests' go on."""
    with LocalServers(server_folder / "lost", fsync=False) as servers:
        given = Settings(_env_file=None, database_url=servers.database_url)
        migrations.upgrade(given)
        yield servers


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


def _answered(rig: Rig, job_ids: list[UUID]) -> None:
    def answered() -> bool:
        calls = [call for calls in rig.calls(job_ids).values() for call in calls]
        return all(call["finished_at"] for call in calls)

    eventually(answered)


def _journaled(rig: Rig, count: int) -> None:
    def kept() -> bool:
        found = rig.journaled()
        assert found == count, found
        return True

    eventually(kept)


def test_paid_results_outlast_an_outage_of_postgres(rig: Rig, servers: LocalServers) -> None:
    rig.sandbox.settings(latency_ms=2000, latency_jitter_ms=1000)
    ids = rig.submit("general", JOBS)
    _calls_made(rig, ids)
    servers.postgres.stop()
    stopped_at = time.monotonic()
    try:
        _answered(rig, ids)
        _journaled(rig, len(ids))
        eventually(lambda: time.monotonic() - stopped_at > OUTAGE_S, OUTAGE_S + 10)
    finally:
        servers.postgres.start()
    rig.await_over(ids)
    rig.check_once(ids)
    _journaled(rig, 0)
    # And it goes on.
    rig.sandbox.settings(latency_ms=50, latency_jitter_ms=0)
    more = rig.submit("general", 3)
    rig.await_over(more)
    rig.check_once(more)


def test_paid_results_outlast_postgres_and_their_worker(rig: Rig, servers: LocalServers) -> None:
    rig.sandbox.settings(latency_ms=2000, latency_jitter_ms=1000)
    ids = rig.submit("general", JOBS)
    _calls_made(rig, ids)
    servers.postgres.stop()
    try:
        _answered(rig, ids)
        _journaled(rig, len(ids))
        for worker in rig.services:
            if worker.name.startswith("w"):
                worker.kill()
    finally:
        servers.postgres.start()
    rig.await_over(ids)
    rig.check_once(ids)
    _journaled(rig, 0)


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
