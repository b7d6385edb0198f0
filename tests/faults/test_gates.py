"""The gates between real processes: a provider that is down, limits and slots that are shared."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest

from sluicegate.shared.admission.states import GateState, read_states
from sluicegate.shared.jobs import Lane
from sluicegate.workers.local.sandbox_control import SandboxControl
from tests.command_line import Command
from tests.harness import FULL, Rig, Service
from tests.polling import eventually

#: Serves both use cases of these tests; the other one stands in when it is asked to.
PRIMARY, MODEL = "openai-gpt-6-luna", "gpt-6-luna"
SPARE = "openai-gpt-6.1-sol"
USE_CASES = ["general", "voice"]

OUTAGE_S = 60.0 if FULL else 7.0
#: In production's lengths, or in shorter ones; a lease outlives what a busy machine holds up.
DURATIONS: dict[str, Any] = (
    {}
    if FULL
    else {
        "breaker_open_s": 1.5,
        "breaker_open_max_s": 3.0,
        "gate_lease_s": 12.0,
        "beat_valid_s": 5.0,
        "dead_after_s": 6.0,
    }
)

pytestmark = pytest.mark.timeout(900 if FULL else 120)


@pytest.fixture(scope="module")
def rig_settings() -> dict[str, Any]:
    return DURATIONS


@pytest.fixture(scope="module")
def _workers(module_rig: Rig) -> None:
    module_rig.start_sweep()
    workers = [module_rig.begin_worker("openai", USE_CASES, jobs_in_flight=50) for _ in range(2)]
    workers.append(module_rig.begin_worker("openai", ["general"], Lane.BULK))
    for worker in workers:
        module_rig.await_worker(worker)


@pytest.fixture
def rig(module_rig: Rig, sandbox: SandboxControl, _workers: None) -> Iterator[Rig]:
    assert module_rig.sandbox is sandbox
    before = module_rig.services
    sandbox.clear_limits()
    yield module_rig
    sandbox.clear_limits()
    for service in set(module_rig.services) - set(before):
        service.kill()
    for key in module_rig.redis.scan_iter(match=f"{module_rig.settings.redis_prefix}gate:*"):
        module_rig.redis.delete(key)


@pytest.fixture
def sluice(rig: Rig, command_line: Callable[[Any], Command]) -> Iterator[Command]:
    """Return the fleet's command line; the provider is as it was when the test is over."""
    command = command_line(rig.settings)
    before = _row(rig, PRIMARY)
    yield command
    clear = "requests-per-minute,tokens-per-minute,max-concurrent"
    assert command("provider", "set", PRIMARY, "--clear", clear).code == 0
    assert _row(rig, PRIMARY) == before


def _row(rig: Rig, name: str) -> tuple[Any, ...]:
    (row,) = rig.rows(
        "SELECT id, requests_per_minute, tokens_per_minute, max_concurrent FROM llm_providers"
        " WHERE name = %(name)s",
        name=name,
    )
    return tuple(row)


def _limit(sluice: Command, **limits: int) -> None:
    """Tell the fleet what the provider takes."""
    words = [f"--{name.replace('_', '-')}={value}" for name, value in limits.items()]
    done = sluice("provider", "set", PRIMARY, *words)
    assert done.code == 0, done


def _gate(rig: Rig) -> GateState:
    (state,) = read_states(rig.redis, rig.settings.redis_prefix, [_row(rig, PRIMARY)[0]])
    return state


def _submit_steadily(
    rig: Rig, use_case: str, seconds: float, *, per_s: float, **options: Any
) -> list[UUID]:
    """Submit one job after the other, at this pace."""
    ids: list[UUID] = []
    begun = time.monotonic()
    while (passed := time.monotonic() - begun) < seconds:
        if due := int(passed * per_s) + 1 - len(ids):
            ids += rig.submit(use_case, due, **options)
        time.sleep(1 / per_s / 2)
    return ids


def _wait_s(rig: Rig, job_ids: list[UUID]) -> list[float]:
    """How long each job waited until its first call was let go, in order of length."""
    rows = rig.rows(
        "SELECT min(a.dispatched_at) - j.created_at AS waited FROM jobs j"
        " JOIN attempts a ON a.job_id = j.id WHERE j.id = ANY(%(ids)s) GROUP BY j.id",
        ids=job_ids,
    )
    assert len(rows) == len(job_ids)
    return sorted(row.waited / timedelta(seconds=1) for row in rows)


def _p95(values: list[float]) -> float:
    return values[int(0.95 * (len(values) - 1))]


def _held_back_by(rig: Rig, job_ids: list[UUID], why: str) -> int:
    """How many of these jobs wait in Postgres for this reason."""
    (row,) = rig.rows(
        "SELECT count(*) AS n FROM jobs WHERE id = ANY(%(ids)s) AND state = 'parked'"
        " AND strpos(held_back, %(why)s) > 0",
        ids=job_ids,
        why=why,
    )
    return int(row.n)


