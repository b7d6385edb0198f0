"""The breaker: when it opens, whom it lets through, and what cannot change it."""

from __future__ import annotations

import pytest

from sluicegate.shared.admission.gate import Ask, Outcome, Probe, Reason, Verdict
from sluicegate.shared.admission.states import reset
from sluicegate.shared.settings import Settings
from tests.gate_row import OTHER_ACCOUNT, ROW_ID, GateRow, Server


@pytest.fixture
def row(gate_server: Server, gate_settings: Settings) -> GateRow:
    return GateRow(gate_server, gate_settings)


def test_opens_after_five_failures_in_a_row(row: GateRow) -> None:
    row.make(Outcome.FAILED)
    row.make(Outcome.OVERLOADED)
    row.make(Outcome.TIMED_OUT, 2)
    assert row.ask(take=False).reason is None
    row.make(Outcome.FAILED, message="connection refused")
    verdict = row.ask()
    assert (verdict.reason, verdict.wait_s) == (Reason.BREAKER, 5.0)
    reason = "5 failures in a row: connection refused"
    assert row.changes == [("breaker", "", "closed", "open", reason)]


def test_a_success_ends_the_streak(row: GateRow) -> None:
    for _ in range(3):
        row.make(Outcome.FAILED, 4)
        row.make(Outcome.SUCCEEDED)
    assert row.state().state == "closed"


@pytest.mark.parametrize(
    "outcome", [Outcome.THROTTLED, Outcome.REFUSED, Outcome.NEUTRAL, Outcome.RETURNED]
)
def test_neither_success_nor_failure(row: GateRow, outcome: Outcome) -> None:
    calls = [row.call() for _ in range(30)]
    for call in calls[:4]:
        row.end(call, Outcome.FAILED)
    for call in calls[4:-1]:
        row.end(call, outcome)
    assert (row.state().state, row.state().calls, row.state().streak) == ("closed", 4, 4)
    row.end(calls[-1], Outcome.FAILED)
    assert row.state().state == "open"


def test_opens_when_half_of_twenty_fail(row: GateRow) -> None:
    for n in range(19):
        row.make(Outcome.FAILED if n % 2 else Outcome.SUCCEEDED)
        row.wait(1)
    assert (row.state().state, row.state().calls, row.state().failures) == ("closed", 19, 9)
    row.make(Outcome.FAILED)
    assert row.state().state == "open"


def test_what_happened_two_minutes_ago_does_not_count(row: GateRow) -> None:
    for n in range(18):
        row.make(Outcome.SUCCEEDED if n % 2 else Outcome.FAILED)
    row.make(Outcome.SUCCEEDED)
    row.wait(121)
    row.make(Outcome.FAILED, 3)
    assert (row.state().state, row.state().calls) == ("closed", 3)


def _open(row: GateRow) -> None:
    row.make(Outcome.FAILED, 5)
    assert row.state().state == "open"


def _first_token(row: GateRow, call: tuple[Ask, Verdict]) -> Probe:
    ask, verdict = call
    return Probe(attempt_id=ask.attempt_id, provider=row.provider, generation=verdict.generation)


def test_half_open_lets_two_probes_through(row: GateRow) -> None:
    _open(row)
    row.wait(4.9)
    assert row.ask().reason is Reason.BREAKER
    row.wait(0.1)
    assert row.state().state == "half_open"
    probes = [row.call(), row.call()]
    assert [verdict.is_probe for _, verdict in probes] == [True, True]
    refused = row.ask()
    assert (refused.reason, refused.wait_s) == (Reason.BREAKER, 1.0)
    row.end(probes[0], Outcome.SUCCEEDED)
    assert row.state().state == "closed"
    assert not row.call()[1].is_probe
    assert [change[2:4] for change in row.changes] == [
        ("closed", "open"),
        ("open", "half_open"),
        ("half_open", "closed"),
    ]


def test_only_looking_at_it_does_not_make_a_probe(row: GateRow) -> None:
    _open(row)
    row.wait(5)
    assert row.ask(take=False).is_probe
    assert (row.state().generation, row.state().probes) == (1, 0)
    row.make(Outcome.NEUTRAL, cooldown_s=9.0)
    refused = row.ask(take=False)
    assert (refused.reason, refused.is_probe) == (Reason.COOLDOWN, False)


def test_open_time_doubles_and_begins_anew_once_closed(row: GateRow) -> None:
    _open(row)
    for seconds in (10, 20, 20):
        row.wait(row.ask().wait_s)
        row.make(Outcome.FAILED)
        assert row.ask().wait_s == seconds
    row.wait(20)
    row.make(Outcome.SUCCEEDED)
    _open(row)
    assert row.ask().wait_s == 5


@pytest.mark.parametrize(("ppm", "seconds"), [(0, 4.0), (999_999, 5.999998)])
def test_open_time_is_spread_by_a_fifth(row: GateRow, ppm: int, seconds: float) -> None:
    row.chance.ppm = ppm
    _open(row)
    assert row.ask().wait_s == seconds


def test_a_probe_has_succeeded_with_its_first_token(row: GateRow) -> None:
    _open(row)
    row.wait(5)
    probe = row.call()
    row.first_token(_first_token(row, probe))
    assert row.state().state == "closed"
    # What becomes of its stream then is nothing to the breaker: the generation is another.
    row.end(probe, Outcome.FAILED)
    assert (row.state().streak, row.state().in_flight) == (0, 0)


