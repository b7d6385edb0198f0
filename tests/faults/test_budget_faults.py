"""After every fault the ledger is at rest: nothing is held, Redis agrees, and so does the bill."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from pydantic import SecretStr
from sqlalchemy import make_url

from sluicegate.workers.local.sandbox_control import SandboxControl
from sluicegate.workers.local.servers import LocalServers
from tests.audit import Audit, Difference
from tests.fault_proxy import FaultProxy
from tests.harness import FULL, Rig, open_rig
from tests.polling import eventually

JOBS = 400 if FULL else 40
#: Where a worker dies, from the moment when a job is its own: money is reserved, the call is made,
#: it is booked and told.
PLACES = ("claimed", "opened", "dispatched", "answered", "charged", "settled")
#: What stands in the values of a statement, and in those of no other.
VALUES_OF = {"reserve": b'"baseline_reserved_nano_usd"', "settle": b'"attempt_state"'}
#: Those that wait to reserve: Postgres shows how a statement begins.
RESERVING = (
    "SELECT pid FROM pg_stat_activity"
    " WHERE wait_event_type = 'Lock' AND query LIKE '%%WITH me AS%%'"
)
#: Large enough for everything here, and small enough to be counted against.
LIMIT = 10**9

pytestmark = pytest.mark.timeout(400 if FULL else 120)


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
        beat_valid_s=3.5,
        dead_after_s=5.0,
        reconcile_interval_s=0.5,
    ) as rig:
        rig.start_sweep()
        rig.start_worker("openai", ["general"])
        yield rig


@pytest.fixture
def rig(module_rig: Rig, sandbox: SandboxControl) -> Iterator[Rig]:
    assert module_rig.sandbox is sandbox
    before = module_rig.services
    yield module_rig
    for service in set(module_rig.services) - set(before):
        service.kill()


@pytest.fixture(scope="module")
def proxy(module_rig: Rig) -> Iterator[FaultProxy]:
    """Return a proxy in front of Postgres, through which a worker of its own goes."""
    url = make_url(module_rig.settings.database_url.get_secret_value())
    assert url.host
    assert url.port
    with FaultProxy(url.host, url.port) as proxy:
        through = url.set(host="127.0.0.1", port=proxy.port)
        through_url = SecretStr(through.render_as_string(hide_password=False))
        worker = module_rig.start_worker(
            "openai", ["voice"], database_url=through_url, coalesce_max=5
        )
        yield proxy
        assert worker.ended() is None, worker.log
        worker.kill()


@pytest.fixture
def account(audit: Audit, request: pytest.FixtureRequest) -> str:
    """Return the name of an account of the test's own, with a budget and two for use cases."""
    name = str(request.node.name).replace("[", "-").rstrip("]")
    audit.add_account(name)
    audit.set_budget(name, day=LIMIT, month=LIMIT)
    for use_case in ("general", "voice"):
        audit.set_budget(name, use_case=use_case, day=LIMIT)
    return name


def _under_way(rig: Rig, job_ids: list[UUID]) -> None:
    """Wait until the provider has these calls."""
    eventually(lambda: len(rig.calls(job_ids)) == len(job_ids))


def _check(
    rig: Rig,
    audit: Audit,
    job_ids: list[UUID],
    record_property: Callable[[str, object], None],
) -> list[Difference]:
    """Wait for the jobs and audit; every difference from the bill is listed in the report."""
    rig.await_over(job_ids, 120)
    assert rig.states(job_ids) == {"succeeded": len(job_ids)}
    audit.check_rest()
    eventually(lambda: not rig.journaled())
    differences = audit.check_bill(rig, job_ids)
    for one in differences:
        assert one.booked_nano_usd >= one.billed_nano_usd, one
        record_property("difference", str(one))
    return differences


def test_workers_that_die_anywhere_on_the_path_lose_nothing(
    rig: Rig, audit: Audit, account: str, record_property: Callable[[str, object], None]
) -> None:
    # Few jobs at a time each, and more than the other one takes: all of them get some.
    victims = {
        place: rig.begin_worker(
            "openai",
            ["general"],
            variables={"SLUICE_FAILPOINTS": f"{place}=kill"},
            jobs_in_flight=10,
        )
        for place in PLACES
    }
    for victim in victims.values():
        rig.await_worker(victim)
    rig.sandbox.settings(latency_ms=1000)
    ids = rig.submit("general", 8 * JOBS, account=account)
    for place, victim in victims.items():
        assert victim.wait(30) == -signal.SIGKILL, place
    differences = _check(rig, audit, ids, record_property)
    rig.check_books(ids)
    for attempts in rig.attempts(ids).values():
        states = [attempt.state for attempt in attempts]
        assert (states.count("unknown") <= 1, states[-1]) == (True, "succeeded"), states
    # Some never left, so there are some that nothing was billed for.
    assert {one.billed_nano_usd > 0 for one in differences} == {False, True}
    (row,) = rig.rows(
        "SELECT count(*) AS n FROM attempts WHERE state = 'unknown' AND job_id = ANY(%(ids)s)",
        ids=ids,
    )
    assert row.n == len(differences)


