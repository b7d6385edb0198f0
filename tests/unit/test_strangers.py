"""Wrong keys: so many are looked up, and then none for a moment."""

from __future__ import annotations

import pytest

from sluicegate.producers.http.problems import Problem
from sluicegate.producers.http.strangers import AT_ONCE, PER_S, Strangers


def test_too_many_wrong_keys_close_it_for_a_moment() -> None:
    now_s = [0.0]
    strangers = Strangers(clock=lambda: now_s[0])
    for _ in range(AT_ONCE):
        strangers.check()
        strangers.count()
    with pytest.raises(Problem) as refused:
        strangers.check()
    assert (refused.value.status, refused.value.headers["Retry-After"]) == (429, "1")
    now_s[0] = 1.5 / PER_S
    strangers.check()
    strangers.count()
    with pytest.raises(Problem):
        strangers.check()
    # It fills up, and no further.
    now_s[0] = 1e6
    for _ in range(AT_ONCE):
        strangers.check()
        strangers.count()
    with pytest.raises(Problem):
        strangers.check()


def test_right_keys_are_not_counted() -> None:
    strangers = Strangers(clock=lambda: 0.0)
    for _ in range(10 * AT_ONCE):
        strangers.check()
