"""Which entries of a reply channel a reader gets, whoever else reads it."""

from __future__ import annotations

import threading
from uuid import uuid4

import orjson

from sluicegate.shared.events import FIELD, event_id, reply_key, terminal_id
from sluicegate.shared.replies import Channels, Subscription

JOB = uuid4()
STARTED = (
    event_id(2, 1).encode(),
    {FIELD: orjson.dumps({"type": "started", "model": "m", "attempt": 1})},
)
COMPLETED = (
    terminal_id(2).encode(),
    {
        FIELD: orjson.dumps(
            {
                "type": "completed",
                "result": {
                    "job_id": str(JOB),
                    "state": "succeeded",
                    "use_case": "draft",
                    "text": "hi",
                    "cost_nano_usd": 1,
                    "baseline_nano_usd": 1,
                    "attempts": 1,
                },
            }
        )
    },
)


def _types(subscription: Subscription) -> list[str]:
    found = []
    while (event := subscription.take()) is not None:
        found.append(event.type)
    return found


def test_who_comes_while_another_is_read_for_gets_the_beginning_too() -> None:
    channels = Channels("t:")
    key = f"t:{reply_key(JOB)}".encode()
    first = Subscription(job_id=JOB, signal=threading.Event())
    channels.add(first)
    channels.plan()
    channels.accept([(key, [STARTED])], [])
    streams, _ = channels.plan()
    assert streams[key] == event_id(2, 1)
    # That read waits for what follows upon the first event, which this one has not seen.
    second = Subscription(job_id=JOB, signal=threading.Event())
    channels.add(second)
    channels.accept([(key, [COMPLETED])], [])
    assert _types(first) == ["started", "completed"]
    assert _types(second) == []
    streams, _ = channels.plan()
    assert streams[key] == event_id(0, 0)
    channels.accept([(key, [STARTED, COMPLETED])], [])
    assert _types(second) == ["started", "completed"]


def test_who_comes_with_a_later_place_takes_what_the_read_brings() -> None:
    channels = Channels("t:")
    key = f"t:{reply_key(JOB)}".encode()
    channels.add(Subscription(job_id=JOB, signal=threading.Event()))
    channels.plan()
    late = Subscription(job_id=JOB, signal=threading.Event(), cursor=(2, 1))
    channels.add(late)
    channels.accept([(key, [STARTED, COMPLETED])], [])
    assert _types(late) == ["completed"]