def test_redis_is_flushed(
    rig: Rig, audit: Audit, account: str, record_property: Callable[[str, object], None]
) -> None:
    rig.sandbox.settings(latency_ms=1500)
    ids = rig.submit("general", JOBS, account=account)
    _under_way(rig, ids)
    rig.redis.flushall()
    ids += rig.submit("general", JOBS, account=account)
    assert _check(rig, audit, ids, record_property) == []


def test_redis_comes_back_from_an_older_file(
    rig: Rig,
    audit: Audit,
    account: str,
    *,
    servers: LocalServers,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    files = servers.valkey.data_dir / "appendonlydir"
    first = rig.submit("general", JOBS, account=account)
    rig.await_over(first)
    audit.check_rest()
    older = {key: copy["version"] for key, copy in audit.copies().items()}
    shutil.copytree(files, tmp_path / "older")
    rig.redis.set("later", 1)
    rig.sandbox.settings(latency_ms=1500)
    second = rig.submit("general", JOBS, account=account)
    _under_way(rig, second)
    servers.valkey.stop()
    shutil.rmtree(files)
    shutil.copytree(tmp_path / "older", files)
    servers.valkey.start()
    third = rig.submit("general", JOBS, account=account)
    assert _check(rig, audit, [*first, *second, *third], record_property) == []
    assert rig.redis.get("later") is None
    newer = audit.copies()
    assert older.keys() <= newer.keys()
    assert any(newer[key]["version"] > version for key, version in older.items())


def test_postgres_stops_at_once_and_comes_back(
    rig: Rig,
    audit: Audit,
    account: str,
    *,
    servers: LocalServers,
    record_property: Callable[[str, object], None],
) -> None:
    # Some are answered before, some while it is away, some after.
    rig.sandbox.settings(latency_ms=50, latency_jitter_ms=2500)
    with audit.watching(audit.account_id(account)):
        ids = rig.submit("general", 4 * JOBS, account=account)
        _under_way(rig, ids[: JOBS // 2])
        servers.postgres.kill(signal.SIGQUIT)
        eventually(lambda: servers.postgres.pid is None)
        servers.postgres.start()
        differences = _check(rig, audit, ids, record_property)
    assert differences == []


def _have_been_lost(proxy: FaultProxy, replies: int) -> bool:
    return proxy.lost == replies


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("statement", VALUES_OF)
def test_replies_to_commits_are_lost(
    rig: Rig,
    audit: Audit,
    account: str,
    *,
    proxy: FaultProxy,
    statement: str,
    at_once: bool,
    record_property: Callable[[str, object], None],
) -> None:
    # Of each wave as many as there are statements at least.
    lost, waves = 4, 4
    expected = proxy.lost
    with audit.watching(audit.account_id(account)):
        ids = []
        for _ in range(waves):
            proxy.lose_replies(VALUES_OF[statement], lost, at_once=at_once)
            ids += rig.submit("voice", JOBS // 2, account=account)
            rig.await_over(ids)
            expected += lost
            eventually(partial(_have_been_lost, proxy, expected))
    assert _check(rig, audit, ids, record_property) == []


@pytest.mark.parametrize("room", [1, 100])
def test_a_reservation_that_is_repeated_while_it_is_made_is_made_once(
    rig: Rig, audit: Audit, account: str, proxy: FaultProxy, room: int
) -> None:
    """The repeat has begun when the first try commits, and finds its own reservation in its way."""
    account_id = audit.account_id(account)
    (before,) = rig.submit("voice", 1, account=account)
    rig.await_over([before])
    (attempt,) = rig.attempts([before])[before]
    limit = attempt.booked + room * attempt.reserved_nano_usd
    audit.set_budget(account, day=limit, month=limit)
    expected = proxy.lost + 1
    with audit.locking(account_id):
        proxy.lose_replies(VALUES_OF["reserve"], 1, at_once=True)
        (job_id,) = rig.submit("voice", 1, account=account)
        eventually(lambda: len(audit.rows(RESERVING)) == 2)
    eventually(partial(_have_been_lost, proxy, expected))
    rig.await_over([job_id])
    assert rig.states([job_id]) == {"succeeded": 1}
    audit.check_rest()
    assert audit.check_bill(rig, [before, job_id]) == []


def _states(rig: Rig, job_ids: list[UUID]) -> list[list[str]]:
    """Return the states of each job's attempts, in no order of jobs."""
    return sorted([one.state for one in found] for found in rig.attempts(job_ids).values())


def test_reservations_that_the_server_gets_after_all_others_hold_nothing(
    rig: Rig, audit: Audit, account: str, proxy: FaultProxy
) -> None:
    """One of two jobs had no room then, waits for some, and there is enough by now."""
    (before,) = rig.submit("voice", 1, account=account)
    rig.await_over([before])
    (attempt,) = rig.attempts([before])[before]
    limit = attempt.booked + attempt.reserved_nano_usd
    audit.set_budget(account, day=limit, month=limit)
    # Longer than the second one takes to be told no, on a busy machine too.
    rig.sandbox.settings(latency_ms=15_000)
    expected, first = proxy.lost, len(proxy.held)
    proxy.hold(VALUES_OF["reserve"], 1000)
    ids = rig.submit("voice", 2, account=account)
    eventually(lambda: all(str(one).encode() in b"".join(proxy.held[first:]) for one in ids))
    proxy.hold(VALUES_OF["reserve"], 0)
    expected += len(proxy.held[first:])
    eventually(lambda: _states(rig, ids) == [["dispatching"], ["void"]])
    rig.sandbox.settings(latency_ms=1000)
    audit.set_budget(account, day=LIMIT, month=LIMIT)
    proxy.release()
    eventually(partial(_have_been_lost, proxy, expected))
    rig.await_over(ids)
    assert rig.states(ids) == {"succeeded": 2}
    audit.check_rest()
    assert audit.check_bill(rig, [before, *ids]) == []
    assert _states(rig, ids) == [["succeeded"], ["void", "succeeded"]]


def test_a_task_that_is_revoked_while_it_reserves_holds_nothing(
    rig: Rig, audit: Audit, account: str
) -> None:
    worker = next(one for one in rig.services if one.name.startswith("w"))
    with audit.locking(audit.account_id(account)):
        (job_id,) = rig.submit("general", 1, account=account)
        eventually(lambda: audit.rows(RESERVING))
        rig.tell(worker, "revoke", task_id=str(job_id), terminate=True)
    rig.await_over([job_id])
    assert rig.states([job_id]) == {"cancelled": 1}
    audit.check_rest()
    assert rig.calls([job_id]) == {}
    assert audit.check_bill(rig, [job_id]) == []


def test_reconcilers_run_at_once_under_load(
    rig: Rig, audit: Audit, account: str, record_property: Callable[[str, object], None]
) -> None:
    rig.sandbox.settings(latency_ms=100)
    ids: list[UUID] = []
    repaired = 0
    for _ in range(20 if FULL else 5):
        ids += rig.submit("general", JOBS // 2, account=account)
        # Gone, and from the future.
        for number, key in enumerate(rig.redis.scan_iter(f"{rig.settings.redis_prefix}budget:1:*")):
            if number % 2:
                rig.redis.delete(key)
                continue
            copies: Any = rig.redis.hgetall(key)
            for name, copy in copies.items():
                rig.redis.hset(key, name, copy.replace(b'"version":', b'"version":9'))
        repaired += sum(drift.repaired for drift in audit.reconcile(at_once=4))
    assert repaired > 0
    assert _check(rig, audit, ids, record_property) == []


def test_a_budget_that_nobody_used_for_months_is_at_rest_too(
    rig: Rig, audit: Audit, account: str
) -> None:
    account_id = audit.account_id(account)
    ids = rig.submit("general", 3, account=account)
    rig.await_over(ids)
    # That of another use case goes on.
    audit.rows(
        "UPDATE budgets SET version = version + 1,"
        " day_started_at = day_started_at - interval '70 days',"
        " day_resets_at = day_resets_at - interval '70 days',"
        " month_started_at = month_started_at - interval '70 days',"
        " month_resets_at = month_resets_at - interval '70 days'"
        " WHERE account_id = %(account_id)s AND use_case = 'voice' RETURNING 1",
        account_id=account_id,
    )
    audit.check_rest()
    assert (
        len([one for one in audit.copies().values() if one["account_id"] == str(account_id)]) == 3
    )
