"""Storing a batch: rows of any number with COPY, in one transaction and in constant memory.

All is stored or nothing, whatever ends the process. The connection is one of its own, open while
the rows are read; the sweep hears of the jobs when they are committed.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Final, NamedTuple, Protocol
from uuid import UUID

import psycopg
from psycopg.rows import namedtuple_row

from sluicegate.producers.bulk import Form, Row
from sluicegate.producers.storing import FIND
from sluicegate.producers.submission import (
    FIND_ACCOUNTS,
    Desk,
    Draft,
    account_parameters,
    read_request,
)
from sluicegate.shared.catalogue import Catalogue
from sluicegate.shared.database import BY_SIZE, connect_options, explain
from sluicegate.shared.errors import (
    IdempotencyConflict,
    InvalidJob,
    QueueUnavailable,
    SluiceError,
)
from sluicegate.shared.ids import new_id
from sluicegate.shared.jobs import Lane
from sluicegate.shared.queues import STAGE_CHANNEL
from sluicegate.shared.settings import Settings

#: Rows that are checked before they are written, and bytes of them unless a single one is larger.
_BLOCK_ROWS = 5000
_BLOCK_BYTES = 8_000_000
_ACCOUNTS_KEPT = 10_000
_NAME_CHARACTERS = 255

_JOB_TYPES: Final = {
    "id": "uuid",
    "account_id": "uuid",
    "use_case": "text",
    "lane": "text",
    "queue": "text",
    "state": "text",
    "max_attempts": "int2",
    "deadline_at": "timestamptz",
    "idempotency_key": "text",
    "request_hash": "bytea",
    "submitted_by": "text",
    "submitted_from": "text",
    "request_id": "text",
    "reply_to": "text",
    "batch_id": "uuid",
    "batch_line": "int4",
}
_COPY_JOBS = f"COPY jobs ({', '.join(_JOB_TYPES)}) FROM STDIN (FORMAT BINARY)"
_COPY_BODIES = "COPY job_bodies (job_id, request) FROM STDIN (FORMAT BINARY)"

# How many jobs there are is known at the end, and nobody sees the row before.
_ENTER = """
INSERT INTO batches (id, account_id, name, use_case, submitted_by, total)
VALUES (%(id)s, %(account_id)s, %(name)s, %(use_case)s, %(submitted_by)s, 1)
RETURNING created_at
"""
_FINISH = f"""
WITH wake AS (SELECT pg_notify('{STAGE_CHANNEL}', ''))
UPDATE batches
SET total = %(total)s, rejected = %(rejected)s, idempotency_key = %(idempotency_key)s
FROM wake WHERE id = %(id)s
"""
_FIND_BATCH = """
SELECT id, total, rejected FROM batches
WHERE id = %(id)s OR (account_id = %(account_id)s AND idempotency_key = %(idempotency_key)s)
"""


class Stored(NamedTuple):
    """What became of the rows; `is_new` tells that this call has stored the batch."""

    batch_id: UUID
    is_new: bool
    jobs: int
    #: Rows that can be no job, and rows that were submitted before.
    rejected: int
    repeated: int


class Rejects(Protocol):
    """What is done with rows that are not stored. An error ends it all, and nothing is stored."""

    def reject(self, row: Row, error: SluiceError) -> None:
        """Note a row that cannot be a job."""

    def repeat(self, row: Row, job_id: UUID) -> None:
        """Note a row whose idempotency key says that it was submitted before, as this job."""

    def nothing_left(self) -> SluiceError:
        """Return the error that says why no row is left to store."""


@dataclass(kw_only=True)
class _Block:
    """Rows that are checked and not yet written."""

    #: Those that cannot be jobs too, so that rows are rejected in their order.
    rows: list[tuple[Row, Draft | InvalidJob]] = field(default_factory=list)
    size_bytes: int = 0

    def add(self, row: Row, checked: Draft | InvalidJob) -> None:
        self.rows.append((row, checked))
        self.size_bytes += len(row.raw)
        if isinstance(checked, Draft):
            self.size_bytes += len(checked.request)

    @property
    def is_full(self) -> bool:
        return len(self.rows) >= _BLOCK_ROWS or self.size_bytes >= _BLOCK_BYTES


def store_batch(
    rows: Iterable[Row],
    *,
    settings: Settings,
    catalogue: Catalogue,
    form: Form,
    name: str,
    rejects: Rejects,
    key: Callable[[], str | None],
) -> Stored:
    """Check and store rows as the jobs of one batch; blocks until they are committed.

    `key` tells the batch's idempotency key, when the rows have been read and, if it is known by
    then, before: a batch that has it already is returned, and nothing is stored.

    Raises `InvalidJob` if no row could be stored with these options, `IdempotencyConflict`,
    whatever `rejects` raises, and `QueueUnavailable` that says what is known to be stored.
    """
    if not name.isprintable() or len(name) > _NAME_CHARACTERS:
        raise InvalidJob(
            "name", f"must be at most {_NAME_CHARACTERS} characters without control characters"
        )
    storing = _Storing(settings=settings, catalogue=catalogue, form=form, rejects=rejects)
    committing = False
    try:
        dsn, options = connect_options(settings, "sluice bulk", BY_SIZE)
        with psycopg.connect(dsn, row_factory=namedtuple_row, **options) as connection:
            connection.isolation_level = psycopg.IsolationLevel.READ_COMMITTED
            storing.check_common(connection)
            if (standing := storing.find(connection, key())) is not None:
                return standing
            try:
                storing.enter(connection, name)
                storing.store(connection, rows)
                storing.finish(connection, key())
            except (psycopg.errors.UniqueViolation, psycopg.errors.DeadlockDetected) as error:
                connection.rollback()
                if (standing := storing.find(connection, key())) is not None:
                    return standing
                raise IdempotencyConflict(
                    "an idempotency key of these rows was used by somebody else just now; "
                    "nothing is stored, submit again"
                ) from error
            committing = True
            connection.commit()
    except psycopg.Error as error:
        if not committing:
            explained = explain(error)
            if isinstance(explained, QueueUnavailable):
                explained = QueueUnavailable(f"{explained}; nothing of the batch is stored")
            raise explained from error
        if not storing.is_committed():
            raise QueueUnavailable(
                "Postgres did not say whether it has stored the batch; look for "
                f"{storing.batch_id} with `sluice bulk list`, or submit the same again, which "
                "stores nothing twice"
            ) from error
    return storing.stored


class _Storing:
    """One batch on its way."""

    def __init__(
        self, *, settings: Settings, catalogue: Catalogue, form: Form, rejects: Rejects
    ) -> None:
        self.batch_id = new_id()
        self._settings = settings
        self._catalogue = catalogue
        self._form = form
        self._rejects = rejects
        self._accounts: dict[str, UUID] = {}
        self._desk = Desk(settings=settings, catalogue=catalogue, accounts=self._accounts)
        self._host = socket.gethostname()
        #: The transaction's time, on Postgres' clock.
        self._now = datetime.now(UTC)
        self._jobs = self._rejected = self._repeated = 0

    @property
    def stored(self) -> Stored:
        return Stored(self.batch_id, True, self._jobs, self._rejected, self._repeated)

    def check_common(self, connection: psycopg.Connection[Any]) -> None:
        """Check what all rows have in common."""
        common = read_request(self._form.use_case, "-", {**self._form.common, "lane": Lane.BULK})
        self._know(connection, common.terms.account)
        draft = self._desk.draft(common)
        self._account_id = draft.account_id
        self._submitted_by = draft.submitted_by

    def find(self, connection: psycopg.Connection[Any], key: str | None) -> Stored | None:
        """Return the batch that has this key already."""
        if key is None:
            return None
        values = {"id": None, "account_id": self._account_id, "idempotency_key": key}
        row = connection.execute(_FIND_BATCH, values).fetchone()
        return None if row is None else Stored(row.id, False, row.total, row.rejected, 0)

    def enter(self, connection: psycopg.Connection[Any], name: str) -> None:
        """Enter the batch, for its jobs to refer to."""
        values = {
            "id": self.batch_id,
            "account_id": self._account_id,
            "name": name,
            "use_case": self._form.use_case,
            "submitted_by": self._submitted_by,
        }
        row = connection.execute(_ENTER, values).fetchone()
        assert row is not None
        self._now = row.created_at

    def store(self, connection: psycopg.Connection[Any], rows: Iterable[Row]) -> None:
        """Check the rows, and write those that can be jobs, block by block."""
        block = _Block()
        for row in rows:
            block.add(row, self._check(connection, row))
            if block.is_full:
                self._write(connection, block)
                block = _Block()
        self._write(connection, block)

    def finish(self, connection: psycopg.Connection[Any], key: str | None) -> None:
        """Enter what is known at the end, and wake the stager once it is committed."""
        if not self._jobs:
            raise self._rejects.nothing_left()
        values = {
            "id": self.batch_id,
            "total": self._jobs,
            "rejected": self._rejected,
            "idempotency_key": key,
        }
        connection.execute(_FINISH, values)

    def is_committed(self) -> bool:
        """Whether the batch is there, as far as can be known."""
        dsn, options = connect_options(self._settings, "sluice bulk", BY_SIZE)
        values = {"id": self.batch_id, "account_id": None, "idempotency_key": None}
        with suppress(psycopg.Error), psycopg.connect(dsn, autocommit=True, **options) as line:
            return line.execute(_FIND_BATCH, values).fetchone() is not None
        return False

    def _check(self, connection: psycopg.Connection[Any], row: Row) -> Draft | InvalidJob:
        if row.problem:
            return InvalidJob("row", row.problem)
        try:
            request = self._form.request(row.values)
            self._know(connection, request.terms.account)
            return self._desk.draft(request)
        except InvalidJob as error:
            return error

    def _know(self, connection: psycopg.Connection[Any], account: str) -> None:
        if account in self._accounts:
            return
        if len(self._accounts) >= _ACCOUNTS_KEPT:
            self._accounts.clear()
        found = connection.execute(FIND_ACCOUNTS, account_parameters([account]))
        self._accounts.update((row.name, row.id) for row in found)

    def _reject(self, row: Row, error: SluiceError) -> None:
        self._rejected += 1
        self._rejects.reject(row, error)

    def _write(self, connection: psycopg.Connection[Any], block: _Block) -> None:
        rows = self._new(connection, block.rows)
        self._jobs += len(rows)
        cursor = connection.cursor()
        with cursor.copy(_COPY_JOBS) as copy:
            copy.set_types(list(_JOB_TYPES.values()))
            for row, draft in rows:
                copy.write_row(
                    (
                        draft.id,
                        draft.account_id,
                        draft.use_case,
                        draft.lane.value,
                        draft.queue,
                        draft.state.value,
                        draft.max_attempts,
                        self._now + timedelta(seconds=draft.deadline_s),
                        draft.idempotency_key,
                        draft.request_hash,
                        draft.submitted_by,
                        self._host,
                        draft.request_id,
                        draft.reply_to,
                        self.batch_id,
                        row.line,
                    )
                )
        with cursor.copy(_COPY_BODIES) as copy:
            # On the wire JSON is its text.
            copy.set_types(["uuid", "bytea"])
            for _, draft in rows:
                copy.write_row((draft.id, draft.request))

    def _new(
        self, connection: psycopg.Connection[Any], rows: list[tuple[Row, Draft | InvalidJob]]
    ) -> list[tuple[Row, Draft]]:
        """Leave out rows that cannot be jobs, and those whose key has a job.

        Its own is the same job, another's a conflict.
        """
        standing = self._standing(connection, [one for _, one in rows if isinstance(one, Draft)])
        left = []
        for row, draft in rows:
            if isinstance(draft, InvalidJob):
                self._reject(row, draft)
                continue
            if draft.idempotency_key is not None:
                own = draft.id, draft.request_hash
                job_id, request_hash = standing.setdefault(
                    (draft.account_id, draft.idempotency_key), own
                )
                if request_hash != draft.request_hash:
                    self._reject(row, _conflict(draft))
                    continue
                if job_id != draft.id:
                    self._repeated += 1
                    self._rejects.repeat(row, job_id)
                    continue
            left.append((row, draft))
        return left

    def _standing(
        self, connection: psycopg.Connection[Any], drafts: list[Draft]
    ) -> dict[tuple[UUID, str | None], tuple[UUID, bytes]]:
        """Return the jobs that have the keys of these already: by key, id and hash."""
        keyed = [draft for draft in drafts if draft.idempotency_key is not None]
        if not keyed:
            return {}
        columns = {
            name: [getattr(draft, name) for draft in keyed]
            for name in ("id", "account_id", "idempotency_key")
        }
        ids = {draft.id: draft for draft in keyed}
        return {
            (ids[row.draft_id].account_id, ids[row.draft_id].idempotency_key): (
                row.id,
                bytes(row.request_hash),
            )
            for row in connection.execute(FIND, columns)
        }


def _conflict(draft: Draft) -> IdempotencyConflict:
    return IdempotencyConflict(
        f"idempotency key {draft.idempotency_key!r} was used before with another request; use a "
        "new key"
    )
