"""A back end's consumer of a shared channel is killed: what it had not acknowledged comes again."""

from __future__ import annotations

import sys
from typing import Any
from uuid import UUID

import orjson

from tests.harness import FULL, Rig, Service, environment_of
from tests.polling import eventually

JOBS = 2000 if FULL else 200
HELD = 3

#: Acknowledges and writes down what comes, so many; then it holds on to three more.
CONSUMER = """
import json, sys, time
from sluicegate import Sluice

consumer, acks = sys.argv[1], int(sys.argv[2])
with Sluice() as sluice:
    for n, reply in enumerate(sluice.replies("crm-eu", "crm", consumer=consumer), 1):
        if n <= acks:
            reply.ack()
        print(json.dumps({
            "job": str(reply.job_id), "text": reply.result.text, "acked": n <= acks,
            "cost": reply.result.cost_nano_usd, "lead": reply.metadata["lead"],
        }), flush=True)
        if n == acks + 3:
            time.sleep(600)
"""


class Consumer:
    """A consumer process, and what it wrote down."""

    def __init__(self, rig: Rig, name: str, *, log: str, acks: int = 10**9) -> None:
        argv = [sys.executable, "-c", CONSUMER, name, str(acks)]
        self._process = Service(name, argv, environment_of(rig.settings), rig.folder / f"{log}.log")

    def __enter__(self) -> Consumer:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()

    def replies(self, *, acked: bool) -> dict[UUID, dict[str, Any]]:
        """By job what it was given, and acknowledged or not."""
        lines = self._process.log.rpartition("\n")[0].splitlines()
        found = [orjson.loads(line) for line in lines]
        chosen = [one for one in found if one["acked"] is acked]
        assert len({one["job"] for one in chosen}) == len(chosen), "twice"
        return {UUID(one["job"]): one for one in chosen}


def test_a_killed_consumer_loses_nothing_and_what_it_acknowledged_does_not_come_again(
    rig: Rig,
) -> None:
    rig.start_sweep()
    rig.start_worker("anthropic", ["draft"])
    jobs = rig.submit("draft", JOBS, reply_to="crm-eu", metadata={"lead": "7"})
    with Consumer(rig, "a", log="killed", acks=JOBS // 4) as killed:
        eventually(lambda: len(killed.replies(acked=False)) == HELD, 60)
    done, held = killed.replies(acked=True), killed.replies(acked=False)

    # It comes back under its name, and another one helps.
    with Consumer(rig, "a", log="back") as back, Consumer(rig, "b", log="other") as other:

        def all_done() -> bool:
            seen = [one.replies(acked=True).keys() for one in (back, other)]
            return len(done) + sum(map(len, seen)) >= len(jobs)

        eventually(all_done, 90)
        again, others = back.replies(acked=True), other.replies(acked=True)

    assert sorted([*done, *again, *others]) == sorted(jobs)
    for job_id, reply in held.items():
        assert again[job_id] == reply | {"acked": True}
        assert reply["cost"] == rig.booked_nano_usd([job_id]) > 0
        assert reply["text"]
        assert reply["lead"] == "7"
    rig.await_over(jobs)
    rig.check_once(jobs)
    eventually(lambda: rig.rows("SELECT FROM outbox") == [])
