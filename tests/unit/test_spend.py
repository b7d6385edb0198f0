"""Spend reports without a server: periods, percentiles, and how a report is shown."""

from __future__ import annotations

import json
import math
from collections import Counter
from datetime import date, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sluicegate.producers.spend import (
    MAX_DAYS,
    By,
    Latency,
    Spend,
    SpendReport,
    latency,
    period_of,
    read_day,
)
from sluicegate.producers.spend_display import as_json, csv_table, sentences, table
from sluicegate.producers.spend_forecast import Forecast
from sluicegate.shared.errors import InvalidJob

TODAY = date(2026, 11, 23)
USD = 1_000_000_000


def days(first: date | None, last: date | None) -> tuple[date, date]:
    period = period_of(first, last, today=TODAY, time_zone="UTC")
    return period.first, period.last


def test_the_month_so_far_is_the_default() -> None:
    assert days(None, None) == (date(2026, 11, 1), TODAY)
    assert days(date(2026, 10, 5), None) == (date(2026, 10, 5), TODAY)
    assert days(None, date(2026, 10, 5)) == (date(2026, 10, 1), date(2026, 10, 5))
    assert days(TODAY, TODAY) == (TODAY, TODAY)
    tomorrow = TODAY + timedelta(days=1)
    assert days(tomorrow, None) == (tomorrow, tomorrow)


@pytest.mark.parametrize(
    ("first", "last", "is_so_far"),
    [
        (None, None, True),
        (None, date(2026, 11, 30), True),
        (None, date(2026, 11, 22), False),
        (date(2026, 11, 2), None, False),
        (date(2026, 10, 1), None, False),
        (date(2026, 10, 1), date(2026, 10, 31), False),
    ],
)
def test_only_this_month_so_far_is_forecast(
    first: date | None, last: date | None, is_so_far: bool
) -> None:
    period = period_of(first, last, today=TODAY, time_zone="UTC")
    assert period.is_month_so_far(TODAY) is is_so_far


def test_a_period_has_an_order_and_a_length() -> None:
    with pytest.raises(InvalidJob, match="from: 2026-11-24 is after the last day, 2026-11-23"):
        days(date(2026, 11, 24), TODAY)
    most = TODAY - timedelta(days=MAX_DAYS - 1)
    assert days(most, TODAY) == (most, TODAY)
    with pytest.raises(InvalidJob, match="more than 3660 days"):
        days(most - timedelta(days=1), TODAY)


def test_days_are_read_as_iso() -> None:
    assert read_day("from", "2026-11-23") == TODAY
    for bad in ("", "23.11.2026", "2026-02-30", "yesterday", "2026-11-23T10:00", "2026-13-01"):
        with pytest.raises(InvalidJob, match="is not a day such as 2026-11-23") as caught:
            read_day("from", bad)
        assert caught.value.field == "from"
    for far in ("1969-12-31", "9999-12-31", "0001-01-01"):
        with pytest.raises(InvalidJob, match="to: must be a day from 1970-01-01 to 9998-12-31"):
            read_day("to", far)


@given(st.lists(st.integers(0, 600_000), min_size=1, max_size=400))
def test_percentiles_are_right_to_two_percent(latencies_ms: list[int]) -> None:
    counts = Counter(math.floor(math.log(max(ms, 1)) * 25) for ms in latencies_ms)
    found = latency(counts)
    assert found is not None
    ordered = sorted(max(ms, 1) for ms in latencies_ms)
    for percent, shown in ((50, found.p50_ms), (95, found.p95_ms), (99, found.p99_ms)):
        exact = ordered[math.ceil(len(ordered) * percent / 100) - 1]
        # Half a bucket, and half a millisecond.
        assert abs(shown - exact) <= 0.0203 * exact + 0.51


def test_nothing_has_no_percentiles() -> None:
    assert latency({}) is None


ROWS = (
    Spend(
        key="draft",
        requests=1500,
        failures=3,
        cost_nano_usd=4 * USD + 1,
        baseline_nano_usd=10 * USD,
        estimates=1,
        estimated_nano_usd=USD,
        input_tokens=600,
        cache_read_tokens=300,
        cache_write_5m_tokens=60,
        cache_write_1h_tokens=40,
        output_tokens=2000,
        duration=Latency(p50_ms=1234, p95_ms=2000, p99_ms=30_500),
    ),
    Spend(key="voice", requests=1, cost_nano_usd=2 * USD, baseline_nano_usd=USD),
)
TOTAL = Spend(
    key="all",
    requests=1501,
    failures=3,
    cost_nano_usd=6 * USD + 1,
    baseline_nano_usd=11 * USD,
    estimates=1,
    estimated_nano_usd=USD,
)


