"""What budgets let through, hold and are charged, statement by statement, on a real server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import count
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

import psycopg
import pytest

from sluicegate.shared.accounts import find_account, set_account
from sluicegate.shared.admission.keys import budgets_key
from sluicegate.shared.budgets import clear_budget
from sluicegate.shared.ids import new_id
from sluicegate.shared.settings import Settings
from sluicegate.workers.ledger import Full
from sluicegate.workers.sweep.loops import Sweep
from tests.books import Books
from tests.polling import eventually_async


@pytest.fixture
async def books(settings: Settings) -> AsyncIterator[Books]:
    async with Books(settings) as books:
        yield books


#: As `Database.execute`.
Step = Callable[..., Awaitable[Any]]


async def _waiting(execute: Step, backends: int) -> None:
    """Wait until so many of the server's processes wait for a lock."""

    async def are_waiting() -> bool:
        (row,) = await execute(
            "SELECT count(*) AS n FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
            " AND datname = current_database()"
        )
        return bool(row.n == backends)

    await eventually_async(are_waiting)


def _state(books: Books, account: str = "acme", use_case: str | None = None) -> tuple[int, ...]:
    budget = books.budget(account, use_case)
    day, month = budget.day, budget.month
    return (
        day.spent_nano_usd, day.held_nano_usd, month.spent_nano_usd, month.held_nano_usd,
    )  # fmt: skip


async def test_without_a_budget_everything_is_let_through(books: Books) -> None:
    account = books.account("acme")
    attempts = await books.wish(account, [10**15] * 3)
    assert await books.open(attempts) == [True] * 3
    await books.settle(attempts, 10**15)
    assert not await books.rows("SELECT FROM budgets")
    assert not await books.rows("SELECT FROM alerts")


async def test_it_lets_through_what_fits_and_not_a_nano_more(books: Books) -> None:
    account = books.account("acme")
    books.set_budget("acme", day=100)
    first = await books.wish(account, [40, 40, 40])
    opened = await books.open(first)
    assert opened[:2] == [True, True]
    full = opened[2]
    assert isinstance(full, Full)
    assert (full.window, full.by_spend, full.use_case) == ("day", False, None)
    assert (full.limit_nano_usd, full.spent_nano_usd, full.held_nano_usd) == (100, 0, 0)
    assert _state(books) == (0, 80, 0, 80)
    assert await books.open(await books.wish(account, [20])) == [True]
    (full,) = await books.open(await books.wish(account, [1]))
    assert isinstance(full, Full)
    assert (full.by_spend, full.held_nano_usd) == (False, 100)
    await books.settle(first[:2], 30)
    assert _state(books) == (60, 20, 60, 20)
    (full,) = await books.open(await books.wish(account, [41]))
    assert isinstance(full, Full)
    assert (full.by_spend, full.spent_nano_usd, full.held_nano_usd) == (True, 60, 20)
    assert await books.open(await books.wish(account, [20])) == [True]


async def test_one_too_large_takes_no_room_from_those_behind_it(books: Books) -> None:
    account = books.account("acme")
    books.set_budget("acme", day=100)
    opened = await books.open(await books.wish(account, [101, 50, 60, 50]))
    assert [one is True for one in opened] == [False, True, False, False]
    assert isinstance(opened[0], Full)
    assert opened[0].by_spend
    assert isinstance(opened[2], Full)
    assert not opened[2].by_spend
    # The one behind may have it the next time: it was only in its way.
    assert await books.open(await books.wish(account, [50])) == [True]


async def test_the_same_statement_twice_opens_and_holds_once(books: Books) -> None:
    account = books.account("acme")
    books.set_budget("acme", day=100)
    attempts = await books.wish(account, [60])
    assert await books.open(attempts) == [True]
    assert await books.open(attempts) == [True]
    assert _state(books) == (0, 60, 0, 60)
    await books.settle(attempts, 50)
    await books.settle(attempts, 50)
    assert _state(books) == (50, 0, 50, 0)


