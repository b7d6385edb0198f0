"""Replies as a reader sees them: results from Postgres, events from reply channels. No I/O here.

A reader's place in a channel is a `Subscription`. It is fed from the job's Redis Stream, and
Postgres is asked every `reply_recheck_s` whether the job has ended meanwhile, so a lost event, a
flushed Redis or an expired stream delays the end of a wait but never prevents it. `Channels` holds
all subscriptions of a process and decides; `sluicegate.shared.reply_reader` moves the bytes.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol
from uuid import UUID, uuid4

from pydantic import ValidationError
from sqlalchemy import Row

from sluicegate.shared.bodies import IN_THE_CLEAR, Bodies
from sluicegate.shared.errors import InvalidJob, NotFound, SluiceError
from sluicegate.shared.events import (
    FIELD,
    TERMINAL_N,
    Event,
    decode,
    event_id,
    id_key,
    reply_key,
    terminal_event,
)
from sluicegate.shared.jobs import Result, State
from sluicegate.shared.secrets import SecretUnreadable

log = logging.getLogger(__name__)

#: How the jobs of `%(job_ids)s` ended, or that they have not: rows for `load_result`.
RESULT_QUERY: Final = """
SELECT j.id AS job_id, j.state, j.created_at, j.finished_at, r.fence, r.body,
       extract(epoch FROM clock_timestamp() - j.finished_at)::float8 AS ended_s
FROM jobs j LEFT JOIN results r ON r.job_id = j.id
WHERE j.id = ANY(%(job_ids)s)
"""

#: Events that wait for a slow consumer; its stream is read on when half of them are taken.
_BUFFER_EVENTS = 1000
_BEGINNING: Final = (0, 0)
#: Jobs that one look at Postgres asks for.
_CHECK_JOBS = 1000
#: Between a settlement's commit and the terminal event's arrival; then the event counts as lost.
_EVENT_GRACE_S = 2.0


def load_result(row: Row[Any], bodies: Bodies) -> Result | None:
    """Build the result from a row of `RESULT_QUERY`; None while the job has not ended.

    Raises SecretUnreadable if it is sealed with a key that is not here.
    """
    if row.body is None or not State(row.state).terminal:
        return None
    return Result.model_validate(
        {
            **bodies.open_result(row.body),
            "job_id": row.job_id,
            "state": row.state,
            "created_at": row.created_at,
            "finished_at": row.finished_at,
        }
    )


def parse_event_id(last_id: str) -> tuple[int, int]:
    """Read the id a reader has seen last; raise `InvalidJob` if no event can have it."""
    try:
        fence, n = id_key(last_id)
    except (ValueError, AttributeError):
        fence, n = -1, -1
    if not (0 <= fence <= TERMINAL_N and 0 <= n <= TERMINAL_N):
        raise InvalidJob("last_id", "must be `0` or the id of an event, such as 3-17")
    return fence, n


class Signal(Protocol):
    """An event that somebody waits for: `threading.Event` or `asyncio.Event`."""

    def set(self) -> None:
        """Wake whoever waits."""


@dataclass(slots=True, eq=False)
class Subscription:
    """One reader's place in one reply channel."""

    job_id: UUID
    #: Set when there is something to `take`; the reader's own kind of event.
    signal: Signal
    #: On the monotonic clock.
    began_at: float = 0.0
    #: Id of the last event taken from the stream.
    cursor: tuple[int, int] = (0, 0)
    #: Leave everything out but the terminal event.
    terminal_only: bool = False
    #: When the row is looked at next, on the monotonic clock.
    check_at: float = 0.0
    #: Nothing is added any more.
    closed: bool = False
    #: The consumer is too slow: the stream is not read on for it.
    paused: bool = False
    #: Given out once the stream is dry: the row says that the job has ended.
    ending: Event | None = None
    _error: SluiceError | None = None
    _buffer: deque[Event] = field(default_factory=deque)

    def take(self) -> Event | None:
        """Return the next event, or None if it has not come yet; raise what ended the wait."""
        if self._buffer:
            return self._buffer.popleft()
        if self._error is not None:
            raise self._error
        return None

    def resume(self) -> bool:
        """Whether it was paused and the consumer has caught up, so that it is read on."""
        if not self.paused or self.terminal_only or len(self._buffer) > _BUFFER_EVENTS // 2:
            return False
        self.paused = False
        return True

    @property
    def drained(self) -> bool:
        """Whether it is over and everything was taken."""
        return self.closed and not self._buffer and self._error is None

    def offer(self, entry_id: str, fields: dict[bytes, bytes]) -> None:
        """Take in one entry of the stream; what was seen before is left out."""
        place = id_key(entry_id)
        if self.closed or self.paused or place <= self.cursor:
            return
        if len(self._buffer) >= _BUFFER_EVENTS:
            self.paused = True
            return
        self.cursor = place
        terminal = place[1] == TERMINAL_N
        if self.terminal_only and not terminal:
            return
        try:
            event = decode(entry_id, fields[FIELD])
        except (KeyError, ValidationError):
            # Nothing is lost with it: the terminal event holds the whole answer, and if it is
            # this one that cannot be read, the row has it.
            log.warning("event %s of job %s cannot be read and is left out", entry_id, self.job_id)
            if terminal:
                self.terminal_only = self.paused = True
                self.cursor, self.check_at = (place[0], place[1] - 1), 0.0
            return
        self._buffer.append(event)
        self.closed = event.terminal
        self.signal.set()

    def end(self, event: Event) -> None:
        """Close it with the terminal event, unless the reader has seen that before."""
        if not self.closed and id_key(event.id) > self.cursor:
            self._buffer.append(event)
        self.closed = True
        self.signal.set()

    def fail(self, error: SluiceError) -> None:
        """Close it with an error."""
        if not self.closed:
            self._error = error
        self.closed = True
        self.signal.set()


