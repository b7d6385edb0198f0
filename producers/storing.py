"""Storing drafts: a batch a statement, safe to repeat. No I/O here.

`insertion` stores, `FIND` tells what stood in the place of a draft, `accept` reads both answers.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from typing import Any, Final, NamedTuple
from uuid import UUID

import orjson
from sqlalchemy import Row

from sluicegate.producers.submission import Draft
from sluicegate.shared.celery_app import JobMessage
from sluicegate.shared.errors import IdempotencyConflict
from sluicegate.shared.jobs import State
from sluicegate.shared.queues import STAGE_CHANNEL

#: One statement stores at most so many jobs, and bytes of requests unless a single one is larger.
_BATCH_JOBS = 500
_BATCH_BYTES = 8_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted:
    """A job that is stored; `message` is what is to be published for it."""

    id: UUID
    is_new: bool
    message: JobMessage | None = None


class Stored(NamedTuple):
    """A row of `insertion` or `FIND` that came as JSON."""

    id: UUID
    published_at: datetime | None
    draft_id: UUID | None = None
    state: str = ""
    request_hash: bytes = b""


class Joining(NamedTuple):
    """Statements for a caller's connection, which looks for tables where the caller does.

    Each row is one text of JSON, for `load_stored`: how values are read there is the caller's too.
    """

    insert: str
    find: str
    #: Takes back what was stored, for all or none.
    take_back: str


_TYPES: Final = {
    "id": "uuid",
    "account_id": "uuid",
    "use_case": "text",
    "lane": "text",
    "queue": "text",
    "state": "text",
    "max_attempts": "smallint",
    "deadline_s": "float8",
    "idempotency_key": "text",
    "request_hash": "bytea",
    "request": "text",
    "submitted_by": "text",
    "request_id": "text",
    "reply_to": "text",
}
_MANY: Final = (
    f"SELECT * FROM unnest({', '.join(f'%({name})s::{kind}[]' for name, kind in _TYPES.items())})"
    f" AS g({', '.join(_TYPES)})"
)
#: Fourteen arrays of one value each would cost a fifth of a millisecond.
_ONE: Final = (
    f"SELECT {', '.join(f'%({name})s::{kind} AS {name}' for name, kind in _TYPES.items())}"
)

# Idempotent: repeated with the same ids it stores nothing, and RETURNING leaves out what was
# there before, be it by id or by idempotency key.
_INSERT: Final = """
WITH given AS (
    {given}
), stored AS (
    INSERT INTO {schema}jobs (
        id, account_id, use_case, lane, queue, state, max_attempts, deadline_at, published_at,
        idempotency_key, request_hash, submitted_by, submitted_from, request_id, reply_to)
    SELECT id, account_id, use_case, lane, queue, state, max_attempts,
           now() + make_interval(secs => deadline_s), CASE WHEN state = 'queued' THEN now() END,
           idempotency_key, request_hash, submitted_by, %(submitted_from)s, request_id, reply_to
    FROM given
    ON CONFLICT DO NOTHING
    RETURNING id, state, published_at
), bodies AS (
    INSERT INTO {schema}job_bodies (job_id, request)
    SELECT given.id, given.request::json FROM given JOIN stored USING (id)
)
SELECT {row}, CASE WHEN state = 'parked' THEN pg_notify('{channel}', '')::text END
FROM stored
"""

_FIND: Final = """
SELECT given.id AS draft_id, j.id, j.state, j.published_at, j.request_hash
FROM unnest(%(id)s::uuid[]) AS given(id) JOIN {schema}jobs j USING (id)
UNION
SELECT given.id, j.id, j.state, j.published_at, j.request_hash
FROM unnest(%(id)s::uuid[], %(account_id)s::uuid[], %(idempotency_key)s::text[])
     AS given(id, account_id, idempotency_key)
JOIN {schema}jobs j USING (account_id, idempotency_key)
"""

_TAKE_BACK: Final = """
DELETE FROM {schema}jobs
WHERE id = ANY(%(id)s::uuid[]) AND state IN ('queued', 'parked')
RETURNING id::text
"""

_ROW: Final = "id, published_at"
# Requests go as binary values: in an array of texts every quote of theirs is looked for, which for
# a large one takes a tenth of a second. A caller's own connection may know no binary values.
_INSERT_MANY: Final = _INSERT.format(
    schema="", row=_ROW, channel=STAGE_CHANNEL, given=_MANY.replace("%(request)s", "%(request)b")
)
_INSERT_ONE: Final = _INSERT.format(schema="", row=_ROW, channel=STAGE_CHANNEL, given=_ONE)

#: What stands where an insert stored nothing: the job itself, or another with its key.
FIND: Final = _FIND.format(schema="")


@cache
def joining(schema: str) -> Joining:
    """Return the statements for a connection of the caller's; our tables are in `schema`."""
    prefix = f'"{schema}".'
    row = "json_build_object('id', id, 'published_at', published_at)::text"
    find = _FIND.format(schema=prefix)
    return Joining(
        insert=_INSERT.format(schema=prefix, row=row, channel=STAGE_CHANNEL, given=_MANY),
        find=f"""
SELECT json_build_object(
    'id', id, 'published_at', published_at, 'draft_id', draft_id, 'state', state,
    'request_hash', encode(request_hash, 'hex'))::text
FROM ({find}) AS found""",
        take_back=_TAKE_BACK.format(schema=prefix),
    )


