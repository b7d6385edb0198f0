"""Rest, suspension, retries, fewer calls at a time, and the line before a closed gate."""

from __future__ import annotations

import pytest

from sluicegate.shared.admission.gate import Outcome, Reason
from sluicegate.shared.admission.states import lift_suspension
from sluicegate.shared.jobs import Lane
from sluicegate.shared.settings import Settings
from tests.gate_row import ACCOUNT, OTHER_ACCOUNT, ROW_ID, GateRow, Server


@pytest.fixture
def row(gate_server: Server, gate_settings: Settings) -> GateRow:
    return GateRow(gate_server, gate_settings)


def test_everybody_rests_as_long_as_was_asked_for(row: GateRow) -> None:
    row.make(Outcome.THROTTLED, cooldown_s=2.0)
    for lane in Lane:
        verdict = row.ask(lane, account_id=OTHER_ACCOUNT)
        assert (verdict.reason, verdict.wait_s) == (Reason.COOLDOWN, 2.0)
    row.wait(2)
    assert row.ask().reason is None


def test_a_shorter_rest_does_not_end_a_longer_one(row: GateRow) -> None:
    calls = [row.call(), row.call(), row.call()]
    row.end(calls[0], Outcome.THROTTLED, cooldown_s=30.0)
    row.wait(1)
    row.end(calls[1], Outcome.THROTTLED, cooldown_s=1.0)
    row.end(calls[2], Outcome.SUCCEEDED)
    assert row.ask().wait_s == 29


def test_rest_has_an_end(row: GateRow) -> None:
    row.make(Outcome.THROTTLED, cooldown_s=float("inf"))
    assert row.ask().wait_s == 3600


def test_rest_that_nobody_timed_doubles_until_a_success(row: GateRow) -> None:
    for seconds in (1, 2, 4, 8, 16, 32, 60, 60):
        row.make(Outcome.THROTTLED)
        assert row.ask().wait_s == seconds
        row.wait(seconds)
    row.make(Outcome.SUCCEEDED)
    row.make(Outcome.THROTTLED)
    assert row.ask().wait_s == 1


def test_a_wave_of_429s_is_one(row: GateRow) -> None:
    calls = [row.call() for _ in range(20)]
    for call in calls:
        row.end(call, Outcome.THROTTLED)
    assert row.ask().wait_s == 1
    row.wait(1)
    row.make(Outcome.THROTTLED)
    assert row.ask().wait_s == 2


@pytest.mark.parametrize("outcome", [Outcome.THROTTLED, Outcome.OVERLOADED, Outcome.TIMED_OUT])
def test_fewer_at_a_time_and_slowly_more_again(row: GateRow, outcome: Outcome) -> None:
    row.wait(1)
    calls = [row.call() for _ in range(10)]
    row.wait(0.5)
    row.end(calls[0], outcome, cooldown_s=0.0)
    assert row.state().concurrency_cap == 7
    # The others left before it was known.
    row.wait(2)
    row.end(calls[1], outcome, cooldown_s=0.0)
    assert (row.state().concurrency_cap, row.state().in_flight) == (7, 8)
    assert row.ask().reason is Reason.CONCURRENCY
    for call in calls[2:]:
        row.end(call, Outcome.SUCCEEDED)
    # Eight successes add about one.
    assert row.state().concurrency_cap == 8
    assert row.state().in_flight == 0
    for _ in range(200):
        row.make(Outcome.SUCCEEDED)
    assert row.state().concurrency_cap is None


def test_fewer_once_a_second(row: GateRow) -> None:
    row.wait(1)
    calls = [row.call() for _ in range(10)]
    row.wait(0.1)
    row.end(calls[0], Outcome.OVERLOADED)
    for call in calls[1:5]:
        row.end(call, Outcome.NEUTRAL)
    row.wait(0.1)
    calls = [*calls[5:], row.call(), row.call()]
    row.wait(0.4)
    row.end(calls.pop(), Outcome.OVERLOADED)
    assert row.state().concurrency_cap == 7
    row.wait(0.5)
    row.end(calls.pop(), Outcome.OVERLOADED)
    assert row.state().concurrency_cap == 4


def test_not_fewer_than_one_at_a_time(row: GateRow) -> None:
    for _ in range(3):
        row.wait(2)
        row.make(Outcome.THROTTLED, cooldown_s=0.0)
    assert row.state().concurrency_cap == 1
    row.call(Lane.BULK)
    assert row.ask().reason is Reason.CONCURRENCY


def test_what_a_row_allows_is_never_exceeded(gate_server: Server, gate_settings: Settings) -> None:
    row = GateRow(gate_server, gate_settings, max_concurrent=3)
    row.wait(1)
    calls = [row.call() for _ in range(3)]
    row.wait(1)
    row.end(calls.pop(), Outcome.THROTTLED, cooldown_s=0.0)
    assert row.state().concurrency_cap == 2
    for call in calls:
        row.end(call, Outcome.SUCCEEDED)
    row.make(Outcome.SUCCEEDED, 2)
    assert row.state().concurrency_cap is None
    assert [one.reason for one in row.admit(*(row.new() for _ in range(4)))] == [
        None,
        None,
        None,
        Reason.CONCURRENCY,
    ]


