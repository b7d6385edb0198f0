"""Limits: no minute takes in more than it may, nothing is left over, nobody is kept out."""

from __future__ import annotations

from typing import Any

import pytest

from sluicegate.shared.admission.gate import Outcome, Reason
from sluicegate.shared.admission.headroom import Headroom
from sluicegate.shared.jobs import Lane
from sluicegate.shared.settings import Settings
from tests.gate_row import GateRow, Server


def test_a_burst_is_at_most_a_second_of_the_rate(
    gate_server: Server, gate_settings: Settings
) -> None:
    row = GateRow(gate_server, gate_settings, requests_per_minute=600, tokens_per_minute=10_000_000)
    verdicts = row.admit(*(row.new() for _ in range(30)))
    assert [verdict.reason for verdict in verdicts] == [None] * 10 + [Reason.REQUESTS] * 20


def test_a_call_above_the_limit_goes_alone(gate_server: Server, gate_settings: Settings) -> None:
    row = GateRow(gate_server, gate_settings, tokens_per_minute=1000)
    row.make(Outcome.SUCCEEDED)
    large: dict[str, Any] = {"input_tokens": 5000, "output_tokens": 0}
    refused = row.ask(**large)
    assert refused.reason is Reason.TOKENS
    row.wait(refused.wait_s)
    assert row.now_us - 10**15 > 60e6
    row.call(**large)
    assert row.ask(input_tokens=1, output_tokens=0).wait_s > 60


def test_what_was_not_used_is_there_again(gate_server: Server, gate_settings: Settings) -> None:
    row = GateRow(gate_server, gate_settings, tokens_per_minute=60_000)
    call = row.call(input_tokens=500, output_tokens=500)
    # 975 tokens a second come back.
    assert row.ask(take=False).wait_s == pytest.approx(1.026, abs=0.001)
    row.end(call, Outcome.SUCCEEDED, used_input_tokens=400, used_output_tokens=95)
    assert row.ask(take=False).wait_s == pytest.approx(0.508, abs=0.001)


def test_what_was_used_beyond_is_charged(gate_server: Server, gate_settings: Settings) -> None:
    row = GateRow(gate_server, gate_settings, tokens_per_minute=60_000)
    call = row.call(input_tokens=100, output_tokens=100)
    row.end(call, Outcome.SUCCEEDED, used_input_tokens=100, used_output_tokens=2_100)
    # Of a burst of 1,000 it has 600 left, is charged 2,000 more, and gets 975 back a second.
    refused = row.ask(input_tokens=100, output_tokens=0)
    assert refused.reason is Reason.TOKENS
    assert refused.wait_s == pytest.approx(1.436, abs=0.001)


def test_what_never_left_is_given_back(gate_server: Server, gate_settings: Settings) -> None:
    row = GateRow(
        gate_server, gate_settings, requests_per_minute=1, tokens_per_minute=160, max_concurrent=1
    )
    for _ in range(5):
        call = row.call(is_retry=True)
        assert row.ask().reason is not None
        row.end(call, Outcome.RETURNED)


def test_headers_only_lower_the_level(gate_server: Server, gate_settings: Settings) -> None:
    row = GateRow(gate_server, gate_settings, requests_per_minute=600)
    row.make(Outcome.SUCCEEDED, headroom=Headroom(requests=3))
    verdicts = row.admit(*(row.new() for _ in range(6)))
    assert [verdict.reason for verdict in verdicts] == [None] * 3 + [Reason.REQUESTS] * 3
    row.wait(0.2)
    row.make(Outcome.SUCCEEDED, headroom=Headroom(requests=500))
    assert row.ask().reason is Reason.REQUESTS


def test_an_exhausted_provider_rests_until_its_reset(
    gate_server: Server, gate_settings: Settings
) -> None:
    row = GateRow(gate_server, gate_settings)
    row.make(Outcome.SUCCEEDED, headroom=Headroom(requests=9, tokens=0, reset_s=2.5))
    verdict = row.ask()
    assert (verdict.reason, verdict.wait_s) == (Reason.COOLDOWN, 2.5)
    row.wait(2.5)
    row.make(Outcome.SUCCEEDED, headroom=Headroom(requests=0, reset_s=1e9))
    assert row.ask().wait_s == 3600


def test_bulk_leaves_slots_free(gate_server: Server, gate_settings: Settings) -> None:
    row = GateRow(gate_server, gate_settings, max_concurrent=10)
    bulk = row.admit(*(row.new(Lane.BULK) for _ in range(12)))
    assert [one.reason for one in bulk] == [None] * 8 + [Reason.CONCURRENCY] * 4
    voice = row.admit(*(row.new() for _ in range(4)))
    assert [one.reason for one in voice] == [None] * 2 + [Reason.CONCURRENCY] * 2


