"""What a reply channel carries, and the ids that let Redis refuse a stale worker's events.

An event id is `<fence>-<n>`. Redis accepts only growing ids, so the events of a worker that lost
the job (lower fence) are refused by the server itself. The terminal event of a fence has the
highest `n` there is: nothing of the same fence can follow it.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Final, Literal, NamedTuple
from uuid import UUID

from pydantic import Field, StringConstraints, TypeAdapter

from sluicegate.shared.jobs import Result, State
from sluicegate.shared.messages import Frozen

#: The largest sequence number of a Redis Stream id (unsigned 64 bit).
TERMINAL_N = 18446744073709551615

#: The field of a stream entry that holds the event.
FIELD: Final = b"e"


#: Over HTTP, the kind of what says that nothing follows the event which the reader has seen last.
OVER: Final = b"over"
#: Over HTTP, the kind of what says why events cannot be read any further.
BROKEN: Final = b"error"

#: The name of a shared reply channel.
ChannelName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.:-]{0,127}$")]


class EventType(StrEnum):
    """The kinds of event, in the order in which a reader may meet them."""

    STARTED = "started"
    DELTA = "delta"
    RESET = "reset"
    COMPLETED = "completed"
    FAILED = "failed"


class Started(Frozen):
    """The first attempt has begun, at this model."""

    type: Literal["started"] = "started"
    model: str
    attempt: int = 1


class ToolCallDelta(Frozen):
    """A fragment of a tool call: `arguments` is a piece of JSON text."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


class Delta(Frozen):
    """More of the answer."""

    type: Literal["delta"] = "delta"
    text: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()


class Reset(Frozen):
    """A new attempt has begun: discard what came before."""

    type: Literal["reset"] = "reset"
    model: str
    attempt: int


class Completed(Frozen):
    """The whole answer; nothing follows."""

    type: Literal["completed"] = "completed"
    result: Result


class Failed(Frozen):
    """The job ended without an answer (failed, cancelled or expired); nothing follows."""

    type: Literal["failed"] = "failed"
    result: Result


Payload = Annotated[Started | Delta | Reset | Completed | Failed, Field(discriminator="type")]
_PAYLOAD: TypeAdapter[Started | Delta | Reset | Completed | Failed] = TypeAdapter(Payload)


class Event(NamedTuple):
    """One event with its id; a reader that reconnects passes the last id it has seen."""

    id: str
    payload: Started | Delta | Reset | Completed | Failed

    @property
    def type(self) -> str:
        """The payload's type, for matching."""
        return self.payload.type

    @property
    def terminal(self) -> bool:
        """Whether nothing follows."""
        return isinstance(self.payload, Completed | Failed)


def reply_key(job_id: UUID | str) -> str:
    """Name of the job's reply channel, a Redis Stream."""
    return f"reply:{job_id}"


def event_id(fence: int, n: int) -> str:
    """Id of the n-th event under this fence (n from 1)."""
    return f"{fence}-{n}"


def terminal_id(fence: int) -> str:
    """Id of the event that ends the job under this fence."""
    return f"{fence}-{TERMINAL_N}"


def id_key(event_id: str) -> tuple[int, int]:
    """Order of event ids; `0` sorts before everything."""
    fence, _, n = event_id.partition("-")
    return int(fence), int(n or 0)


def decode(event_id: str, data: bytes | str) -> Event:
    """Read one event from a reply channel."""
    return Event(event_id, _PAYLOAD.validate_json(data))


def terminal_event(fence: int, result: Result) -> Event:
    """Make the terminal event from a result, identically from Postgres or in a worker."""
    payload = Completed(result=result) if result.state is State.SUCCEEDED else Failed(result=result)
    return Event(terminal_id(fence), payload)
