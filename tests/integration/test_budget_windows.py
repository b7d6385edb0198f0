"""Where the days and months of budgets begin and end, as Postgres computes them."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, time, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from sqlalchemy import Engine

from sluicegate.shared.budgets import WINDOWS

#: The statement as workers run it, at a moment of our choice: a budget whose windows are over.
_TURNED = f"""
WITH budget AS (
    SELECT gen_random_uuid() AS id, gen_random_uuid() AS account_id, NULL::text AS use_case,
           %(zone)s::text AS time_zone, 1::bigint AS day_limit_nano_usd,
           NULL::bigint AS month_limit_nano_usd,
           '-infinity'::timestamptz AS day_started_at, '-infinity'::timestamptz AS day_resets_at,
           5::bigint AS day_spent_nano_usd, 7::bigint AS day_held_nano_usd,
           '-infinity'::timestamptz AS month_started_at,
           '-infinity'::timestamptz AS month_resets_at,
           5::bigint AS month_spent_nano_usd, 7::bigint AS month_held_nano_usd
), {WINDOWS.replace("now()", "%(at)s::timestamptz")}
SELECT name, started_at, resets_at, spent, held FROM windows ORDER BY name
"""

Turn = Callable[[str, datetime], dict[str, tuple[datetime, datetime]]]


@pytest.fixture
def turn(engine: Engine) -> Turn:
    """Return what tells the windows that hold at a moment in a zone."""

    def windows(zone: str, at: datetime) -> dict[str, tuple[datetime, datetime]]:
        with engine.connect() as connection:
            rows: list[Any] = list(
                connection.exec_driver_sql(_TURNED, {"zone": zone, "at": at}).all()
            )
        assert all((row.spent, row.held) == (0, 0) for row in rows)
        return {row.name: (row.started_at, row.resets_at) for row in rows}

    return windows


@pytest.mark.parametrize(
    ("zone", "at", "begins", "ends"),
    [
        # 23 hours, and 25.
        ("America/New_York", "2026-03-08T12:00Z", "2026-03-08T05:00Z", "2026-03-09T04:00Z"),
        ("America/New_York", "2026-03-08T05:00Z", "2026-03-08T05:00Z", "2026-03-09T04:00Z"),
        ("America/New_York", "2026-03-09T03:59:59Z", "2026-03-08T05:00Z", "2026-03-09T04:00Z"),
        ("America/New_York", "2026-11-01T12:00Z", "2026-11-01T04:00Z", "2026-11-02T05:00Z"),
        ("America/New_York", "2026-11-02T04:59:59Z", "2026-11-01T04:00Z", "2026-11-02T05:00Z"),
        ("Europe/Berlin", "2026-03-29T01:00Z", "2026-03-28T23:00Z", "2026-03-29T22:00Z"),
        ("Europe/Berlin", "2026-03-29T22:00Z", "2026-03-29T22:00Z", "2026-03-30T22:00Z"),
        ("Europe/Berlin", "2026-10-25T01:00Z", "2026-10-24T22:00Z", "2026-10-25T23:00Z"),
        ("Europe/Berlin", "2026-10-25T22:59:59Z", "2026-10-24T22:00Z", "2026-10-25T23:00Z"),
        ("Asia/Kolkata", "2026-11-23T18:29:59Z", "2026-11-22T18:30Z", "2026-11-23T18:30Z"),
        ("Asia/Kolkata", "2026-11-23T18:30:00Z", "2026-11-23T18:30Z", "2026-11-24T18:30Z"),
        ("Pacific/Kiritimati", "2026-11-23T09:59:59Z", "2026-11-22T10:00Z", "2026-11-23T10:00Z"),
        ("Pacific/Kiritimati", "2026-11-23T10:00:00Z", "2026-11-23T10:00Z", "2026-11-24T10:00Z"),
        ("UTC", "2028-02-29T23:59:59Z", "2028-02-29T00:00Z", "2028-03-01T00:00Z"),
    ],
)
def test_a_day(turn: Turn, zone: str, at: str, begins: str, ends: str) -> None:
    day = turn(zone, datetime.fromisoformat(at))["day"]
    assert day == (datetime.fromisoformat(begins), datetime.fromisoformat(ends))


@pytest.mark.parametrize(
    ("zone", "at", "begins", "ends"),
    [
        ("America/New_York", "2026-03-31T12:00Z", "2026-03-01T05:00Z", "2026-04-01T04:00Z"),
        ("America/New_York", "2026-11-01T04:00Z", "2026-11-01T04:00Z", "2026-12-01T05:00Z"),
        ("America/New_York", "2026-11-01T03:59:59Z", "2026-10-01T04:00Z", "2026-11-01T04:00Z"),
        ("Europe/Berlin", "2026-03-31T21:59:59Z", "2026-02-28T23:00Z", "2026-03-31T22:00Z"),
        ("Europe/Berlin", "2026-10-31T23:00:00Z", "2026-10-31T23:00Z", "2026-11-30T23:00Z"),
        ("Asia/Kolkata", "2026-11-30T18:29:59Z", "2026-10-31T18:30Z", "2026-11-30T18:30Z"),
        ("Asia/Kolkata", "2026-11-30T18:30:00Z", "2026-11-30T18:30Z", "2026-12-31T18:30Z"),
        ("Pacific/Kiritimati", "2026-12-31T09:59:59Z", "2026-11-30T10:00Z", "2026-12-31T10:00Z"),
        ("Pacific/Kiritimati", "2026-12-31T10:00:00Z", "2026-12-31T10:00Z", "2027-01-31T10:00Z"),
        ("UTC", "2028-02-29T23:59:59Z", "2028-02-01T00:00Z", "2028-03-01T00:00Z"),
        ("UTC", "2026-12-31T23:59:59.999999Z", "2026-12-01T00:00Z", "2027-01-01T00:00Z"),
    ],
)
def test_a_month(turn: Turn, zone: str, at: str, begins: str, ends: str) -> None:
    month = turn(zone, datetime.fromisoformat(at))["month"]
    assert month == (datetime.fromisoformat(begins), datetime.fromisoformat(ends))


@hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    zone=st.sampled_from(
        ["America/New_York", "Europe/Berlin", "Asia/Kolkata", "Pacific/Kiritimati",
         "Australia/Lord_Howe", "America/Santiago", "America/St_Johns", "UTC"]
    ),
    at=st.datetimes(datetime(2026, 1, 1), datetime(2029, 12, 31)),  # noqa: DTZ001 - made UTC below
)  # fmt: skip
def test_days_and_months_are_those_of_the_calendar_there(
    turn: Turn, zone: str, at: datetime
) -> None:
    """Python reads the same time zones, and computes by itself."""
    moment = at.replace(tzinfo=UTC)
    local = moment.astimezone(ZoneInfo(zone))
    windows = turn(zone, moment)
    today = local.date()
    first = today.replace(day=1)
    following = (first + timedelta(days=32)).replace(day=1)

    def midnight(day: Any) -> datetime:
        return datetime.combine(day, time(), ZoneInfo(zone)).astimezone(UTC)

    assert windows["day"] == (midnight(today), midnight(today + timedelta(days=1)))
    assert windows["month"] == (midnight(first), midnight(following))
