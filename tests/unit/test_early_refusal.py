"""When a client looks at budgets before it stores a job: not for each, and not where Redis is away.

The stand-in for Redis counts what it is asked, as that is what is promised here.
"""

from __future__ import annotations

from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any, cast
from uuid import UUID
from zoneinfo import ZoneInfo

import fakeredis
import orjson
import pytest
import redis

from sluicegate.producers.early_refusal import ROOM_S, EarlyRefusal
from sluicegate.producers.submission import Draft
from sluicegate.shared.admission.keys import budgets_key
from sluicegate.shared.catalogue import Catalogue
from sluicegate.shared.errors import BudgetExceeded
from sluicegate.shared.jobs import Lane
from sluicegate.testing.catalogue import fresh_catalogue

ACCOUNT = UUID(int=1)
NEVER_US = 2**60


class Desk:
    """An `EarlyRefusal` on a clock of its own, and Postgres as a list of answers."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.early = EarlyRefusal("test:", clock=lambda: self.now_s)
        self.server = fakeredis.FakeServer()
        self.client = fakeredis.FakeRedis(server=self.server)
        self.asked: list[dict[str, Any]] = []
        self.full: list[Any] = []

    def copy(self, **values: Any) -> None:
        """Put the copy of a budget there, with nothing in it but what is given."""
        windows = {
            f"{window}_{what}": value
            for window in ("day", "month")
            for what, value in (("limit", None), ("spent", 0), ("held", 0), ("resets_us", NEVER_US))
        }
        copy = {"use_case": None, **windows, **values}
        self.client.hset(budgets_key("test:", ACCOUNT), "b", orjson.dumps(copy))

    def submit(self, use_case: str = "draft", lane: Lane = Lane.INTERACTIVE) -> int:
        """Return how often Postgres was asked so far."""
        draft = SimpleNamespace(
            account_id=ACCOUNT, use_case=use_case, lane=lane, idempotency_key=None
        )
        catalogue: Catalogue = fresh_catalogue()[0]

        def execute(_statement: str, **values: Any) -> list[Any]:
            self.asked.append(values)
            return self.full

        self.early.check(
            cast("Draft", draft), cast("redis.Redis", self.client), lambda: catalogue, execute
        )
        return len(self.asked)


@pytest.fixture
def desk() -> Desk:
    return Desk()


@pytest.mark.parametrize(
    ("copy", "is_full"),
    [
        ({}, False),
        ({"day_limit": 10, "day_spent": 9}, False),
        ({"day_limit": 10, "day_spent": 9, "day_held": 9}, False),
        ({"day_limit": 10, "day_spent": 10}, True),
        ({"month_limit": 10, "month_spent": 11}, True),
        ({"month_limit": 0}, True),
        ({"day_limit": 10, "day_spent": 10, "day_resets_us": 1}, False),
        ({"day_limit": 10, "day_spent": 10, "use_case": "draft"}, True),
        ({"day_limit": 10, "day_spent": 10, "use_case": "voice"}, False),
    ],
)
def test_postgres_is_asked_where_a_copy_looks_full(
    desk: Desk, copy: dict[str, Any], is_full: bool
) -> None:
    desk.copy(**copy)
    assert desk.submit() == (1 if is_full else 0)


def test_only_postgres_refuses(desk: Desk) -> None:
    desk.copy(day_limit=5, day_spent=5)
    desk.submit()
    assert desk.asked[0]["least"] == 1
    resets_at = datetime(2026, 11, 24, 5, tzinfo=UTC)
    desk.full = [
        SimpleNamespace(
            account="acme",
            use_case="draft",
            window="day",
            cap=5_000_000_000,
            spent=5_000_000_001,
            resets_at=resets_at,
            time_zone="America/New_York",
        )
    ]
    with pytest.raises(BudgetExceeded) as refused:
        desk.submit()
    assert str(refused.value) == (
        "the daily budget for draft of account acme, $5.00, is full: $5.000000001 is spent; "
        "it resets at 2026-11-24 00:00 (America/New_York)"
    )
    assert refused.value.resets_at == resets_at
    assert refused.value.resets_at.tzinfo == ZoneInfo("America/New_York")


def test_an_account_with_room_is_looked_at_again_after_a_moment(desk: Desk) -> None:
    desk.submit()
    desk.copy(day_limit=0)
    assert desk.submit() == 0
    assert desk.submit("voice") == 1
    desk.now_s += ROOM_S
    assert desk.submit() == 2
    # What looks full is looked at each time.
    assert desk.submit() == 3
    assert desk.submit(lane=Lane.BULK) == 3


def test_nobody_waits_for_a_redis_that_is_away(desk: Desk) -> None:
    desk.copy(day_limit=0)
    desk.server.connected = False
    assert desk.submit() == 0
    desk.server.connected = True
    assert desk.submit() == 0
    desk.now_s += 60
    assert desk.submit() == 1
