"""Nothing holds up a worker's event loop for more than 50 ms.

asyncio's debug mode runs, so that what it checks is checked; what is slow is told by `loop_watch`,
which asyncio's own report is not fit for on a machine with other work to do.
"""

from __future__ import annotations

import base64
import os
import random
import subprocess
import sys
from pathlib import Path
from uuid import UUID

import pytest

from sluicegate import ImagePart, Message, TextPart
from sluicegate.shared.jobs import Lane
from sluicegate.shared.messages import MAX_ATTACHMENT_BYTES
from tests.harness import FULL, Rig, Service, environment_of

JOBS = 2000 if FULL else 200
#: Of a picture, before it is base64.
LARGEST = MAX_ATTACHMENT_BYTES // 4 * 3
#: A thread that holds Python's lock can be put aside by a busy machine, and the loop with it.
ROUNDS = 5

_WATCH = str(Path(__file__).parent / "loop_watch")


@pytest.fixture(scope="module")
def workers(module_rig: Rig) -> list[Service]:
    """Start a worker of each lane; debug mode halves their speed, so they are not for others."""
    path = os.pathsep.join([_WATCH, os.environ["PYTHONPATH"]])
    debug = {"SLUICE_LOOP_DEBUG": "1", "PYTHONPATH": path}
    started = [
        module_rig.begin_worker("openai", ["general", "vision"], variables=debug),
        module_rig.begin_worker("anthropic", ["summary"], Lane.BULK, variables=debug),
    ]
    module_rig.start_sweep()
    return [module_rig.await_worker(worker) for worker in started]


def _load(rig: Rig) -> None:
    """Run single jobs, streams, chunks, and the largest request there may be."""
    rig.sandbox.add_fault("http_500", prompt_contains="No. 7", times=3)
    ids = rig.submit("general", JOBS // 4)
    ids += rig.submit("general", JOBS // 4, stream=True, text="Write.\nTOKENS: 200")
    ids += rig.submit("summary", JOBS // 2, lane="bulk")
    ids += rig.submit("general", 3, text="No. 7")
    ids += rig.submit("general", 2, text="long " * 190_000)
    ids += rig.submit("general", 1, text="Write at length.\nTOKENS: 30000", max_tokens=32_000)
    # Bytes that compress as badly as those of a picture, and some that compress well.
    for data in (random.Random(1).randbytes(LARGEST), bytes(LARGEST)):
        ids += [rig.client.submit("vision", pictured(data)).id]
    rig.await_over(ids, 120)
    assert rig.states(ids) == {"succeeded": len(ids)}


def pictured(data: bytes) -> list[Message]:
    """Return a prompt with this picture."""
    picture = ImagePart(data=base64.b64encode(data).decode())
    return [Message(role="user", content=(TextPart(text="What is this?"), picture))]


def _said(worker: Service) -> list[str]:
    """What the watch has said of a worker so far."""
    return [line for line in worker.log.splitlines() if line.startswith("LOOP ")]


def test_nothing_holds_up_the_loop(rig: Rig, workers: list[Service]) -> None:
    """What blocks the loop does so in every round; what a busy machine delays does not."""
    rig.sandbox.settings(latency_ms=100, first_token_ms=50, tokens_per_s=400)
    _load(rig)  # what is done once in a process's life is done now
    rounds: list[list[str]] = []
    while len(rounds) < ROUNDS and all(rounds):
        before = [len(_said(worker)) for worker in workers]
        _load(rig)
        rounds.append(
            [
                line
                for worker, known in zip(workers, before, strict=True)
                for line in _said(worker)[known:]
            ]
        )
    quietest = min(rounds, key=len)
    assert not quietest, "\n".join(quietest)


#: Submits the largest picture that there may be, after one that brings what is done once.
_CLIENT = """
import asyncio, sys
from sluicegate import AsyncSluice
from tests.acceptance.test_event_loop import LARGEST, pictured

async def main():
    largest = pictured(bytes(range(256)) * (LARGEST // 256))
    async with AsyncSluice() as sluice:
        await sluice.submit("vision", pictured(b"small"))
        print("BEGIN", file=sys.stderr)
        job = await sluice.submit("vision", largest)
        print("END", file=sys.stderr)
        print(job.id)

asyncio.run(main())
"""


def test_nothing_holds_up_a_clients_loop(rig: Rig, workers: list[Service]) -> None:
    """As above; `asyncio.run` makes the client's messages part of a turn of the loop as well."""
    path = os.pathsep.join([_WATCH, os.environ["PYTHONPATH"]])
    env = environment_of(rig.settings, PYTHONPATH=path)
    rounds: list[str] = []
    while len(rounds) < ROUNDS and all(rounds):
        argv = [sys.executable, "-c", _CLIENT]
        ended = subprocess.run(argv, env=env, capture_output=True, text=True, check=True)
        rig.await_over([UUID(ended.stdout.strip())])
        during = ended.stderr.partition("BEGIN\n")[2].partition("END\n")[0]
        rounds.append("\n".join(line for line in during.splitlines() if "LOOP" in line))
    quietest = min(rounds, key=len)
    assert not quietest
