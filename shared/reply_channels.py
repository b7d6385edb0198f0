"""Shared reply channels, as both ends know them: names, ids, and what an entry holds.

A channel is a Redis Stream of terminal results. The id of an entry is `<number>-0`; the numbers
come from Postgres and only grow, so Redis itself refuses an entry that it has had.
"""

from __future__ import annotations

from typing import Final

#: The Postgres channel on which the end of a job with a `reply_to` is told: it wakes the deliverer.
OUTBOX_CHANNEL: Final = "sluice_outbox"

#: The fields of an entry: the id of the job, and its result with what the submitter gave it, JSON.
JOB_FIELD: Final = b"j"
REPLY_FIELD: Final = b"r"


def channel_key(name: str) -> str:
    """Name of the channel's Redis Stream, without the prefix."""
    return f"channel:{name}"


def entry_id(number: int) -> str:
    """Id of the entry with this number."""
    return f"{number}-0"


def entry_number(entry: bytes | str) -> int:
    """Read the number of an entry from its id."""
    text = entry.decode() if isinstance(entry, bytes) else entry
    return int(text.partition("-")[0])
