"""Estimates of prompt tokens, as they are learned from what providers count."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sluicegate.workers.estimates import TokenEstimates

FACTOR = st.floats(0.25, 4.0)
ESTIMATED = st.integers(200, 100_000)


def test_without_a_call_the_careful_estimate_holds() -> None:
    assert TokenEstimates().input_tokens("gpt-x", 1000) == 1000


@given(factor=FACTOR, estimated=st.lists(ESTIMATED, min_size=80, max_size=80), asked=ESTIMATED)
def test_it_converges(factor: float, estimated: list[int], asked: int) -> None:
    estimates = TokenEstimates()
    for tokens in estimated:
        estimates.learn("gpt-x", tokens, round(tokens * factor))
    assert estimates.input_tokens("gpt-x", asked) == pytest.approx(asked * factor, rel=0.1, abs=1)


def test_it_follows_a_change_and_is_close_after_few_calls() -> None:
    estimates = TokenEstimates()
    for _ in range(10):
        estimates.learn("gpt-x", 1000, 700)
    assert 700 <= estimates.input_tokens("gpt-x", 1000) <= 740
    for _ in range(100):
        estimates.learn("gpt-x", 1000, 1500)
    assert 1450 <= estimates.input_tokens("gpt-x", 1000) <= 1500


def test_one_odd_call_moves_it_little() -> None:
    estimates = TokenEstimates()
    for _ in range(50):
        estimates.learn("gpt-x", 1000, 800)
    estimates.learn("gpt-x", 100, 1_000_000)
    assert estimates.input_tokens("gpt-x", 1000) < 1000


@given(
    calls=st.lists(st.tuples(st.integers(-5, 10**7), st.integers(-5, 10**9)), max_size=30),
    asked=st.integers(0, 10**7),
)
def test_whatever_comes_the_factor_stays_in_its_bounds(
    calls: list[tuple[int, int]], asked: int
) -> None:
    estimates = TokenEstimates()
    for estimated, actual in calls:
        estimates.learn("gpt-x", estimated, actual)
    assert asked * 0.25 <= estimates.input_tokens("gpt-x", asked) <= asked * 4 + 1


@pytest.mark.parametrize(("estimated", "actual"), [(49, 400), (400, 49), (0, 0), (-1, 60)])
def test_short_prompts_teach_nothing(estimated: int, actual: int) -> None:
    estimates = TokenEstimates()
    estimates.learn("gpt-x", estimated, actual)
    assert estimates.input_tokens("gpt-x", 1000) == 1000


def test_attachments_teach_nothing_and_are_not_scaled() -> None:
    estimates = TokenEstimates()
    estimates.learn("gpt-x", 6100, 1500, has_attachments=True)
    assert estimates.input_tokens("gpt-x", 1000) == 1000
    estimates.learn("gpt-x", 1000, 500)
    assert estimates.input_tokens("gpt-x", 6100, has_attachments=True) == 6100
    assert estimates.input_tokens("gpt-x", 1000) == 750


@given(st.lists(st.tuples(st.sampled_from("abcdefgh"), st.booleans()), max_size=60))
def test_models_are_bounded_and_the_longest_unused_goes(steps: list[tuple[str, bool]]) -> None:
    estimates = TokenEstimates(max_models=3)
    known: list[str] = []  # the model last used at the end
    for model, learns in steps:
        if learns:
            estimates.learn(model, 1000, 500)
        else:
            assert (estimates.input_tokens(model, 1000) < 1000) is (model in known)
        if learns or model in known:
            known = [other for other in known if other != model] + [model]
            known = known[-3:]


def test_an_answer_is_as_long_as_those_before_it_and_never_longer_than_it_may_be() -> None:
    estimates = TokenEstimates()
    assert estimates.output_tokens("gpt-x", "draft", 1000) == 250
    estimates.learn_output("gpt-x", "draft", 40)
    assert estimates.output_tokens("gpt-x", "draft", 1000) == 40
    for _ in range(200):
        estimates.learn_output("gpt-x", "draft", 600)
    assert estimates.output_tokens("gpt-x", "draft", 1000) == pytest.approx(600, abs=2)
    assert estimates.output_tokens("gpt-x", "draft", 300) == 300
    # Other use cases and models are known nothing of.
    assert estimates.output_tokens("gpt-x", "summary", 1000) == 250
    assert estimates.output_tokens("gpt-y", "draft", 1) == 1


def test_an_empty_answer_still_counts_as_a_token() -> None:
    estimates = TokenEstimates()
    estimates.learn_output("gpt-x", "draft", 0)
    assert estimates.output_tokens("gpt-x", "draft", 1000) == 1


@given(st.lists(st.integers(1, 10_000), min_size=1, max_size=20))
def test_the_first_answers_are_known_by_their_mean(answers: list[int]) -> None:
    estimates = TokenEstimates()
    for answer in answers:
        estimates.learn_output("gpt-x", "draft", answer)
    assert estimates.output_tokens("gpt-x", "draft", 10_000) == pytest.approx(
        sum(answers) / len(answers), abs=1
    )
