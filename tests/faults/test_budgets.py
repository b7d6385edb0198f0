"""Budgets hold: many submitters, several workers, one account, and not one job too many."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

import orjson
import pytest
from sqlalchemy import create_engine
from sqlalchemy.pool import NullPool

from sluicegate.shared.alerts import ALERT_FIELD, alert_key
from sluicegate.shared.budgets import Budget
from sluicegate.shared.errors import BudgetExceeded
from sluicegate.shared.jobs import Lane
from sluicegate.shared.provider_changes import ProviderChange, add_provider
from sluicegate.workers.local.sandbox_control import SandboxControl
from tests.audit import Audit
from tests.harness import FULL, Rig
from tests.polling import eventually

PAID, JOBS, SUBMITTERS, WORKERS = (1000, 5000, 200, 4) if FULL else (60, 300, 20, 2)
RUNS = range(10 if FULL else 1)
#: Bulk jobs reserve so many times what they cost; there is room for so many, of so many.
TIMES, BULK_PAID, BULK_JOBS = (20, PAID, JOBS) if FULL else (5, 40, 100)

#: A provider at which a call costs what it reserved: prompts are free, and answers have a length.
#: The provider itself bills prompts too.
ROW, MODEL = "exact", "sandbox-exact"
TOKENS, RATE = 40, 500
COST = TOKENS * RATE
TEXT = f"Summarise the call.\nTOKENS: {TOKENS}\n"
OPTIONS: dict[str, Any] = {"text": TEXT, "model": ROW, "max_tokens": TOKENS}

pytestmark = pytest.mark.timeout(900 if FULL else 120)


@pytest.fixture(scope="module")
def rig_settings() -> dict[str, Any]:
    # Many small statements: what they do at the same time is what is looked at here.
    return {"reconcile_interval_s": 0.5, "coalesce_max": 4}


@pytest.fixture(scope="module")
def _fleet(module_rig: Rig) -> None:
    row = ProviderChange(
        model=MODEL,
        use_case=frozenset({"general"}),
        priority=1000,
        max_tokens=100 * TOKENS,
        context_tokens=100_000,
        price_override={"input": 0, "output": RATE},
    )
    engine = create_engine(module_rig.settings.database_dsn, poolclass=NullPool)
    with engine.begin() as line:
        add_provider(line, ROW, "openai", row, account=None)
    module_rig.start_sweep()
    workers = [module_rig.begin_worker("openai", ["general"]) for _ in range(WORKERS)]
    for worker in workers:
        module_rig.await_worker(worker)


@pytest.fixture
def rig(module_rig: Rig, sandbox: SandboxControl, _fleet: None) -> Iterator[Rig]:
    assert module_rig.sandbox is sandbox
    sandbox.settings(latency_ms=50)
    before = module_rig.services
    yield module_rig
    for service in set(module_rig.services) - set(before):
        service.kill()


@pytest.fixture
def account(audit: Audit, request: pytest.FixtureRequest) -> str:
    """Return the name of an account of the test's own."""
    name: str = "".join(c if c.isalnum() else "-" for c in request.node.name)
    audit.add_account(name)
    return name


def _submit_at_once(
    rig: Rig, jobs: int, *, text: str, **options: Any
) -> tuple[list[UUID], list[BudgetExceeded]]:
    """Submit jobs one by one, all submitters at the same time; return who was turned away, too.

    Every other one goes the way on which nobody is: the workers decide on it.
    """

    def submit(number: int) -> UUID | BudgetExceeded:
        try:
            if number % 2:
                return rig.client.submit("general", text, **options).id
            return rig.client.submit_many("general", [text], **options)[0].id
        except BudgetExceeded as error:
            return error

    with ThreadPoolExecutor(SUBMITTERS) as pool:
        done = list(pool.map(submit, range(jobs)))
    accepted = [one for one in done if isinstance(one, UUID)]
    return accepted, [one for one in done if isinstance(one, BudgetExceeded)]


def _paid(rig: Rig, job_ids: list[UUID]) -> int:
    """How many jobs are paid, by everybody who knows: they have to agree."""
    states = rig.states(job_ids)
    attempts = [one for found in rig.attempts(job_ids).values() for one in found]
    assert {one.state for one in attempts} == {"succeeded"}
    assert {one.booked for one in attempts} == {COST}
    paid = states["succeeded"]
    assert len(attempts) == paid
    assert rig.booked_nano_usd(job_ids) == paid * COST
    assert rig.sandbox.bill()["billed_calls"] == paid
    return paid