@pytest.fixture
def _spare(rig: Rig, sluice: Command) -> Iterator[None]:
    """Have another row of the same pool stand in, so that the same workers call both."""
    assert sluice("provider", "set", SPARE, "--failover", "complex,general").code == 0
    yield
    assert sluice("provider", "set", SPARE, "--failover", "complex").code == 0


@pytest.mark.usefixtures("_spare")
@pytest.mark.parametrize("fault", ["http_503", "http_500"] if FULL else ["http_503"])
def test_a_provider_that_is_down_costs_a_few_calls(
    rig: Rig, fault: str, record_property: Callable[[str, object], None]
) -> None:
    ids = _submit_steadily(rig, "general", 1, per_s=20)
    rig.await_over(ids)
    number = _newest_change(rig)
    rule = rig.sandbox.down(MODEL, fault)
    ids += _submit_steadily(rig, "general", OUTAGE_S, per_s=20)
    rig.sandbox.remove_fault(rule)
    up_at = time.time()

    def is_back() -> bool:
        ids.extend(rig.submit("general", 2))
        calls = [call for call in rig.sandbox.calls() if call["started_at"] > up_at]
        return any(call["model"] == MODEL and call["status"] == 200 for call in calls)

    eventually(is_back, 30)
    record_property("back_after_s", round(time.time() - up_at, 1))
    rig.await_over(ids)
    assert rig.states(ids) == {"succeeded": len(ids)}
    rig.check_books(ids)

    trail = _breaker_trail(rig, after=number)
    assert trail[0][1] == "open"
    assert trail[-1][1] == "closed"
    assert {state for _, state in trail[1:-1]} <= {"open", "half_open"}
    opened_at = trail[0][0]
    calls = [call["started_at"] for call in rig.sandbox.calls() if call["model"] == MODEL]
    reached = [at for at in calls if opened_at < at < up_at]
    record_property("calls_while_down", len(reached))
    assert len(reached) <= 20
    # One state for all: a second after it opens nobody calls, until it lets probes through.
    closed_to_all = 0.0
    for (at, state), (until, _) in itertools.pairwise(trail):
        if state == "open":
            assert [one for one in calls if at + 1 < one < until - 0.1] == []
            closed_to_all += max(0.0, until - at - 1)
    assert closed_to_all > 1
    # Both workers had jobs all the while, and both kept away from it.
    served = rig.rows(
        "SELECT worker_id, count(*) AS n FROM attempts WHERE provider = %(spare)s"
        " AND dispatched_at > to_timestamp(%(at)s) GROUP BY 1",
        spare=SPARE,
        at=opened_at,
    )
    assert len(served) == 2
    assert min(row.n for row in served) > 5


def _newest_change(rig: Rig) -> int:
    (row,) = rig.rows("SELECT coalesce(max(number), 0) AS number FROM gate_changes")
    return int(row.number)


def _breaker_trail(rig: Rig, *, after: int) -> list[tuple[float, str]]:
    """What the primary's breaker did, when by the clock of Redis; waits until it has closed."""

    def closed() -> list[tuple[float, str]]:
        rows = rig.rows(
            "SELECT event_id, after FROM gate_changes WHERE kind = 'breaker'"
            " AND provider_id = %(id)s AND number > %(after)s ORDER BY number",
            id=_row(rig, PRIMARY)[0],
            after=after,
        )
        assert rows, "nothing was recorded"
        assert rows[-1].after == "closed"
        return [(int(row.event_id.partition("-")[0]) / 1000, row.after) for row in rows]

    return eventually(closed)


@pytest.mark.parametrize("binding", ["requests", "tokens"] if FULL else ["requests"])
def test_four_workers_share_a_limit(
    rig: Rig, sluice: Command, binding: str, record_property: Callable[[str, object], None]
) -> None:
    """What they use of it is a rate, which only the full size asserts: over two minutes."""
    minute = {"requests_per_minute": 600, "tokens_per_minute": 100_000}
    # The sandbox' minute is shorter otherwise. Ours is one, with a second's worth as a burst; of
    # any five seconds that leaves 59 requests. The rest is for those that arrive late.
    window_s, jobs, share = (60.0, 1500, 1.0) if FULL else (5.0, 80, 80 / 600)
    enforced = {name: round(limit * share) for name, limit in minute.items()}
    rig.sandbox.limit(MODEL, limit_window_s=window_s, **enforced)
    _limit(sluice, **minute)
    for worker in [rig.begin_worker("openai", USE_CASES, jobs_in_flight=50) for _ in range(2)]:
        rig.await_worker(worker)
    answer_tokens = 40 if binding == "requests" else 250
    options: dict[str, Any] = {
        "text": f"Summarise the call.\nTOKENS: {answer_tokens}\n",
        "max_tokens": None if FULL else 50,
        "deadline": 3600,
    }
    if FULL:
        # A fleet that runs knows how long its answers are; what it learned in is forgotten.
        rig.await_over(rig.submit("general", 40, **options))
        time.sleep(window_s + 1)
        begun = len(rig.sandbox.calls())
    ids = rig.submit("general", jobs, **options)
    if FULL:
        rig.sandbox.wait_for_calls(begun + 1, 60)
        time.sleep(2 * window_s + 1)
        used = _limit_used(rig.sandbox.calls()[begun:], minute, 2 * window_s)
        record_property("limit_used", round(used, 3))
        for job_id in ids:
            rig.client.cancel(job_id)
    rig.await_over(ids)
    calls = [call for calls in rig.calls(ids).values() for call in calls]
    refused = [call for call in calls if call["status"] == 429]
    record_property("throttled", len(refused))
    served = rig.rows(
        "SELECT worker_id, count(*) AS n FROM attempts WHERE job_id = ANY(%(ids)s) GROUP BY 1",
        ids=ids,
    )
    assert len(served) == 4
    rig.check_books(ids)
    if FULL:
        assert used >= 0.95
        assert len(refused) <= 0.005 * len(calls)
    else:
        assert rig.states(ids) == {"succeeded": jobs}
        assert refused == []


