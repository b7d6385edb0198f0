"""The forecast of a month: exact where it can be, wide where it must be, silent from few days."""

from __future__ import annotations

import random
from calendar import monthrange
from datetime import date, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sluicegate.producers.spend_forecast import MIN_DAYS, Forecast, forecast, whole_days

USD = 1_000_000_000
#: A Sunday; the 30th is a Monday.
FIRST = date(2026, 11, 1)


def day(number: int) -> date:
    return FIRST.replace(day=number)


def month(workday: int, weekend: int, *, until: int) -> dict[date, int]:
    """Costs of a month's days before a day, the same for all of a kind."""
    return {day(n): weekend if day(n).weekday() >= 5 else workday for n in range(1, until)}


def sure(costs: dict[date, int], today: date) -> Forecast:
    found = forecast(costs, today)
    assert found is not None
    return found


@st.composite
def some_costs(draw: st.DrawFn) -> tuple[dict[date, int], date]:
    today = draw(st.dates(date(2020, 1, 1), date(2030, 12, 31)))
    amounts = st.integers(0, 2**53)
    days = st.dates(today - timedelta(days=40), today)
    return draw(st.dictionaries(days, amounts, max_size=60)), today


@given(some_costs())
def test_the_range_holds_the_forecast_and_neither_is_below_what_is_spent(
    given_: tuple[dict[date, int], date],
) -> None:
    costs, today = given_
    found = forecast(costs, today)
    if found is None:
        return
    of_month = [cost for day, cost in costs.items() if (day.year, day.month) == today_month(today)]
    assert found.so_far_nano_usd == sum(of_month)
    assert found.so_far_nano_usd <= found.low_nano_usd <= found.cost_nano_usd <= found.high_nano_usd
    assert MIN_DAYS <= found.days == len(whole_days(costs, today)) < today.day
    assert found.month == today.replace(day=1)


def today_month(today: date) -> tuple[int, int]:
    return today.year, today.month


@given(some_costs(), st.integers(1, 10**9))
def test_it_knows_no_unit(given_: tuple[dict[date, int], date], factor: int) -> None:
    costs, today = given_
    small = forecast({day: cost % 10**6 for day, cost in costs.items()}, today)
    large = forecast({day: cost % 10**6 * factor for day, cost in costs.items()}, today)
    assert (small is None) is (large is None)
    if small is not None and large is not None:
        for name in ("cost_nano_usd", "low_nano_usd", "high_nano_usd"):
            wanted = getattr(small, name) * factor
            assert getattr(large, name) == pytest.approx(wanted, rel=1e-9, abs=2 * factor)


@pytest.mark.parametrize("whole", range(MIN_DAYS))
def test_there_is_none_from_fewer_days(whole: int) -> None:
    costs = month(USD, USD, until=whole + 1) | {day(whole + 1): USD}
    assert forecast(costs, day(whole + 1)) is None
    enough = month(USD, USD, until=MIN_DAYS + 1)
    assert sure(enough, day(MIN_DAYS + 1)).days == MIN_DAYS


def test_days_that_are_all_alike_leave_no_doubt() -> None:
    found = sure(month(3 * USD, USD, until=16), day(16))
    # 21 workdays and 9 days of weekends.
    assert found.cost_nano_usd == (21 * 3 + 9) * USD
    assert found.low_nano_usd == found.high_nano_usd == found.cost_nano_usd


def test_what_today_has_cost_is_a_part_of_what_today_is_expected_to() -> None:
    before = month(3 * USD, USD, until=16)
    for today_cost, more in ((0, 0), (USD, 0), (3 * USD, 0), (10 * USD, 7)):
        found = sure(before | {day(16): today_cost}, day(16))
        assert found.cost_nano_usd == (21 * 3 + 9 + more) * USD


def test_on_the_last_day_what_is_past_is_exact() -> None:
    before = month(3 * USD, USD, until=30)
    found = sure(before | {day(30): 9 * USD}, day(30))
    assert found.cost_nano_usd == sum(before.values()) + 9 * USD


def test_days_before_the_first_cost_are_not_counted_and_those_after_it_are() -> None:
    late = {at: cost for at, cost in month(3 * USD, 0, until=21).items() if at >= day(9)}
    assert whole_days(late, day(21))[0] == day(9)
    assert sure(late, day(21)).cost_nano_usd == 3 * USD * (5 + 5 + 6)
    quiet = {day(2): 12 * USD, day(16): USD}
    assert sure(quiet, day(16)).days == 14


def test_by_hand() -> None:
    """Eight days: six workdays of 1 to 6, two of weekends of 1 and 3, in dollars."""
    amounts = {2: 1, 3: 2, 4: 3, 5: 4, 6: 5, 7: 1, 8: 3, 9: 6}
    found = sure({day(n): cost * USD for n, cost in amounts.items()}, day(10))
    # To come: 15 workdays at 3.5, 6 days of weekends at 2, today none yet.
    assert found.cost_nano_usd == (25 + 15 * 3.5 + 6 * 2) * USD
    # Variances 3.5 and 2: 3.5 (15 + 15²/6) = 183.75, 2 (6 + 6²/2) = 48; 5.93 degrees of freedom.
    half = 2.015 * (183.75 + 48) ** 0.5 * USD
    assert found.high_nano_usd - found.cost_nano_usd == pytest.approx(half, rel=1e-9)
    assert found.low_nano_usd == 2 * found.cost_nano_usd - found.high_nano_usd


@pytest.mark.parametrize("today", [9, 16, 24])
def test_the_range_holds_what_comes_about_as_often_as_it_says(today: int) -> None:
    chance = random.Random(today)
    hits = 0
    months = 2000
    for _ in range(months):
        actual = {
            day(n): round(chance.gauss(20 if day(n).weekday() >= 5 else 100, 15) * USD)
            for n in range(1, monthrange(2026, 11)[1] + 1)
        }
        found = sure({at: cost for at, cost in actual.items() if at < day(today)}, day(today))
        hits += found.low_nano_usd <= sum(actual.values()) <= found.high_nano_usd
    assert 0.87 <= hits / months <= 0.96