@pytest.mark.parametrize("run", RUNS)
def test_exactly_as_many_are_paid_as_there_is_room_for(
    rig: Rig, audit: Audit, account: str, run: int, record_property: Callable[[str, object], None]
) -> None:
    budget = audit.set_budget(account, day=PAID * COST)
    with audit.watching(audit.account_id(account)) as watch:
        ids, turned_away = _submit_at_once(rig, JOBS, account=account, **OPTIONS)
        rig.await_over(ids, 300 if FULL else 60)
    record_property("snapshots", watch.snapshots)
    record_property("turned_away", len(turned_away))
    assert len(ids) + len(turned_away) == JOBS
    assert Counter(rig.states(ids)) == {"succeeded": PAID, "failed": len(ids) - PAID}
    assert _paid(rig, ids) == PAID
    # They fail once the budget is full by what is spent, and only then.
    full = _dollars(PAID * COST)
    resets_at = f"it resets at {_local(budget):%Y-%m-%d %H:%M}"
    for error in turned_away:
        assert f"{full}, is full: {full} is spent; {resets_at}" in str(error)
    failed = rig.rows(
        "SELECT r.body->'error' AS error, j.cost_nano_usd FROM jobs j JOIN results r"
        " ON r.job_id = j.id WHERE j.id = ANY(%(ids)s) AND j.state = 'failed'",
        ids=ids,
    )
    for row in failed:
        assert row.cost_nano_usd == 0
        assert row.error["error_class"] == "budget"
        assert row.error["message"] == (
            f"the account's daily budget of {full} is full: {full} is spent, $0.00 is held by "
            f"calls under way, and this one may cost {_dollars(COST)}; {resets_at}"
            f" ({budget.time_zone})"
        )
    audit.check_rest()


def _local(budget: Budget) -> datetime:
    """When its day is over, by its account's clock."""
    return budget.day.resets_at.astimezone(ZoneInfo(budget.time_zone))


def _dollars(nano_usd: int) -> str:
    cents, rest = divmod(nano_usd, 10_000_000)
    return f"${cents // 100}.{cents % 100:02d}{f'{rest:07d}'.rstrip('0')}"


@pytest.mark.parametrize("run", RUNS)
def test_bulk_jobs_leave_room_for_their_last_reserve(
    rig: Rig, audit: Audit, account: str, run: int, record_property: Callable[[str, object], None]
) -> None:
    for worker in [rig.begin_worker("openai", ["general"], Lane.BULK) for _ in range(WORKERS)]:
        rig.await_worker(worker)
    fit = BULK_PAID - TIMES + 1
    budget = audit.set_budget(account, day=BULK_PAID * COST)
    options = OPTIONS | {"max_tokens": TIMES * TOKENS, "lane": "bulk", "account": account}
    with audit.watching(audit.account_id(account)) as watch:
        ids, turned_away = _submit_at_once(rig, BULK_JOBS, **options)
        assert turned_away == []

        def full() -> bool:
            rows = rig.rows(
                "SELECT state, state = 'parked' AND run_at >= %(resets_at)s AS waits,"
                " count(*) AS n FROM jobs WHERE id = ANY(%(ids)s) GROUP BY 1, 2",
                ids=ids,
                resets_at=budget.day.resets_at,
            )
            found = {(row.state, row.waits): row.n for row in rows}
            assert found == {("succeeded", False): fit, ("parked", True): BULK_JOBS - fit}
            return True

        eventually(full, 300 if FULL else 60)
    record_property("snapshots", watch.snapshots)
    assert _paid(rig, ids) == fit
    (row,) = rig.rows(
        "SELECT count(*) AS n, max(held_back) AS words FROM jobs WHERE id = ANY(%(ids)s)"
        " AND held_back LIKE 'the account''s daily budget of %% is full:%%'",
        ids=ids,
    )
    assert row.n == BULK_JOBS - fit, row
    audit.check_rest()

    # A day later.
    for table, column in (
        ("attempts", "dispatched_at"),
        ("cost_entries", "dispatched_at"),
        ("jobs", "run_at"),
    ):
        rig.rows(
            f"UPDATE {table} SET {column} = {column} - interval '1 day'"
            " WHERE account_id = %(id)s RETURNING 1",
            id=budget.account_id,
        )
    rig.rows(
        "UPDATE budgets SET version = version + 1, day_started_at = day_started_at - interval"
        " '1 day', day_resets_at = day_resets_at - interval '1 day' WHERE id = %(id)s RETURNING 1",
        id=budget.id,
    )
    eventually(lambda: rig.states(ids)["succeeded"] > fit, 60)
    for job_id in ids:
        rig.client.cancel(job_id)
    rig.await_over(ids)
    audit.check_rest()