async def test_a_call_that_never_left_costs_nothing(books: Books) -> None:
    account = books.account("acme")
    books.set_budget("acme", day=100)
    attempts = await books.wish(account, [60])
    await books.open(attempts)
    await books.settle(attempts, None)
    assert _state(books) == (0, 0, 0, 0)


async def test_what_a_dead_worker_leaves_is_spent_until_it_is_corrected(books: Books) -> None:
    account = books.account("acme")
    books.set_budget("acme", day=100)
    attempts = await books.wish(account, [60])
    await books.open(attempts)
    await books.die()
    await asyncio.gather(books.resolve(), books.resolve())
    assert _state(books) == (60, 0, 60, 0)
    await books.settle(attempts, 25)
    assert _state(books) == (25, 0, 25, 0)
    await books.settle(attempts, 25)
    assert _state(books) == (25, 0, 25, 0)


async def test_a_use_case_has_a_budget_beside_the_accounts(books: Books) -> None:
    account = books.account("acme")
    books.set_budget("acme", day=100)
    books.set_budget("acme", use_case="draft", month=50)
    (full,) = await books.open(await books.wish(account, [60], "draft"))
    assert isinstance(full, Full)
    assert (full.window, full.use_case) == ("month", "draft")
    drafts = await books.wish(account, [50], "draft")
    others = await books.wish(account, [50], "voice")
    assert await books.open(drafts) == [True]
    assert await books.open(others) == [True]
    (full,) = await books.open(await books.wish(account, [1], "voice"))
    assert isinstance(full, Full)
    assert full.use_case is None
    await books.settle(drafts, 20)
    await books.settle(others, 10)
    assert _state(books) == (30, 0, 30, 0)
    assert _state(books, use_case="draft") == (20, 0, 20, 0)


async def test_accounts_do_not_share(books: Books) -> None:
    acme, globex = books.account("acme"), books.account("globex")
    books.set_budget("acme", day=10)
    mixed = [*await books.wish(acme, [10]), *await books.wish(globex, [10]),
             *await books.wish(acme, [10])]  # fmt: skip
    opened = await books.open(mixed)
    assert [one is True for one in opened] == [True, True, False]


async def test_a_window_that_is_over_begins_anew_and_what_ends_late_belongs_to_the_old(
    books: Books,
) -> None:
    account = books.account("acme")
    books.set_budget("acme", day=100)
    late = await books.wish(account, [100])
    await books.open(late)
    await books.age(timedelta(days=1))
    assert books.budget("acme").day.left_nano_usd == 100
    new = await books.wish(account, [70])
    assert await books.open(new) == [True]
    assert _state(books)[:2] == (0, 70)
    await books.settle(late, 90)
    assert _state(books)[:2] == (0, 70)
    await books.settle(new, 60)
    assert _state(books)[:2] == (60, 0)


async def test_at_midnight_all_budgets_of_an_account_turn_together(books: Books) -> None:
    """A statement that began before midnight finds one budget turned by one that began after it."""
    account = books.account("acme")
    books.set_budget("acme", day=1000)
    books.set_budget("acme", use_case="draft", day=1000)
    early = await books.wish(account, [600], "draft")
    await books.open(early)
    # Of yesterday; and midnight, by the other statement's clock, is five seconds ahead of ours.
    await books.rows(
        "UPDATE attempts SET dispatched_at = date_trunc('day', now()) - interval '1 s'"
    )
    await books.rows(
        "UPDATE budgets SET day_resets_at = now() + interval '5 seconds' WHERE use_case = 'draft'"
    )
    await books.rows(
        "UPDATE budgets SET day_started_at = now() + interval '5 seconds', day_held_nano_usd = 0"
        " WHERE use_case IS NULL"
    )
    late = await books.wish(account, [600], "draft")
    assert await books.open(late) == [True]
    # As the next day's first statement finds it.
    assert _state(books, use_case="draft")[:2] == (0, 600)
    await books.settle(late, 100)
    await books.settle(early, 100)
    assert _state(books)[:2] == _state(books, use_case="draft")[:2] == (100, 0)


