"""Budgets as both clients and the command have them: set, read and cleared.

with Sluice() as sluice:
    budget = sluice.set_budget("acme", daily="25.50", monthly=500)
    print(budget.day.left, budget.day.resets_at)
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from decimal import Decimal
from types import EllipsisType
from typing import TypeVar
from uuid import UUID

from sqlalchemy import Connection
from sqlalchemy.ext.asyncio import AsyncConnection

from sluicegate.shared import budgets
from sluicegate.shared.accounts import find_account
from sluicegate.shared.budgets import Budget, WindowName, check_thresholds, read_dollars
from sluicegate.shared.errors import InvalidJob

T = TypeVar("T")

#: US dollars, exact; None: no limit; `...`: as it is.
Limit = Decimal | str | int | None | EllipsisType


def setting(
    account: str | UUID,
    *,
    use_case: str | None,
    daily: Limit,
    monthly: Limit,
    thresholds: Sequence[int] | None,
) -> Callable[[Connection], Budget]:
    """Check what a budget is to be; return what sets it within a transaction.

    Raises `InvalidJob` that names the field; what is returned also raises `NotFound`.
    """
    limits: dict[WindowName, int | None] = {}
    if not isinstance(daily, EllipsisType):
        limits["day"] = None if daily is None else read_dollars("daily", daily)
    if not isinstance(monthly, EllipsisType):
        limits["month"] = None if monthly is None else read_dollars("monthly", monthly)
    checked = None if thresholds is None else check_thresholds(thresholds)
    if not limits and checked is None:
        raise InvalidJob("limit", "give a daily or a monthly limit, or thresholds")

    def work(connection: Connection) -> Budget:
        found = find_account(connection, str(account))
        return budgets.set_budget(
            connection, found, use_case=use_case, limits=limits, thresholds=checked
        )

    return work


def reading(account: str | UUID | None) -> Callable[[Connection], list[Budget]]:
    """Return what reads the budgets of an account, or of all; it raises `NotFound`."""

    def work(connection: Connection) -> list[Budget]:
        account_id = None if account is None else find_account(connection, str(account)).id
        return budgets.list_budgets(connection, account_id)

    return work


def clearing(account: str | UUID, use_case: str | None) -> Callable[[Connection], None]:
    """Return what takes a budget away within a transaction; it raises `NotFound`."""

    def work(connection: Connection) -> None:
        found = find_account(connection, str(account))
        budgets.clear_budget(connection, found, use_case=use_case)

    return work


class Budgeting:
    """What `Sluice` does with budgets."""

    def set_budget(
        self,
        account: str | UUID,
        *,
        use_case: str | None = None,
        daily: Limit = ...,
        monthly: Limit = ...,
        thresholds: Sequence[int] | None = None,
    ) -> Budget:
        """Set what an account may spend, or (use_case) what its jobs of a use case may.

        daily, monthly: in US dollars, exact, as `Decimal`, text or a whole number; None takes that
        limit away, and what is not given stays. thresholds: percents of a limit at which an alert
        is raised; 80 and 100 at first. Returns the budget as it is now: what was spent and is held
        since its day and its month began counts.

        Raises `NotFound` for an account or a use case that there is not, `InvalidJob` that names
        the field, `QueueUnavailable` if Postgres does not answer or its ledger is busy.
        """
        work = setting(
            account, use_case=use_case, daily=daily, monthly=monthly, thresholds=thresholds
        )
        return self._query(work, atomic=True)

    def budgets(self, account: str | UUID | None = None) -> list[Budget]:
        """Return the budgets of an account, or of all, as they are now; raises `NotFound`."""
        return self._query(reading(account))

    def clear_budget(self, account: str | UUID, use_case: str | None = None) -> None:
        """Take a budget away; raises `NotFound` if there is none."""
        self._query(clearing(account, use_case), atomic=True)

    def _query(self, work: Callable[[Connection], T], *, atomic: bool = False) -> T:
        raise NotImplementedError


class AsyncBudgeting:
    """What `AsyncSluice` does with budgets."""

    async def set_budget(
        self,
        account: str | UUID,
        *,
        use_case: str | None = None,
        daily: Limit = ...,
        monthly: Limit = ...,
        thresholds: Sequence[int] | None = None,
    ) -> Budget:
        """Set what an account may spend, or what its jobs of a use case may; as `Sluice` does."""
        work = setting(
            account, use_case=use_case, daily=daily, monthly=monthly, thresholds=thresholds
        )
        return await self._query(lambda connection: connection.run_sync(work), atomic=True)

    async def budgets(self, account: str | UUID | None = None) -> list[Budget]:
        """Return the budgets of an account, or of all, as they are now; raises `NotFound`."""
        work = reading(account)
        return await self._query(lambda connection: connection.run_sync(work))

    async def clear_budget(self, account: str | UUID, use_case: str | None = None) -> None:
        """Take a budget away; raises `NotFound` if there is none."""
        work = clearing(account, use_case)
        await self._query(lambda connection: connection.run_sync(work), atomic=True)

    async def _query(
        self, work: Callable[[AsyncConnection], Awaitable[T]], *, atomic: bool = False
    ) -> T:
        raise NotImplementedError
