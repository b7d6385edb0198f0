"""Retry: what to do after an attempt that ended without an answer."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sluicegate.shared.errors import ErrorClass
from sluicegate.workers.retry import Decision, GiveUp, Park, Retry, RetryPolicy

POLICY = RetryPolicy(base_s=1, max_s=300, park_above_s=30)


def _decide(
    error_class: ErrorClass = ErrorClass.SERVER,
    *,
    attempts_used: int = 1,
    max_attempts: int = 4,
    retry_after_s: float | None = None,
    left_s: float = 86_400,
) -> Decision:
    return POLICY.decide(
        error_class,
        attempts_used=attempts_used,
        max_attempts=max_attempts,
        retry_after_s=retry_after_s,
        left_s=left_s,
    )


@pytest.mark.parametrize("error_class", [one for one in ErrorClass if not one.transient])
def test_what_cannot_pass_is_not_tried_again(error_class: ErrorClass) -> None:
    assert _decide(error_class) == GiveUp("it is not tried again by itself")


@pytest.mark.parametrize("error_class", [one for one in ErrorClass if one.transient])
def test_what_may_pass_is_tried_again(error_class: ErrorClass) -> None:
    match _decide(error_class):
        case Retry(after_s):
            assert 0 <= after_s <= 2
        case other:
            raise AssertionError(other)


def test_the_attempt_budget_ends_it() -> None:
    assert _decide(attempts_used=4) == GiveUp("all 4 attempts are used")
    assert isinstance(_decide(attempts_used=3), Retry)


def test_the_provider_is_waited_for_as_long_as_it_says() -> None:
    assert _decide(ErrorClass.RATE_LIMITED, retry_after_s=20) == Retry(20)
    assert _decide(ErrorClass.RATE_LIMITED, retry_after_s=31) == Park(31)
    # Also for longer than our own longest wait.
    assert _decide(ErrorClass.RATE_LIMITED, retry_after_s=3000) == Park(3000)


def test_a_wait_past_the_deadline_is_not_begun() -> None:
    match _decide(retry_after_s=60, left_s=50):
        case GiveUp(why):
            assert "60 s from now, past its deadline" in why
        case other:
            raise AssertionError(other)


@given(
    attempts_used=st.integers(1, 20),
    retry_after_s=st.none() | st.floats(0, 10_000),
    left_s=st.floats(0.001, 100_000),
)
def test_every_wait_is_within_its_bounds(
    attempts_used: int, retry_after_s: float | None, left_s: float
) -> None:
    asked_s = retry_after_s or 0
    match _decide(
        attempts_used=attempts_used, max_attempts=21, retry_after_s=retry_after_s, left_s=left_s
    ):
        case Retry(after_s):
            assert asked_s <= after_s <= 30
            assert after_s < left_s
        case Park(after_s):
            assert max(asked_s, 30) <= after_s <= max(asked_s, 300)
            assert after_s < left_s
        case GiveUp():
            assert left_s <= max(asked_s, 300)


def test_waits_grow_and_are_spread_out() -> None:
    waits = [decision.after_s for _ in range(200) if isinstance(decision := _decide(), Retry)]
    later = [_decide(attempts_used=6, max_attempts=9) for _ in range(200)]
    longest = max(one.after_s for one in later if isinstance(one, Retry | Park))
    assert len(set(waits)) > 1
    assert longest > 2 >= max(waits)
