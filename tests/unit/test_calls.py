"""Cutting off one call leaves its task, and every other, as they were."""

from __future__ import annotations

import asyncio
from uuid import UUID

import pytest

from sluicegate.workers.calls import Calls, CutOffError

JOB, OTHER = UUID(int=1), UUID(int=2)


async def _forever() -> str:
    await asyncio.Event().wait()
    raise AssertionError("unreachable")


async def _turn() -> None:
    for _ in range(3):
        await asyncio.sleep(0)


def _cancelling() -> int:
    task = asyncio.current_task()
    assert task is not None
    return task.cancelling()


async def test_the_call_ends_and_its_task_goes_on() -> None:
    calls = Calls()

    async def run(job_id: UUID) -> str:
        try:
            return await calls.make(job_id, _forever())
        except CutOffError:
            # As whoever settles now may: wait, be limited in time, and not be cancelled.
            async with asyncio.timeout(10):
                await asyncio.sleep(0)
            return f"cut off, {_cancelling()} left"

    cut, other = asyncio.create_task(run(JOB)), asyncio.create_task(run(OTHER))
    await _turn()
    assert calls.cut_off(JOB)
    # A message and a beat may both bring the wish.
    assert calls.cut_off(JOB)
    assert await cut == "cut off, 0 left"
    assert not calls.cut_off(JOB)
    assert not other.done()
    assert calls.cut_off(OTHER)
    assert await other == "cut off, 0 left"


async def test_a_call_that_ended_is_left_alone() -> None:
    calls = Calls()

    async def answer() -> str:
        return "hello"

    async def fail() -> str:
        raise LookupError

    assert await calls.make(JOB, answer()) == "hello"
    with pytest.raises(LookupError):
        await calls.make(JOB, fail())
    assert not calls.cut_off(JOB)
    await asyncio.sleep(0)


async def test_an_answer_that_came_in_spite_of_it_counts() -> None:
    calls = Calls()

    async def stubborn() -> str:
        try:
            return await _forever()
        except asyncio.CancelledError:
            return "hello"

    async def run() -> tuple[str, int]:
        return await calls.make(JOB, stubborn()), _cancelling()

    task = asyncio.create_task(run())
    await _turn()
    calls.cut_off(JOB)
    assert await task == ("hello", 0)


@pytest.mark.parametrize("wish_first", [True, False])
async def test_a_task_that_is_cancelled_as_well_stays_so(wish_first: bool) -> None:
    calls = Calls()
    task = asyncio.create_task(calls.make(JOB, _forever()))
    await _turn()
    if wish_first:
        calls.cut_off(JOB)
    task.cancel()
    if not wish_first:
        calls.cut_off(JOB)
    with pytest.raises(asyncio.CancelledError):
        await task
    assert task.cancelled()
    assert task.cancelling() == 1


async def test_a_deadline_inside_the_call_is_not_mistaken_for_it() -> None:
    calls = Calls()

    async def limited() -> str:
        async with asyncio.timeout(0.001):
            return await _forever()

    with pytest.raises(TimeoutError):
        await calls.make(JOB, limited())


async def test_the_same_job_twice_cuts_off_the_later_call() -> None:
    calls = Calls()
    first = asyncio.create_task(calls.make(JOB, _forever()))
    await _turn()
    second = asyncio.create_task(calls.make(JOB, _forever()))
    await _turn()
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    assert calls.cut_off(JOB)
    with pytest.raises(CutOffError):
        await second
