"""What a provider refuses for good, a prompt or an account; and jobs that nobody takes just now."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import create_engine
from sqlalchemy.pool import NullPool

from sluicegate import JobExpired, JobFailed
from sluicegate.shared.admission.states import lift_suspension
from sluicegate.shared.gate_changes import pull_lever, set_pause
from sluicegate.shared.jobs import JobError, Lane
from sluicegate.shared.provider_changes import find_provider
from tests.candidates import Candidate, Wanted, add_candidates, other
from tests.harness import Rig
from tests.polling import eventually

POOLS = ("openai", "anthropic")
BOTH = pytest.mark.parametrize("pool", POOLS)
WAIT_S = 60
#: What refuses an account, and what the attempt is then booked as.
LOCKED_OUT = {"http_401": "auth", "http_402": "quota", "http_403": "auth", "quota_429": "quota"}
#: What the first candidate has, and what the second one then says, so that the first is waited for.
LATER = {
    "http_401": ("http_429", "rate_limited", "auth"),
    "http_404": ("http_503", "overloaded", "not_found"),
    "context_too_long": ("http_429", "rate_limited", "context_too_long"),
}
#: Long enough for a job to be parked: a worker itself waits for a second.
REST_S = 1.5


def _scenes(pool: str) -> dict[str, Sequence[Wanted | str]]:
    """Return the candidates of each account, in order, where `pool` has the first of them."""
    small, large = 100_000, 1_000_000
    same_model = f"sandbox-longer-{pool}-1"
    return {
        "longer": (
            Wanted(pool=pool, context_tokens=small),
            Wanted(pool=other(pool), context_tokens=small),
            Wanted(pool=pool, context_tokens=large, model=same_model),
            Wanted(pool=other(pool), context_tokens=large),
        ),
        "longest": (
            Wanted(pool=pool, context_tokens=large),
            Wanted(pool=pool, context_tokens=large),
            Wanted(pool=other(pool), context_tokens=small),
        ),
        "longer-later": (
            Wanted(pool=pool, context_tokens=small),
            Wanted(pool=other(pool), context_tokens=large),
        ),
        "filtered": (pool, other(pool)),
        "filtered-later": (pool,),
        **{
            f"later-{fault}": (
                Wanted(pool=pool, context_tokens=large),
                Wanted(pool=other(pool), context_tokens=small),
            )
            for fault in LATER
        },
        "closed": (pool, other(pool), pool, other(pool)),
        "throttled": (pool,),
        "recovering": (pool,),
        "patient": (pool,),
    }


Scenes = dict[str, list[Candidate]]


@pytest.fixture(scope="module", autouse=True)
def scenes(module_rig: Rig) -> Scenes:
    """Start the fleet; return the candidates by account, or by the use case that all share."""
    rig = module_rig
    rig.settings = rig.settings.model_copy(update={"breaker_open_s": 2.0})
    accounts: dict[str, Sequence[Wanted | str]] = {}
    shared: dict[str, Sequence[Wanted | str]] = {}
    for pool in POOLS:
        accounts |= {f"{name}-{pool}": wanted for name, wanted in _scenes(pool).items()}
        shared |= {f"{fault}-{pool}": (pool, other(pool)) for fault in LOCKED_OUT}
    accounts |= {f"{name}-{who}": () for name in shared for who in ("ada", "bob", "eve")}
    found = add_candidates(rig, accounts=accounts, use_cases=shared)
    for pool in POOLS:
        _close(rig, found[f"closed-{pool}"])
    workers = [rig.begin_worker(pool, ["general", *shared]) for pool in POOLS]
    workers.append(rig.begin_worker(POOLS[0], ["general"], Lane.BULK))
    rig.start_sweep()
    for worker in workers:
        rig.await_worker(worker)
    return found


def _close(rig: Rig, candidates: list[Candidate]) -> None:
    """Have the first one's breaker forced open, and the second one paused."""
    engine = create_engine(rig.settings.database_dsn, poolclass=NullPool)
    forced, paused = candidates[:2]
    with engine.begin() as connection:
        row = find_provider(connection, forced.name, forced.name.removesuffix("-1"))
        pull_lever(connection, row, "forced_open")
        set_pause(connection, "provider", paused.id, paused=True)