def _limit_used(calls: list[dict[str, Any]], minute: dict[str, int], seconds: float) -> float:
    """The part of what may be used from the first call on for so long, where it is largest."""
    until = min(call["started_at"] for call in calls) + seconds
    let_in = [call for call in calls if call["started_at"] < until and call["status"] != 429]
    minutes = seconds / 60
    return max(
        len(let_in) / (minutes * minute["requests_per_minute"]),
        sum(map(_tokens, let_in)) / (minutes * minute["tokens_per_minute"]),
    )


def _tokens(call: dict[str, Any]) -> int:
    usage = call["usage"] or {}
    # Reasoning is a part of the output.
    return int(sum(usage.values()) - usage.get("reasoning", 0))


def test_a_killed_workers_slots_are_back_within_their_lease(
    rig: Rig, sluice: Command, record_property: Callable[[str, object], None]
) -> None:
    slots = 8
    _limit(sluice, max_concurrent=slots)
    victim = rig.start_worker("openai", ["draft"])
    rig.sandbox.settings(latency_ms=60_000)
    held = rig.submit("draft", slots, model=PRIMARY)
    eventually(lambda: len(rig.calls(held)) == slots)
    assert _gate(rig).in_flight == slots
    rig.sandbox.settings(latency_ms=5)
    waiting = rig.submit("general", 20)
    eventually(lambda: _held_back_by(rig, waiting, "as many calls under way") > 0)
    # They are kept: the lease runs out only when nobody renews it.
    eventually(lambda: _age_s(rig, victim) >= rig.settings.gate_lease_s + 1, 60)
    assert _gate(rig).in_flight == slots
    assert rig.calls(waiting) == {}
    victim.kill()
    killed_at = time.time()
    eventually(lambda: _gate(rig).in_flight < slots, rig.settings.gate_lease_s + 2)
    record_property("slots_back_after_s", round(time.time() - killed_at, 1))
    rig.await_over(waiting)
    assert rig.states(waiting) == {"succeeded": len(waiting)}
    rig.check_once(waiting)
    for job_id in held:
        rig.client.cancel(job_id)


def _age_s(rig: Rig, worker: Service) -> float:
    """For how long a worker has lived, by its beats."""
    (row,) = rig.rows("SELECT beat FROM workers WHERE name = %(name)s", name=f"{worker.name}@test")
    return float(row.beat * rig.settings.beat_interval_s)


@pytest.mark.parametrize("limit", ["requests_per_minute", "max_concurrent"])
def test_voice_does_not_wait_behind_bulk_work(
    rig: Rig, sluice: Command, limit: str, record_property: Callable[[str, object], None]
) -> None:
    # A hundred a second when production is meant, of which bulk work may take eighty.
    a_second = 100 if FULL else 20
    latency_s = 0.3
    if limit == "requests_per_minute":
        _limit(sluice, requests_per_minute=60 * a_second)
    else:
        _limit(sluice, max_concurrent=round(a_second * latency_s))
    rig.sandbox.settings(latency_ms=1000 * latency_s)
    bulk = rig.submit("general", 10_000 if FULL else 300, lane="bulk")
    eventually(lambda: _held_back_by(rig, bulk, PRIMARY) > 0)
    voice = _submit_steadily(rig, "voice", 60 if FULL else 3, per_s=0.15 * a_second)
    rig.await_over(voice, 20)
    states = rig.states(bulk)
    assert states.get("succeeded", 0) < len(bulk), "the bulk work was over too soon"
    assert set(states) <= {"succeeded", "running", "queued", "parked"}
    assert rig.states(voice) == {"succeeded": len(voice)}
    waits_s = _wait_s(rig, voice)
    record_property("voice_wait_p95_ms", round(1000 * _p95(waits_s)))
    record_property("voice_wait_max_ms", round(1000 * waits_s[-1]))
    if FULL:
        assert _p95(waits_s) <= 0.25
        rig.await_over(bulk, 600)
        assert rig.states(bulk) == {"succeeded": len(bulk)}
    else:
        for job_id in bulk:
            rig.client.cancel(job_id)
