"""Coalescing: one statement for many, an outcome for each."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import psycopg.errors
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sluicegate.shared.coalescing import Coalescer, run_apart


class _Doubling:
    """A statement that doubles numbers and notes which came together; some it cannot take."""

    def __init__(self, *, bad: frozenset[int] = frozenset(), conflicts: int = 0) -> None:
        self.batches: list[list[int]] = []
        self.running = 0
        self.most_running = 0
        self._bad = bad
        self._conflicts = conflicts

    async def __call__(self, items: Sequence[int]) -> list[int]:
        self.batches.append(list(items))
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            await asyncio.sleep(0.001)
            if self._conflicts:
                self._conflicts -= 1
                raise psycopg.errors.DeadlockDetected
            if self._bad & set(items):
                raise psycopg.errors.UntranslatableCharacter
            return [2 * item for item in items]
        finally:
            self.running -= 1


async def test_what_is_asked_at_once_travels_together() -> None:
    statement = _Doubling()
    call = Coalescer(statement=statement, max_items=100, spacing_s=0.005)
    assert await asyncio.gather(*(call(n) for n in range(50))) == [2 * n for n in range(50)]
    assert len(statement.batches) <= 2


async def test_statements_are_bounded_in_size_and_number() -> None:
    statement = _Doubling()
    call = Coalescer(statement=statement, max_items=7, spacing_s=0, parallel=2)
    assert await asyncio.gather(*(call(n) for n in range(100))) == [2 * n for n in range(100)]
    assert max(map(len, statement.batches)) <= 7
    assert statement.most_running == 2
    assert sorted(item for batch in statement.batches for item in batch) == list(range(100))


async def test_one_that_is_refused_fails_alone() -> None:
    call = Coalescer(statement=_Doubling(bad=frozenset({17})), max_items=50, spacing_s=0.005)
    outcomes = await asyncio.gather(*(call(n) for n in range(50)), return_exceptions=True)
    assert isinstance(outcomes[17], psycopg.errors.UntranslatableCharacter)
    assert [one for n, one in enumerate(outcomes) if n != 17] == [
        2 * n for n in range(50) if n != 17
    ]


async def test_a_conflict_repeats_the_whole() -> None:
    statement = _Doubling(conflicts=2)
    assert await run_apart(statement, [1, 2]) == [2, 4]
    assert statement.batches == [[1, 2]] * 3


async def test_any_other_error_is_everybodys() -> None:
    async def broken(_: Sequence[int]) -> list[int]:
        raise ConnectionResetError

    call = Coalescer(statement=broken, max_items=10, spacing_s=0)
    outcomes = await asyncio.gather(call(1), call(2), return_exceptions=True)
    assert [type(one) for one in outcomes] == [ConnectionResetError] * 2
    with pytest.raises(ConnectionResetError):
        await call(3)


async def test_a_caller_that_left_before_its_turn_wants_nothing_done() -> None:
    statement = _Doubling()
    call = Coalescer(statement=statement, max_items=1, spacing_s=0, parallel=1)
    first, second, third = (asyncio.ensure_future(call(n)) for n in range(3))
    await asyncio.sleep(0)
    second.cancel()
    assert (await first, await third) == (0, 4)
    assert [1] not in statement.batches


@given(st.sets(st.integers(0, 39)), st.integers(1, 40))
def test_only_the_culprits_fail(bad: set[int], size: int) -> None:
    outcomes = asyncio.run(run_apart(_Doubling(bad=frozenset(bad)), range(size)))
    for item, outcome in enumerate(outcomes):
        if item in bad:
            assert isinstance(outcome, psycopg.errors.UntranslatableCharacter)
        else:
            assert outcome == 2 * item


async def test_a_statement_holds_up_the_next_by_what_it_carried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now_s = 1000.0
    monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: now_s)

    async def doubled(numbers: Sequence[int]) -> list[int]:
        return [2 * n for n in numbers]

    call = Coalescer(statement=doubled, max_items=100, spacing_s=1.0)

    async def is_done(future: asyncio.Future[Any], at_s: float) -> bool:
        nonlocal now_s
        now_s = 1000.0 + at_s
        for _ in range(10):
            await asyncio.sleep(0)
        return future.done()

    assert await is_done(asyncio.ensure_future(call(1)), 0.0)  # the first starts at once
    alone = asyncio.ensure_future(call(2))
    assert not await is_done(alone, 0.24)
    assert await is_done(alone, 0.26)
    together = asyncio.gather(*(call(n) for n in range(8)))
    assert not await is_done(together, 0.50)
    assert await is_done(together, 0.52)
    after_many = asyncio.ensure_future(call(3))
    assert not await is_done(after_many, 1.51)
    assert await is_done(after_many, 1.53)
    assert await after_many == 6
