"""What was spent, on what, and what it saved: reports over the cost entries of some days.

All figures are sums over the cost entries and the view `spend`, see docs/money.md. Percentiles come
from counts in buckets 4 % wide, so that a million latencies need no sorting: they are right to 2 %.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, timedelta
from enum import StrEnum
from itertools import accumulate, pairwise
from math import exp
from typing import Any, Final
from uuid import UUID

from sqlalchemy import Connection, Row

from sluicegate.producers.spend_forecast import Forecast, forecast
from sluicegate.shared.accounts import Account, check_time_zone, find_account
from sluicegate.shared.errors import InvalidJob, NotFound
from sluicegate.shared.messages import Frozen
from sluicegate.shared.tables import LATENCY_BUCKETS

#: Days that one report may cover: ten years.
MAX_DAYS: Final = 3660
_FIRST_DAY, _LAST_DAY = date(1970, 1, 1), date(9998, 12, 31)
#: How long one statement may take: an archive of years is read from end to end.
_PATIENCE_S: Final = 300


class By(StrEnum):
    """What the rows of a report stand for."""

    PROVIDER = "provider"
    MODEL = "model"
    USE_CASE = "use_case"
    ACCOUNT = "account"
    DAY = "day"


@dataclass(frozen=True, slots=True)
class Period:
    """Whole days, both ends included, in a time zone."""

    first: date
    last: date
    time_zone: str

    @property
    def days(self) -> int:
        """How many days it has."""
        return (self.last - self.first).days + 1

    def day(self, number: int) -> date:
        """Return its day of this number, from 0."""
        return self.first + timedelta(days=number)

    def is_month_so_far(self, today: date) -> bool:
        """Whether it holds this month until today, and nothing before it."""
        return self.first == today.replace(day=1) and self.last >= today


class Latency(Frozen):
    """What half, 95 % and 99 % of the answers took at most, in milliseconds."""

    p50_ms: int
    p95_ms: int
    p99_ms: int


def latency(counts: Mapping[int, int]) -> Latency | None:
    """Read percentiles from how many calls are in which bucket; None if there are none."""
    if not counts:
        return None
    total = sum(counts.values())
    ordered = sorted(counts)
    # How many calls are in each bucket or one before it.
    reached = list(accumulate(counts[bucket] for bucket in ordered))

    def at(percent: int) -> int:
        wanted = -(-total * percent // 100)
        return round(exp((ordered[bisect_left(reached, wanted)] + 0.5) / LATENCY_BUCKETS))

    return Latency(p50_ms=at(50), p95_ms=at(95), p99_ms=at(99))


class Spend(Frozen):
    """The figures of one row, or of all of them."""

    key: str
    #: Calls that were made, failed ones included, and how many of them failed.
    requests: int = 0
    failures: int = 0
    cost_nano_usd: int = 0
    #: What the same tokens would have cost on the baseline model.
    baseline_nano_usd: int = 0
    #: Calls of which nobody knows what they cost, and how much of the cost is booked for them.
    estimates: int = 0
    estimated_nano_usd: int = 0
    input_tokens: int = 0
    cache_read_tokens: int = 0
    cache_write_5m_tokens: int = 0
    cache_write_1h_tokens: int = 0
    output_tokens: int = 0
    #: A part of the output.
    reasoning_tokens: int = 0
    #: Of the calls that were answered; None if none was.
    duration: Latency | None = None
    first_token: Latency | None = None

    @property
    def saving_nano_usd(self) -> int:
        """What was saved; below zero, what was paid in addition."""
        return self.baseline_nano_usd - self.cost_nano_usd

    @property
    def saving_percent(self) -> float | None:
        """The saving in percents of the baseline cost; None if there is none."""
        if not self.baseline_nano_usd:
            return None
        return 100 * self.saving_nano_usd / self.baseline_nano_usd

    @property
    def prompt_tokens(self) -> int:
        """All tokens of prompts, cached or not."""
        written = self.cache_write_5m_tokens + self.cache_write_1h_tokens
        return self.input_tokens + self.cache_read_tokens + written

    @property
    def cache_hit_percent(self) -> float | None:
        """How much of the prompts was read from a cache; None if there were none."""
        return 100 * self.cache_read_tokens / self.prompt_tokens if self.prompt_tokens else None


class DayCost(Frozen):
    """What a use case cost in a day."""

    day: date
    use_case: str
    cost_nano_usd: int


class SpendReport(Frozen):
    """What was spent in some days, by what was asked for, the dearest first; days in order."""

    by: By
    #: The account's name; None: all accounts.
    account: str | None
    time_zone: str
    #: Both included.
    first_day: date
    last_day: date
    rows: tuple[Spend, ...]
    total: Spend
    #: What each use case cost in each day, in order; empty unless it was asked for.
    daily: tuple[DayCost, ...] = ()
    #: Whether the days are this month's so far,
    is_month_so_far: bool
    #: and what the whole month will have cost; None otherwise, or if there are too few days.
    forecast: Forecast | None


def read_day(option: str, text: str) -> date:
    """Read a day such as 2026-11-23; raise `InvalidJob` that names the option."""
    try:
        day = date.fromisoformat(text.strip())
    except ValueError:
        raise InvalidJob(option, f"{text!r} is not a day such as 2026-11-23") from None
    if not _FIRST_DAY <= day <= _LAST_DAY:
        raise InvalidJob(option, f"must be a day from {_FIRST_DAY} to {_LAST_DAY}")
    return day


def period_of(first: date | None, last: date | None, *, today: date, time_zone: str) -> Period:
    """Complete a period: from the first of its last day's month on, until today.

    Raises `InvalidJob` if it ends before it begins, or is too long.
    """
    end = last or max(today, first or today)
    start = first or end.replace(day=1)
    if end < start:
        raise InvalidJob("from", f"{start} is after the last day, {end}")
    period = Period(start, end, time_zone)
    if period.days > MAX_DAYS:
        raise InvalidJob("from", f"{start} to {end} are more than {MAX_DAYS} days")
    return period


def spend_report(
    connection: Connection,
    *,
    by: By | str = By.USE_CASE,
    first_day: date | None = None,
    last_day: date | None = None,
    account: str | UUID | None = None,
    time_zone: str | None = None,
    daily: bool = False,
) -> SpendReport:
    """Report what was spent in some days, both ends included; this month's so far if not given.

    They are days of the account, if one is given, else of `time_zone`, else of UTC. Raises
    `InvalidJob` that names what cannot be.
    """
    wanted = _by(by)
    if account is not None and time_zone is not None:
        raise InvalidJob("time_zone", "the days of an account are those of its own time zone")
    connection.execution_options(isolation_level="REPEATABLE READ")
    with connection.begin():
        connection.exec_driver_sql(_PREPARE)
        owner = None if account is None else _owner(connection, str(account))
        zone = owner.time_zone if owner else check_time_zone(time_zone or "UTC")
        today = connection.exec_driver_sql(_TODAY, {"zone": zone}).scalar_one()
        period = period_of(first_day, last_day, today=today, time_zone=zone)
        is_month_so_far = period.is_month_so_far(today)
        account_id = owner.id if owner else None
        scope = _Scope(connection, period, account_id)
        rows = scope.rows(wanted)
        costs = scope.daily() if daily or is_month_so_far else []
    return SpendReport(
        by=wanted,
        account=owner.name if owner else None,
        time_zone=zone,
        first_day=period.first,
        last_day=period.last,
        rows=tuple(rows[:-1]),
        total=rows[-1],
        daily=tuple(costs) if daily else (),
        is_month_so_far=is_month_so_far,
        forecast=forecast(_by_day(costs), today) if is_month_so_far else None,
    )


def _by_day(costs: Iterable[DayCost]) -> Counter[date]:
    days: Counter[date] = Counter()
    for cost in costs:
        days[cost.day] += cost.cost_nano_usd
    return days


def _by(name: By | str) -> By:
    try:
        return By(name)
    except ValueError:
        raise InvalidJob("by", f"must be one of {', '.join(By)}") from None


def _owner(connection: Connection, account: str) -> Account:
    try:
        return find_account(connection, account)
    except NotFound as error:
        raise InvalidJob("account", str(error)) from None


# Statements. All that a report needs is asked in one transaction, of one and the same state. A scan
# of a million entries is worth a second process and some memory, and not worth compiling.
_PREPARE: Final = f"""
SELECT set_config('max_parallel_workers_per_gather',
                  greatest(current_setting('max_parallel_workers_per_gather')::int, 1)::text, true),
       set_config('work_mem',
                  greatest(pg_size_bytes(current_setting('work_mem')) / 1024, 65536)::text, true),
       set_config('random_page_cost',
                  least(current_setting('random_page_cost')::float8, 1.1)::text, true),
       set_config('jit', 'off', true),
       set_config('statement_timeout', '{_PATIENCE_S}s', true)
