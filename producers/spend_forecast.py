"""What a month will have cost, by its days so far. Pure.

Method: the whole days so far, from the first that cost anything on, fall into workdays (Monday to
Friday) and weekends. Each day to come is expected to cost the mean of its kind, today at least what
it has cost already. The range is a 90 % prediction interval: the days of a kind are taken as
independent and alike, so that their sum to come varies by the spread of the days seen and by how
well their mean is known; Student's t takes its degrees of freedom from Welch and Satterthwaite.
Seven days in a row hold two days of each kind at least, so there is no forecast from fewer.
"""

from __future__ import annotations

from calendar import monthrange
from collections.abc import Mapping, Sequence
from datetime import date, timedelta
from math import sqrt
from statistics import mean, variance
from typing import Final

from sluicegate.shared.messages import Frozen

#: Whole days that a forecast needs.
MIN_DAYS: Final = 7
#: How often what comes lies in the range, if days are as the method takes them.
CONFIDENCE: Final = 0.9

#: Student's t that is exceeded once in twenty times, by degrees of freedom from 1.
_T: Final = (
    *(6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833, 1.812),
    *(1.796, 1.782, 1.771, 1.761, 1.753, 1.746, 1.740, 1.734, 1.729, 1.725),
    *(1.721, 1.717, 1.714, 1.711, 1.708, 1.706, 1.703, 1.701, 1.699),
)
_SATURDAY: Final = 5


class Forecast(Frozen):
    """What the whole month is expected to cost."""

    #: The month's first day.
    month: date
    #: What it has cost until now, today included.
    so_far_nano_usd: int
    #: Whole days that the forecast is made from.
    days: int
    cost_nano_usd: int
    low_nano_usd: int
    high_nano_usd: int


def whole_days(costs: Mapping[date, int], today: date) -> list[date]:
    """Return the days before today since the month's first one that cost anything."""
    spent = [day for day, cost in costs.items() if cost and _is_same_month(day, today)]
    if not spent:
        return []
    first = min(spent)
    return [first + timedelta(days=n) for n in range((today - first).days)]


def forecast(costs: Mapping[date, int], today: date) -> Forecast | None:
    """Say what today's month will have cost; None if there are too few whole days.

    costs: nano-USD by day; a day that is not there cost nothing. Other months' are left alone.
    """
    days = whole_days(costs, today)
    if len(days) < MIN_DAYS:
        return None
    of_today = costs.get(today, 0)
    so_far = of_today + sum(costs.get(day, 0) for day in days)
    last = monthrange(today.year, today.month)[1]
    to_come = [today.replace(day=number) for number in range(today.day, last + 1)]

    expected = 0.0
    spreads: list[tuple[float, int]] = []
    for is_weekend in (False, True):
        seen = [costs.get(day, 0) for day in days if _is_weekend(day) is is_weekend]
        coming = sum(_is_weekend(day) is is_weekend for day in to_come)
        usual = float(mean(seen))
        expected += coming * usual
        if _is_weekend(today) is is_weekend:
            # That much of what today is expected to cost is in `so_far`.
            expected -= min(usual, of_today)
        spreads.append((float(variance(seen)) * (coming + coming**2 / len(seen)), len(seen) - 1))
    half = _quantile(spreads) * sqrt(sum(spread for spread, _ in spreads))
    cost = so_far + max(0, round(expected))
    return Forecast(
        month=today.replace(day=1),
        so_far_nano_usd=so_far,
        days=len(days),
        cost_nano_usd=cost,
        low_nano_usd=max(so_far, cost - round(half)),
        high_nano_usd=cost + round(half),
    )


def _quantile(spreads: Sequence[tuple[float, int]]) -> float:
    """Return t for a sum of variances, each with its own degrees of freedom."""
    largest = max(spread for spread, _ in spreads)
    if largest == 0:
        return 0.0
    # In shares of the largest, so that no square overflows.
    shares = [(spread / largest, freedom) for spread, freedom in spreads]
    freedom = sum(share for share, _ in shares) ** 2 / sum(
        share**2 / freedom for share, freedom in shares
    )
    number = int(freedom + 1e-9)
    return _T[min(number, len(_T)) - 1]


def _is_same_month(day: date, other: date) -> bool:
    return (day.year, day.month) == (other.year, other.month)


def _is_weekend(day: date) -> bool:
    return day.weekday() >= _SATURDAY
