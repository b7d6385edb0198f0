"""Workers that are killed, frozen and stopped while another one goes on."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from typing import Any
from uuid import UUID

import orjson
import pytest

from sluicegate.shared.events import id_key
from sluicegate.workers.local.sandbox_control import SandboxControl
from tests.harness import FULL, Rig, Service, open_rig
from tests.polling import eventually

IN_FLIGHT = 200 if FULL else 60
#: What production uses, so that the time to resume is production's.
DURATIONS: dict[str, Any] = (
    {"beat_interval_s": 2.0, "beat_valid_s": 10.0, "dead_after_s": 15.0} if FULL else {}
)
QUEUE = "general.openai"

pytestmark = pytest.mark.timeout(300 if FULL else 120)


@pytest.fixture(scope="module")
def module_rig(
    postgres: Any,
    valkey: str,
    _sandbox_process: SandboxControl,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Rig]:
    with (
        postgres.database(template=postgres.template) as url,
        open_rig(
            database_url=url,
            redis_url=valkey,
            sandbox=_sandbox_process,
            folder=tmp_path_factory.mktemp("rig"),
            jobs_in_flight=IN_FLIGHT,
            # A frozen worker's calls outlive the freeze.
            first_token_deadline_s=120.0,
            idle_deadline_s=120.0,
            **DURATIONS,
        ) as rig,
    ):
        yield rig


@pytest.fixture(scope="module")
def survivor(module_rig: Rig) -> Service:
    module_rig.start_sweep()
    return module_rig.start_worker("openai", ["general"])


@pytest.fixture
def rig(module_rig: Rig, sandbox: SandboxControl, survivor: Service) -> Rig:
    assert module_rig.sandbox is sandbox
    assert survivor.ended() is None, survivor.log
    return module_rig


def _calling(rig: Rig, worker: Service, count: int) -> list[UUID]:
    """Wait until a worker has this many calls under way; return their jobs."""

    def found() -> list[UUID]:
        jobs = rig.in_flight(worker)
        assert len(jobs) >= count, len(jobs)
        assert len(rig.calls(jobs)) == len(jobs)
        return jobs

    return eventually(found)


def _states(rig: Rig, job_id: UUID) -> list[str]:
    return [attempt.state for attempt in rig.attempts([job_id])[job_id]]


def test_a_killed_workers_jobs_are_finished_by_another(
    rig: Rig, record_property: Any
) -> None:
    victim = rig.start_worker("openai", ["general"])
    rig.sandbox.settings(latency_ms=6000)
    ids = rig.submit("general", 3 * IN_FLIGHT)
    held = _calling(rig, victim, IN_FLIGHT)
    victim.kill()
    killed_at = time.monotonic()
    rig.sandbox.settings(latency_ms=50)

    def resumed() -> bool:
        return any(len(attempts) > 1 for attempts in rig.attempts(held).values())

    eventually(resumed, timeout_s=20)
    record_property("resumed_after_s", round(time.monotonic() - killed_at, 1))
    rig.await_over(ids)
    assert rig.states(ids) == {"succeeded": len(ids)}
    assert sorted(held) == sorted(
        job_id for job_id, calls in rig.calls(ids).items() if len(calls) == 2
    )
    for job_id in held:
        assert _states(rig, job_id) == ["unknown", "succeeded"]
    others = sorted(set(ids) - set(held))
    assert {tuple(_states(rig, job_id)) for job_id in others} == {("succeeded",)}
    rig.check_books(ids)


def _check_channel(rig: Rig, job_id: UUID) -> None:
    """Read a reply channel as Redis has it: one terminal event, and never a fence's return."""
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


