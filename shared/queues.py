"""Queues: one for each (use case, pool), and one more for its bulk lane."""

from __future__ import annotations

from typing import NamedTuple

from kombu import Queue

from sluicegate.shared.errors import SettingsError
from sluicegate.shared.jobs import Lane

POOLS = ("openai", "anthropic")

#: The Postgres channel on which producers say that parked jobs are due: it wakes the stager.
STAGE_CHANNEL = "sluice_stage"

#: The Redis Stream of settlements that Postgres could not take, and the field that holds one, JSON.
JOURNAL_KEY = "journal"
JOURNAL_FIELD = b"s"


class QueueName(NamedTuple):
    """The parts of a queue's name."""

    use_case: str
    pool: str
    lane: Lane

    def __str__(self) -> str:
        """`draft.anthropic` for the interactive lane, `draft.anthropic.bulk` for bulk."""
        suffix = ".bulk" if self.lane is Lane.BULK else ""
        return f"{self.use_case}.{self.pool}{suffix}"


def queue_name(use_case: str, pool: str, lane: Lane) -> str:
    """Name of the queue for jobs of this use case, pool and lane."""
    return str(QueueName(use_case, pool, lane))


def parse_queue(name: str) -> QueueName:
    """Read a queue's name; raise `SettingsError` if it is not one of ours."""
    match name.split("."):
        case [use_case, pool] if pool in POOLS and use_case:
            return QueueName(use_case, pool, Lane.INTERACTIVE)
        case [use_case, pool, "bulk"] if pool in POOLS and use_case:
            return QueueName(use_case, pool, Lane.BULK)
        case _:
            raise SettingsError(
                f"{name!r} is not a queue of this fleet; they are named <use case>.<pool> or "
                f"<use case>.<pool>.bulk, with the pools {', '.join(POOLS)}"
            )


def pool_queues(use_cases: list[str], pool: str, lane: Lane) -> list[str]:
    """Names of the queues that a worker of this pool and lane serves."""
    return [queue_name(use_case, pool, lane) for use_case in use_cases]


def declare(name: str) -> Queue:
    """Build the kombu queue; it is published to directly, on the default exchange.

    After a FLUSHALL, a message published to a named exchange is dropped without an error by a
    channel that has declared it before; the default exchange needs no binding.
    """
    return Queue(name, exchange="", routing_key=name)
