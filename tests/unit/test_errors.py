"""Errors: readable by themselves, of one family, and they survive a pickle."""

from __future__ import annotations

import inspect
import pickle

import pytest

from sluicegate.shared import errors
from sluicegate.shared.errors import (
    ErrorClass,
    InvalidJob,
    JobEnded,
    JobFailed,
    ResultTimeout,
    SluiceError,
)

FAMILY = [
    kind
    for _, kind in inspect.getmembers(errors, inspect.isclass)
    if issubclass(kind, SluiceError) and kind is not InvalidJob
]


@pytest.mark.parametrize("kind", FAMILY)
def test_the_docstring_is_the_default_message(kind: type[SluiceError]) -> None:
    message = str(kind())
    assert message == inspect.getdoc(kind)
    assert message.endswith(".")
    assert "\n" not in message
    assert str(kind("Something else.")) == "Something else."


def test_a_refusal_names_the_field() -> None:
    error = InvalidJob("max_tokens", "must be at least 1")
    assert str(error) == "max_tokens: must be at least 1"
    assert (error.field, error.problem) == ("max_tokens", "must be at least 1")
    assert isinstance(error, SluiceError)


def test_a_job_that_ended_says_which_and_how() -> None:
    error = JobFailed("It failed.", job_id="1", state="failed")
    assert isinstance(error, JobEnded)
    assert (str(error), error.job_id, error.state) == ("It failed.", "1", "failed")


def test_a_timeout_is_one_for_everybody() -> None:
    assert isinstance(ResultTimeout(), TimeoutError)


@pytest.mark.parametrize(
    "error",
    [
        *(kind() for kind in FAMILY),
        InvalidJob("a", "b"),
        JobFailed("x", job_id="1", state="failed"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_survive_a_pickle(error: SluiceError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)


def test_which_failures_pass_by_themselves() -> None:
    assert {kind.value for kind in ErrorClass if not kind.transient} == {
        "quota",
        "auth",
        "budget",
        "not_found",
        "bad_request",
        "context_too_long",
        "content_filter",
        "invalid_answer",
        "cancelled",
        "internal",
    }
