"""Slots: first in, first out, counted in jobs."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sluicegate.workers.slots import Draining, Slots


async def _turns(count: int = 3) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_what_fits_is_given_at_once() -> None:
    slots = Slots(10)
    await slots.acquire(7)
    await slots.acquire(3)
    assert (slots.free, slots.taken) == (0, 10)
    slots.release(4)
    assert slots.taken == 6


async def test_a_small_message_does_not_overtake_a_large_one() -> None:
    slots = Slots(10)
    await slots.acquire(6)
    large = asyncio.ensure_future(slots.acquire(8))
    await _turns()
    small = asyncio.ensure_future(slots.acquire(1))
    await _turns()
    assert not large.done()
    assert not small.done()
    slots.release(6)
    await asyncio.wait_for(asyncio.gather(large, small), 1)
    assert slots.taken == 9


async def test_a_cancelled_wait_makes_room_for_the_next() -> None:
    slots = Slots(4)
    await slots.acquire(3)
    large = asyncio.ensure_future(slots.acquire(4))
    await _turns()
    small = asyncio.ensure_future(slots.acquire(1))
    await _turns()
    large.cancel()
    await asyncio.wait_for(small, 1)
    assert large.cancelled()
    assert slots.taken == 4


async def test_slots_that_were_given_to_a_cancelled_wait_come_back() -> None:
    slots = Slots(2)
    await slots.acquire(2)
    waits = asyncio.ensure_future(slots.acquire(2))
    await _turns()
    slots.release(2)
    waits.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waits
    assert slots.free == 2


async def test_closing_turns_everybody_away() -> None:
    slots = Slots(1)
    await slots.acquire(1)
    waits = [asyncio.ensure_future(slots.acquire(1)) for _ in range(3)]
    await _turns()
    slots.close()
    for wait in waits:
        with pytest.raises(Draining):
            await wait
    with pytest.raises(Draining):
        await slots.acquire(1)
    slots.release(1)
    assert slots.free == 1


@given(st.lists(st.tuples(st.integers(1, 5), st.booleans()), max_size=30))
def test_none_is_lost_and_none_is_given_twice(wanted: list[tuple[int, bool]]) -> None:
    """Messages of any size, some of them cancelled: all others get their turn, in order."""

    async def run() -> None:
        slots = Slots(5)
        served: list[int] = []

        async def message(number: int, size: int) -> None:
            await slots.acquire(size)
            assert slots.taken <= slots.limit
            served.append(number)
            await _turns(size)
            slots.release(size)

        tasks = [asyncio.ensure_future(message(n, size)) for n, (size, _) in enumerate(wanted)]
        await _turns(2)
        for task, (_, cancelled) in zip(tasks, wanted, strict=True):
            if cancelled and not served.count(tasks.index(task)):
                task.cancel()
        await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 5)
        assert served == sorted(served)
        assert {n for n, (_, cancelled) in enumerate(wanted) if not cancelled} <= set(served)
        assert slots.free == slots.limit

    asyncio.run(run())
