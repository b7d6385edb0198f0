"""One of several processes that do to the same few accounts all that can be done to a budget.

Reserves, settlements, voids, deaths, late answers, resolving, limits that are set and cleared, and
other time zones: the fleet's own statements, many rows of many accounts in each, in any order.

    python -m tests.mixed_load SEED SECONDS   # with the settings in the environment
"""

from __future__ import annotations

import asyncio
import random
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from uuid import UUID

import orjson

from sluicegate.shared.accounts import find_account, set_account
from sluicegate.shared.budgets import clear_budget
from sluicegate.shared.errors import NotFound
from sluicegate.shared.settings import Settings
from sluicegate.workers.dispatch import Attempt
from tests.books import Books

#: The accounts; they are made before.
NAMES = tuple(f"hot-{number}" for number in range(10))
USE_CASES = ("general", "draft")
_ZONES = ("UTC", "Pacific/Kiritimati", "Asia/Kolkata", "America/New_York", "Pacific/Pago_Pago")
_WORKERS = 6
#: Of lost attempts, for how many at most the answer still comes.
_LATE = 200


class Load:
    """What one process does."""

    def __init__(self, books: Books, seed: int) -> None:
        self._books = books
        self._random = random.Random(seed)
        self._account_ids: list[UUID] = []
        self._lost: list[Attempt] = []
        self.done: Counter[str] = Counter()

    async def run(self, seconds: float) -> None:
        """Do all of it at the same time, for so long."""
        with self._books.engine.connect() as line:
            self._account_ids = [find_account(line, name).id for name in NAMES]
        until = asyncio.get_running_loop().time() + seconds
        loops = [self._work] * _WORKERS + [self._die, self._change, self._reconcile]
        await asyncio.gather(*(self._until(until, step) for step in loops))

    async def _until(self, until: float, step: Callable[[], Awaitable[None]]) -> None:
        while asyncio.get_running_loop().time() < until:
            await step()

    async def _work(self) -> None:
        """Reserve for several accounts in one statement, and end what was let through in others."""
        books, chance = self._books, self._random
        wishes: list[Attempt] = []
        for account_id in chance.sample(self._account_ids, chance.randint(1, 4)):
            reserves = [chance.randint(1, 100) for _ in range(chance.randint(1, 4))]
            wishes += await books.wish(account_id, reserves, chance.choice(USE_CASES))
        chance.shuffle(wishes)
        answers = await books.open(wishes)
        opened = [one for one, answer in zip(wishes, answers, strict=True) if answer is True]
        self.done["opened"] += len(opened)
        self.done["refused"] += len(wishes) - len(opened)
        while opened:
            some = [opened.pop() for _ in range(min(len(opened), chance.randint(1, 8)))]
            match chance.random():
                case share if share < 0.1:
                    self._lost = [*self._lost, *some][-_LATE:]
                    self.done["left"] += len(some)
                case share if share < 0.25:
                    await books.settle(some, None)
                    self.done["void"] += len(some)
                case share if share < 0.35:
                    # As after a reply that was lost, and two at the same time.
                    cost = chance.randint(0, 150)
                    await asyncio.gather(books.settle(some, cost), books.settle(some, cost))
                    self.done["settled"] += len(some)
                case _:
                    await books.settle(some, chance.randint(0, 150))
                    self.done["settled"] += len(some)

    async def _die(self) -> None:
        """Leave what is open to whoever finds it; some of it is answered all the same."""
        await asyncio.sleep(self._random.uniform(0.05, 0.3))
        await self._books.die()
        await asyncio.gather(self._books.resolve(), self._books.resolve())
        some, self._lost = self._lost[::2], self._lost[1::2]
        if some:
            await self._books.settle(some, self._random.randint(0, 150))
        self.done["died"] += 1

    async def _change(self) -> None:
        await asyncio.sleep(self._random.uniform(0.0, 0.05))
        name, use_case = self._random.choice(NAMES), self._random.choice((None, *USE_CASES))
        match self._random.random():
            case share if share < 0.2:
                await asyncio.to_thread(self._clear, name, use_case)
            case share if share < 0.3:
                await asyncio.to_thread(self._move, name, self._random.choice(_ZONES))
            case _:
                limits = {
                    window: self._random.choice((500, 5_000, 10**6)) for window in ("day", "month")
                }
                await asyncio.to_thread(self._books.set_budget, name, use_case=use_case, **limits)
                self.done["set"] += 1

    def _clear(self, name: str, use_case: str | None) -> None:
        with self._books.change() as line:
            try:
                clear_budget(line, find_account(line, name), use_case=use_case)
            except NotFound:
                return
        self.done["cleared"] += 1

    def _move(self, name: str, time_zone: str) -> None:
        with self._books.change() as line:
            set_account(line, name, time_zone=time_zone)
        self.done["moved"] += 1

    async def _reconcile(self) -> None:
        await asyncio.sleep(0.3)
        await self._books.reconcile()


async def main(seed: int, seconds: float) -> None:
    """Print how often what was done."""
    async with Books(Settings(_env_file=None)) as books:
        load = Load(books, seed)
        await load.run(seconds)
    print(orjson.dumps(dict(load.done)).decode())


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), float(sys.argv[2])))
