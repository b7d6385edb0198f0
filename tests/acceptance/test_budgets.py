"""What an account that has a budget sees of it: jobs refused, jobs that wait, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from uuid import UUID

import orjson
import pytest

from sluicegate.shared.accounts import find_account
from sluicegate.shared.admission.keys import budgets_key
from sluicegate.shared.budgets import clear_budget, list_budgets, set_budget
from sluicegate.shared.database import make_engine
from sluicegate.shared.errors import JobFailed
from sluicegate.shared.jobs import Lane
from sluicegate.workers.local.sandbox_control import SandboxControl
from tests.command_line import Command
from tests.harness import Rig
from tests.polling import eventually

PRIMARY = "openai-gpt-6-luna"
#: A job's cost, in nano-USD: its answer's tokens at this price, and its prompt is free.
TOKENS, NANO_A_TOKEN = 20, 100
COST = TOKENS * NANO_A_TOKEN
PROMPT = f"TOKENS: {TOKENS}\nWrite to her."


@pytest.fixture(scope="module")
def rig_settings() -> dict[str, Any]:
    return {"reconcile_interval_s": 1.0}


@pytest.fixture(scope="module", autouse=True)
def _workers(module_rig: Rig) -> None:
    # Before anybody has read it: a change takes a worker up to a second to see.
    module_rig.rows(
        "UPDATE llm_providers SET price_override = %(price)s WHERE name = %(name)s RETURNING id",
        price=orjson.dumps({"input": 0, "output": NANO_A_TOKEN}).decode(),
        name=PRIMARY,
    )
    module_rig.start_sweep()
    for worker in (
        module_rig.begin_worker("openai", ["general"]),
        module_rig.begin_worker("openai", ["general"], Lane.BULK),
    ):
        module_rig.await_worker(worker)


class Account:
    """An account with a budget of its own, for one test."""

    def __init__(self, rig: Rig, name: str) -> None:
        self.rig = rig
        self.name = name
        self._engine = make_engine(rig.settings, application_name="test", pool_size=1)

    def limit(self, **limits: int | None) -> None:
        with self._engine.connect() as line:
            line.execution_options(isolation_level="READ COMMITTED")
            with line.begin():
                set_budget(line, find_account(line, self.name), limits=limits)  # type: ignore[arg-type]

    @property
    def id(self) -> UUID:
        with self._engine.connect() as line:
            return find_account(line, self.name).id

    def clear(self) -> None:
        with self._engine.connect() as line:
            line.execution_options(isolation_level="READ COMMITTED")
            with line.begin():
                clear_budget(line, find_account(line, self.name))

    def state(self) -> tuple[int, int]:
        """Return what is spent and held of its day."""
        with self._engine.connect() as line:
            (budget,) = list_budgets(line, find_account(line, self.name).id)
        return budget.day.spent_nano_usd, budget.day.held_nano_usd

    def submit(self, jobs: int, **options: Any) -> list[UUID]:
        return self.rig.submit(
            "general", jobs, text=PROMPT, account=self.name, max_tokens=TOKENS, **options
        )

    def close(self) -> None:
        self._engine.dispose()


@pytest.fixture
def account(
    rig: Rig, command_line: Callable[[Any], Command], request: pytest.FixtureRequest
) -> Iterator[Account]:
    name = request.node.name.removeprefix("test_")[:60]
    assert command_line(rig.settings)("account", "add", name).code == 0
    account = Account(rig, name)
    yield account
    account.close()


def test_a_spent_budget_fails_a_job_at_once_and_says_all_about_it(account: Account) -> None:
    # Something is left, so it is taken, and too little.
    account.limit(day=2 * COST + 1, month=100 * COST)
    ids = account.submit(2)
    account.rig.await_over(ids)
    assert account.state() == (2 * COST, 0)
    handle = account.rig.client.submit("general", PROMPT, account=account.name, max_tokens=TOKENS)
    with pytest.raises(JobFailed) as failure:
        handle.result(timeout=30)
    said = str(failure.value)
    for words in (
        "daily budget of $0.000004001 is full",
        "$0.000004 is spent, $0.00 is held",
        "this one may cost $0.000002",
        "it resets at ",
        " 00:00 (UTC)",
    ):
        assert words in said, said
    view = account.rig.client.get(handle.id)
    assert view.result is not None
    assert view.result.error is not None
    assert view.result.error.error_class == "budget"
    assert (view.attempts, account.rig.calls([handle.id])) == (0, {})


def test_bulk_waits_for_the_window_and_for_whoever_makes_it_larger(account: Account) -> None:
    account.limit(day=3 * COST)
    ids = account.submit(8, lane="bulk")

    def spent() -> bool:
        states = account.rig.states(ids)
        return states == {"succeeded": 3, "parked": 5}

    eventually(spent)
    rows = account.rig.rows(
        "SELECT held_back, run_at > now() + interval '1 second' AS waits FROM jobs"
        " WHERE id = ANY(%(ids)s) AND state = 'parked'",
        ids=ids,
    )
    assert all("daily budget" in row.held_back and "resets at" in row.held_back for row in rows)
    account.limit(day=5 * COST)
    eventually(lambda: account.rig.states(ids) == {"succeeded": 5, "parked": 3})
    account.clear()
    account.rig.await_over(ids)
    assert account.rig.states(ids) == {"succeeded": 8}
    assert account.rig.booked_nano_usd(ids) == len(ids) * COST


def test_a_budget_that_is_held_makes_jobs_wait_and_all_are_answered(
    account: Account, sandbox: SandboxControl
) -> None:
    sandbox.settings(latency_ms=300)
    # Their reserve is five times their cost: two at a time.
    account.limit(day=40 * COST)
    ids = account.rig.submit(
        "general", 12, text=PROMPT, account=account.name, max_tokens=20 * TOKENS
    )
    account.rig.await_over(ids)
    assert account.rig.states(ids) == {"succeeded": 12}
    assert account.state() == (12 * COST, 0)
    assert account.rig.booked_nano_usd(ids) == len(ids) * COST


def test_a_copy_that_is_wrong_costs_nobody_his_job(account: Account) -> None:
    account.limit(day=10 * COST)
    first = account.submit(1)
    account.rig.await_over(first)
    key = budgets_key(account.rig.settings.redis_prefix, account.id)
    eventually(lambda: account.rig.redis.exists(key))
    stored: Any = account.rig.redis.hgetall(key)
    ((budget_id, packed),) = stored.items()
    # Full, says a version that never was.
    wrong = packed.replace(b'"day_spent":%d' % COST, b'"day_spent":%d' % (10 * COST))
    assert wrong != packed
    account.rig.redis.hset(key, budget_id, wrong)
    ids = account.submit(4)
    account.rig.await_over(ids)
    assert account.rig.states(ids) == {"succeeded": 4}


def test_without_a_copy_postgres_decides_all_the_same(account: Account) -> None:
    account.limit(day=2 * COST)
    rig = account.rig
    rig.redis.delete(budgets_key(rig.settings.redis_prefix, account.id))
    ids = account.submit(5)
    rig.await_over(ids)
    assert rig.states(ids) == {"succeeded": 2, "failed": 3}
    assert account.state() == (2 * COST, 0)