def test_what_a_call_costs_above_its_reserve_is_all_that_a_budget_is_exceeded_by(
    rig: Rig, audit: Audit, account: str
) -> None:
    """The provider counts more prompt tokens than the estimate, as it may."""
    jobs, room = 60, 10
    text = f"Summarise the call.\nINPUT: 900\nTOKENS: {TOKENS}\n"
    options: dict[str, Any] = {"text": text, "max_tokens": TOKENS, "account": account}
    (first,) = rig.submit("general", 1, **options)
    rig.await_over([first])
    (attempt,) = rig.attempts([first])[first]
    assert attempt.booked > attempt.reserved_nano_usd
    limit = attempt.booked + room * attempt.reserved_nano_usd
    rig.sandbox.settings(latency_ms=300)
    audit.set_budget(account, day=limit)
    with audit.watching(audit.account_id(account)):
        ids = [first, *rig.submit("general", jobs, **options)]
        rig.await_over(ids)
    (day, _) = audit.windows(audit.account_id(account))
    assert limit < day.spent <= limit + day.overrun
    states = rig.states(ids)
    assert 3 < states["succeeded"] <= 1 + room
    assert sum(states.values()) == states["succeeded"] + states["failed"]
    audit.check_rest()
    assert audit.check_bill(rig, ids) == []


def test_one_alert_for_each_threshold_with_many_settlements_at_once_and_a_restart(
    rig: Rig, audit: Audit, account: str
) -> None:
    audit.set_budget(account, day=60 * COST, month=60 * COST)
    audit.set_budget(account, use_case="general", day=60 * COST, thresholds=[10, 80, 100])
    rig.sandbox.settings(latency_ms=500)
    ids = rig.submit("general", 50, account=account, **OPTIONS)
    rig.await_over(ids)
    assert rig.states(ids) == {"succeeded": 50}
    budgets = ((None, "day"), (None, "month"), ("general", "day"))
    lower = [("general", "day", 10), *((*budget, 80) for budget in budgets)]
    assert _alerts(rig, audit, account) == sorted(lower, key=str)
    next(one for one in rig.services if one.name.startswith("w")).kill()
    rig.start_worker("openai", ["general"])
    ids += rig.submit("general", 20, account=account, **OPTIONS)
    rig.await_over(ids)
    assert rig.states(ids) == {"succeeded": 60, "failed": 10}
    # Crossed again, by limits that come down to what is spent.
    for use_case in (None, "general"):
        audit.set_budget(account, use_case=use_case, day=100 * COST)
        audit.set_budget(account, use_case=use_case, day=60 * COST)
    all_ = [*lower, *((*budget, 100) for budget in budgets)]
    assert _alerts(rig, audit, account) == sorted(all_, key=str)
    audit.check_rest()

    def told() -> bool:
        key = rig.settings.redis_prefix + alert_key(audit.account_id(account))
        entries: Any = rig.redis.xrange(key)
        alerts = [orjson.loads(fields[ALERT_FIELD]) for _, fields in entries]
        found = [(one["use_case"], one["window"], one["threshold_percent"]) for one in alerts]
        assert sorted(found, key=str) == sorted(all_, key=str)
        return True

    eventually(told)


def _alerts(rig: Rig, audit: Audit, account: str) -> list[tuple[str | None, str, int]]:
    rows = rig.rows(
        'SELECT use_case, "window", threshold FROM alerts WHERE account_id = %(id)s'
        " AND kind = 'budget'",
        id=audit.account_id(account),
    )
    return sorted(((row.use_case, row.window, row.threshold) for row in rows), key=str)
