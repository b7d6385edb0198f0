"""Erasing an account: all that is personal of it goes, at once; what it cost stays, nameless.

First it gets no new jobs and those that are not over are cancelled; then, batch by batch, its jobs
are erased; last its own settings go and it loses its name. Each step may be repeated, so whoever
was cut off begins again and goes on from there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final
from uuid import UUID

import orjson
import redis
from celery import Celery
from sqlalchemy import Connection, Row

from sluicegate.producers.steering import CANCEL
from sluicegate.producers.submission import ACCOUNTS_KEPT_S
from sluicegate.producers.telling import tell_worker
from sluicegate.shared.accounts import DEFAULT_ACCOUNT, find_account
from sluicegate.shared.alerts import alert_key
from sluicegate.shared.errors import SluiceError
from sluicegate.shared.events import reply_key
from sluicegate.shared.ids import first_id, new_id
from sluicegate.shared.purging import ERASE_JOBS, PURGE_BATCH
from sluicegate.shared.queues import JOURNAL_FIELD, JOURNAL_KEY
from sluicegate.shared.reply_channels import JOB_FIELD, channel_key

#: How long running calls, and answers that are not booked yet, are waited for.
_PATIENCE_S: Final = 60.0
#: From when on no client submits for an account that is not active: each knows by then. Half a
#: second more is for what is on its way.
_CLOSED_AFTER_S: Final = ACCOUNTS_KEPT_S + 0.5
_LOOK_S: Final = 0.25
#: Submitters make the ids of jobs, by clocks that may be off by so much.
_CLOCKS_DIFFER: Final = timedelta(hours=1)
_PAGE: Final = 1000
_ENTRIES: Final = 200
_FIRST: Final = UUID(int=0)

_CLOSE: Final = "UPDATE accounts SET is_active = false WHERE id = %(account_id)s"

_NOT_OVER: Final = f"""
SELECT id FROM jobs
WHERE account_id = %(account_id)s AND id > %(after)s AND state IN ('queued', 'parked', 'running')
ORDER BY id LIMIT {_PAGE}
"""
_RUNNING: Final = "SELECT id FROM jobs WHERE id = ANY(%(job_ids)s) AND state = 'running'"
_OURS: Final = "SELECT id FROM jobs WHERE id = ANY(%(job_ids)s) AND account_id = %(account_id)s"
# An attempt that the sweep has booked in full has nothing to say any more.
_UNBOOKED: Final = """
SELECT DISTINCT job_id FROM attempts WHERE job_id = ANY(%(job_ids)s) AND state = 'dispatching'
"""

_COUNT: Final = "SELECT count(*) FROM jobs WHERE account_id = %(account_id)s"
_NEXT: Final = f"""
SELECT id, reply_to FROM jobs WHERE account_id = %(account_id)s AND id > %(after)s
ORDER BY id LIMIT {PURGE_BATCH}
"""
_OWN: Final = "SELECT id FROM llm_providers WHERE account_id = %(account_id)s"

_BATCHES: Final = f"""
UPDATE batches SET name = 'erased', submitted_by = NULL, idempotency_key = NULL
WHERE id IN (
    SELECT id FROM batches
    WHERE account_id = %(account_id)s
      AND (name <> 'erased' OR submitted_by IS NOT NULL OR idempotency_key IS NOT NULL)
    LIMIT {_PAGE})
"""

#: What is the account's own, in one transaction: as long as it has its name it can be found by it.
_FAREWELL: Final = (
    """
WITH alert AS (
    SELECT id FROM alerts WHERE account_id = %(account_id)s OR provider_id = ANY(%(own)s)
    ORDER BY id FOR NO KEY UPDATE
)
UPDATE alerts a
SET message = 'erased', post_error = NULL, post_due_at = NULL,
    told_at = coalesce(told_at, now()), resolved_at = coalesce(resolved_at, now())
FROM alert WHERE a.id = alert.id
""",
    """
UPDATE gate_changes SET reason = ''
WHERE reason <> '' AND (account_id = %(account_id)s OR provider_id = ANY(%(own)s))
""",
    "DELETE FROM provider_keys WHERE account_id = %(account_id)s",
    "DELETE FROM api_keys WHERE account_id = %(account_id)s",
    "DELETE FROM llm_providers WHERE account_id = %(account_id)s",
    """
