"""Nothing holds up a worker's event loop for more than 50 ms.

asyncio's debug mode runs, so that what it checks is checked; what is slow is told by `loop_watch`,
which asyncio's own report is not fit for on a machine with other work to do.
"""

from __future__ import annotations

import base64
import os
from pathlib import Path

import pytest

from sluicegate.shared.jobs import Lane
from tests.harness import FULL, Rig, Service

JOBS = 2000 if FULL else 200
#: A thread that holds Python's lock can be put aside by a busy machine, and the loop with it.
ROUNDS = 3

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
    image = {
        "type": "image",
        "media_type": "image/png",
        "data": base64.b64encode(bytes(1_000_000)).decode(),
    }
    handle = rig.client.submit(
        "vision", [{"role": "user", "content": [{"type": "text", "text": "What?"}, image]}]
    )
    rig.await_over([*ids, handle.id], 120)
    assert rig.states([*ids, handle.id]) == {"succeeded": len(ids) + 1}


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