def _submit_each(rig: Rig, accounts: Sequence[str], **options: Any) -> dict[str, UUID]:
    return {
        account: rig.submit("general", 1, account=account, **options)[0] for account in accounts
    }


def _history(rig: Rig, job_id: UUID) -> list[tuple[str, str | None]]:
    """Return the models that were called for this job, in order, and how each call ended."""
    attempts = sorted(rig.attempts([job_id])[job_id], key=lambda attempt: attempt.id)
    assert [call["model"] for call in rig.calls([job_id])[job_id]] == [a.model for a in attempts]
    return [(attempt.model, attempt.error_class) for attempt in attempts]


def _error(rig: Rig, job_id: UUID) -> JobError:
    with pytest.raises(JobFailed):
        rig.client.handle(job_id).result(WAIT_S)
    result = rig.client.get(job_id).result
    assert result is not None
    assert result.error is not None
    return result.error


def _await_parked(rig: Rig, job_id: UUID, *reasons: str) -> None:
    """Wait until the job is held back, for these reasons."""

    def held_back() -> bool:
        view = rig.client.get(job_id)
        if view.state.terminal:
            pytest.fail(f"it did not wait: {view.result}")
        assert view.state == "parked", view
        for reason in reasons:
            assert view.held_back is not None
            assert reason in view.held_back
        return True

    eventually(held_back, WAIT_S)


# An account that is refused


@BOTH
@pytest.mark.parametrize("fault", LOCKED_OUT)
def test_a_refused_account_is_suspended_there_and_no_other(
    rig: Rig, scenes: Scenes, fault: str, pool: str
) -> None:
    use_case, error_class = f"{fault}-{pool}", LOCKED_OUT[fault]
    first, second = scenes[use_case]
    ada, bob, eve = (f"{use_case}-{which}" for which in ("ada", "bob", "eve"))
    rig.sandbox.add_fault(fault, model=first.model, prompt_contains="refused", times=2)

    (refused,) = rig.submit(use_case, 1, text="refused", account=ada)
    assert rig.client.handle(refused).result(WAIT_S).provider == second.name
    assert _history(rig, refused) == [(first.model, error_class), (second.model, None)]
    # The fault strikes once more; whoever calls there would meet it.
    (again,) = rig.submit(use_case, 1, text="refused", account=ada)
    assert rig.client.handle(again).result(WAIT_S).provider == second.name
    assert _history(rig, again) == [(second.model, None)]
    (others,) = rig.submit(use_case, 1, account=bob)
    assert rig.client.handle(others).result(WAIT_S).provider == first.name
    assert _history(rig, others) == [(first.model, None)]

    # With nobody else to ask it fails at once, and says why: who is called, and who is not.
    (alone,) = rig.submit(use_case, 1, text="refused", account=eve, model=first.model)
    error = _error(rig, alone)
    assert (error.error_class, error.provider) == (error_class, first.name)
    assert _history(rig, alone) == [(first.model, error_class)]
    (not_called,) = rig.submit(use_case, 1, account=eve, model=first.model)
    error = _error(rig, not_called)
    assert first.name in error.message
    assert "suspended" in error.message
    assert rig.calls([not_called]) == {}
    rig.check_books([refused, again, others, alone, not_called])

    def alerted() -> bool:
        alerts = rig.rows(
            "SELECT c.name, a.message FROM alerts a JOIN accounts c ON c.id = a.account_id"
            " WHERE a.provider_id = %(id)s AND a.resolved_at IS NULL ORDER BY c.name",
            id=first.id,
        )
        assert [alert.name for alert in alerts] == [ada, eve]
        assert all(first.name in alert.message for alert in alerts)
        return True

    eventually(alerted)


def test_a_bulk_job_waits_until_its_account_is_let_in_again(rig: Rig, scenes: Scenes) -> None:
    account = f"patient-{POOLS[0]}"
    (only,) = scenes[account]
    rule = rig.sandbox.add_fault("http_401", model=only.model)
    (job_id,) = rig.submit("general", 1, account=account, lane="bulk")
    _await_parked(rig, job_id, f"{only.name}: it refused this account's key or quota")
    rig.sandbox.remove_fault(rule)
    assert lift_suspension(rig.redis, rig.settings.redis_prefix, only.id) == 1
    assert rig.client.handle(job_id).result(WAIT_S).provider == only.name
    assert _history(rig, job_id) == [(only.model, "auth"), (only.model, None)]
    rig.check_books([job_id])


