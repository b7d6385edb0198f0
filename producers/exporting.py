"""Exporting an account: all that we hold of it, as JSON Lines, in memory that stays small.

Each line is an object with a `type`: account, provider, budget, alert, api_key, change (of the
audit), batch, job. A job brings its request, its result, its attempts and their cost entries. Keys
are left out, ours and theirs.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Final
from uuid import UUID

import orjson
import psycopg
from psycopg.rows import namedtuple_row

from sluicegate.shared.accounts import Account
from sluicegate.shared.bodies import Bodies
from sluicegate.shared.database import BY_SIZE, connect_options
from sluicegate.shared.errors import SluiceError
from sluicegate.shared.settings import Settings

#: Jobs of one statement. They come one by one, however large they are.
_PAGE: Final = 500

# All columns but those that hold keys; what a later version adds comes along.
_OF_ACCOUNT: Final = {
    "account": """
SELECT to_jsonb(t) - 'alert_secret_encrypted' FROM accounts t WHERE id = %(account_id)s
""",
    "provider": """
SELECT to_jsonb(t) - 'api_key_encrypted' FROM llm_providers t
WHERE account_id = %(account_id)s ORDER BY id
""",
    "budget": "SELECT to_jsonb(t) FROM budgets t WHERE account_id = %(account_id)s ORDER BY id",
    "alert": "SELECT to_jsonb(t) FROM alerts t WHERE account_id = %(account_id)s ORDER BY id",
    "api_key": """
SELECT to_jsonb(t) - 'token_hash' FROM api_keys t WHERE account_id = %(account_id)s ORDER BY id
""",
    "change": """
SELECT to_jsonb(t) FROM audit_entries t WHERE account_id = %(account_id)s ORDER BY number
""",
    "batch": "SELECT to_jsonb(t) FROM batches t WHERE account_id = %(account_id)s ORDER BY id",
}

# A page at a time, so that no statement looks at the past for long. Requests and results come as
# they are kept: turning them into jsonb would lose what it has no word for.
_JOBS: Final = f"""
SELECT j.id, to_jsonb(j) - 'request_hash' AS job,
       (SELECT b.request::text FROM job_bodies b WHERE b.job_id = j.id) AS request,
       (SELECT r.body FROM results r WHERE r.job_id = j.id) AS body,
       (SELECT coalesce(json_agg(a ORDER BY a.dispatched_at, a.id), '[]')
        FROM attempts a WHERE a.job_id = j.id) AS attempts,
       (SELECT coalesce(json_agg(c ORDER BY c.created_at, c.id), '[]')
        FROM cost_entries c
        WHERE c.attempt_id IN (SELECT a.id FROM attempts a WHERE a.job_id = j.id)) AS cost_entries
FROM (SELECT * FROM jobs WHERE account_id = %(account_id)s AND id > %(after)s
      ORDER BY id LIMIT {_PAGE}) j
"""


def export_account(settings: Settings, account: Account, write: Callable[[bytes], object]) -> int:
    """Write all there is of the account, a line at a time; return how many jobs that were.

    Other work goes on: what begins or ends meanwhile may be there or not. Raises what psycopg
    raises, and `SecretUnreadable` if a body is encrypted with a key that is not here.
    """
    bodies = Bodies.of(settings)
    dsn, options = connect_options(settings, "sluice export", BY_SIZE)
    jobs = 0
    with psycopg.connect(dsn, autocommit=True, **options) as connection:
        # A reader that takes its time is no reason to give up.
        connection.execute("SET statement_timeout = 0")
        for kind, statement in _OF_ACCOUNT.items():
            with connection.cursor() as cursor:
                for (row,) in cursor.stream(statement, {"account_id": account.id}):
                    write(_line(kind, row))
        for line in _jobs(connection, account.id, bodies):
            write(line)
            jobs += 1
    return jobs


def _jobs(connection: psycopg.Connection[Any], account_id: UUID, bodies: Bodies) -> Iterator[bytes]:
    after = UUID(int=0)
    found = _PAGE
    while found == _PAGE:
        found = 0
        with connection.cursor(row_factory=namedtuple_row) as cursor:
            values = {"account_id": account_id, "after": after}
            row: Any
            for row in cursor.stream(_JOBS, values):
                found += 1
                after = max(after, row.id)
                request = None if row.request is None else bodies.open_request(row.request)
                yield _line(
                    "job",
                    {
                        **row.job,
                        "request": None if request is None else orjson.Fragment(request),
                        "result": None if row.body is None else bodies.open_result(row.body),
                        "attempts": row.attempts,
                        "cost_entries": row.cost_entries,
                    },
                )


def _line(kind: str, values: dict[str, Any]) -> bytes:
    return orjson.dumps({"type": kind, **values}, option=orjson.OPT_APPEND_NEWLINE)


@contextmanager
def opened(path: Path | None) -> Iterator[BinaryIO]:
    """Open standard output, or a file for our eyes only that takes its name once it is complete.

    Raises `SluiceError` if it cannot be written.
    """
    if path is None:
        yield sys.stdout.buffer
        sys.stdout.flush()
        return
    try:
        # Made with mode 0600, whatever stood there before.
        number, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(number, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            Path(name).replace(path)
        except BaseException:
            with suppress(OSError):
                Path(name).unlink()
            raise
    except OSError as error:
        raise SluiceError(f"{path} cannot be written: {error.strerror}") from error