UPDATE accounts
SET name = %(erased_name)s, is_active = false, alert_url = NULL, alert_secret_encrypted = NULL,
    erased_at = coalesce(erased_at, now())
WHERE id = %(account_id)s
""",
    # Its removal was noted with all it had. That something was changed, and when, stays.
    """
UPDATE audit_entries
SET before = NULL, after = NULL, subject = 'erased',
    actor = CASE WHEN actor LIKE 'jwt:%%' THEN 'erased' ELSE actor END
WHERE account_id = %(account_id)s
""",
    # Jobs that name no account are submitted for this one.
    f"""
INSERT INTO accounts (id, name) SELECT %(new_id)s, '{DEFAULT_ACCOUNT}'
WHERE %(was_default)s ON CONFLICT (name) DO NOTHING
""",
)


@dataclass(slots=True, kw_only=True)
class Erasure:
    """How far it is; what it was once it is done."""

    account_id: UUID
    #: What the account was called, and what it is called now.
    name: str
    erased_name: str
    #: Jobs it has in all, those that were looked at, erased now, and cancelled for it.
    total: int = 0
    done: int = 0
    erased: int = 0
    cancelled: int = 0
    #: What it waits for just now, for people; empty while it works.
    waits_for: str = ""

    def as_json(self) -> dict[str, Any]:
        """Return what was done."""
        return {
            "id": str(self.account_id),
            "name": self.erased_name,
            "jobs": self.total,
            "erased": self.erased,
            "cancelled": self.cancelled,
        }


class Eraser:
    """Erases one account; made for one `run`.

    The connection is in autocommit. `progress` is told after each step how far it is.
    """

    def __init__(
        self,
        *,
        connection: Connection,
        client: redis.Redis,
        app: Celery,
        prefix: str,
        account: str,
        progress: Callable[[Erasure], None],
    ) -> None:
        """Find the account; raises `NotFound`."""
        self._connection = connection
        self._client = client
        self._app = app
        self._prefix = prefix
        self._progress = progress
        #: Shared channels that its jobs were to answer to.
        self._channels: set[str] = set()
        found = find_account(connection, account)
        self.erasure = Erasure(
            account_id=found.id,
            name=found.name,
            erased_name=f"erased-{found.id.hex[-12:]}",
        )

    def run(self) -> Erasure:
        """Erase; raises `SluiceError` if something still runs after all that patience.

        Nothing is erased then, but the account gets no new jobs. What Postgres and Redis raise
        comes as it is.
        """
        erasure = self.erasure
        self._close()
        erasure.total = int(self._rows(_COUNT)[0][0])
        own = [row.id for row in self._rows(_OWN)]
        for page in self._pages():
            (found,) = self._rows(ERASE_JOBS, job_ids=[row.id for row in page], own=own)
            self._client.unlink(*(self._prefix + reply_key(row.id) for row in page))
            erasure.erased += int(found.erased)
            erasure.done += len(page)
            self._progress(erasure)
        # What the deliverer had read before is in the channels by now.
        if self._channels:
            time.sleep(_LOOK_S)
        for channel in self._channels:
            self._clear_channel(channel)
        self._say_farewell(own)
        return erasure

    # Before: nothing of it is to change any more

    def _close(self) -> None:
        """Have it get no new jobs, and wait until all that it has are over and booked."""
        erasure = self.erasure
        is_erased = erasure.name == erasure.erased_name
        began_at = time.monotonic()
        self._execute(_CLOSE)
        known_at = began_at if is_erased else began_at + _CLOSED_AFTER_S
        running = self._cancel(_FIRST)
        recent = first_id(datetime.now(UTC) - _CLOCKS_DIFFER)
        while True:
            now = time.monotonic()
            late = now > max(began_at + _PATIENCE_S, known_at)
            running |= self._cancel(recent)
            running = {row.id for row in self._rows(_RUNNING, job_ids=list(running))}
            journaled = set() if running else self._journaled(remove_booked=late)
            if not running and not journaled and now >= known_at:
                break
            if late:
                raise self._too_late(running, journaled)
            erasure.waits_for = (
                f"{len(running)} calls to be cut off"
                if running
                else "answers in the journal"
                if journaled
                else "clients to know that it is closed"
            )
            self._progress(erasure)
            time.sleep(_LOOK_S)
        erasure.waits_for = ""

    def _too_late(self, running: set[UUID], journaled: set[UUID]) -> SluiceError:
        what = (
            f"jobs of it still run ({len(running)}), their workers were not heard of"
            if running
            else f"answers to jobs of it ({len(journaled)}) are not booked yet"
        )
        return SluiceError(
            f"{self.erasure.name} gets no new jobs, but nothing of it is erased: {what}; see that "
            "the sweep runs, and erase it again"
        )

    def _cancel(self, after: UUID) -> set[UUID]:
        """Cancel its jobs behind this id that are not over; return those that run."""
        running: dict[UUID, str | None] = {}
        while page := self._rows(_NOT_OVER, after=after):
            after = page[-1].id
            for row in self._rows(CANCEL, job_ids=[one.id for one in page]):
                if row.state == "running":
                    running[row.id] = row.worker
                else:
                    self.erasure.cancelled += row.fence is not None
            self._progress(self.erasure)
        for worker in {name for name in running.values() if name is not None}:
            tell_worker(self._app, worker, [one for one, name in running.items() if name == worker])
        return set(running)

    def _journaled(self, *, remove_booked: bool) -> set[UUID]:
        """Return its jobs of which the journal keeps an answer.

        remove_booked: take out those whose attempt has been booked as an estimate meanwhile.
        """
        left: set[UUID] = set()
        for entries in self._entries(self._prefix + JOURNAL_KEY):
            jobs = {
                entry: UUID(orjson.loads(fields[JOURNAL_FIELD])["job_id"])
                for entry, fields in entries
            }
            ours = self._ours(jobs.values())
            if remove_booked and ours:
                open_ = {row.job_id for row in self._rows(_UNBOOKED, job_ids=list(ours))}
                if booked := [entry for entry, job in jobs.items() if job in ours - open_]:
                    self._client.xdel(self._prefix + JOURNAL_KEY, *booked)
                ours &= open_
            left |= ours
        return left

    # The jobs, and what Redis holds of them

    def _pages(self) -> Iterator[Sequence[Row[Any]]]:
        after = _FIRST
        while page := self._rows(_NEXT, after=after):
            self._channels.update(row.reply_to for row in page if row.reply_to is not None)
            yield page
            after = page[-1].id

    def _clear_channel(self, name: str) -> None:
        """Take its results out of a shared channel; those of others stay."""
        key = self._prefix + channel_key(name)
        for entries in self._entries(key):
            jobs = {entry: UUID(fields[JOB_FIELD].decode()) for entry, fields in entries}
            ours = self._ours(jobs.values())
            if mine := [entry for entry, job in jobs.items() if job in ours]:
                self._client.xdel(key, *mine)

    def _entries(self, key: str) -> Iterator[list[tuple[bytes, dict[bytes, bytes]]]]:
        start = "-"
        while True:
            entries: Any = self._client.xrange(key, min=start, max="+", count=_ENTRIES)
            if not entries:
                return
            yield entries
            start = "(" + entries[-1][0].decode()

    def _ours(self, job_ids: Iterable[UUID]) -> set[UUID]:
        return {row.id for row in self._rows(_OURS, job_ids=list(job_ids))}

    # What is left: its name

    def _say_farewell(self, own: list[UUID]) -> None:
        while self._execute(_BATCHES) == _PAGE:
            pass
        erasure = self.erasure
        values = {
            "account_id": erasure.account_id,
            "own": own,
            "erased_name": erasure.erased_name,
            "new_id": new_id(),
            "was_default": erasure.name == DEFAULT_ACCOUNT,
        }
        connection = self._connection
        connection.commit()  # in autocommit that ends nothing but SQLAlchemy's own count
        connection.execution_options(isolation_level="READ COMMITTED")
        with connection.begin():
            for statement in _FAREWELL:
                connection.exec_driver_sql(statement, values)
        self._client.unlink(self._prefix + alert_key(erasure.account_id))

    def _rows(self, statement: str, **values: Any) -> Sequence[Row[Any]]:
        given = {"account_id": self.erasure.account_id, **values}
        return self._connection.exec_driver_sql(statement, given).all()

    def _execute(self, statement: str) -> int:
        values = {"account_id": self.erasure.account_id}
        return self._connection.exec_driver_sql(statement, values).rowcount
