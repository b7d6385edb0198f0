"""How budgets are shown: as a table for people, as JSON for programs. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, Final
from uuid import UUID
from zoneinfo import ZoneInfo

from sluicegate.shared.budgets import WINDOW_NAMES, Budget, Window, dollars
from sluicegate.shared.jobs import dollars as decimal_dollars
from sluicegate.shared.terminal import Coloured, moment, money, span

HEAD: Final = (
    *("account", "use case", "window", "limit", "percent", "spent", "held", "left"),
    *("resets at", "more jobs (about)"),
)

#: What a job of each use case typically costs, in nano-USD, by account.
Costs = Mapping[UUID, Mapping[str, int]]


def table(budgets: Sequence[Budget], costs: Costs, now: datetime) -> list[Sequence[str]]:
    """Return a row for each window that has a limit."""
    return [
        (
            budget.account,
            budget.use_case or "all",
            name,
            dollars(limit),
            _percent_cell(window, limit, budget.thresholds),
            money(window.spent_nano_usd),
            money(window.held_nano_usd),
            money(window.left_nano_usd),
            _reset(window, budget.time_zone, now),
            _jobs_cell(jobs_left(budget, window, costs)),
        )
        for budget in budgets
        for name, window, limit in _limited(budget)
    ]


def as_json(budget: Budget, costs: Costs, now: datetime) -> dict[str, Any]:
    """Return all there is to say of a budget: exact amounts, dollars as text."""
    return {
        "id": str(budget.id),
        "account_id": str(budget.account_id),
        "account": budget.account,
        "use_case": budget.use_case,
        "time_zone": budget.time_zone,
        "thresholds": list(budget.thresholds),
        **{name: _window_as_json(budget, name, costs, now) for name in WINDOW_NAMES},
    }


def jobs_left(budget: Budget, window: Window, costs: Costs) -> dict[str, int | None]:
    """Return about how many more jobs of each use case a window has room for.

    None for the budget's own use case, if nobody knows what a job of it costs.
    """
    left = window.left_nano_usd
    known = costs.get(budget.account_id, {})
    if left is None:
        return {}
    if budget.use_case is None:
        return {use_case: left // cost for use_case, cost in sorted(known.items())}
    cost = known.get(budget.use_case)
    return {budget.use_case: None if cost is None else left // cost}


def percent(window: Window) -> float | None:
    """Return how much of the limit is spent; None without a limit."""
    limit = window.limit_nano_usd
    if limit is None:
        return None
    return 100 * window.spent_nano_usd / limit if limit else 100.0


def _limited(budget: Budget) -> Iterator[tuple[str, Window, int]]:
    for name in WINDOW_NAMES:
        window = _window(budget, name)
        if window.limit_nano_usd is not None:
            yield name, window, window.limit_nano_usd


def _window(budget: Budget, name: str) -> Window:
    return {"day": budget.day, "month": budget.month}[name]


def _percent_cell(window: Window, limit: int, thresholds: Sequence[int]) -> str:
    spent = window.spent_nano_usd
    written = f"{percent(window) or 0:.1f}%"
    if spent >= limit:
        return Coloured(written, "red")
    if any(spent * 100 >= limit * threshold for threshold in thresholds):
        return Coloured(written, "yellow")
    return Coloured(written, "green")


def _reset(window: Window, time_zone: str, now: datetime) -> str:
    resets_at = window.resets_at.astimezone(ZoneInfo(time_zone))
    left = span((window.resets_at - now).total_seconds())
    return f"{resets_at:%Y-%m-%d %H:%M} {time_zone} (in {left})"


def _jobs_cell(left: Mapping[str, int | None]) -> str:
    known = [f"{count:,} {use_case}" for use_case, count in left.items() if count is not None]
    return ", ".join(known) or "no job yet"


def _window_as_json(budget: Budget, name: str, costs: Costs, now: datetime) -> dict[str, Any]:
    window = _window(budget, name)
    amounts = {
        "limit": window.limit_nano_usd,
        "spent": window.spent_nano_usd,
        "held": window.held_nano_usd,
        "left": window.left_nano_usd,
    }
    zone = ZoneInfo(budget.time_zone)
    return {
        **{f"{what}_nano_usd": amount for what, amount in amounts.items()},
        **{
            f"{what}_usd": None if amount is None else format(decimal_dollars(amount), "f")
            for what, amount in amounts.items()
        },
        "percent": percent(window),
        "started_at": moment(window.started_at.astimezone(zone)),
        "resets_at": moment(window.resets_at.astimezone(zone)),
        "resets_in_s": max(0.0, (window.resets_at - now).total_seconds()),
        "jobs_left": jobs_left(budget, window, costs),
    }