@pytest.mark.parametrize("fault", LATER)
def test_who_takes_the_job_later_is_waited_for_when_the_last_one_refuses_it(
    rig: Rig, scenes: Scenes, fault: str
) -> None:
    passing, passing_class, error_class = LATER[fault]
    accounts = [f"later-{fault}-{pool}" for pool in POOLS]
    for first, second in (scenes[account] for account in accounts):
        rig.sandbox.add_fault(passing, model=first.model, times=1, retry_after_s=REST_S)
        rig.sandbox.add_fault(fault, model=second.model)
    for account, job_id in _submit_each(rig, accounts).items():
        first, second = scenes[account]
        assert rig.client.handle(job_id).result(WAIT_S).provider == first.name
        assert _history(rig, job_id) == [
            (first.model, passing_class),
            (second.model, error_class),
            (first.model, None),
        ]
        rig.check_books([job_id])


# A prompt that is refused


@BOTH
def test_a_prompt_too_long_goes_to_a_larger_context_only(
    rig: Rig, scenes: Scenes, pool: str
) -> None:
    first, _as_small, _same_model, large = scenes[f"longer-{pool}"]
    rig.sandbox.add_fault("context_too_long", model=first.model)
    (job_id,) = rig.submit("general", 1, account=f"longer-{pool}")
    assert rig.client.handle(job_id).result(WAIT_S).provider == large.name
    assert _history(rig, job_id) == [(first.model, "context_too_long"), (large.model, None)]
    rig.check_books([job_id])


@BOTH
def test_a_prompt_too_long_for_all_is_refused_in_clear_words(
    rig: Rig, scenes: Scenes, pool: str
) -> None:
    first = scenes[f"longest-{pool}"][0]
    rig.sandbox.add_fault("context_too_long", model=first.model)
    (job_id,) = rig.submit("general", 1, account=f"longest-{pool}")
    error = _error(rig, job_id)
    assert error.error_class == "context_too_long"
    assert "too long" in error.message or "maximum context length" in error.message
    assert _history(rig, job_id) == [(first.model, "context_too_long")]
    rig.check_books([job_id])


def test_a_prompt_too_long_is_remembered_while_it_is_parked(rig: Rig, scenes: Scenes) -> None:
    accounts = [f"longer-later-{pool}" for pool in POOLS]
    for small, large in (scenes[account] for account in accounts):
        rig.sandbox.add_fault("context_too_long", model=small.model)
        rig.sandbox.add_fault("http_429", model=large.model, times=1, retry_after_s=REST_S)
    jobs = _submit_each(rig, accounts)
    for account, job_id in jobs.items():
        small, large = scenes[account]
        _await_parked(rig, job_id, f"{small.name}: ", f"{large.name}: it asked for a rest")
    for account, job_id in jobs.items():
        small, large = scenes[account]
        assert rig.client.handle(job_id).result(WAIT_S).provider == large.name
        assert _history(rig, job_id) == [
            (small.model, "context_too_long"),
            (large.model, "rate_limited"),
            (large.model, None),
        ]
        rig.check_books([job_id])


@BOTH
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("fault", ["content_policy", "content_filter", "refusal"])
def test_a_filter_is_the_providers_last_word(
    rig: Rig, scenes: Scenes, pool: str, fault: str, stream: bool
) -> None:
    first = scenes[f"filtered-{pool}"][0]
    rig.sandbox.add_fault(fault, model=first.model)
    (job_id,) = rig.submit("general", 1, account=f"filtered-{pool}", stream=stream)
    error = _error(rig, job_id)
    assert (error.error_class, error.provider) == ("content_filter", first.name)
    assert _history(rig, job_id) == [(first.model, "content_filter")]
    rig.check_books([job_id])


def test_a_filter_is_met_once_after_a_park_too_and_gives_its_reason(
    rig: Rig, scenes: Scenes
) -> None:
    accounts = [f"filtered-later-{pool}" for pool in POOLS]
    reason = "Rejected as a result of our safety system: it names a person"
    for (only,) in (scenes[account] for account in accounts):
        rig.sandbox.add_fault("http_429", model=only.model, times=1, retry_after_s=REST_S)
        rig.sandbox.add_fault("content_policy", model=only.model, message=f"{reason}.")
    jobs = _submit_each(rig, accounts)
    for account, job_id in jobs.items():
        _await_parked(rig, job_id, f"{scenes[account][0].name}: it asked for a rest")
    for account, job_id in jobs.items():
        (only,) = scenes[account]
        assert reason in _error(rig, job_id).message
        assert _history(rig, job_id) == [
            (only.model, "rate_limited"),
            (only.model, "content_filter"),
        ]
        rig.check_books([job_id])


