"""Reading a shared reply channel as a member of a consumer group.

with Sluice() as sluice, sluice.replies("crm-eu", "crm") as replies:
    for reply in replies:
        store(reply.metadata, reply.result)
        reply.ack()

`Channel` decides what to ask Redis next and what the answer means, without I/O;
`sluicegate.producers.reply_readers` asks.
"""

from __future__ import annotations

import logging
import os
import random
import re
import socket
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any, Final, NamedTuple
from uuid import UUID, uuid4

import orjson
from pydantic import TypeAdapter, ValidationError

from sluicegate.shared.bodies import Bodies
from sluicegate.shared.errors import InvalidJob
from sluicegate.shared.events import ChannelName
from sluicegate.shared.jobs import Result
from sluicegate.shared.reply_channels import JOB_FIELD, REPLY_FIELD, channel_key
from sluicegate.shared.secrets import SecretUnreadable
from sluicegate.shared.settings import Settings

log = logging.getLogger(__name__)

_NAME: TypeAdapter[str] = TypeAdapter(ChannelName)

#: Replies that one read fetches, unless the caller says otherwise, and at most. One that was
#: fetched counts as delivered, even if its consumer dies before it comes to it.
BATCH: Final = 1
_BATCH_MAX: Final = 1000
#: A read blocks this long at most: then it is time to look for replies that others left, or to end.
_BLOCK_S: Final = 2.0
#: An entry that cannot be read is left to other consumers, which may be newer, so many times.
_UNREADABLE_TRIES: Final = 5
#: While Redis is away: the longest pause between two tries, and how often that is said.
_PAUSE_S: Final = 2.0
_SAY_S: Final = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """A terminal result, as it came through a channel."""

    #: Id of the entry: the same whenever it comes again.
    id: str
    result: Result = field(hash=False)
    #: What the submitter gave the job.
    metadata: Mapping[str, str] = field(hash=False)
    idempotency_key: str | None
    request_id: str | None
    #: How often a consumer of the group has fetched it, this time included. With a `batch` of more
    #: than one some may have died before they came to it.
    deliveries: int

    @property
    def job_id(self) -> UUID:
        """The job that ended."""
        return self.result.job_id


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply(Delivery):
    """A terminal result from a shared channel: the answer or the error, and what it cost."""

    _ack: Callable[[str], None] = field(repr=False, compare=False)

    def ack(self) -> None:
        """Say that it is done: the group does not get it again. May be said twice.

        Raises `QueueUnavailable` if Redis does not take it; the reply will then come again.
        """
        self._ack(self.id)


@dataclass(frozen=True, slots=True, kw_only=True)
class AsyncReply(Delivery):
    """As `Reply`; its `ack` is awaited."""

    _ack: Callable[[str], Awaitable[None]] = field(repr=False, compare=False)

    async def ack(self) -> None:
        """As `Reply.ack`."""
        await self._ack(self.id)


class _Phase(Enum):
    """What Redis is asked for, in this order; the last two take turns."""

    GROUP = auto()  # that there is the group
    OWN = auto()  # what this consumer was given before and has not acknowledged
    LEFT = auto()  # what any consumer was given long ago and has not acknowledged
    NEW = auto()  # what no consumer of the group was given


class Call(NamedTuple):
    """One command: a method that both of redis-py's clients have, and what it is given."""

    method: str
    args: tuple[Any, ...]
    options: dict[str, Any]