def report(**changes: object) -> SpendReport:
    given = {
        "by": By.USE_CASE,
        "account": "acme",
        "time_zone": "Europe/Berlin",
        "first_day": date(2026, 11, 1),
        "last_day": TODAY,
        "rows": ROWS,
        "total": TOTAL,
        "is_month_so_far": True,
        "forecast": None,
    }
    return SpendReport.model_validate(given | changes)


def test_what_is_saved_may_be_less_than_nothing() -> None:
    draft, voice = ROWS
    assert draft.saving_nano_usd == 6 * USD - 1
    assert draft.saving_percent == pytest.approx(60)
    assert (voice.saving_nano_usd, voice.saving_percent) == (-USD, -100)
    assert Spend(key="x", cost_nano_usd=5).saving_percent is None


def test_cache_hits_are_a_share_of_all_prompt_tokens() -> None:
    assert ROWS[0].cache_hit_percent == 30
    assert ROWS[1].cache_hit_percent is None


def test_the_table() -> None:
    head, rows = table(report())
    shown = [dict(zip(head, row, strict=True)) for row in rows]
    assert [row["use case"] for row in shown] == ["draft", "voice", "all"]
    draft, voice, _ = shown
    assert draft == {
        "use case": "draft",
        "requests": "1,500",
        "failures": "3",
        "cost": "$4.000000",
        "baseline": "$10.000000",
        "saving": "$6.000000",
        "saved": "60.0%",
        "duration s": "1.23/2.00/30.50",
        "first token s": "",
        "cached": "30.0%",
        "input": "600",
        "output": "2,000",
        "cache read": "300",
        "cache write": "100",
        "reasoning": "",
        "estimated": "$1.000000",
    }
    assert (voice["saving"], voice["saved"], voice["cached"]) == ("-$1.000000", "-100.0%", "")


def test_csv_has_plain_and_exact_numbers() -> None:
    head, (draft, voice) = csv_table(report())
    shown = dict(zip(head, draft, strict=True))
    assert shown["use_case"] == "draft"
    assert shown["requests"] == "1500"
    assert shown["cost_usd"] == "4.000000001"
    assert shown["saving_usd"] == "5.999999999"
    assert shown["saving_percent"] == "60.000"
    assert shown["cache_write_1h_tokens"] == "40"
    assert (shown["duration_p99_ms"], shown["first_token_p50_ms"]) == ("30500", "")
    assert dict(zip(head, voice, strict=True))["saving_usd"] == "-1.000000000"


def test_json_holds_all_of_it() -> None:
    told = json.loads(json.dumps(as_json(report())))
    assert told.keys() == {
        *("by", "account", "time_zone", "from", "to", "rows", "total", "forecast"),
    }
    assert (told["from"], told["to"], told["forecast"]) == ("2026-11-01", "2026-11-23", None)
    draft = told["rows"][0]
    assert draft["saving_nano_usd"] == 6 * USD - 1
    assert draft["duration"] == {"p50_ms": 1234, "p95_ms": 2000, "p99_ms": 30_500}
    assert told["total"]["requests"] == 1501


def test_sentences_say_what_is_estimated_and_what_comes() -> None:
    estimated, none = sentences(report())
    assert estimated == (
        "$1.000000 of the cost (16.7%) is estimated: nobody knows what 1 call cost, "
        "so the most is booked"
    )
    assert none.startswith("no forecast for November yet: it takes 7 whole days")
    coming = Forecast(
        month=date(2026, 11, 1),
        so_far_nano_usd=6 * USD,
        days=22,
        cost_nano_usd=9 * USD,
        low_nano_usd=8 * USD,
        high_nano_usd=10 * USD,
    )
    assert sentences(report(forecast=coming))[1] == (
        "November will have cost about $9.000000, 90% likely between $8.000000 and $10.000000 "
        "(from 22 whole days)"
    )


def test_nothing_is_said_to_be_nothing() -> None:
    nothing = {"rows": (), "total": Spend(key="all")}
    assert sentences(report(**nothing)) == [
        "nothing was spent from 2026-11-01 to 2026-11-23 by acme (Europe/Berlin)"
    ]
    one = {"first_day": TODAY, "account": None, "is_month_so_far": False}
    assert sentences(report(**nothing, **one)) == [
        "nothing was spent on 2026-11-23 (Europe/Berlin)"
    ]
    assert sentences(report(is_month_so_far=False, total=ROWS[1])) == []