"""
_TODAY: Final = "SELECT (now() AT TIME ZONE %(zone)s)::date"
_STARTS: Final = """
SELECT array_agg((%(first)s::date + n)::timestamp AT TIME ZONE %(zone)s ORDER BY n)
FROM generate_series(0, %(days)s) AS n
"""
_TOKENS: Final = (
    *("input_tokens", "cache_read_tokens", "cache_write_5m_tokens", "cache_write_1h_tokens"),
    *("output_tokens", "reasoning_tokens"),
)
_OF_ENTRIES: Final = ("requests", "cost_nano_usd", "baseline_nano_usd", *_TOKENS)
_OF_REST: Final = ("requests", "failures", "estimates", "estimated_nano_usd")
_WHERE: Final = "dispatched_at >= %(start)s AND dispatched_at < %(end)s"
#: When the day of an entry began. Days of 24 hours are found by arithmetic, at half the cost; among
#: days of 23 or 25 hours each has to be looked up.
_ALIKE: Final = "date_bin('1 day', dispatched_at, %(start)s::timestamptz)"
_UNLIKE: Final = (
    "(%(starts)s::timestamptz[])[width_bucket(dispatched_at, %(starts)s::timestamptz[])]"
)

# The entries themselves: the view that has the rest as well would cost half as much again.
_ENTRIES: Final = f"""
SELECT {{key}} AS key, duration_bucket AS bucket, count(*) AS calls,
       count(*) FILTER (WHERE kind <> 'correction') AS requests,
       sum(amount_nano_usd)::bigint AS cost_nano_usd,
       sum(baseline_nano_usd)::bigint AS baseline_nano_usd,
       {", ".join(f"sum({name})::bigint AS {name}" for name in _TOKENS)}
