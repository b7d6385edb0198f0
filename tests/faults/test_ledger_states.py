"""Any order of calls, crashes, corrections, midnights and flushes, against a simple model."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar
from uuid import UUID

import pytest
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from sluicegate.shared.accounts import find_account
from sluicegate.shared.admission.keys import budgets_key
from sluicegate.shared.budgets import clear_budget
from sluicegate.shared.settings import Settings
from sluicegate.workers.dispatch import Attempt
from sluicegate.workers.ledger import Full
from tests.books import Books
from tests.harness import FULL

T = TypeVar("T")

USE_CASES = ("draft", "voice")
ACCOUNT = "acme"


@dataclass
class Call:
    """What the model knows of an attempt."""

    attempt: Attempt
    use_case: str
    #: How many midnights have passed since it was dispatched.
    age_days: int = 0
    #: None: it is open; -1: its outcome is unknown, and the reserve is booked.
    state: str = "open"
    spent: int = 0


class Ledger(RuleBasedStateMachine):
    """One account with up to three budgets, and workers that may die."""

    books: Books
    runner: asyncio.Runner

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        #: Daily limits by use case; None: the account's.
        self.limits: dict[str | None, int] = {}
        self.account_id: UUID = self.books.account(ACCOUNT)

    def wait(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(coroutine)

    def teardown(self) -> None:
        async def wipe() -> None:
            await self.books.copying.finish(10)
            for table in ("alerts", "budgets", "cost_entries", "jobs", "gate_changes"):
                await self.books.rows(f"DELETE FROM {table}")
            await self.books.rows("DELETE FROM accounts WHERE name = 'acme'")

        self.wait(wipe())

    @initialize(limit=st.integers(50, 300))
    def begin(self, limit: int) -> None:
        self.set_budget(None, limit)

    @rule(use_case=st.sampled_from([None, *USE_CASES]), limit=st.integers(0, 300))
    def set_budget(self, use_case: str | None, limit: int) -> None:
        self.books.set_budget(ACCOUNT, use_case=use_case, day=limit)
        self.limits[use_case] = limit

    @precondition(lambda self: self.limits)
    @rule(data=st.data())
    def clear(self, data: st.DataObject) -> None:
        use_case = data.draw(st.sampled_from(sorted(self.limits, key=str)))
        with self.books.change() as line:
            clear_budget(line, find_account(line, ACCOUNT), use_case=use_case)
        del self.limits[use_case]

    @rule(
        use_case=st.sampled_from(USE_CASES),
        reserves=st.lists(st.integers(0, 120), min_size=1, max_size=4),
        twice=st.booleans(),
    )
    def dispatch(self, use_case: str, reserves: list[int], twice: bool) -> None:
        attempts = self.wait(self.books.wish(self.account_id, reserves, use_case))
        expected = self._fitting(use_case, reserves)
        opened = self.wait(self.books.open(attempts))
        if twice:
            # The first answer was lost: the same statement opens nothing more than it has.
            again = self.wait(self.books.open(attempts))
            assert all(new is True for old, new in zip(opened, again, strict=True) if old is True)
            opened = again
        assert [one is True for one in opened][: len(expected)] == expected or twice
        for attempt, one, reserve in zip(attempts, opened, reserves, strict=True):
            if one is True:
                self.calls.append(Call(attempt, use_case))
            else:
                assert isinstance(one, Full)
                over = [
                    self._spent(name) + reserve > limit
                    for name, limit in self.limits.items()
                    if name in (None, use_case)
                ]
                assert one.by_spend == any(over)

    def _fitting(self, use_case: str, reserves: list[int]) -> list[bool]:
        """Which of these fit: those that would not alone take no room; a sum is of all others."""
        rooms = [
            limit - self._spent(name) - self._held(name)
            for name, limit in self.limits.items()
            if name in (None, use_case)
        ]
        alone = [all(reserve <= room for room in rooms) for reserve in reserves]
        total, fits = 0, []
        for reserve, is_alone in zip(reserves, alone, strict=True):
            total += reserve * is_alone
            fits.append(is_alone and all(total <= room for room in rooms))
        return fits

    @precondition(lambda self: self.calls)
    @rule(data=st.data(), cost=st.integers(0, 150), twice=st.booleans())
    def settle(self, data: st.DataObject, cost: int, twice: bool) -> None:
        call = data.draw(st.sampled_from(self.calls))
        for _ in range(1 + twice):
            self.wait(self.books.settle([call.attempt], cost))
        if call.state in ("open", "unknown"):
            call.state, call.spent = "over", cost

    @precondition(lambda self: self.calls)
    @rule(data=st.data())
    def void(self, data: st.DataObject) -> None:
        call = data.draw(st.sampled_from(self.calls))
        self.wait(self.books.settle([call.attempt], None))
        if call.state in ("open", "unknown"):
            call.state, call.spent = "over", 0

    @rule(twice=st.booleans())
    def crash(self, twice: bool) -> None:
        async def die_and_resolve() -> None:
            await self.books.die()
            await asyncio.gather(*(self.books.resolve() for _ in range(1 + twice)))

        self.wait(die_and_resolve())
        for call in self.calls:
            if call.state == "open":
                call.state, call.spent = "unknown", call.attempt.reserved_nano_usd

    @rule()
    def midnight(self) -> None:
        self.wait(self.books.age(timedelta(days=1)))
        for call in self.calls:
            call.age_days += 1

    @rule()
    def flush(self) -> None:
        key = budgets_key(self.books.settings.redis_prefix, self.account_id)

        async def flush() -> None:
            await self.books.copying.finish(10)
            await self.books.redis.delete(key)

        self.wait(flush())

    @rule()
    def reconcile(self) -> None:
        async def both() -> None:
            await self.books.copying.finish(10)
            await asyncio.gather(self.books.reconcile(), self.books.reconcile())
            assert (await self.books.reconcile()).repaired == 0
            copies = await self.books.copies.read([self.account_id])
            assert len(copies) == len(self.limits)

        self.wait(both())

    def _today(self, use_case: str | None) -> list[Call]:
        return [
            call for call in self.calls if call.age_days == 0 and use_case in (None, call.use_case)
        ]

    def _spent(self, use_case: str | None) -> int:
        return sum(call.spent for call in self._today(use_case))

    def _held(self, use_case: str | None) -> int:
        return sum(
            call.attempt.reserved_nano_usd for call in self._today(use_case) if call.state == "open"
        )

    @invariant()
    def the_books_are_those_of_the_model(self) -> None:
        for use_case, limit in self.limits.items():
            day = self.books.budget(ACCOUNT, use_case).day
            assert day.limit_nano_usd == limit
            assert day.spent_nano_usd == self._spent(use_case)
            assert day.held_nano_usd == self._held(use_case)

    @invariant()
    def entries_are_what_was_spent(self) -> None:
        (row,) = self.wait(
            self.books.rows(
                "SELECT coalesce(sum(amount_nano_usd), 0)::bigint AS booked FROM cost_entries"
            )
        )
        assert row.booked == sum(call.spent for call in self.calls)


@pytest.mark.timeout(900 if FULL else 120)
def test_the_ledger(settings: Settings) -> None:
    with asyncio.Runner() as runner:

        async def open_books() -> Books:
            return await Books(settings).__aenter__()

        Ledger.runner, Ledger.books = runner, runner.run(open_books())
        try:
            run_state_machine_as_test(
                Ledger,
                settings=hypothesis_settings(
                    max_examples=300 if FULL else 20,
                    stateful_step_count=25,
                    suppress_health_check=list(HealthCheck),
                ),
            )
        finally:
            runner.run(Ledger.books.close())