# Nobody takes it now


def test_a_job_that_nobody_takes_says_why_and_expires_with_that(rig: Rig, scenes: Scenes) -> None:
    accounts = [f"closed-{pool}" for pool in POOLS]
    for _, _, throttled, refused in (scenes[account] for account in accounts):
        rig.sandbox.add_fault("http_429", model=throttled.model, retry_after_s=600)
        rig.sandbox.add_fault("http_401", model=refused.model)
    # One that comes later is told the same, and calls nobody.
    for number in (1, 2):
        jobs = _submit_each(rig, accounts, deadline=4)
        for account, job_id in jobs.items():
            _await_parked(rig, job_id, *(f"{row.name}: " for row in scenes[account]))
        for account, job_id in jobs.items():
            forced, paused, throttled, refused = scenes[account]
            reasons = [
                f"{forced.name}: its breaker is forced open",
                f"{paused.name}: it is paused",
                f"{throttled.name}: it asked for a rest",
                f"{refused.name}: ",
            ]
            with pytest.raises(JobExpired) as expired:
                rig.client.handle(job_id).result(WAIT_S)
            for reason in reasons:
                assert reason in str(expired.value)
            calls = [(throttled.model, "rate_limited"), (refused.model, "auth")]
            assert _history(rig, job_id) == (calls if number == 1 else [])
            rig.check_books([job_id])


def test_a_candidate_that_always_throttles_is_asked_ever_less_often(
    rig: Rig, scenes: Scenes
) -> None:
    accounts = [f"throttled-{pool}" for pool in POOLS]
    for (only,) in (scenes[account] for account in accounts):
        rig.sandbox.add_fault("http_429", model=only.model)
    for account, job_id in _submit_each(rig, accounts, deadline=5).items():
        (only,) = scenes[account]
        with pytest.raises(JobExpired, match=only.name):
            rig.client.handle(job_id).result(WAIT_S)
        assert set(_history(rig, job_id)) == {(only.model, "rate_limited")}
        began = [call["started_at"] for call in rig.calls([job_id])[job_id]]
        assert sum(at <= began[0] + 3 for at in began) <= 4
        assert 2 <= len(began) <= 6
        view = rig.client.get(job_id)
        assert (view.attempts, view.cost_nano_usd) == (0, 0)
        rig.check_books([job_id])


def test_jobs_parked_by_an_open_breaker_go_on_when_the_provider_is_back(
    rig: Rig, scenes: Scenes
) -> None:
    rows = {account: scenes[account][0] for account in (f"recovering-{pool}" for pool in POOLS)}
    down = [rig.sandbox.down(row.model) for row in rows.values()]
    streak = rig.settings.breaker_streak
    failing = [
        job_id
        for account in rows
        for job_id in rig.submit("general", streak, account=account, max_attempts=1)
    ]
    rig.await_over(failing)
    assert rig.states(failing) == {"failed": len(failing)}
    parked = {account: rig.submit("general", 3, account=account) for account in rows}
    for account, job_ids in parked.items():
        for job_id in job_ids:
            _await_parked(rig, job_id, f"{rows[account].name}: its breaker is open")
    jobs = [job_id for job_ids in parked.values() for job_id in job_ids]
    assert rig.calls(jobs) == {}
    for rule in down:
        rig.sandbox.remove_fault(rule)
    rig.await_over(jobs)
    rig.check_once(jobs)
    rig.check_books(failing)
    for row in rows.values():
        eventually(partial(_check_recovered, rig, row))


def _check_recovered(rig: Rig, row: Candidate) -> bool:
    changes = rig.rows(
        "SELECT after FROM gate_changes WHERE provider_id = %(id)s AND kind = 'breaker'"
        " ORDER BY number",
        id=row.id,
    )
    assert [change.after for change in changes] == ["open", "half_open", "closed"]
    return True
