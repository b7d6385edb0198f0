"""A back end that uses its clients, forks, and goes on: run by test_client_fork.py.

Prints a line of JSON for each process: which connections it spoke on, before and after.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import sys
import threading
from collections.abc import Callable
from typing import Any, NoReturn

from sluicegate import AsyncSluice, Sluice

CHILDREN = 8
WAIT_S = 60


def lines_of(client: Any) -> Any:
    return client._open()


def spoken_on(sluice: Sluice) -> list[int]:
    """What the servers call this client's connections: Postgres, Redis, broker."""
    lines = lines_of(sluice)
    with lines.engine.connect() as connection:
        backend = connection.exec_driver_sql("SELECT pg_backend_pid()").scalar_one()
    with lines.app.pool.acquire() as broker:
        return [backend, lines.redis.client_id(), broker.default_channel.client.client_id()]


async def spoken_on_async(sluice: AsyncSluice) -> list[int]:
    lines = lines_of(sluice)
    async with lines.engine.connect() as connection:
        found = await connection.exec_driver_sql("SELECT pg_backend_pid()")
        backend = found.scalar_one()
    return [backend, await lines.redis.client_id()]


def ask(sluice: Sluice, prompt: str) -> None:
    assert sluice.submit("draft", prompt).result(WAIT_S).text == prompt


async def ask_async(sluice: AsyncSluice, prompt: str) -> None:
    job = await sluice.submit("draft", prompt)
    assert (await job.result(WAIT_S)).text == prompt


def fork(child: Callable[[int], NoReturn]) -> list[int]:
    pids = []
    for n in range(CHILDREN):
        pid = os.fork()
        if pid == 0:
            child(n)
        pids.append(pid)
    return pids


def reap(pids: list[int]) -> None:
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * CHILDREN


def say(kind: str, **ids: list[int]) -> None:
    # One write, so that lines of several processes do not mix.
    os.write(1, (json.dumps({"kind": kind, **ids}) + "\n").encode())


def threads() -> None:
    """Fork while other threads are in the middle of using the client."""
    sluice = Sluice()
    fresh = [Sluice() for _ in range(CHILDREN)]
    ask(sluice, "parent")
    before = spoken_on(sluice)
    over = threading.Event()

    def work(n: int) -> None:
        count = 0
        while not over.is_set():
            count += 1
            ask(sluice, f"thread {n}, job {count}")

    workers = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for worker in workers:
        worker.start()

    def child(n: int) -> NoReturn:
        ask(sluice, f"child {n}")
        ask(fresh[n], f"child {n}, a client that the parent did not use")
        gc.collect()
        say("child", ids=spoken_on(sluice))
        sys.exit(0)  # as a worker ends: with all finalizers

    pids = []
    for n in range(CHILDREN):
        # Between two forks another client opens, which takes locks.
        opener = threading.Thread(target=ask, args=(fresh[n - 1], f"opener {n}"))
        opener.start()
        pid = os.fork()
        if pid == 0:
            child(n)
        pids.append(pid)
        opener.join()
    reap(pids)
    over.set()
    for worker in workers:
        worker.join()
    ask(sluice, "parent again")
    say("parent", before=before, after=spoken_on(sluice))
    for client in (sluice, *fresh):
        client.close()


async def loop() -> None:
    """Fork inside of a running loop; each child has a loop of its own."""
    async with AsyncSluice() as sluice:
        await ask_async(sluice, "parent")
        before = await spoken_on_async(sluice)
        waiting = asyncio.create_task(ask_async(sluice, "parent, over the fork"))
        await asyncio.sleep(0)

        async def in_child(n: int) -> None:
            await ask_async(sluice, f"child {n}")
            gc.collect()
            say("child", ids=await spoken_on_async(sluice))
            await sluice.close()

        def child(n: int) -> NoReturn:
            asyncio.run(in_child(n))
            gc.collect()
            os._exit(0)  # the parent's loop is on the stack

        pids = fork(child)
        await asyncio.to_thread(reap, pids)
        await waiting
        await ask_async(sluice, "parent again")
        say("parent", before=before, after=await spoken_on_async(sluice))


if __name__ == "__main__":
    if sys.argv[1] == "threads":
        threads()
    else:
        asyncio.run(loop())