async def test_a_month_outlives_its_days(books: Books) -> None:
    account = books.account("acme")
    today = datetime.now(UTC)
    books.set_budget("acme", day=100, month=150)
    # Yesterday was this month on every day but the first.
    await books.db.execute(
        "UPDATE budgets SET month_started_at = month_started_at - interval '40 days',"
        " month_resets_at = month_resets_at + interval '40 days'"
    )
    first = await books.wish(account, [100])
    await books.open(first)
    await books.settle(first, 100)
    await books.age(timedelta(days=1))
    (full,) = await books.open(await books.wish(account, [60]))
    assert isinstance(full, Full)
    assert (full.window, full.by_spend, full.spent_nano_usd) == ("month", True, 100)
    assert full.resets_at > today.replace(tzinfo=None)
    assert await books.open(await books.wish(account, [50])) == [True]
    assert _state(books) == (0, 50, 100, 50)


async def test_a_new_budget_counts_what_is_spent_and_held_already(books: Books) -> None:
    account = books.account("acme")
    done, open_ = await books.wish(account, [40], "draft"), await books.wish(account, [30])
    await books.open([*done, *open_])
    await books.settle(done, 25)
    books.set_budget("acme", day=100)
    books.set_budget("acme", use_case="draft", day=100)
    assert _state(books) == (25, 30, 25, 30)
    assert _state(books, use_case="draft") == (25, 0, 25, 0)
    await books.settle(open_, 10)
    assert _state(books) == (35, 0, 35, 0)


async def test_a_budget_that_begins_under_load_misses_nothing(books: Books) -> None:
    account = books.account("acme")

    async def work() -> None:
        for _ in range(15):
            attempts = await books.wish(account, [7] * 3)
            opened = await books.open(attempts)
            await books.settle([a for a, o in zip(attempts, opened, strict=True) if o is True], 5)

    async def change() -> None:
        for use_case in (None, "general"):
            await asyncio.sleep(0.05)
            await asyncio.to_thread(
                books.set_budget, "acme", use_case=use_case, day=10**9, month=10**9
            )

    await asyncio.gather(*(work() for _ in range(6)), change())
    assert _state(books) == _state(books, use_case="general") == (6 * 15 * 15, 0, 6 * 15 * 15, 0)


async def test_another_time_zone_counts_anew(books: Books) -> None:
    account = books.account("acme", "Pacific/Kiritimati")
    budget = books.set_budget("acme", day=100)
    spent = await books.wish(account, [40])
    await books.open(spent)
    await books.settle(spent, 40)
    with books.change() as line:
        set_account(line, "acme", time_zone="Pacific/Pago_Pago")
    # 25 hours behind: now is in both of its days.
    moved = books.budget("acme")
    zone = ZoneInfo("Pacific/Pago_Pago")
    assert moved.day.started_at.astimezone(zone).time().isoformat() == "00:00:00"
    assert moved.day.started_at != budget.day.started_at
    assert (moved.day.spent_nano_usd, moved.day.held_nano_usd) == (40, 0)


async def test_another_time_zone_wakes_whoever_waits_and_says_what_is_reached(books: Books) -> None:
    account = books.account("acme", "Pacific/Kiritimati")
    spent = await books.wish(account, [90])
    await books.open(spent)
    await books.settle(spent, 90)
    # Yesterday there, and today in Pago Pago.
    await books.rows("UPDATE cost_entries SET dispatched_at = dispatched_at - interval '24 hours'")
    books.set_budget("acme", month=None, day=100)
    with books.change() as line:
        set_account(line, "acme", time_zone="Pacific/Pago_Pago")
    (change,) = await books.rows(
        "SELECT account_id, before, after FROM gate_changes ORDER BY number DESC LIMIT 1"
    )
    assert change == (account, "Pacific/Kiritimati", "Pacific/Pago_Pago")
    reached = books.budget("acme").day.spent_nano_usd >= 80
    alerts = await books.rows("SELECT threshold FROM alerts")
    assert [row.threshold for row in alerts] == ([80] if reached else [])


