"""Cancelling jobs whose calls are under way, with real workers: that call ends, and no other."""

from __future__ import annotations

import time
from uuid import UUID

import pytest

from sluicegate import State
from sluicegate.shared.errors import JobCancelled
from sluicegate.shared.events import TERMINAL_N, id_key
from sluicegate.shared.jobs import Lane
from tests.harness import Rig, Service
from tests.polling import eventually

CHUNK = 10


@pytest.fixture(scope="module")
def workers(module_rig: Rig) -> list[Service]:
    module_rig.settings = module_rig.settings.model_copy(
        update={
            # Nobody dies here, and beats are rare: what ends soon ends by the message.
            "beat_interval_s": 100.0,
            "beat_valid_s": 200.0,
            "dead_after_s": 300.0,
            "chunk_size": CHUNK,
            "first_token_deadline_s": 120.0,
            "idle_deadline_s": 120.0,
        }
    )
    started = [
        module_rig.begin_worker("openai", ["general"]),
        module_rig.begin_worker("anthropic", ["summary"], Lane.BULK),
        module_rig.begin_worker("anthropic", ["draft"], beat_interval_s=0.3),
    ]
    module_rig.start_sweep()
    return [module_rig.await_worker(worker) for worker in started]


@pytest.fixture(autouse=True)
def _hang(rig: Rig, workers: list[Service]) -> None:
    assert all(worker.ended() is None for worker in workers)
    rig.sandbox.add_fault("hang", prompt_contains="hangs")


def _calling(rig: Rig, job_ids: list[UUID]) -> None:
    """Wait until the calls of these jobs have reached the provider."""

    def under_way() -> bool:
        assert sorted(rig.calls(job_ids)) == sorted(job_ids)
        return True

    eventually(under_way)


def _check_cut_off(rig: Rig, job_id: UUID) -> None:
    """It ended as cancelled after one call, at the price of its reservation, and says so."""
    with pytest.raises(JobCancelled, match="the job was cancelled"):
        rig.client.handle(job_id).result(timeout=30)
    (attempt,) = rig.attempts([job_id])[job_id]
    assert (attempt.state, attempt.entries, attempt.kind) == ("cancelled", 1, "estimate")
    assert attempt.booked == attempt.reserved_nano_usd > 0
    view = rig.client.get(job_id)
    assert (view.state, view.attempts) == (State.CANCELLED, 1)
    assert view.cost_nano_usd == attempt.booked
    assert view.cancel_requested_at is not None

    def is_told() -> bool:
        return any(id_key(event_id)[1] == TERMINAL_N for event_id, _ in rig.channel(job_id)[-1:])

    eventually(is_told)
    rig.check_books([job_id])


def test_a_running_job_is_cancelled_at_once(rig: Rig, workers: list[Service]) -> None:
    (job_id,) = rig.submit("general", 1, text="hangs", stream=True)
    _calling(rig, [job_id])
    assert rig.client.cancel(job_id) is State.RUNNING
    _check_cut_off(rig, job_id)
    assert rig.client.cancel(job_id) is State.CANCELLED
    # Celery saw a message that was done: nothing was revoked, and nothing comes back.
    assert "revoked" not in workers[0].log
    assert rig.waiting("general", "openai") == 0
    after = rig.submit("general", 3)
    rig.await_over(after)
    rig.check_once(after)
    assert len(rig.calls([job_id])[job_id]) == 1


def test_one_job_of_a_chunk_is_cancelled_and_the_others_succeed(rig: Rig) -> None:
    rig.sandbox.settings(latency_ms=1500)
    ids = rig.submit("summary", CHUNK - 1, lane="bulk")
    (job_id,) = rig.submit("summary", 1, lane="bulk", text="hangs")
    _calling(rig, [*ids, job_id])
    rig.client.cancel(job_id)
    _check_cut_off(rig, job_id)
    rig.await_over(ids)
    rig.check_once(ids)
    # The chunk's message is done.
    more = rig.submit("summary", 1, lane="bulk")
    rig.await_over(more)
    assert len(rig.calls([job_id])[job_id]) == 1


def test_a_wish_whose_message_was_lost_is_found_by_the_next_beat(rig: Rig) -> None:
    (job_id,) = rig.submit("draft", 1, text="hangs")
    _calling(rig, [job_id])
    rig.rows(
        "UPDATE jobs SET cancel_requested_at = now() WHERE id = %(id)s RETURNING id", id=job_id
    )
    _check_cut_off(rig, job_id)


def test_a_claimed_job_with_a_wish_is_never_called_for(rig: Rig, workers: list[Service]) -> None:
    rig.tell(workers[0], "cancel_consumer", queue="general.openai")
    ids = rig.submit("general", 2)
    # As a job whose worker died, or that was released, comes back.
    rig.rows(
        "UPDATE jobs SET cancel_requested_at = now() WHERE id = %(id)s RETURNING id", id=ids[1]
    )
    rig.tell(workers[0], "add_consumer", queue="general.openai")
    with pytest.raises(JobCancelled):
        rig.client.handle(ids[1]).result(timeout=30)
    rig.await_over(ids)
    rig.check_once(ids[:1])
    assert rig.attempts(ids[1:]) == {}
    assert rig.calls(ids[1:]) == {}
    assert rig.client.get(ids[1]).cost_nano_usd == 0
    rig.check_books(ids)


def test_a_cancelled_job_is_retried_and_read_anew(rig: Rig) -> None:
    (job_id,) = rig.submit("general", 1, text="hangs", stream=True)
    _calling(rig, [job_id])
    rig.client.cancel(job_id)
    _check_cut_off(rig, job_id)
    rig.sandbox.reset()
    handle = rig.client.retry(job_id)
    events = list(handle.events(timeout=30))
    assert [event.type for event in events if event.type != "delta"] == ["started", "completed"]
    assert handle.result(timeout=30).attempts == 1
    assert [attempt.state for attempt in rig.attempts([job_id])[job_id]] == [
        "cancelled",
        "succeeded",
    ]


def test_many_cancels_while_jobs_run_end_each_job_once(rig: Rig) -> None:
    rig.sandbox.settings(latency_ms=100)
    ids = rig.submit("general", 120)
    said = {}
    for n, job_id in enumerate(ids):
        if n % 3:
            said[job_id] = rig.client.cancel(job_id)
            time.sleep(0.002)  # so that they meet jobs in every state
    rig.await_over(ids)
    states = rig.states(ids)
    assert states.keys() <= {"succeeded", "cancelled"}
    for job_id, state in said.items():
        if state is not State.RUNNING:
            assert rig.client.get(job_id).state is state
    rig.check_books(ids)
