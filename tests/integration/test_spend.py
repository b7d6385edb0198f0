"""Spend reports on a real Postgres, held against sums made the naive way."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime, timedelta
from typing import Any
from uuid import uuid4
from zoneinfo import ZoneInfo

import pytest
from sqlalchemy import Connection, Engine

from sluicegate.producers.spend import By, Spend, SpendReport, spend_report
from sluicegate.shared.accounts import find_account
from sluicegate.shared.database import make_engine
from sluicegate.shared.errors import InvalidJob
from sluicegate.shared.settings import Settings
from tests.cost_books import FIGURES, Books, Entry, random_books
from tests.harness import FULL
from tests.spending import DAYS, START, expected, fill, percentiles

ENTRIES = 1_000_000 if FULL else 20_000

pytestmark = pytest.mark.timeout(600 if FULL else 180)


@pytest.fixture
def connection(engine: Engine) -> Iterator[Connection]:
    with engine.connect() as connection:
        yield connection


@pytest.fixture
def books(connection: Connection) -> Books:
    return Books(connection)


def ask(engine: Engine, **options: Any) -> SpendReport:
    with engine.connect() as connection:
        return spend_report(connection, **options)


def check(report: SpendReport, wanted: dict[str, dict[str, Any]]) -> None:
    """Hold each row of a report, and its total, against sums made the naive way."""
    assert {row.key for row in report.rows} | {"all"} == wanted.keys() | {"all"}
    for row in (*report.rows, report.total):
        sums = wanted.get(row.key, {})
        assert {name: getattr(row, name) for name in FIGURES} == {
            name: sums.get(name, 0) for name in FIGURES
        }, row.key
        for what in ("duration", "first_token"):
            latency = getattr(row, what)
            assert (latency is None) is (what not in sums)
            if latency is not None:
                for name, exact in sums[what].items():
                    shown = getattr(latency, name)
                    wrong = abs(shown - max(exact, 1))
                    assert wrong <= 0.0203 * exact + 0.51, (row.key, name)


KEYS: dict[By, Callable[[Entry], str]] = {
    By.PROVIDER: lambda one: one.provider,
    By.MODEL: lambda one: one.model,
    By.USE_CASE: lambda one: one.use_case,
    By.ACCOUNT: lambda one: one.account,
}


def local_day(zone: str) -> Callable[[Entry], date]:
    return lambda one: one.dispatched_at.astimezone(ZoneInfo(zone)).date()


@pytest.mark.parametrize(
    ("zone", "around"),
    [
        ("UTC", datetime(2026, 11, 1, tzinfo=UTC)),
        # Days of 25 and of 23 hours.
        ("Europe/Berlin", datetime(2026, 10, 25, 1, tzinfo=UTC)),
        ("Europe/Berlin", datetime(2026, 3, 29, 1, tzinfo=UTC)),
        ("America/New_York", datetime(2026, 11, 1, 6, tzinfo=UTC)),
        ("America/New_York", datetime(2026, 3, 8, 7, tzinfo=UTC)),
        # Half hours, the earliest days there are, and midnights that are left out.
        ("Asia/Kolkata", datetime(2026, 10, 31, 18, 30, tzinfo=UTC)),
        ("Pacific/Kiritimati", datetime(2026, 12, 31, 10, tzinfo=UTC)),
        ("America/Santiago", datetime(2026, 9, 6, 4, tzinfo=UTC)),
    ],
)
def test_any_books_add_up(engine: Engine, books: Books, zone: str, around: datetime) -> None:
    random_books(books, seed=sum(map(ord, zone)) + around.month, around=around)
    day_of = local_day(zone)
    middle = around.astimezone(ZoneInfo(zone)).date()
    first, last = middle - timedelta(days=1), middle + timedelta(days=1)

    def within(one: Entry) -> bool:
        return first <= day_of(one) <= last

    for by, key in (KEYS | {By.DAY: lambda one: day_of(one).isoformat()}).items():
        report = ask(engine, by=by, first_day=first, last_day=last, time_zone=zone, daily=True)
        wanted = books.naive(key, within)
        check(report, wanted)
        assert wanted["all"]["requests"] > 50
        assert report.total.failures > 0 < report.total.estimates
        if by is By.DAY:
            assert [row.key for row in report.rows] == sorted(row.key for row in report.rows)
            assert len(report.rows) == 3
        else:
            costs = [row.cost_nano_usd for row in report.rows]
            assert costs == sorted(costs, reverse=True)

    daily: dict[tuple[date, str], int] = defaultdict(int)
    for one in filter(within, books.entries):
        daily[day_of(one), one.use_case] += one.cost
    assert {(one.day, one.use_case): one.cost_nano_usd for one in report.daily} == daily


@pytest.mark.parametrize("account", ["acme", "birch"])
def test_an_account_has_its_own_days(
    engine: Engine, connection: Connection, books: Books, account: str
) -> None:
    random_books(books, seed=7, around=datetime(2026, 11, 1, 6, tzinfo=UTC))
    owner = find_account(connection, account)
    day_of = local_day(owner.time_zone)
    wanted_day = date(2026, 11, 1)
    for name in (account, str(owner.id)):
        report = ask(engine, by="model", account=name, first_day=wanted_day, last_day=wanted_day)
        assert (report.account, report.time_zone) == (account, owner.time_zone)
        wanted = books.naive(
            lambda one: one.model, lambda one: one.account == account and day_of(one) == wanted_day
        )
        check(report, wanted)
        assert report.total.requests > 10


def test_this_month_so_far_is_forecast(engine: Engine, books: Books) -> None:
    books.account("kiri", "Pacific/Kiritimati")
    today = datetime.now(ZoneInfo("Pacific/Kiritimati"))
    noon = today.replace(hour=12, minute=0, second=0, microsecond=0)
    for back in range(today.day):
        books.enter(
            Entry(
                "kiri", "draft", "p", "m", noon - timedelta(days=back), attempt_id=uuid4(), cost=7
            )
        )
    report = ask(engine, account="kiri", daily=True)
    assert (report.first_day, report.last_day) == (today.date().replace(day=1), today.date())
    assert report.is_month_so_far
    assert len(report.daily) == today.day
    if today.day > 7:
        assert report.forecast is not None
        assert report.forecast.so_far_nano_usd == 7 * today.day
        assert report.forecast.low_nano_usd == report.forecast.high_nano_usd
    else:
        assert report.forecast is None


def test_nothing_is_nothing(engine: Engine) -> None:
    for by in By:
        report = ask(engine, by=by)
        assert (report.rows, report.total) == ((), Spend(key="all"))
        assert report.forecast is None


def test_what_cannot_be_asked(engine: Engine, books: Books) -> None:
    books.account("acme")
    refused: tuple[tuple[dict[str, Any], str], ...] = (
        ({"by": "colour"}, "by: must be one of provider, model, use_case, account, day"),
        ({"account": "nobody"}, "account: there is no account 'nobody'"),
        ({"time_zone": "Mars/Olympus"}, "time_zone: 'Mars/Olympus' is not an IANA time zone"),
        ({"account": "acme", "time_zone": "UTC"}, "time_zone: the days of an account are"),
    )
    for options, says in refused:
        with pytest.raises(InvalidJob, match=says):
            ask(engine, **options)


@pytest.fixture(scope="module")
def filled(postgres: Any) -> Iterator[Engine]:
    """All of one month, in the size that reports must bear."""
    with postgres.database(template=postgres.template) as url:
        engine = make_engine(Settings(_env_file=None, database_url=url))
        with engine.connect() as connection:
            connection.exec_driver_sql("SET statement_timeout = 0")
            fill(connection, ENTRIES)
        yield engine
        engine.dispose()


@pytest.mark.parametrize("by", [*By])
def test_many_entries_add_up(filled: Engine, by: By) -> None:
    report = ask(
        filled, by=by, first_day=START.date(), last_day=START.date() + timedelta(days=DAYS - 1)
    )
    wanted = {
        key: dict(one.figures)
        | {
            "duration": percentiles(one.durations_ms),
            "first_token": percentiles(one.first_tokens_ms),
        }
        for key, one in expected(ENTRIES, by.value).items()
    }
    check(report, wanted)
    assert report.total.requests == ENTRIES * 51 // 50


def test_a_day_of_an_account_reads_that_day_alone(filled: Engine) -> None:
    day = START.date() + timedelta(days=3)
    report = ask(filled, by="model", account="acme", first_day=day, last_day=day)
    per_day = ENTRIES / DAYS / 5
    assert report.total.requests == pytest.approx(per_day * 51 / 50, rel=0.02)
    with filled.connect() as connection:
        plan = connection.exec_driver_sql(
            "EXPLAIN SELECT sum(cost_nano_usd) FROM spend WHERE dispatched_at >= %(day)s"
            " AND dispatched_at < %(day)s::date + 1 AND account_id = %(id)s",
            {"day": day, "id": find_account(connection, "acme").id},
        ).scalars()
        said = "\n".join(plan)
    assert "Seq Scan" not in said, said


def test_views_for_other_tools_say_the_same(connection: Connection, books: Books) -> None:
    random_books(books, seed=3, around=datetime(2026, 10, 25, 1, tzinfo=UTC))
    rows = connection.exec_driver_sql("SELECT * FROM spend_days WHERE account = 'acme'").all()
    day_of = local_day("Europe/Berlin")
    wanted = books.naive(
        lambda one: f"{day_of(one)} {one.use_case} {one.provider} {one.model}",
        lambda one: one.account == "acme",
    )
    del wanted["all"]
    assert {f"{row.day} {row.use_case} {row.provider} {row.model}" for row in rows} == wanted.keys()
    for row in rows:
        sums = wanted[f"{row.day} {row.use_case} {row.provider} {row.model}"]
        for name in FIGURES:
            if name.endswith("_nano_usd"):
                shown = getattr(row, name.replace("_nano_usd", "_usd"))
                assert shown * 1_000_000_000 == sums[name]
            else:
                assert getattr(row, name) == sums[name]
        if "duration" in sums:
            exact = {name: getattr(row, f"duration_{name}") for name in sums["duration"]}
            assert exact == sums["duration"]
