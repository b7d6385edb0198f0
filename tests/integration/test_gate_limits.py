"""Limits over minutes: none takes in more than it may, nothing is left over, nobody is kept out.

The row's time is the test's, so an hour of it takes no longer than the calls that are made in it.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from sluicegate.shared.admission.gate import Outcome, Reason
from sluicegate.shared.jobs import Lane
from sluicegate.shared.settings import Settings
from tests.gate_row import GateRow, Server
from tests.harness import FULL

#: When, how much; of what.
Log = list[tuple[float, dict[str, int]]]


def _most_in_a_minute(log: Log, what: str) -> int:
    """Return the largest sum of any sixty seconds that does not belong to a single call."""
    most = 0
    within: deque[tuple[float, int]] = deque()
    for end, needs in log:
        while within and within[0][0] <= end - 60:
            within.popleft()
        if needs[what]:
            within.append((end, needs[what]))
        if len(within) > 1:
            most = max(most, sum(need for _, need in within))
    return most


def _needs(input_tokens: int, output_tokens: int) -> dict[str, int]:
    return {
        "requests_per_minute": 1,
        "tokens_per_minute": input_tokens + output_tokens,
        "input_tokens_per_minute": input_tokens,
        "output_tokens_per_minute": output_tokens,
    }


@pytest.mark.timeout(900 if FULL else 120)
@given(data=st.data())
@hypothesis_settings(
    max_examples=500 if FULL else 40,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate],
)
def test_no_minute_takes_in_more(
    gate_server: Server, settings: Settings, data: st.DataObject
) -> None:
    limits = data.draw(
        st.fixed_dictionaries(
            {},
            optional={
                "requests_per_minute": st.sampled_from([1, 3, 10, 60, 600]),
                "tokens_per_minute": st.sampled_from([900, 10_000, 100_000]),
                "input_tokens_per_minute": st.sampled_from([800, 9_000]),
                "output_tokens_per_minute": st.sampled_from([500, 4_000]),
            },
        ).filter(bool)
    )
    row = GateRow(gate_server, settings, **limits)
    reserved: Log = []
    used: Log = []
    under_way = []
    sizes = st.sampled_from([0, 1, 20, 160, 400, 900, 2_000, 4_000, 9_000, 50_000, 100_000])
    for _ in range(data.draw(st.integers(10, 80))):
        sent = data.draw(sizes), data.draw(sizes)
        lane = data.draw(st.sampled_from([Lane.INTERACTIVE, Lane.INTERACTIVE, Lane.BULK]))
        ask = row.new(lane, input_tokens=sent[0], output_tokens=sent[1])
        (verdict,) = row.admit(ask)
        if verdict.reason is None:
            reserved.append((row.now, _needs(*sent)))
            used.append((row.now, _needs(*sent)))
            under_way.append(((ask, verdict), used[-1][1]))
        elif data.draw(st.booleans()):
            row.wait(verdict.wait_s)
            assert row.ask(lane, input_tokens=0, output_tokens=0, take=False).wait_s >= 0
        if under_way and data.draw(st.sampled_from([True, False, False])):
            call, needs = under_way.pop(0)
            # Less than was reserved: the rest is there again, and must not be spent twice.
            part = data.draw(st.sampled_from([0, 1, 3, 10]))
            tokens = call[0].input_tokens * part // 10, call[0].output_tokens * part // 10
            row.end(
                call,
                Outcome.SUCCEEDED,
                used_input_tokens=tokens[0],
                used_output_tokens=tokens[1],
            )
            needs |= _needs(*tokens)
        row.wait(data.draw(st.sampled_from([0, 0, 0.01, 0.3, 1, 7, 20, 61])))
        if under_way:
            row.renew(*(call for call, _ in under_way))
    for what, limit in limits.items():
        assert _most_in_a_minute(used, what) <= limit, what


@pytest.mark.timeout(900 if FULL else 120)
@given(data=st.data())
@hypothesis_settings(
    max_examples=500 if FULL else 30,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate],
)
def test_no_minute_takes_in_more_of_what_nobody_corrected(
    gate_server: Server, settings: Settings, data: st.DataObject
) -> None:
    """Needs up to the limit itself, asked for again as soon as it may be worth it."""
    limit = data.draw(st.sampled_from([10, 600, 100_000]))
    row = GateRow(gate_server, settings, tokens_per_minute=limit)
    shares = data.draw(st.lists(st.sampled_from([0.001, 0.01, 0.1, 0.4, 0.9, 1.0]), min_size=1))
    log: Log = []
    for n in range(60):
        need = max(1, round(limit * shares[n % len(shares)]))
        verdict = row.ask(input_tokens=need, output_tokens=0)
        if verdict.reason is not None:
            assert verdict.reason is Reason.TOKENS
            row.wait(verdict.wait_s)
            verdict = row.ask(input_tokens=need, output_tokens=0)
        assert verdict.reason is None
        log.append((row.now, {"tokens": need}))
    assert _most_in_a_minute(log, "tokens") <= limit


def _backlog(row: GateRow, seconds: float, **values: Any) -> list[float]:
    """Ask again and again, as soon as it may be worth it; return when calls left."""
    left = []
    end = row.now + seconds
    while row.now < end:
        verdict = row.ask(**values)
        if verdict.reason is None:
            left.append(row.now)
        else:
            row.wait(verdict.wait_s)
    return left


@pytest.mark.parametrize(
    ("limits", "most"),
    [
        ({"requests_per_minute": 600, "tokens_per_minute": 100_000}, 600),
        ({"tokens_per_minute": 40_000}, 250),
        ({"output_tokens_per_minute": 6_000, "input_tokens_per_minute": 50_000}, 100),
        ({"requests_per_minute": 10}, 10),
        ({"requests_per_minute": 3}, 3),
        ({"requests_per_minute": 1}, 1),
    ],
)
def test_the_limit_is_used(
    gate_server: Server, settings: Settings, limits: dict[str, int], most: int
) -> None:
    row = GateRow(gate_server, settings, **limits)
    minutes = 2 if most > 50 else 20
    left = _backlog(row, minutes * 60)
    assert len(left) >= int(0.96 * most * minutes)
    assert _most_in_a_minute([(at, {"calls": 1}) for at in left], "calls") <= most


def test_bulk_uses_its_share_and_voice_does_not_wait(
    gate_server: Server, settings: Settings
) -> None:
    limits = {"requests_per_minute": 300, "tokens_per_minute": 60_000, "max_concurrent": 20}
    row = GateRow(gate_server, settings, **limits)
    left: Counter[Lane] = Counter()
    calls = []
    for tick in range(1200):
        row.wait(0.1)
        # Whatever bulk can get, and a word now and then.
        for lane in (Lane.BULK, *([Lane.INTERACTIVE] if tick % 20 == 0 else [])):
            ask = row.new(lane, input_tokens=150, output_tokens=200 if lane is Lane.BULK else 40)
            (verdict,) = row.admit(ask)
            if verdict.reason is None:
                left[lane] += 1
                calls.append((ask, verdict))
            else:
                assert lane is Lane.BULK, verdict
        if tick > 10 and calls:
            row.end(calls.pop(0), Outcome.SUCCEEDED)
    assert left[Lane.INTERACTIVE] == 60
    # 80 % of 60,000 tokens at 350 a call.
    assert 0.94 * 2 * 137 <= left[Lane.BULK] <= 2 * 137 + 3


@pytest.mark.parametrize("lane", Lane)
def test_a_large_call_is_not_kept_out_by_small_ones(
    gate_server: Server, settings: Settings, lane: Lane
) -> None:
    row = GateRow(gate_server, settings, tokens_per_minute=30_000)
    small: dict[str, Any] = {"lane": lane, "input_tokens": 100, "output_tokens": 60}
    large = row.new(lane, input_tokens=6_000, output_tokens=0)
    _backlog(row, 90, **small)
    asked_at, again_at = row.now, row.now
    admitted_after = None
    small_left = 0
    while row.now < asked_at + 60:
        if admitted_after is None and row.now >= again_at:
            (verdict,) = row.admit(large)
            again_at = row.now + max(verdict.wait_s, 0.2)
            if verdict.reason is None:
                admitted_after = row.now - asked_at
        small_left += row.ask(**small).reason is None
        row.wait(0.05)
    assert admitted_after is not None
    assert admitted_after < 20
    # Meanwhile the small ones went on, and afterwards too.
    assert small_left > 60


def test_small_calls_are_not_kept_out_by_large_ones(
    gate_server: Server, settings: Settings
) -> None:
    row = GateRow(gate_server, settings, tokens_per_minute=30_000)
    # Always three of each kind ask again as soon as they may.
    askers = [[size, row.now] for size in (6_000, 150) * 3]
    left: Counter[float] = Counter()
    order = random.Random(7)
    while row.now < askers[0][1] + 600 and sum(left.values()) < 60:
        order.shuffle(askers)
        for asker in askers:
            size, again_at = asker
            if row.now >= again_at:
                verdict = row.ask(input_tokens=int(size), output_tokens=0)
                left[size] += verdict.reason is None
                asker[1] = row.now + verdict.wait_s
        row.wait(0.1)
    assert left[6_000] >= 10
    assert left[150] >= 10