FROM cost_entries WHERE {{where}} GROUP BY 1, 2
"""
_FIRST_TOKENS: Final = """
SELECT {key} AS key, first_token_bucket AS bucket, count(*) AS calls
FROM cost_entries WHERE {where} AND first_token_bucket IS NOT NULL GROUP BY 1, 2
"""
# Few of all, and found by indexes of their own.
_REST: Final = f"""
SELECT {{key}} AS key, {", ".join(f"sum({name})::bigint AS {name}" for name in _OF_REST)}
FROM spend WHERE {{where}} AND failures + estimates > 0 GROUP BY 1
"""
# Not ordered there: Postgres would take each entry for a day of its own, and sort all of them.
_DAILY: Final = """
SELECT {day} AS day, use_case, sum(amount_nano_usd)::bigint AS cost_nano_usd
FROM cost_entries WHERE {where} GROUP BY 1, 2
"""
_NAMES: Final = "SELECT id, name FROM accounts WHERE id = ANY(%(ids)s)"


@dataclass(slots=True)
class _Row:
    """What is added up of one key: figures by name, calls by bucket."""

    sums: Counter[str] = field(default_factory=Counter)
    durations: Counter[int] = field(default_factory=Counter)
    first_tokens: Counter[int] = field(default_factory=Counter)

    def add(self, other: _Row) -> None:
        self.sums.update(other.sums)
        self.durations.update(other.durations)
        self.first_tokens.update(other.first_tokens)

    def named(self, key: str) -> Spend:
        return Spend(
            key=key,
            duration=latency(self.durations),
            first_token=latency(self.first_tokens),
            **self.sums,
        )


class _Scope:
    """The entries of some days, of one account or of all."""

    def __init__(self, connection: Connection, period: Period, account_id: UUID | None) -> None:
        self._connection = connection
        self._where = _WHERE if account_id is None else f"{_WHERE} AND account_id = %(account_id)s"
        limits = {"first": period.first, "zone": period.time_zone, "days": period.days}
        starts = connection.exec_driver_sql(_STARTS, limits).scalar_one()
        #: By when they begin.
        self._days = {start: period.day(number) for number, start in enumerate(starts)}
        alike = {end - start for start, end in pairwise(starts)} == {timedelta(days=1)}
        self._day = _ALIKE if alike else _UNLIKE
        self._values = {
            "start": starts[0],
            "end": starts[-1],
            "starts": starts,
            "account_id": account_id,
        }

    def rows(self, by: By) -> list[Spend]:
        """Return the rows of a report and, last, their total."""
        keys = {By.ACCOUNT: "account_id", By.DAY: self._day}
        found = self._added_up(keys.get(by, by.value))
        names = self._names(by, found)
        rows = [row.named(names[key]) for key, row in found.items()]
        rows.sort(key=lambda row: (0 if by is By.DAY else -row.cost_nano_usd, row.key))
        whole = _Row()
        for row in found.values():
            whole.add(row)
        return [*rows, whole.named("all")]

    def daily(self) -> list[DayCost]:
        """Return what each use case cost in each day."""
        costs = [
            DayCost(
                day=self._days[row.day],
                use_case=row.use_case,
                cost_nano_usd=row.cost_nano_usd,
            )
            for row in self._ask(_DAILY, day=self._day)
        ]
        return sorted(costs, key=lambda cost: (cost.day, cost.use_case))

    def _added_up(self, key: str) -> dict[Any, _Row]:
        found: defaultdict[Any, _Row] = defaultdict(_Row)
        for row in self._ask(_ENTRIES, key=key):
            found[row.key].sums.update({name: getattr(row, name) for name in _OF_ENTRIES})
            if row.bucket is not None:
                found[row.key].durations[row.bucket] = row.calls
        for row in self._ask(_FIRST_TOKENS, key=key):
            found[row.key].first_tokens[row.bucket] = row.calls
        for row in self._ask(_REST, key=key):
            found[row.key].sums.update({name: getattr(row, name) for name in _OF_REST})
        return found

    def _names(self, by: By, keys: Iterable[Any]) -> dict[Any, str]:
        if by is By.DAY:
            return {key: self._days[key].isoformat() for key in keys}
        if by is By.ACCOUNT:
            rows = self._connection.exec_driver_sql(_NAMES, {"ids": list(keys)}).all()
            found = {row.id: row.name for row in rows}
            return {key: found.get(key, str(key)) for key in keys}
        return {key: key for key in keys}

    def _ask(self, statement: str, **parts: str) -> Sequence[Row[Any]]:
        written = statement.format(where=self._where, **parts)
        return self._connection.exec_driver_sql(written, self._values).all()
