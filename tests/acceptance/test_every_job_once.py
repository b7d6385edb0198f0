"""Jobs through real workers: each ends once, with one call and the cost of exactly that call."""

from __future__ import annotations

from uuid import UUID

import pytest

from sluicegate.producers.handles import JobHandle
from sluicegate.shared.errors import JobExpired, JobFailed
from sluicegate.shared.events import Event
from sluicegate.shared.jobs import Lane
from tests.harness import FULL, Rig
from tests.polling import eventually

JOBS = 5000 if FULL else 300
CHUNK = 50


@pytest.fixture(scope="module", autouse=True)
def _workers(module_rig: Rig) -> None:
    module_rig.settings = module_rig.settings.model_copy(update={"chunk_size": CHUNK})
    workers = [
        module_rig.begin_worker("openai", ["general", "voice"]),
        module_rig.begin_worker("anthropic", ["draft", "summary"]),
        module_rig.begin_worker("anthropic", ["draft", "summary"], Lane.BULK),
    ]
    module_rig.start_sweep()
    for worker in workers:
        module_rig.await_worker(worker)


@pytest.mark.timeout(900 if FULL else 120)
def test_every_job_succeeds_once_and_costs_what_was_billed(rig: Rig) -> None:
    fifth = JOBS // 5
    ids = rig.submit("general", fifth)
    ids += rig.submit("draft", fifth, stream=True, text="Write a follow-up.\nTOKENS: 30")
    ids += rig.submit("voice", fifth, stream=True, text="CACHED: 5\nSay hello, and more.")
    ids += rig.submit("summary", 2 * fifth, lane="bulk", text="Summarise.\nREASONING: 7")
    rig.await_over(ids, 600 if FULL else 60)
    rig.check_once(ids)
    bill = rig.sandbox.bill()
    assert (bill["calls"], bill["billed_nano_usd"]) == (JOBS, rig.booked_nano_usd(ids))


def test_deliveries_in_any_number_make_one_call(rig: Rig) -> None:
    rig.sandbox.settings(latency_ms=300)
    ids = rig.submit("general", 5)
    for job_id in ids:
        rig.publish("general.openai", [job_id], times=5)
    rig.publish("general.openai", ids, times=2)
    rig.await_over(ids)
    for job_id in ids:
        rig.publish("general.openai", [job_id], times=2)
    # Once these are done, what was published before them has been delivered.
    ids += rig.submit("general", 5)
    rig.await_over(ids)
    eventually(lambda: rig.waiting("general", "openai") == 0)
    rig.check_once(ids)


def test_an_answer_that_cannot_be_stored_as_it_is_disturbs_no_other(rig: Rig) -> None:
    text = "Dear \x00 Ada \ud800!"
    rig.sandbox.settings(latency_ms=200)
    rig.sandbox.add_fault("answer_text", prompt_contains="No. 17", text=text)
    ids = rig.submit("summary", 16, lane="bulk")
    ids += rig.submit("summary", 1, lane="bulk", text="No. 17")
    ids += rig.submit("summary", CHUNK - 17, lane="bulk")
    rig.await_over(ids)
    rig.check_once(ids)
    answer = rig.client.handle(ids[16]).result(timeout=10)
    assert answer.text == "Dear \ufffd Ada \ufffd!"


def _events(rig: Rig, job_id: UUID, last_id: str = "0") -> list[Event]:
    return list(JobHandle(rig.client, job_id).events(last_id, timeout=30))


def test_a_reader_may_come_late_and_come_back(rig: Rig) -> None:
    rig.sandbox.settings(first_token_ms=50, tokens_per_s=100)
    (job_id,) = rig.submit("draft", 1, stream=True, text="Write.\nTOKENS: 40")
    live = _events(rig, job_id)
    assert [event.type for event in live[:2]] == ["started", "delta"]
    assert len(live) > 5
    assert live[-1].type == "completed"
    spoken = "".join(event.payload.text for event in live if event.payload.type == "delta")
    assert live[-1].payload.type == "completed"
    assert live[-1].payload.result.text.startswith(spoken)
    assert _events(rig, job_id) == live
    for place in (0, 3, len(live) - 2):
        assert _events(rig, job_id, live[place].id) == live[place + 1 :]
    # The stream expires; the ending is made from the row.
    rig.redis.pexpire(f"{rig.settings.redis_prefix}reply:{job_id}", 1)
    eventually(lambda: not rig.channel(job_id))
    eventually(lambda: _events(rig, job_id) == live[-1:], timeout_s=5)
    assert _events(rig, job_id, live[3].id) == live[-1:]
    assert _events(rig, job_id, live[-1].id) == []


