"""Rate-limit headers of both wires."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from email.utils import format_datetime

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sluicegate.shared.admission.headroom import Headroom
from sluicegate.shared.errors import ErrorClass
from sluicegate.workers.local.sandbox_openai import duration
from sluicegate.workers.providers.failures import fault_of_status
from sluicegate.workers.providers.rate_headers import headroom, reset_s

NOW = datetime(2026, 11, 22, 12, 0, 0, tzinfo=UTC)
DATE = format_datetime(NOW, usegmt=True)
#: As the SDKs document them.
OPENAI = {
    "x-ratelimit-limit-requests": "60",
    "x-ratelimit-limit-tokens": "150000",
    "x-ratelimit-remaining-requests": "59",
    "x-ratelimit-remaining-tokens": "149984",
    "x-ratelimit-reset-requests": "1s",
    "x-ratelimit-reset-tokens": "6m0s",
}
ANTHROPIC = {
    f"anthropic-ratelimit-{name}-{what}": value
    for name, left in (
        ("requests", "49"),
        ("tokens", "90000"),
        ("input-tokens", "80000"),
        ("output-tokens", "10000"),
    )
    for what, value in (
        ("limit", "100000"),
        ("remaining", left),
        ("reset", "2026-11-22T12:00:30Z"),
    )
}


def read(headers: dict[str, str], now: datetime = NOW) -> Headroom | None:
    return headroom(httpx2.Headers(headers).raw, now=now)


def test_both_wires() -> None:
    assert read(OPENAI) == Headroom(requests=59, tokens=149_984)
    assert read(ANTHROPIC) == Headroom(
        requests=49, tokens=90_000, input_tokens=80_000, output_tokens=10_000
    )
    shouted = {name.upper(): f" {value} " for name, value in ANTHROPIC.items()}
    assert read(shouted) == read(ANTHROPIC)
    assert read({"content-type": "application/json", "date": DATE}) is None
    assert read({}) is None


def test_the_reset_is_that_of_what_is_used_up() -> None:
    assert read(OPENAI | {"x-ratelimit-remaining-tokens": "0"}) == Headroom(
        requests=59, tokens=0, reset_s=360
    )
    both = OPENAI | {"x-ratelimit-remaining-tokens": "0", "x-ratelimit-remaining-requests": "0"}
    assert read(both) == Headroom(requests=0, tokens=0, reset_s=360)
    spent = ANTHROPIC | {"anthropic-ratelimit-input-tokens-remaining": "0"}
    assert read(spent) == Headroom(
        requests=49, tokens=90_000, input_tokens=0, output_tokens=10_000, reset_s=30
    )
    del spent["anthropic-ratelimit-input-tokens-reset"]
    assert (read(spent) or Headroom(reset_s=1)).reset_s is None


def test_a_time_counts_from_the_answers_own_date() -> None:
    spent = ANTHROPIC | {"anthropic-ratelimit-requests-remaining": "0"}
    fast = NOW + timedelta(hours=3)  # our clock
    assert (read(spent | {"date": DATE}, fast) or Headroom()).reset_s == 30
    assert (read(spent | {"date": "yesterday"}) or Headroom()).reset_s == 30
    assert (read(spent, fast) or Headroom()).reset_s == 0


@pytest.mark.parametrize("limit", ["-1", "0"])
def test_a_limit_that_is_none(limit: str) -> None:
    """What Azure sends."""
    azure = OPENAI | {
        "x-ratelimit-limit-tokens": limit,
        "x-ratelimit-remaining-tokens": "0",
        "x-ratelimit-reset-tokens": "0",
    }
    assert read(azure) == Headroom(requests=59)
    assert read(OPENAI | {"x-ratelimit-remaining-tokens": "-1"}) == Headroom(requests=59)
    # A server that does not name its limits still says what is left of them.
    assert read({"x-ratelimit-remaining-tokens": "7"}) == Headroom(tokens=7)


@pytest.mark.parametrize(
    "garbage", ["", "-", "many", "1e9", "1.5", "-3", "9" * 16, "1, 2", "\xb2", "None"]
)
def test_garbage_counts_as_not_sent(garbage: str) -> None:
    headers = httpx2.Headers(OPENAI, encoding="latin-1")
    raw = [
        (name, garbage.encode("latin-1") if name.endswith(b"remaining-tokens") else value)
        for name, value in headers.raw
    ]
    assert headroom(raw, now=NOW) == Headroom(requests=59)


@pytest.mark.parametrize(
    ("said", "seconds"),
    [
        ("1s", 1),
        ("6m0s", 360),
        ("120ms", 0.12),
        ("1h2m3.5s", 3723.5),
        ("1d", 86_400),
        ("0s", 0),
        ("250us", 0.00025),
        ("17", 17),
        ("0.25", 0.25),
        (" 2s ", 2),
        ("2026-11-22T12:00:30Z", 30),
        ("2026-11-22T12:00:30.250Z", 30.25),
        ("2026-11-22T13:00:30+01:00", 30),
        ("2026-11-22T11:00:00Z", 0),
        ("", None),
        ("soon", None),
        ("s", None),
        ("1", 1),
        ("-1", None),
        ("-1s", None),
        ("1s!", None),
        ("1x", None),
        ("m5s", None),
        ("nan", None),
        ("inf", None),
        ("2d", None),
        ("1790000000", None),
        ("2026-11-22", None),
        ("2026-11-25T12:00:00Z", None),
        ("2026-13-22T12:00:00Z", None),
    ],
)
def test_resets(said: str, seconds: float | None) -> None:
    wait_s = reset_s(said, DATE)
    assert wait_s == (None if seconds is None else pytest.approx(seconds))


@given(milliseconds=st.integers(0, 86_400_000))
def test_any_duration_comes_back(milliseconds: int) -> None:
    assert reset_s(duration(milliseconds / 1000)) == pytest.approx(milliseconds / 1000)


@given(seconds=st.integers(-86_400, 86_400), zone=st.integers(-12, 12))
def test_any_time_comes_back(seconds: int, zone: int) -> None:
    at = (NOW + timedelta(seconds=seconds)).astimezone(timezone(timedelta(hours=zone)))
    assert reset_s(at.isoformat(), DATE) == max(0, seconds)


NAMES = st.sampled_from([*OPENAI, *ANTHROPIC, "date"]).map(str.encode)
VALUES = st.one_of(
    st.binary(max_size=30),
    st.integers(-2, 10**18).map(lambda number: str(number).encode()),
    st.from_regex(r"[0-9]{1,20}(ms|s|m|h|d)[0-9.]{0,4}s?", fullmatch=True).map(str.encode),
    st.from_regex(
        rb"[0-9]{4}-[01][0-9]-[0-3][0-9][T ][0-2][0-9]:[0-5][0-9]:[0-5][0-9](Z|[+-][0-2][0-9]:00)?",
        fullmatch=True,
    ),
    st.from_regex(
        rb"Sun, [0-9]{1,2} Nov [0-9]{1,30} [0-2][0-9]:00:00 (GMT|[+-][0-9]{4,12})", fullmatch=True
    ),
)


@given(headers=st.lists(st.tuples(NAMES, VALUES), max_size=20))
def test_any_headers_give_something_sensible(headers: list[tuple[bytes, bytes]]) -> None:
    found = headroom(headers, now=NOW)
    if found is None:
        return
    counts = (found.requests, found.tokens, found.input_tokens, found.output_tokens)
    assert any(count is not None for count in counts)
    assert all(count is None or 0 <= count < 10**15 for count in counts)
    if found.reset_s is not None:
        assert 0 in counts
        assert 0 <= found.reset_s <= 86_400


@pytest.mark.parametrize(
    ("status", "headers", "wait_s"),
    [
        (429, {"x-ratelimit-remaining-tokens": "0"}, 360),
        (429, {"x-ratelimit-remaining-tokens": "0", "retry-after": "2"}, 2),
        (429, {"x-ratelimit-remaining-requests": "0"}, 1),
        (429, {}, None),  # nothing is used up: the headers do not tell what the 429 is about
        (503, {"x-ratelimit-remaining-tokens": "0"}, None),
    ],
)
def test_a_429_without_retry_after_waits_for_the_reset(
    status: int, headers: dict[str, str], wait_s: float | None
) -> None:
    fault = fault_of_status(
        "the openai provider", status, httpx2.Headers(OPENAI | headers), b"{}", now=NOW
    )
    assert fault.retry_after_s == wait_s
    assert fault.headroom is not None
    assert fault.headroom == read(OPENAI | headers)
    if status == 429:
        assert fault.error_class is ErrorClass.RATE_LIMITED
