"""Workers that are killed, frozen and stopped while another one goes on."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from uuid import UUID

import orjson
import pytest

from sluicegate.shared.events import id_key
from sluicegate.workers.local.sandbox_control import SandboxControl
from tests.harness import FULL, Rig, Service
from tests.polling import eventually

IN_FLIGHT = 200 if FULL else 60
#: What production uses, so that the time to resume is production's.
DURATIONS: dict[str, Any] = (
    {"beat_interval_s": 2.0} if FULL else {"beat_valid_s": 3.5, "dead_after_s": 5.0}
)
QUEUE = "general.openai"

pytestmark = pytest.mark.timeout(300 if FULL else 120)


@pytest.fixture(scope="module")
def rig_settings() -> dict[str, Any]:
    # A frozen worker's calls outlive the freeze.
    deadlines = {"first_token_deadline_s": 120.0, "idle_deadline_s": 120.0}
    return {"jobs_in_flight": IN_FLIGHT} | deadlines | DURATIONS


@pytest.fixture(scope="module")
def survivor(module_rig: Rig) -> Service:
    module_rig.start_sweep()
    return module_rig.start_worker("openai", ["general"])


@pytest.fixture
def rig(module_rig: Rig, sandbox: SandboxControl, survivor: Service) -> Iterator[Rig]:
    assert module_rig.sandbox is sandbox
    assert survivor.ended() is None, survivor.log
    before = module_rig.services
    yield module_rig
    for service in set(module_rig.services) - set(before):
        service.kill()


@contextmanager
def _resting(rig: Rig, worker: Service) -> Iterator[None]:
    """Keep a worker from taking messages, so that another gets them; one may still slip in."""
    rig.tell(worker, "cancel_consumer", queue=QUEUE)
    yield
    rig.tell(worker, "add_consumer", queue=QUEUE)


def _calling(rig: Rig, worker: Service, job_ids: list[UUID]) -> list[UUID]:
    """Wait until a worker has the calls of these jobs under way; return its jobs."""

    def found() -> list[UUID]:
        jobs = rig.in_flight(worker)
        assert len(jobs) >= len(job_ids) - 1, len(jobs)
        assert len(rig.calls(jobs)) == len(jobs)
        return jobs

    return eventually(found)


def _states(rig: Rig, job_id: UUID) -> list[str]:
    return [attempt.state for attempt in rig.attempts([job_id])[job_id]]


def test_a_killed_workers_jobs_are_finished_by_another(
    rig: Rig, survivor: Service, record_property: Callable[[str, object], None]
) -> None:
    victim = rig.start_worker("openai", ["general"])
    rig.sandbox.settings(latency_ms=60_000)
    with _resting(rig, survivor):
        ids = rig.submit("general", IN_FLIGHT)
        held = _calling(rig, victim, ids)
        rig.sandbox.settings(latency_ms=50)
    # Of these the victim has one or two in hand, neither claimed nor called.
    ids += rig.submit("general", IN_FLIGHT)
    victim.kill()
    killed_at = time.monotonic()

    def resumed() -> bool:
        return any(len(attempts) > 1 for attempts in rig.attempts(held).values())

    eventually(resumed, timeout_s=20)
    record_property("resumed_after_s", round(time.monotonic() - killed_at, 1))
    rig.await_over(ids)
    assert rig.states(ids) == {"succeeded": len(ids)}
    twice = [job_id for job_id, calls in rig.calls(ids).items() if len(calls) == 2]
    assert sorted(twice) == sorted(held)
    for job_id in ids:
        expected = ["unknown", "succeeded"] if job_id in held else ["succeeded"]
        assert _states(rig, job_id) == expected
    rig.check_books(ids)


def _check_channel(rig: Rig, job_id: UUID) -> None:
    """Read a reply channel as Redis has it: one terminal event, and no fence ever returns."""
    entries = rig.channel(job_id)
    places = [id_key(entry_id) for entry_id, _ in entries]
    assert places == sorted(places)
    payloads = [orjson.loads(fields[b"e"]) for _, fields in entries]
    kinds = [payload["type"] for payload in payloads]
    assert kinds.count("completed") == 1
    assert kinds[-1] == "completed"
    (row,) = rig.rows("SELECT fence FROM results WHERE job_id = %(id)s", id=job_id)
    assert places[-1][0] == row.fence
    last = max(n for n, kind in enumerate(kinds) if kind in ("started", "reset"))
    spoken = "".join(payload["text"] for payload in payloads[last + 1 : -1])
    assert payloads[-1]["result"]["text"].startswith(spoken)


def test_a_frozen_workers_late_answers_become_corrections(rig: Rig, survivor: Service) -> None:
    victim = rig.start_worker("openai", ["general"])
    (old_id,) = rig.worker_ids(victim)
    rig.sandbox.settings(latency_ms=5000, first_token_ms=100, tokens_per_s=12)
    with _resting(rig, survivor):
        ids = rig.submit("general", IN_FLIGHT // 6, stream=True, text="Write.\nTOKENS: 60")
        ids += rig.submit("general", IN_FLIGHT // 6)
        held = _calling(rig, victim, ids)
        streams = [job_id for job_id in held if job_id in ids[: IN_FLIGHT // 6]]
        eventually(lambda: all(len(rig.channel(job_id)) > 1 for job_id in streams))
        victim.signal(signal.SIGSTOP)
    eventually(lambda: rig.worker_ids(victim) != [old_id], 60)
    rig.sandbox.settings(latency_ms=50, first_token_ms=20, tokens_per_s=1000)
    rig.await_over(ids)
    for job_id in held:
        assert _states(rig, job_id) == ["unknown", "succeeded"]
    channels = {job_id: rig.channel(job_id) for job_id in streams}
    # The provider has finished what the frozen worker asked for; nobody has read it.
    eventually(lambda: rig.sandbox.bill()["in_flight"] == 0)
    victim.signal(signal.SIGCONT)

    def corrected() -> bool:
        states = {tuple(_states(rig, job_id)) for job_id in held}
        assert states == {("corrected", "succeeded")}, states
        return True

    eventually(corrected)
    assert rig.states(ids) == {"succeeded": len(ids)}
    rig.check_books(ids)
    for job_id in streams:
        assert rig.channel(job_id) == channels[job_id]
        _check_channel(rig, job_id)
    billed = sum(call["billed_nano_usd"] for calls in rig.calls(ids).values() for call in calls)
    assert rig.booked_nano_usd(ids) == billed
    # It goes on, under another name.
    eventually(lambda: rig.worker_ids(victim) not in ([], [old_id]))
    with _resting(rig, survivor):
        more = rig.submit("general", 5)
        rig.await_over(more)
    rig.check_once(more)
    victim.signal(signal.SIGTERM)
    assert victim.wait(30) == 0


def test_a_stopped_worker_finishes_what_fits(rig: Rig, survivor: Service) -> None:
    victim = rig.start_worker("openai", ["general"])
    rig.sandbox.settings(latency_ms=3000)
    with _resting(rig, survivor):
        ids = rig.submit("general", IN_FLIGHT)
        held = _calling(rig, victim, ids)
        # Some of these have been delivered and wait for slots.
        ids += rig.submit("general", IN_FLIGHT)
        victim.signal(signal.SIGTERM)
        rig.sandbox.settings(latency_ms=50)
        assert victim.wait(rig.settings.grace_s + 5) == 0
    assert rig.worker_ids(victim) == []
    assert {tuple(_states(rig, job_id)) for job_id in held} == {("succeeded",)}
    rig.await_over(ids)
    rig.check_once(ids)


def test_a_stopped_worker_does_not_wait_for_what_does_not_fit(rig: Rig, survivor: Service) -> None:
    victim = rig.start_worker("openai", ["general"], grace_s=1.5)
    rig.sandbox.settings(latency_ms=60_000)
    with _resting(rig, survivor):
        ids = rig.submit("general", IN_FLIGHT // 3)
        held = _calling(rig, victim, ids)
        rig.sandbox.settings(latency_ms=50)
        victim.signal(signal.SIGTERM)
        started = time.monotonic()
        assert victim.wait(30) == 0
        assert time.monotonic() - started < 15
    rig.await_over(ids)
    assert rig.states(ids) == {"succeeded": len(ids)}
    for job_id in ids:
        expected = ["unknown", "succeeded"] if job_id in held else ["succeeded"]
        assert _states(rig, job_id) == expected
    rig.check_books(ids)