def _history(rig: Rig, job_id: UUID) -> list[tuple[str, str | None]]:
    return [(a.state, a.error_class) for a in rig.attempts([job_id])[job_id]]


@pytest.mark.parametrize(
    ("fault", "error_class", "stream"),
    [
        ("http_500", "server", False),
        ("http_529", "overloaded", True),
        ("reset_before_headers", "connect", False),
        ("truncated_stream", "truncated", True),
        ("cut_stream", "stream_broken", True),
        ("garbage_body", "garbage", False),
    ],
)
def test_what_may_pass_is_tried_again(rig: Rig, fault: str, error_class: str, stream: bool) -> None:
    rig.sandbox.add_fault(fault, prompt_contains="unlucky", times=1)
    ids = rig.submit("draft", 1, text="unlucky", stream=stream)
    ids += rig.submit("summary", 1, lane="bulk", text="fine")
    rig.await_over(ids)
    assert _history(rig, ids[0]) == [("failed", error_class), ("succeeded", None)]
    rig.check_books(ids)


def test_one_of_a_chunk_is_tried_again_by_itself(rig: Rig) -> None:
    rig.sandbox.add_fault("http_503", prompt_contains="unlucky", times=2)
    lucky = rig.submit("summary", 9, lane="bulk")
    (unlucky,) = rig.submit("summary", 1, lane="bulk", text="unlucky")
    rig.await_over([*lucky, unlucky])
    rig.check_once(lucky)
    assert [state for state, _ in _history(rig, unlucky)] == ["failed", "failed", "succeeded"]
    rig.check_books([unlucky])


def test_a_rate_limit_is_waited_for_as_long_as_it_says(rig: Rig) -> None:
    rig.sandbox.add_fault("http_429", prompt_contains="hasty", times=1, retry_after_s=1.5)
    (job_id,) = ids = rig.submit("general", 1, text="hasty")
    rig.await_over(ids)
    assert _history(rig, job_id) == [("failed", "rate_limited"), ("succeeded", None)]
    first, second = rig.calls(ids)[job_id]
    assert second["started_at"] - first["started_at"] >= 1.5
    rig.check_books(ids)


@pytest.mark.parametrize(
    ("fault", "error_class"),
    [
        ("http_400", "bad_request"),
        ("http_401", "auth"),
        ("http_404", "not_found"),
        ("quota_429", "quota"),
        ("context_too_long", "context_too_long"),
    ],
)
def test_what_cannot_pass_ends_the_job_with_a_reason(
    rig: Rig, fault: str, error_class: str
) -> None:
    rig.sandbox.add_fault(fault, prompt_contains="hopeless")
    (job_id,) = ids = rig.submit("draft", 1, text="hopeless")
    with pytest.raises(JobFailed) as failed:
        rig.client.handle(job_id).result(timeout=30)
    assert len(str(failed.value)) > 20
    assert _history(rig, job_id) == [("failed", error_class)]
    assert len(rig.calls(ids)[job_id]) == 1
    view = rig.client.get(job_id)
    assert (view.state, view.cost_nano_usd, view.attempts) == ("failed", 0, 1)
    rig.check_books(ids)


def test_all_attempts_fail(rig: Rig) -> None:
    rig.sandbox.add_fault("http_500", prompt_contains="doomed")
    (job_id,) = ids = rig.submit("draft", 1, text="doomed", max_attempts=2)
    with pytest.raises(JobFailed, match="all 2 attempts are used"):
        rig.client.handle(job_id).result(timeout=30)
    assert len(rig.calls(ids)[job_id]) == 2
    rig.check_books(ids)


def test_a_deadline_passes_during_a_call_between_calls_and_before_one(rig: Rig) -> None:
    rig.sandbox.add_fault("hang", prompt_contains="hangs")
    rig.sandbox.add_fault("http_429", prompt_contains="waits", retry_after_s=600)
    hanging = rig.submit("draft", 1, text="hangs", deadline=1.5)
    # Nobody serves `complex` here.
    unserved = rig.submit("complex", 1, deadline=1.0)
    waiting = rig.submit("draft", 1, text="waits", deadline=3.0)
    for (job_id,) in (hanging, unserved, waiting):
        with pytest.raises(JobExpired, match="deadline"):
            rig.client.handle(job_id).result(timeout=30)
    with pytest.raises(JobExpired, match="it asked for a rest"):
        rig.client.handle(waiting[0]).result(timeout=30)
    assert rig.calls(unserved) == {}
    ((state, _),) = _history(rig, hanging[0])
    assert state == "failed"
    rig.check_books([*hanging, *unserved, *waiting])