def test_a_hung_probe_does_not_wedge_it(row: GateRow) -> None:
    _open(row)
    row.wait(5)
    probe = row.call()
    row.call()
    row.wait(14)
    row.renew(probe)
    row.wait(1)
    # The second one's worker is gone: that is a failure, at the moment when its lease ran out.
    verdict = row.ask()
    assert (verdict.reason, verdict.wait_s) == (Reason.BREAKER, 10.0)
    row.wait(10)
    assert row.call()[1].is_probe
    assert row.state().probes == 1


def test_a_long_probe_keeps_its_permit(row: GateRow) -> None:
    _open(row)
    row.wait(5)
    probe = row.call()
    for _ in range(5):
        row.wait(14)
        row.renew(probe)
    assert (row.state().state, row.state().probes) == ("half_open", 1)
    row.end(probe, Outcome.SUCCEEDED)
    assert row.state().state == "closed"


def test_a_lost_probe_has_failed_before_the_other_one_answers(row: GateRow) -> None:
    _open(row)
    row.wait(5)
    probe = row.call()
    row.call()
    row.wait(14)
    row.renew(probe)
    row.wait(1.5)
    row.end(probe, Outcome.SUCCEEDED)
    assert (row.state().state, row.state().half_open_in_s) == ("open", 9.5)


def test_looking_late_at_a_hung_probe_lets_the_next_one_through_at_once(row: GateRow) -> None:
    _open(row)
    row.wait(5)
    row.call()
    row.wait(3600)
    assert row.call()[1].is_probe
    assert [change[3] for change in row.changes] == ["open", "half_open", "open", "half_open"]


@pytest.mark.parametrize(
    "outcome", [Outcome.THROTTLED, Outcome.REFUSED, Outcome.NEUTRAL, Outcome.RETURNED]
)
def test_a_probe_that_proved_nothing_gives_its_permit_back(row: GateRow, outcome: Outcome) -> None:
    _open(row)
    row.wait(5)
    probes = [row.call(), row.call()]
    row.end(probes[0], outcome, cooldown_s=0.0)
    state = row.state()
    assert (state.state, state.probes, state.generation) == ("half_open", 1, 2)
    # Whatever it is said to have done afterwards.
    row.first_token(_first_token(row, probes[0]))
    assert row.state().state == "half_open"
    assert row.call(account_id=OTHER_ACCOUNT)[1].is_probe


def test_late_reports_change_nothing(row: GateRow) -> None:
    early = [row.call() for _ in range(30)]
    for call in early[:5]:
        row.end(call, Outcome.FAILED)
    assert (row.state().state, row.state().generation) == ("open", 1)
    for call in early[5:15]:
        row.end(call, Outcome.FAILED)
    row.wait(5)
    row.renew(*early[15:])
    probe = row.call()
    for call in early[15:20]:
        row.end(call, Outcome.FAILED)
    for call in early[20:25]:
        row.end(call, Outcome.SUCCEEDED)
    assert (row.state().state, row.state().probes, row.state().generation) == ("half_open", 1, 2)
    row.end(probe, Outcome.SUCCEEDED)
    for call in early[25:]:
        row.end(call, Outcome.FAILED)
    assert (row.state().state, row.state().streak, row.state().calls) == ("closed", 0, 0)


def test_forced_open(row: GateRow) -> None:
    row.pull("forced_open")
    verdict = row.ask()
    assert (verdict.reason, verdict.wait_s) == (Reason.BREAKER, 20.0)
    row.wait(3600)
    assert row.ask().reason is Reason.BREAKER
    row.pull("auto")
    assert row.ask().reason is None


def test_disabled_is_neither_checked_nor_fed(row: GateRow) -> None:
    row.pull("disabled")
    row.make(Outcome.FAILED, 50)
    assert (row.state().state, row.state().calls) == ("closed", 0)
    row.pull("auto")
    _open(row)
    row.pull("disabled")
    call = row.call()
    assert not call[1].is_probe
    row.end(call, Outcome.SUCCEEDED)
    assert row.state().state == "open"
    row.pull("auto")
    row.wait(5)
    row.call()
    row.pull("disabled")
    row.wait(60)
    # Its probe was lost meanwhile.
    row.make(Outcome.SUCCEEDED)
    assert (row.state().state, row.state().generation) == ("half_open", 2)


def test_a_call_that_was_not_checked_is_no_probe(row: GateRow) -> None:
    _open(row)
    row.wait(5)
    row.call()
    row.pull("disabled")
    unchecked = [row.call(), row.call()]
    row.pull("auto")
    row.end(unchecked[0], Outcome.FAILED)
    row.end(unchecked[1], Outcome.SUCCEEDED)
    assert (row.state().state, row.state().probes) == ("half_open", 1)


def test_reset_closes_it(row: GateRow) -> None:
    call = row.call()
    _open(row)
    reset(row.server.plain, row.prefix, ROW_ID, reason="by hand")
    assert row.changes[-1] == ("breaker", "", "open", "closed", "by hand")
    row.end(call, Outcome.FAILED)
    assert (row.state().state, row.state().generation, row.state().streak) == ("closed", 2, 0)
    row.make(Outcome.FAILED, 5)
    row.wait(row.ask().wait_s)
    row.call()
    assert row.state().probes == 1
    reset(row.server.plain, row.prefix, ROW_ID)
    assert (row.state().state, row.state().probes) == ("closed", 0)
    row.make(Outcome.FAILED, 4)
    assert row.ask().reason is None