class Channel:
    """A consumer's view of a channel: what to ask Redis next, and what came. No I/O.

    Each `plan` is followed by `accept` with the answer, or by `failed`. Times are on the monotonic
    clock.
    """

    def __init__(
        self,
        *,
        settings: Settings,
        channel: str,
        group: str,
        consumer: str | None,
        redeliver_after_s: object,
        batch: object,
    ) -> None:
        self.name = _check_name("channel", channel)
        self.group = _check_name("group", group)
        self.consumer = _check_name("consumer", _own_name() if consumer is None else consumer)
        self.key = settings.redis_prefix + channel_key(self.name)
        self._bodies = Bodies.of(settings)
        if not isinstance(redeliver_after_s, int | float) or not 0 < redeliver_after_s < 1e9:
            raise InvalidJob("redeliver_after_s", "must be a number of seconds above 0")
        if not isinstance(batch, int) or not 1 <= batch <= _BATCH_MAX:
            raise InvalidJob("batch", f"must be a number from 1 to {_BATCH_MAX}")
        self._redeliver_after_s = float(redeliver_after_s)
        self._batch = batch
        # Well inside the time after which the client takes a silent connection for a dead one.
        self._block_s = min(_BLOCK_S, settings.command_timeout_s / 2, self._redeliver_after_s / 4)
        self._look_at = 0.0
        self._ready: deque[tuple[float, Delivery]] = deque()
        #: What this process was given and has not acknowledged, and when, the oldest first.
        self._held: dict[str, float] = {}
        self._unreadable: list[str] = []
        self._failures = 0
        #: Why Redis has not answered the last time; empty if it has.
        self.problem = ""
        self._said_at = -_SAY_S
        self._begin(_Phase.GROUP)

    def _begin(self, phase: _Phase) -> None:
        self._phase = phase
        #: Pending entries, and how often they were given: looked up, and to be taken next.
        self._found: dict[bytes, int] = {}
        self._from = "-"

    def take(self, now: float) -> Delivery | None:
        """Return the next delivery that is here; None if Redis is to be asked."""
        while self._ready:
            since, delivery = self._ready.popleft()
            # What has waited here for too long may be another consumer's by now. If it is not, it
            # comes again.
            if now - since < self._redeliver_after_s:
                return delivery
        return None

    def acknowledged(self, entry: str) -> None:
        """Note that the group does not get this entry again."""
        self._held.pop(entry, None)

    def plan(self, now: float, left_s: float | None) -> Call:
        """Return what to ask Redis now; it blocks for `left_s` at most."""
        if self._unreadable:
            return Call("xack", (self.key, self.group, *self._unreadable), {})
        if self._phase is _Phase.NEW and now >= self._look_at:
            self._begin(_Phase.LEFT)
        group = (self.key, self.group)
        idle_ms = max(1, round(self._redeliver_after_s * 1000)) if self._phase is _Phase.LEFT else 0
        if self._found:
            # Of two consumers that found the same, one gets it: for the other it is not idle.
            return Call("xclaim", (*group, self.consumer, idle_ms, list(self._found)), {})
        match self._phase:
            case _Phase.GROUP:
                return Call("xgroup_create", (*group, "0"), {"mkstream": True})
            case _Phase.OWN:
                own = {"consumername": self.consumer}
                return Call("xpending_range", (*group, self._from, "+", self._batch), own)
            case _Phase.LEFT:
                left = {"idle": idle_ms}
                return Call("xpending_range", (*group, self._from, "+", self._batch), left)
            case _Phase.NEW:
                block_s = self._block_s if left_s is None else min(self._block_s, left_s)
                # 0 would block for ever.
                options = {"count": self._batch, "block": round(block_s * 1000) or None}
                return Call("xreadgroup", (self.group, self.consumer, {self.key: ">"}), options)

    def accept(self, answer: Any, now: float) -> bool:
        """Take in what Redis answered; return whether it has nothing more just now."""
        self._failures = 0
        self.problem = ""
        if self._unreadable:
            self._unreadable = []
        elif self._found:
            for entry, values in answer:
                self._add(entry, values, self._found.get(entry, 0) + 1, now)
            self._found = {}
        elif self._phase is _Phase.GROUP:
            self._begin(_Phase.OWN)
        elif self._phase is _Phase.NEW:
            entries = [one for _, found in answer for one in found]
            for entry, values in entries:
                self._add(entry, values, 1, now)
            return not entries
        elif answer:
            self._accept_pending(answer)
        else:
            self._forget_held(now)
            self._look_at = now + self._redeliver_after_s / 4
            self._begin(_Phase.LEFT if self._phase is _Phase.OWN else _Phase.NEW)
        return False

    def _accept_pending(self, found: list[dict[str, Any]]) -> None:
        self._from = f"({found[-1]['message_id'].decode()}"
        own = self._phase is _Phase.OWN
        self._found = {
            one["message_id"]: one["times_delivered"]
            for one in found
            # What this process has in hand is not given twice.
            if not (own and one["message_id"].decode() in self._held)
        }

    def _forget_held(self, now: float) -> None:
        """Forget what was held for so long that any consumer may be given it."""
        for entry, since in list(self._held.items()):
            if now - since < self._redeliver_after_s:
                return
            self._held.pop(entry, None)

    def _add(
        self, entry: bytes, values: dict[bytes, bytes] | None, deliveries: int, now: float
    ) -> None:
        name = entry.decode()
        try:
            delivery = _read(name, values or {}, deliveries, self._bodies)
        except SecretUnreadable:
            # It stays with this consumer, or another one that has the key.
            raise
        except (KeyError, TypeError, ValueError):
            last = deliveries >= _UNREADABLE_TRIES
            log.error(
                "entry %s of reply channel %s (job %s) cannot be read by this version%s",
                name,
                self.name,
                (values or {}).get(JOB_FIELD, b"?").decode(errors="replace"),
                ", and is left out: `sluice job show` has its result" if last else "",
            )
            if last:
                self._unreadable.append(name)
            return
        self._held.pop(name, None)
        self._held[name] = now
        self._ready.append((now, delivery))

    def failed(self, error: BaseException, now: float) -> float:
        """Note that there is no answer; return the seconds to wait before the next try."""
        text = str(error)
        if self._phase is _Phase.GROUP and "BUSYGROUP" in text:
            self._begin(_Phase.OWN)
            return 0.0
        if "NOGROUP" in text or "UNBLOCKED" in text:
            # Redis has lost its data: what is not acknowledged comes anew.
            self._begin(_Phase.GROUP)
            self._ready.clear()
            self._held.clear()
        elif self._phase is not _Phase.GROUP:
            # The answer that was lost may have given entries to this consumer.
            self._begin(_Phase.OWN)
        self._failures += 1
        self.problem = text
        if now - self._said_at >= _SAY_S:
            self._said_at = now
            log.warning("reply channel %s cannot be read just now: %s", self.name, text)
        longest_s = min(_PAUSE_S, 0.05 * 2.0 ** min(self._failures, 10))
        return longest_s * random.uniform(0.5, 1)  # noqa: S311 - it only spreads the tries


def _read(entry: str, values: Mapping[bytes, bytes], deliveries: int, bodies: Bodies) -> Delivery:
    found = orjson.loads(values[REPLY_FIELD])
    ended = {name: found[name] for name in ("state", "created_at", "finished_at")}
    return Delivery(
        id=entry,
        result=Result.model_validate(
            {**bodies.open_result(found["result"]), **ended, "job_id": values[JOB_FIELD].decode()}
        ),
        metadata=bodies.open_metadata(found["metadata"]),
        idempotency_key=found["idempotency_key"],
        request_id=found["request_id"],
        deliveries=deliveries,
    )


def _check_name(name: str, value: object) -> str:
    try:
        return _NAME.validate_python(value, strict=True)
    except ValidationError:
        raise InvalidJob(
            name,
            "must be 1 to 128 letters, digits, or . _ : -, with a letter or a digit first",
        ) from None


def _own_name() -> str:
    host = re.sub(r"[^A-Za-z0-9.-]", "-", socket.gethostname())[:64].lstrip(".-")
    return f"{host or 'host'}-{os.getpid()}-{uuid4().hex[:8]}"