def test_only_the_account_that_was_refused_is_suspended(row: GateRow) -> None:
    row.make(Outcome.REFUSED, message="401: bad key")
    verdict = row.ask()
    assert (verdict.reason, verdict.wait_s) == (Reason.SUSPENDED, 900.0)
    row.call(account_id=OTHER_ACCOUNT)
    assert row.state().suspensions == {ACCOUNT: 900.0}
    assert row.changes == [("suspension", str(ACCOUNT), "active", "suspended", "401: bad key")]
    row.wait(900)
    assert row.ask().reason is None


def test_several_refusals_are_one_suspension(row: GateRow) -> None:
    calls = [row.call(), row.call()]
    row.end(calls[0], Outcome.REFUSED)
    row.wait(10)
    row.end(calls[1], Outcome.REFUSED)
    assert len(row.changes) == 1
    assert row.state().suspensions == {ACCOUNT: 900.0}


def test_a_suspension_can_be_lifted(row: GateRow) -> None:
    for account in (ACCOUNT, OTHER_ACCOUNT):
        row.end(row.call(account_id=account), Outcome.REFUSED)
    plain, offset = row.server.plain, row.behind_us
    lifted = lift_suspension(plain, row.prefix, ROW_ID, ACCOUNT, clock_offset_us=offset)
    assert lifted == 1
    assert row.ask().reason is None
    assert row.ask(account_id=OTHER_ACCOUNT).reason is Reason.SUSPENDED
    assert lift_suspension(plain, row.prefix, ROW_ID, clock_offset_us=offset) == 1
    assert lift_suspension(plain, row.prefix, ROW_ID, clock_offset_us=offset) == 0
    assert row.ask(account_id=OTHER_ACCOUNT).reason is None
    assert row.changes[-1][1:4] == (str(OTHER_ACCOUNT), "suspended", "active")


def test_retries_are_a_share_of_first_tries(row: GateRow) -> None:
    for _ in range(10):
        row.call(is_retry=True)
    verdict = row.ask(is_retry=True)
    assert (verdict.reason, verdict.wait_s) == (Reason.RETRIES, 5.0)
    for _ in range(10):
        row.call()
    assert [row.ask(is_retry=True).reason for _ in range(3)] == [None, None, Reason.RETRIES]


def test_a_retry_that_never_left_is_given_back(row: GateRow) -> None:
    calls = [row.call(is_retry=True) for _ in range(10)]
    row.end(calls[0], Outcome.RETURNED)
    row.end(calls[1], Outcome.NEUTRAL)
    assert [row.ask(is_retry=True).reason for _ in range(2)] == [None, Reason.RETRIES]


def test_a_lone_retry_gets_its_chance(row: GateRow) -> None:
    for _ in range(10):
        row.call(is_retry=True)
    for seconds in (5, 5, 600):
        row.wait(seconds)
        assert [row.ask(is_retry=True).reason for _ in range(2)] == [None, Reason.RETRIES]


def test_a_first_try_needs_nothing_of_the_retry_bucket(row: GateRow) -> None:
    for _ in range(10):
        row.call(is_retry=True)
    assert row.ask().reason is None


def test_whoever_lines_up_gets_a_turn(gate_server: Server, gate_settings: Settings) -> None:
    row = GateRow(gate_server, gate_settings, requests_per_minute=3)
    row.call()
    waits = [row.ask(line_up=True).wait_s for _ in range(60)]
    # One turn for each request that the limit allows, and never more than a quarter of an hour.
    assert waits[:3] == pytest.approx([20.511, 41.023, 61.534], abs=0.001)
    assert waits == sorted(waits)
    assert waits[-1] == 900
    # Each lane has a line of its own, and whoever comes from his turn is not sent to the end.
    assert row.ask(Lane.BULK, line_up=True).wait_s < 30
    assert row.ask().wait_s == waits[0]
    row.wait(waits[0])
    assert row.ask().reason is None


def test_the_line_of_a_closed_gate_begins_when_it_opens(row: GateRow) -> None:
    row.make(Outcome.FAILED, 5)
    waits = [row.ask(line_up=True).wait_s for _ in range(100)]
    assert waits[0] == 5.02
    assert waits[-1] == pytest.approx(5 + 100 * 0.02)
    assert row.ask().wait_s == 5


def test_a_suspended_account_stands_in_no_line(row: GateRow) -> None:
    row.make(Outcome.REFUSED)
    waits = {row.ask(line_up=True).wait_s for _ in range(10)}
    assert waits == {900.0}
    assert row.ask(account_id=OTHER_ACCOUNT, line_up=True).reason is None


def test_the_longest_wait_is_the_one_that_is_named(row: GateRow) -> None:
    row.make(Outcome.FAILED, 4)
    row.end(row.call(), Outcome.FAILED, cooldown_s=60.0)
    verdict = row.ask()
    assert (verdict.reason, verdict.wait_s) == (Reason.COOLDOWN, 60.0)
