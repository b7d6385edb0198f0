"""Retry: what to do after an attempt that ended without an answer."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sluicegate.shared.errors import ErrorClass
from sluicegate.workers.retry import Decision, Expire, GiveUp, Next, Retry, RetryPolicy

POLICY = RetryPolicy(base_s=1, max_s=300)

NEVER_AGAIN = "it is not tried again by itself"
ELSEWHERE = {ErrorClass.AUTH, ErrorClass.QUOTA, ErrorClass.NOT_FOUND, ErrorClass.CONTEXT_TOO_LONG}
TROUBLED = [
    ErrorClass.OVERLOADED,
    ErrorClass.TIMEOUT,
    ErrorClass.STREAM_BROKEN,
    ErrorClass.TRUNCATED,
    ErrorClass.GARBAGE,
]
BACKED_OFF = [
    one for one in ErrorClass if one.transient and one is not ErrorClass.RATE_LIMITED
]  # where nobody else is left


def _decide(error_class: ErrorClass = ErrorClass.SERVER, **changes: Any) -> Decision:
    values: dict[str, Any] = {
        "tries_here": 1,
        "others": False,
        "attempts_used": 1,
        "max_attempts": 4,
        "retry_after_s": None,
        "left_s": 86_400,
    }
    return POLICY.decide(error_class, **(values | changes))


@pytest.mark.parametrize("error_class", [one for one in ErrorClass if not one.transient])
def test_what_cannot_pass_is_not_tried_again_here(error_class: ErrorClass) -> None:
    assert _decide(error_class) == GiveUp(NEVER_AGAIN)
    elsewhere = Next() if error_class in ELSEWHERE else GiveUp(NEVER_AGAIN)
    assert _decide(error_class, others=True) == elsewhere


@pytest.mark.parametrize("error_class", BACKED_OFF)
def test_what_may_pass_is_tried_again_if_nobody_else_is_left(error_class: ErrorClass) -> None:
    match _decide(error_class):
        case Retry(after_s):
            assert 0 <= after_s <= 1
        case other:
            raise AssertionError(other)


@pytest.mark.parametrize("error_class", TROUBLED)
def test_a_provider_in_trouble_is_left_at_once_for_another(error_class: ErrorClass) -> None:
    assert _decide(error_class, others=True) == Next()


@pytest.mark.parametrize("error_class", [ErrorClass.SERVER, ErrorClass.CONNECT])
def test_a_stumble_gets_one_more_try_at_the_same_provider(error_class: ErrorClass) -> None:
    assert isinstance(_decide(error_class, others=True), Retry)
    assert _decide(error_class, others=True, tries_here=2) == Next()
    # It asks for more time than going to another takes.
    assert _decide(error_class, others=True, retry_after_s=20) == Next()


def test_a_429_is_a_matter_for_the_gates() -> None:
    assert _decide(ErrorClass.RATE_LIMITED) == Next()
    assert _decide(ErrorClass.RATE_LIMITED, attempts_used=4, retry_after_s=3000) == Next()
    # Nobody could ask them: another is asked, or we wait by ourselves, as the provider says.
    assert _decide(ErrorClass.RATE_LIMITED, gated=False, others=True) == Next()
    assert _decide(ErrorClass.RATE_LIMITED, gated=False, retry_after_s=20) == Retry(20)
    match _decide(ErrorClass.RATE_LIMITED, gated=False, tries_here=0):
        case Retry(after_s):
            assert after_s >= POLICY.base_s
        case other:
            raise AssertionError(other)


@pytest.mark.parametrize("error_class", [ErrorClass.AUTH, ErrorClass.QUOTA])
def test_bulk_work_waits_for_a_key_to_be_repaired(error_class: ErrorClass) -> None:
    assert _decide(error_class, patient=True) == Next()
    assert _decide(error_class, patient=True, attempts_used=4) == GiveUp(NEVER_AGAIN)


def test_the_attempt_budget_ends_it() -> None:
    assert _decide(attempts_used=4) == GiveUp("all 4 attempts are used")
    assert _decide(attempts_used=4, others=True) == GiveUp("all 4 attempts are used")
    assert isinstance(_decide(attempts_used=3), Retry)


def test_the_provider_is_waited_for_as_long_as_it_says() -> None:
    assert _decide(ErrorClass.OVERLOADED, retry_after_s=20) == Retry(20)
    # Also for longer than our own longest wait.
    assert _decide(ErrorClass.OVERLOADED, retry_after_s=3000) == Retry(3000)


def test_a_wait_past_the_deadline_is_not_begun() -> None:
    match _decide(retry_after_s=60, left_s=50):
        case GiveUp(why):
            assert "past its deadline" in why
        case other:
            raise AssertionError(other)
    assert _decide(ErrorClass.TIMEOUT, left_s=0) == Expire("its deadline has passed")


@given(
    error_class=st.sampled_from(list(ErrorClass)),
    tries_here=st.integers(0, 30),
    others=st.booleans(),
    attempts_used=st.integers(1, 30),
    max_attempts=st.integers(1, 20),
    retry_after_s=st.none() | st.floats(0, 1e6),
    left_s=st.floats(-10, 1e6),
    gated=st.booleans(),
    patient=st.booleans(),
)
def test_every_decision_is_one_that_ends(
    error_class: ErrorClass, retry_after_s: float | None, left_s: float, **values: Any
) -> None:
    decision = _decide(error_class, retry_after_s=retry_after_s, left_s=left_s, **values)
    if isinstance(decision, Retry):
        assert values["attempts_used"] < values["max_attempts"]
        assert (retry_after_s or 0) <= decision.after_s < left_s
        assert decision.after_s <= max(POLICY.max_s, retry_after_s or 0)
    if isinstance(decision, Next):
        known = values["others"] or values["patient"] or values["gated"]
        assert known, "nobody is left to go to"