class Channels:
    """All subscriptions of a process: what to read, whom it is for, which rows to look at."""

    def __init__(self, prefix: str, bodies: Bodies = IN_THE_CLEAR) -> None:
        self._prefix = prefix
        self._bodies = bodies
        self._lock = threading.Lock()
        self._by_key: dict[bytes, list[Subscription]] = {}
        # A stream of this reader's own: an entry in it ends the XREAD that waits.
        self.wake_key = f"{prefix}wake:{uuid4()}".encode()
        self._wake_id = b"0-0"
        self._reading = False
        #: Where the XREAD that waits has begun in each stream.
        self._read_from: dict[bytes, tuple[int, int]] = {}

    def __len__(self) -> int:
        return len(self._by_key)

    def add(self, subscription: Subscription) -> bool:
        """Add it; return whether the XREAD that waits has to be woken."""
        key = self._key(subscription)
        with self._lock:
            self._by_key.setdefault(key, []).append(subscription)
            return self._woken()

    def read_on(self) -> bool:
        """Note that something is to be read that was not; return as `add` does."""
        with self._lock:
            return self._woken()

    def _woken(self) -> bool:
        # One wake-up is enough until the next XREAD is planned.
        asleep, self._reading = self._reading, False
        return asleep

    def remove(self, subscription: Subscription) -> None:
        """Read nothing more for it."""
        key = self._key(subscription)
        with self._lock:
            left = [other for other in self._by_key.get(key, ()) if other is not subscription]
            if left:
                self._by_key[key] = left
            else:
                self._by_key.pop(key, None)

    def plan(self) -> tuple[dict[bytes, bytes | str], list[Subscription]]:
        """Return the streams to read, each from an id on, and who ends if they are dry."""
        streams: dict[bytes, bytes | str] = {}
        ending: list[Subscription] = []
        with self._lock:
            self._reading = True
            self._read_from.clear()
            for key, readers in self._by_key.items():
                reading = [one for one in readers if not one.closed and not one.paused]
                if not reading:
                    continue
                place = min([one.cursor for one in reading]) if reading[1:] else reading[0].cursor
                self._read_from[key] = place
                # Most wait for the first event.
                streams[key] = event_id(*place) if place > _BEGINNING else "0-0"
                ending += [one for one in readers if one.ending and not one.paused]
            streams[self.wake_key] = self._wake_id
        return streams, ending

    def accept(self, reply: Iterable[Any], ending: Iterable[Subscription]) -> None:
        """Give out what an XREAD returned, and end those whose streams it found dry."""
        with self._lock:
            self._reading = False
            places = {id(one): one.cursor for one in ending}
            touched = {self._key(one) for one in ending}
            for key, entries in reply:
                if key == self.wake_key:
                    self._wake_id = entries[-1][0]
                    continue
                touched.add(key)
                begun = self._read_from.get(key, (0, 0))
                for one in self._by_key.get(key, ()):
                    if one.cursor < begun:
                        continue  # it came since, and what it wants first is not in this reply
                    for entry_id, fields in entries:
                        one.offer(entry_id.decode(), fields)
            for one in ending:
                if one.ending is not None and one.cursor == places[id(one)]:
                    one.end(one.ending)
            self._drop_closed(touched)

    def due(self, now: float) -> list[UUID]:
        """Return the jobs whose rows are to be looked at."""
        with self._lock:
            jobs = {
                one.job_id
                for readers in self._by_key.values()
                for one in readers
                if one.check_at <= now and one.ending is None
            }
        return list(jobs)[:_CHECK_JOBS]

    def next_check_at(self) -> float | None:
        """Return when the next row is due, on the monotonic clock."""
        with self._lock:
            return min(
                (
                    one.check_at
                    for readers in self._by_key.values()
                    for one in readers
                    if one.ending is None
                ),
                default=None,
            )

    def postpone(self, jobs: Sequence[UUID], until: float) -> None:
        """Look at the rows of these later."""
        with self._lock:
            for one in self._of(jobs):
                one.check_at = until

    def answer(
        self, jobs: Sequence[UUID], rows: Iterable[Row[Any]], now: float, recheck_s: float
    ) -> bool:
        """Give out what the rows say; return whether the XREAD has to be woken, as `add` does."""
        found = {row.job_id: row for row in rows}
        draining = False
        with self._lock:
            readers = self._of(jobs)
            for one in readers:
                one.check_at = now + recheck_s
                row = found.get(one.job_id)
                if row is None:
                    one.fail(NotFound(f"there is no job {one.job_id}"))
                    continue
                try:
                    result = load_result(row, self._bodies)
                except SecretUnreadable as error:
                    one.fail(error)
                    continue
                except ValidationError as error:
                    log.error("the result of job %s cannot be read: %s", one.job_id, error)
                    one.fail(SluiceError(f"the result of job {one.job_id} cannot be read"))
                    continue
                if result is None:
                    continue
                event = terminal_event(row.fence, result)
                if one.terminal_only or id_key(event.id) <= one.cursor:
                    one.end(event)
                elif row.ended_s < _EVENT_GRACE_S:
                    # Its last events may still be under way: everybody sees the same sequence.
                    one.check_at = now + _EVENT_GRACE_S / 2
                else:
                    one.ending = event
                    draining = True
            self._drop_closed({self._key(one) for one in readers})
            return draining and self._woken()

    def fail(self, error: SluiceError) -> None:
        """End every wait with this error."""
        with self._lock:
            for readers in self._by_key.values():
                for one in readers:
                    one.fail(error)
            self._by_key.clear()

    def _key(self, subscription: Subscription) -> bytes:
        return (self._prefix + reply_key(subscription.job_id)).encode()

    def _of(self, jobs: Sequence[UUID]) -> list[Subscription]:
        keys = ((self._prefix + reply_key(job_id)).encode() for job_id in jobs)
        return [one for key in keys for one in self._by_key.get(key, ())]

    def _drop_closed(self, keys: Iterable[bytes]) -> None:
        for key in keys:
            left = [one for one in self._by_key.get(key, ()) if not one.closed]
            if left:
                self._by_key[key] = left
            else:
                self._by_key.pop(key, None)