async def test_a_dispatch_that_goes_on_after_its_connection_is_heard_of(
    books: Books, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first try waits for a lock, without its client, and commits after the second began."""
    account = books.account("acme")
    books.set_budget("acme", day=100)
    (attempt,) = await books.wish(account, [60])
    zombies: list[asyncio.Task[object]] = []
    execute = books.db.execute

    async def lossy(sql: str, *arguments: Any, **values: Any) -> Any:
        if not zombies:
            zombies.append(asyncio.ensure_future(execute(sql, *arguments, **values)))
            await _waiting(execute, 1)
            raise psycopg.OperationalError("the connection is lost")
        return await execute(sql, *arguments, **values)

    monkeypatch.setattr(books.db, "execute", lossy)
    with books.change() as line:
        line.exec_driver_sql("SELECT FROM budgets FOR UPDATE")
        opening = asyncio.ensure_future(books.open([attempt]))
        await _waiting(execute, 2)
    assert await opening == [True]
    await asyncio.gather(*zombies)
    assert _state(books) == (0, 60, 0, 60)


class _Late:
    """Statements' way to the server, on which the first one stays until it is begun by hand.

    Its client hears that the connection is lost. `then` is what happens to each of those after it;
    where there is no more of that, they go through.
    """

    def __init__(self, books: Books, monkeypatch: pytest.MonkeyPatch, *then: Step) -> None:
        self.execute: Step = books.db.execute
        self.then = list(then)
        self._first: Callable[[], Awaitable[Any]] | None = None
        monkeypatch.setattr(books.db, "execute", self._go)

    async def begin(self) -> None:
        assert self._first is not None
        await self._first()

    async def _go(self, sql: str, *arguments: Any, **values: Any) -> Any:
        if self._first is None:
            self._first = partial(self.execute, sql, *arguments, **values)
            raise psycopg.OperationalError("the connection is lost")
        step = self.then.pop(0) if self.then else self.execute
        return await step(sql, *arguments, **values)


async def _meets_a_conflict(*_: Any, **__: Any) -> Any:
    raise psycopg.errors.DeadlockDetected("deadlock detected")


async def _loses_its_connection(*_: Any, **__: Any) -> Any:
    raise psycopg.OperationalError("the connection is lost")


@pytest.mark.parametrize(
    "then",
    [(), (_meets_a_conflict,), (_loses_its_connection, _meets_a_conflict)],
    ids=["answered", "conflict", "lost, conflict"],
)
async def test_a_dispatch_that_is_begun_after_its_repeat_was_answered_opens_nothing(
    books: Books, monkeypatch: pytest.MonkeyPatch, then: tuple[Step, ...]
) -> None:
    account = books.account("acme")
    books.set_budget("acme", day=300)
    before = await books.wish(account, [220])
    await books.open(before)
    small, large = await books.wish(account, [40, 100])
    late = _Late(books, monkeypatch, *then)
    opened, full = await books.open([small, large])
    assert opened is True
    assert isinstance(full, Full)
    await books.settle(before, None)
    await late.begin()
    assert _state(books) == (0, 40, 0, 40)
    # The job goes on, with another attempt.
    again = replace(large, attempt_id=new_id())
    assert await books.open([again]) == [True]
    await books.settle([small, again], 30)
    assert _state(books) == (60, 0, 60, 0)
    rows = await books.rows(
        "SELECT a.id, a.state, a.ended_at IS NULL AS is_open, j.attempts_used"
        " FROM attempts a JOIN jobs j ON j.id = a.job_id WHERE j.id = %(id)s ORDER BY a.id",
        id=large.job_id,
    )
    assert rows == [
        (large.attempt_id, "void", False, 1),
        (again.attempt_id, "succeeded", False, 1),
    ]


async def test_a_dispatch_that_is_begun_before_it_is_closed_is_heard_of(
    books: Books, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It commits after the statement that is to close it has begun."""
    account = books.account("acme")
    books.set_budget("acme", day=100)
    await books.open(await books.wish(account, [60]))
    (attempt,) = await books.wish(account, [60])

    async def overtaken(sql: str, *arguments: Any, **values: Any) -> Any:
        await late.execute("UPDATE budgets SET day_limit_nano_usd = 200")
        with books.change() as line:
            line.exec_driver_sql("SELECT FROM budgets FOR UPDATE")
            first = asyncio.ensure_future(late.begin())
            await _waiting(late.execute, 1)
            closing = asyncio.ensure_future(late.execute(sql, *arguments, **values))
            await _waiting(late.execute, 2)
        await first
        return await closing

    late = _Late(books, monkeypatch, books.db.execute, overtaken)
    assert await books.open([attempt]) == [True]
    assert _state(books) == (0, 120, 0, 120)


@pytest.mark.parametrize(
    "lose",
    [
        "UPDATE jobs SET fence = fence + 1 WHERE id = %(id)s",
        "DELETE FROM jobs WHERE id = %(id)s",
    ],
    ids=["another's", "deleted"],
)
async def test_a_dispatch_whose_job_is_lost_meanwhile_opens_nothing_late(
    books: Books, monkeypatch: pytest.MonkeyPatch, lose: str
) -> None:
    account = books.account("acme")
    books.set_budget("acme", day=100)
    (attempt,) = await books.wish(account, [60])
    late = _Late(books, monkeypatch)

    async def repeated(sql: str, *arguments: Any, **values: Any) -> Any:
        await late.execute(lose, id=attempt.job_id)
        return await late.execute(sql, *arguments, **values)

    late.then.append(repeated)
    assert await books.open([attempt]) == [False]
    await late.begin()
    assert _state(books) == (0, 0, 0, 0)
    assert not await books.rows("SELECT FROM attempts WHERE state <> 'void'")


async def test_what_a_dead_worker_left_of_a_job_that_has_gone_on_is_booked(books: Books) -> None:
    account = books.account("acme")
    books.set_budget("acme", day=1000)
    (stray,) = await books.wish(account, [60])
    await books.open([stray])
    await books.die()
    # Its job is another worker's by now, under another fence.
    await books.rows(
        "UPDATE jobs SET worker_id = %(worker)s, fence = fence + 1 WHERE id = %(id)s",
        worker=books.worker_id,
        id=stray.job_id,
    )
    await asyncio.gather(books.resolve(), books.resolve())
    assert _state(books) == (60, 0, 60, 0)
    (job,) = await books.rows(
        "SELECT state, fence, cost_nano_usd FROM jobs WHERE id = %(id)s", id=stray.job_id
    )
    assert job == ("running", 2, 60)


async def test_fifty_settlements_that_cross_a_threshold_at_once_raise_one_alert(
    books: Books,
) -> None:
    account = books.account("acme")
    books.set_budget("acme", day=1000)
    attempts = await books.wish(account, [20] * 50)
    assert await books.open(attempts) == [True] * 50
    await asyncio.gather(*(books.settle([attempt], 20) for attempt in attempts))
    rows = await books.rows(
        'SELECT account_id, use_case, "window", threshold, message FROM alerts ORDER BY threshold'
    )
    assert [(row.account_id, row.use_case, row.window, row.threshold) for row in rows] == [
        (account, None, "day", 80),
        (account, None, "day", 100),
    ]
    assert rows[0].message.startswith("acme has spent 80 percent of its daily budget: $0.0000008")


async def test_a_window_has_its_own_alerts_and_a_raised_limit_none_twice(books: Books) -> None:
    account = books.account("acme")

    async def spend(amount: int) -> None:
        attempts = await books.wish(account, [amount])
        assert await books.open(attempts) == [True]
        await books.settle(attempts, amount)

    async def alerts() -> list[tuple[str, int]]:
        rows = await books.rows('SELECT "window", threshold FROM alerts ORDER BY id')
        return [(row.window, row.threshold) for row in rows]

    books.set_budget("acme", day=100)
    await spend(80)
    assert await alerts() == [("day", 80)]
    books.set_budget("acme", day=200)
    await spend(100)
    assert await alerts() == [("day", 80)]
    # Lowered to where it is reached already.
    books.set_budget("acme", day=180)
    assert await alerts() == [("day", 80), ("day", 100)]
    books.set_budget("acme", month=200)
    assert await alerts() == [("day", 80), ("day", 100), ("month", 80)]
    await books.age(timedelta(days=1))
    await books.rows("UPDATE alerts SET window_started_at = window_started_at - interval '1 day'")
    books.set_budget("acme", month=None)
    await spend(170)
    assert (await alerts())[3:] == [("day", 80)]


async def test_redis_has_what_postgres_has(books: Books) -> None:
    account = books.account("acme")
    books.set_budget("acme", day=100)
    attempts = await books.wish(account, [60, 60])
    await books.open(attempts)
    await books.settle(attempts[:1], 50)
    await books.copying.finish(10)
    (copy,) = (await books.copies.read([account])).values()
    assert (copy["day_spent"], copy["day_held"], copy["day_limit"]) == (50, 0, 100)
    drift = await books.reconcile()
    assert (drift.budgets, drift.repaired) == (1, 0)


async def test_the_reconciler_repairs_whatever_redis_has(books: Books, settings: Settings) -> None:
    ids: list[UUID] = [books.account(name) for name in ("a", "b", "c", "d")]
    for name in ("a", "b", "c", "d"):
        books.set_budget(name, day=100)
    attempts = [attempt for one in ids for attempt in await books.wish(one, [60])]
    await books.open(attempts)
    await books.copying.finish(10)
    before = await books.copies.read(ids)
    assert len(before) == 4
    await books.settle(attempts, 50)
    await books.copying.finish(10)
    by_account = {copy["account_id"]: copy for copy in before.values()}
    # a: from an older file; b: gone; c: of a version that never was; d: its budget is cleared.
    old, gone, wrong, _ = (str(one) for one in ids)
    await books.copies.remove([by_account[old], by_account[gone]])
    await books.copies.put([by_account[old]])
    await books.copies.put([by_account[wrong] | {"version": 99}])
    with books.change() as line:
        clear_budget(line, find_account(line, "d"))
    drift = await books.reconcile()
    assert (drift.behind, drift.missing, drift.wrong, drift.orphaned) == (1, 1, 1, 1)
    assert (drift.budgets, drift.largest_nano_usd) == (3, 60)
    after = await books.copies.read(ids)
    assert {copy["account_id"] for copy in after.values()} == {old, gone, wrong}
    assert all((copy["day_spent"], copy["day_held"]) == (50, 0) for copy in after.values())
    assert (await books.reconcile()).repaired == 0
    # Nobody can read one.
    key = budgets_key(settings.redis_prefix, ids[0])
    await books.redis.hset(key, by_account[old]["id"], "neither JSON nor ours")
    drift = await books.reconcile()
    assert (drift.wrong, drift.repaired) == (1, 1)
    assert await books.copies.read(ids) == after
    for key in await books.copies.account_ids():
        await books.redis.delete(budgets_key(settings.redis_prefix, key))
    await asyncio.gather(*(books.reconcile() for _ in range(5)))
    assert await books.copies.read(ids) == after


async def test_a_sweep_is_woken_by_a_change_of_a_budget(books: Books) -> None:
    """It looks every two minutes by itself."""
    account = books.account("acme")
    books.set_budget("acme", day=100)
    given = {"sweep_interval_s": 120.0, "reconcile_interval_s": 120.0}
    running = asyncio.create_task(Sweep(books.settings.model_copy(update=given)).run())
    limits = count(101)

    async def limit() -> int:
        copies = (await books.copies.read([account])).values()
        return max((int(copy["day_limit"]) for copy in copies), default=0)

    async def looked() -> bool:
        return await limit() == 100

    async def woken() -> bool:
        # Until it listens it hears of none.
        await asyncio.to_thread(books.set_budget, "acme", day=next(limits))
        return await limit() > 100

    try:
        await eventually_async(looked)
        await eventually_async(woken)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
