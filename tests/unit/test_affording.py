"""What becomes of a job that a budget has no room for."""

from __future__ import annotations

from datetime import datetime

import pytest

from sluicegate.shared.jobs import Lane
from sluicegate.workers.affording import Park, Refuse, Rest, afford
from sluicegate.workers.ledger import Full


def full(*, by_spend: bool, use_case: str | None = None) -> Full:
    return Full.read(
        {
            "window": "month",
            "use_case": use_case,
            "limit_nano_usd": 5_000_000_000,
            "spent_nano_usd": 4_990_000_000,
            "held_nano_usd": 12_345,
            "reserve_nano_usd": 31_200_000,
            "resets_at": "2026-12-01T00:00:00",
            "resets_in_s": 3600.0,
            "time_zone": "Europe/Berlin",
            "by_spend": by_spend,
        }
    )


@pytest.mark.parametrize("patience_s", [2.0, 0.0, -1.0])
def test_spent_fails_whoever_is_waited_for_and_parks_the_rest_to_the_next_window(
    patience_s: float,
) -> None:
    spent = full(by_spend=True)
    assert afford(spent, Lane.INTERACTIVE, patience_s=patience_s) == Refuse()
    assert afford(spent, Lane.BULK, patience_s=patience_s) == Park(3600.0)


def test_held_is_waited_for_here_while_there_is_patience_and_then_in_postgres() -> None:
    held = full(by_spend=False)
    match afford(held, Lane.INTERACTIVE, patience_s=0.1):
        case Rest(rest_s):
            assert 0 < rest_s < 1
        case other:
            raise AssertionError(other)
    for lane, patience_s in ((Lane.INTERACTIVE, 0.0), (Lane.BULK, 2.0)):
        match afford(held, lane, patience_s=patience_s):
            case Park(after_s):
                assert 0 < after_s <= 5
            case other:
                raise AssertionError(other)


def test_it_says_which_budget_what_is_spent_and_when_it_resets() -> None:
    assert str(full(by_spend=True, use_case="voice")) == (
        "the account's monthly budget for voice of $5.00 is full: $4.99 is spent, $0.000012345 is "
        "held by calls under way, and this one may cost $0.0312; it resets at 2026-12-01 00:00 "
        "(Europe/Berlin)"
    )
    assert full(by_spend=True).resets_at == datetime(2026, 12, 1)  # noqa: DTZ001 - local there
