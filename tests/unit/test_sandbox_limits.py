"""The sandbox provider's limits, against a count of every call."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from sluicegate.workers.local import sandbox_limits
from sluicegate.workers.local.sandbox_anthropic import AnthropicWire
from sluicegate.workers.local.sandbox_limits import (
    DIMENSIONS,
    Dimension,
    Level,
    LimitBook,
    Limits,
    Meter,
    Shortage,
)
from sluicegate.workers.local.sandbox_openai import OpenAIWire
from sluicegate.workers.local.sandbox_prices import Usage

WINDOW_S = 10
LIMIT = st.none() | st.integers(1, 60)


def amounts(usage: Usage) -> tuple[int, int, int, int]:
    return 1, usage.prompt + usage.output, usage.prompt, usage.output


@given(
    limits=st.builds(
        Limits,
        requests_per_minute=st.none() | st.integers(1, 6),
        tokens_per_minute=LIMIT,
        input_tokens_per_minute=LIMIT,
        output_tokens_per_minute=LIMIT,
        limit_window_s=st.just(WINDOW_S),
    ),
    steps=st.lists(
        # Quarters of a second, so that float arithmetic is exact.
        st.tuples(st.integers(0, 12), st.integers(1, 30), st.integers(0, 30)),
        max_size=40,
    ),
)
def test_no_window_ever_holds_more_and_nothing_is_refused_early(
    limits: Limits, steps: list[tuple[int, int, int]]
) -> None:
    meter = Meter(limits)
    let_in: list[tuple[float, tuple[int, int, int, int]]] = []
    peak = [0, 0, 0, 0]
    now_s = 1_000.0

    def used_in_window(at_s: float) -> list[int]:
        held = [counted for then_s, counted in let_in if at_s - then_s < WINDOW_S]
        return [sum(counted[number] for counted in held) for number in range(4)]

    for quarters, prompt, output in steps:
        now_s += quarters / 4
        usage = Usage(input=prompt, output=output)
        before, wanted = used_in_window(now_s), amounts(usage)
        fits = all(
            limit is None or used + want <= limit
            for limit, used, want in zip(limits.per_minute, before, wanted, strict=True)
        )
        shortage = meter.enter(usage, now_s)
        assert (shortage is None) is fits
        if shortage is None:
            let_in.append((now_s, wanted))
            peak = [max(most, used) for most, used in zip(peak, used_in_window(now_s), strict=True)]
        elif shortage.retry_after_s is not None:
            assert 0 < shortage.retry_after_s <= WINDOW_S
            then = used_in_window(now_s + shortage.retry_after_s)
            just_before = used_in_window(now_s + shortage.retry_after_s - 0.25)
            assert all(
                limit is None or used + want <= limit
                for limit, used, want in zip(limits.per_minute, then, wanted, strict=True)
            )
            assert any(
                limit is not None and used + want > limit
                for limit, used, want in zip(limits.per_minute, just_before, wanted, strict=True)
            )
        else:
            assert shortage.requested > shortage.limit
        levels = meter.levels(now_s)
        after = used_in_window(now_s)
        for dimension, limit, used in zip(DIMENSIONS, limits.per_minute, after, strict=True):
            assert (levels[dimension].remaining if limit else None) == (limit and limit - used)
    shown: Any = meter.shown()
    assert shown["peak"] == dict(zip(DIMENSIONS, peak, strict=True)) | {"concurrent": len(let_in)}
    assert shown["total"]["requests"] == len(let_in)
    assert sum(shown["refused"].values()) == len(steps) - len(let_in)


def test_calls_at_once() -> None:
    meter = Meter(Limits(max_concurrent=2))
    for _ in range(2):
        assert meter.enter(Usage(input=1), 0) is None
    assert meter.enter(Usage(input=1), 0) == Shortage("concurrent", 2, 2, 1, None)
    meter.leave()
    assert meter.enter(Usage(input=1), 0) is None
    shown: Any = meter.shown()
    assert (shown["concurrent"], shown["peak"]["concurrent"]) == (2, 2)
    assert shown["refused"] == {"concurrent": 1}
    meter.reset()
    shown = meter.shown()
    assert (shown["concurrent"], shown["peak"]["concurrent"]) == (2, 2)
    assert shown["peak"]["requests"] == 0


def test_the_shortage_is_the_one_that_lasts() -> None:
    meter = Meter(Limits(requests_per_minute=2, tokens_per_minute=100))
    meter.enter(Usage(input=10), 0)
    meter.enter(Usage(input=80), 5)
    assert meter.enter(Usage(input=10), 10) == Shortage("requests", 2, 2, 1, 50)
    assert meter.enter(Usage(input=50), 10) == Shortage("tokens", 100, 90, 50, 55)
    assert meter.enter(Usage(input=101), 10) == Shortage("tokens", 100, 90, 101, None)
    assert meter.levels(10) == {"requests": Level(2, 0, 55), "tokens": Level(100, 10, 55)}
    assert meter.levels(65) == {"requests": Level(2, 2, 0), "tokens": Level(100, 100, 0)}


def test_a_models_own_limits_and_those_of_all_others(monkeypatch: pytest.MonkeyPatch) -> None:
    book = LimitBook()
    assert book.meter("gpt-x") is None
    book.set(Limits(model="gpt-x", requests_per_minute=1))
    own = book.meter("gpt-x")
    assert own is not None
    assert book.meter("gpt-y") is None
    book.set(Limits(requests_per_minute=1))
    assert book.meter("gpt-y") is book.meter("gpt-z") is not own
    # New limits hold for what was counted already.
    own.enter(Usage(), 0)
    book.set(Limits(model="gpt-x", requests_per_minute=2))
    assert book.meter("gpt-x") is own
    assert own.enter(Usage(), 0) is None
    assert own.enter(Usage(), 0) is not None
    monkeypatch.setattr(sandbox_limits, "MAX_METERS", 2)
    with pytest.raises(ValueError, match="delete some"):
        book.set(Limits(model="gpt-y"))
    book.clear()
    assert book.meter("gpt-x") is None


@pytest.mark.parametrize(
    "values",
    [{"requests_per_minute": 0}, {"limit_window_s": 0}, {"model": ""}, {"rpm": 5}],
    ids=str,
)
def test_bad_limits_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Limits.model_validate(values)


def test_how_each_wire_tells_it() -> None:
    now = datetime(2026, 11, 22, 12, 0, 0, 600_000, tzinfo=UTC)
    levels: dict[Dimension, Level] = {
        "requests": Level(60, 0, 12.3),
        "input_tokens": Level(1_000, 1, 0.5),
    }
    gpt = OpenAIWire().headers(now, levels)
    assert gpt["x-ratelimit-limit-requests"] == "60"
    assert gpt["x-ratelimit-remaining-requests"] == "0"
    assert gpt["x-ratelimit-reset-requests"] == "12.3s"
    assert gpt["x-ratelimit-remaining-tokens"] == "29999000"
    claude = AnthropicWire().headers(now, levels)
    assert claude["anthropic-ratelimit-requests-remaining"] == "0"
    assert claude["anthropic-ratelimit-requests-reset"] == "2026-11-22T12:00:13Z"
    assert claude["anthropic-ratelimit-input-tokens-remaining"] == "1"
    assert claude["anthropic-ratelimit-output-tokens-limit"] == "2000000"
    assert OpenAIWire().retry_after(1.2001) == {"retry-after": "2", "retry-after-ms": "1201"}
    assert AnthropicWire().retry_after(1.2001) == {"retry-after": "2"}
    short = Shortage("requests", 60, 60, 1, 60.02)
    assert OpenAIWire().shortage("gpt-x", short) == (
        "Rate limit reached for gpt-x on requests per min (RPM): Limit 60, Used 60, Requested 1."
        " Please try again in 1m0.02s."
    )
    large = Shortage("tokens", 60, 0, 61, None)
    assert OpenAIWire().shortage("gpt-x", large).startswith("Request too large for gpt-x on tokens")