def load_stored(texts: Iterable[str]) -> list[Stored]:
    """Read the rows of a `Joining` statement."""
    return [_load(orjson.loads(text)) for text in texts]


def _load(row: dict[str, Any]) -> Stored:
    at = row["published_at"]
    return Stored(
        id=UUID(row["id"]),
        published_at=datetime.fromisoformat(at).astimezone(UTC) if at else None,
        draft_id=UUID(row["draft_id"]) if "draft_id" in row else None,
        state=row.get("state", ""),
        request_hash=bytes.fromhex(row.get("request_hash", "")),
    )


def batches(drafts: Sequence[Draft]) -> Iterator[Sequence[Draft]]:
    """Split into what one statement stores."""
    batch: list[Draft] = []
    batch_bytes = 0
    for draft in drafts:
        if batch and (len(batch) == _BATCH_JOBS or batch_bytes + len(draft.request) > _BATCH_BYTES):
            yield batch
            batch, batch_bytes = [], 0
        batch.append(draft)
        batch_bytes += len(draft.request)
    if batch:
        yield batch


def insertion(drafts: Sequence[Draft]) -> tuple[str, dict[str, Any]]:
    """Return the statement that stores these, and its parameters."""
    if len(drafts) > 1:
        return _INSERT_MANY, parameters(drafts)
    return _INSERT_ONE, {**_values(drafts[0]), "submitted_from": _host()}


def parameters(drafts: Sequence[Draft]) -> dict[str, Any]:
    """Return the parameters of `FIND`, and of a statement that stores many."""
    rows = [_values(draft) for draft in drafts]
    columns = {name: [row[name] for row in rows] for name in _TYPES}
    return {**columns, "submitted_from": _host()}


def _values(draft: Draft) -> dict[str, Any]:
    values = {name: getattr(draft, name) for name in _TYPES}
    return {**values, "request": draft.request.decode()}


def missing(drafts: Sequence[Draft], stored: Iterable[Row[Any] | Stored]) -> list[Draft]:
    """Return the drafts for which `insertion` found something in their place."""
    ids = {row.id for row in stored}
    return [draft for draft in drafts if draft.id not in ids]


def accept(
    drafts: Sequence[Draft],
    stored: Iterable[Row[Any] | Stored],
    found: Iterable[Row[Any] | Stored],
) -> list[Accepted]:
    """Tell for each draft which job it is; raise `IdempotencyConflict` where that is another's.

    `stored` are the rows of `insertion`, `found` those of `FIND`.
    """
    jobs = []
    for outcome in outcomes(drafts, stored, found):
        if isinstance(outcome, IdempotencyConflict):
            raise outcome
        jobs.append(outcome)
    return jobs


def outcomes(
    drafts: Sequence[Draft],
    stored: Iterable[Row[Any] | Stored],
    found: Iterable[Row[Any] | Stored],
) -> Iterator[Accepted | IdempotencyConflict]:
    """Tell for each draft which job it is, or why it is none: drafts that have their own fates."""
    published = {row.id: row.published_at for row in stored}
    standing = {row.draft_id: row for row in found}
    for draft in drafts:
        if draft.id in published:
            yield _accepted(draft, published[draft.id])
        elif (row := standing.get(draft.id)) is None:
            yield IdempotencyConflict(
                f"the job with idempotency key {draft.idempotency_key!r} was deleted just now; "
                "submit again"
            )
        elif bytes(row.request_hash) != draft.request_hash:
            yield IdempotencyConflict(
                f"idempotency key {draft.idempotency_key!r} was used before with another request; "
                "use a new key"
            )
        elif row.id != draft.id:
            yield Accepted(id=row.id, is_new=False)
        else:
            # The first try had committed after all, and nothing was published for it.
            yield _accepted(draft, row.published_at if row.state == State.QUEUED else None)


def _accepted(draft: Draft, published_at: datetime | None) -> Accepted:
    message = None
    if published_at is not None:
        message = JobMessage(queue=draft.queue, job_ids=(draft.id,), published_at=published_at)
    return Accepted(id=draft.id, is_new=True, message=message)


@cache
def _host() -> str:
    return socket.gethostname()