def test_a_frozen_workers_late_answers_become_corrections(rig: Rig) -> None:
    victim = rig.start_worker("openai", ["general"])
    (old_id,) = rig.worker_ids(victim)
    rig.sandbox.settings(latency_ms=2500, first_token_ms=100, tokens_per_s=25)
    ids = rig.submit("general", IN_FLIGHT // 3, stream=True, text="Write.\nTOKENS: 60")
    ids += rig.submit("general", IN_FLIGHT // 3)
    held = _calling(rig, victim, IN_FLIGHT // 6)
    streams = [job_id for job_id in held if job_id in ids[: IN_FLIGHT // 3]]
    eventually(lambda: all(len(rig.channel(job_id)) > 1 for job_id in streams))
    victim.signal(signal.SIGSTOP)
    eventually(lambda: rig.worker_ids(victim) != [old_id], 60)
    rig.sandbox.settings(latency_ms=50, first_token_ms=20, tokens_per_s=1000)
    rig.await_over(ids)
    lost = [job_id for job_id in held if "unknown" in _states(rig, job_id)]
    assert set(streams) & set(lost)
    before = {job_id: rig.channel(job_id) for job_id in streams}
    victim.signal(signal.SIGCONT)

    def corrected() -> bool:
        states = {tuple(_states(rig, job_id)) for job_id in lost}
        assert states == {("corrected", "succeeded")}, states
        return True

    eventually(corrected)
    assert rig.states(ids) == {"succeeded": len(ids)}
    rig.check_books(ids)
    for job_id in streams:
        assert rig.channel(job_id) == before[job_id]
        _check_channel(rig, job_id)
    billed = sum(call["billed_nano_usd"] for calls in rig.calls(ids).values() for call in calls)
    assert rig.booked_nano_usd(ids) == billed
    # It goes on under a new name.
    eventually(lambda: rig.worker_ids(victim) not in ([], [old_id]))
    assert victim.ended() is None
    victim.signal(signal.SIGTERM)
    assert victim.wait(30) == 0


def test_a_stopped_worker_finishes_what_fits(rig: Rig) -> None:
    victim = rig.start_worker("openai", ["general"])
    rig.sandbox.settings(latency_ms=2000)
    ids = rig.submit("general", 3 * IN_FLIGHT)
    held = _calling(rig, victim, IN_FLIGHT // 2)
    rig.sandbox.settings(latency_ms=50)
    victim.signal(signal.SIGTERM)
    assert victim.wait(rig.settings.grace_s + 5) == 0
    assert rig.worker_ids(victim) == []
    assert not [job_id for job_id in held if _states(rig, job_id) != ["succeeded"]]
    rig.await_over(ids)
    rig.check_once(ids)


def test_a_stopped_worker_does_not_wait_for_what_does_not_fit(
    rig: Rig, survivor: Service
) -> None:
    victim = rig.start_worker("openai", ["general"], grace_s=1.5)
    rig.tell(survivor, "cancel_consumer", queue=QUEUE)
    rig.sandbox.settings(latency_ms=600_000)
    ids = rig.submit("general", IN_FLIGHT // 3)
    held = _calling(rig, victim, IN_FLIGHT // 6)
    rig.sandbox.settings(latency_ms=50)
    victim.signal(signal.SIGTERM)
    started = time.monotonic()
    assert victim.wait(30) == 0
    assert time.monotonic() - started < 15
    rig.tell(survivor, "add_consumer", queue=QUEUE)
    rig.await_over(ids)
    assert rig.states(ids) == {"succeeded": len(ids)}
    for job_id in ids:
        expected = ["unknown", "succeeded"] if job_id in held else ["succeeded"]
        assert _states(rig, job_id) == expected
    # No bill for the calls that were cut off: the provider still works on them.
    rig.check_books(ids)


def test_a_worker_that_dies_anywhere_on_the_path_loses_nothing(rig: Rig) -> None:
    places = ("claimed", "dispatched", "answered", "settled")
    victims = {
        place: rig.begin_worker(
            "openai", ["general"], variables={"SLUICE_FAILPOINTS": f"{place}=kill"}
        )
        for place in places
    }
    for victim in victims.values():
        rig.await_worker(victim)
    rig.sandbox.settings(latency_ms=300)
    ids = rig.submit("general", IN_FLIGHT)
    for place, victim in victims.items():
        assert victim.wait(30) == -signal.SIGKILL, place
    rig.await_over(ids)
    assert rig.states(ids) == {"succeeded": len(ids)}
    for job_id in ids:
        states = _states(rig, job_id)
        assert states.count("unknown") <= 1
        assert states[-1] == "succeeded"
    rig.check_books(ids)