def test_bulk_can_always_use_one(gate_server: Server, gate_settings: Settings) -> None:
    row = GateRow(gate_server, gate_settings, requests_per_minute=1, max_concurrent=1)
    assert row.ask(Lane.BULK).reason is None
    row.wait(77)
    assert row.ask(Lane.BULK).reason is None


def test_slots_of_a_dead_worker_come_back(gate_server: Server, gate_settings: Settings) -> None:
    row = GateRow(gate_server, gate_settings, max_concurrent=2)
    mine, lost = row.call(), row.call(Lane.BULK)
    row.wait(10)
    row.renew(mine)
    assert row.ask().reason is Reason.CONCURRENCY
    row.wait(5)
    assert row.state().in_flight == 1
    row.call()
    # Its worker was only slow: what is gone stays gone.
    row.renew(lost)
    row.end(lost, Outcome.SUCCEEDED)
    assert row.state().in_flight == 2
    assert row.ask().reason is Reason.CONCURRENCY


def test_a_large_bulk_call_does_not_make_voice_wait(
    gate_server: Server, gate_settings: Settings
) -> None:
    row = GateRow(gate_server, gate_settings, tokens_per_minute=60_000)
    row.call(Lane.BULK, input_tokens=20_000, output_tokens=0)
    assert row.ask(input_tokens=10, output_tokens=0).wait_s < 0.05
    assert row.ask(Lane.BULK, input_tokens=10, output_tokens=0).wait_s > 20


def test_room_is_kept_for_a_large_call_until_it_has_had_its_chance(
    gate_server: Server, gate_settings: Settings
) -> None:
    row = GateRow(gate_server, gate_settings, tokens_per_minute=600)
    for _ in range(5):
        row.call(input_tokens=100, output_tokens=0)
        row.wait(10.3)
    large: dict[str, Any] = {"input_tokens": 400, "output_tokens": 0}
    refused = row.ask(**large)
    # In the last minute 500 were taken, and the first three hundreds have to be over.
    assert refused.reason is Reason.TOKENS
    assert 29 < refused.wait_s < 31
    small: dict[str, Any] = {"input_tokens": 1, "output_tokens": 0}
    assert row.ask(**small).wait_s == refused.wait_s
    # Bulk has to wait for voice, voice not for bulk.
    assert row.ask(Lane.BULK, **small).wait_s == refused.wait_s
    row.wait(refused.wait_s)
    assert row.ask(**small, take=False).reason is None
    row.call(**large)


def test_room_that_nobody_comes_for_is_given_up(
    gate_server: Server, gate_settings: Settings
) -> None:
    row = GateRow(gate_server, gate_settings, tokens_per_minute=600)
    for _ in range(5):
        row.call(Lane.BULK, input_tokens=90, output_tokens=0)
        row.wait(11.6)
    # 450 of bulk's 480 were taken in the last minute.
    refused = row.ask(Lane.BULK, input_tokens=300, output_tokens=0)
    assert refused.reason is Reason.TOKENS
    row.wait(refused.wait_s)
    small: dict[str, Any] = {"input_tokens": 1, "output_tokens": 0}
    row.call(Lane.BULK, **small)
    row.wait(4.9)
    assert row.ask(Lane.BULK, **small).reason is Reason.TOKENS
    assert row.ask(**small).reason is None
    row.wait(0.2)
    assert row.ask(Lane.BULK, **small).reason is None


def test_what_voice_gives_back_is_not_given_to_bulk(
    gate_server: Server, gate_settings: Settings
) -> None:
    row = GateRow(gate_server, gate_settings, tokens_per_minute=60_000)
    row.call(Lane.BULK, input_tokens=2_000, output_tokens=0)
    voice = row.call(input_tokens=900, output_tokens=0)
    owed_s = row.ask(Lane.BULK, take=False).wait_s
    assert owed_s > 2
    row.end(voice, Outcome.RETURNED)
    assert row.ask(Lane.BULK, take=False).wait_s == owed_s


def test_what_is_over_is_corrected_no_more(gate_server: Server, gate_settings: Settings) -> None:
    row = GateRow(gate_server, gate_settings, tokens_per_minute=1_000)
    long = row.call(input_tokens=400, output_tokens=0)
    for _ in range(5):
        row.wait(12.2)
        row.renew(long)
    # A minute later, in the ring's same place.
    row.call(input_tokens=900, output_tokens=0)
    row.end(long, Outcome.SUCCEEDED, used_input_tokens=0, used_output_tokens=0)
    row.wait(row.ask(input_tokens=1, output_tokens=0, take=False).wait_s)
    assert row.ask(input_tokens=100, output_tokens=0, take=False).reason is None
    assert row.ask(input_tokens=101, output_tokens=0, take=False).reason is Reason.TOKENS
