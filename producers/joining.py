"""Joining the caller's own transaction: a job is stored by its commit, and not without it.

What `connection=` may be, and what each can do: run a statement of ours, and tell when the
transaction has committed, so that the job is published. A SQLAlchemy session tells by its events
and Django by its `on_commit`. A plain connection tells nobody: there the job begins parked, with a
NOTIFY in the transaction, and the sweep publishes it when Postgres sends that on.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Final, Protocol
from weakref import WeakKeyDictionary

import psycopg
from psycopg.rows import tuple_row
from sqlalchemy import Connection, event, make_url
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, async_scoped_session
from sqlalchemy.orm import Session, SessionTransaction, scoped_session

from sluicegate.producers.storing import (
    Accepted,
    accept,
    batches,
    joining,
    load_stored,
    missing,
    parameters,
)
from sluicegate.producers.submission import Draft
from sluicegate.shared.celery_app import JobMessage
from sluicegate.shared.database import sqlstate
from sluicegate.shared.errors import IdempotencyConflict, InvalidJob
from sluicegate.shared.jobs import State
from sluicegate.shared.settings import Settings

log = logging.getLogger(__name__)

#: Publishes for a client, soon; what it raises is logged, as the commit has happened by then.
Publish = Callable[[Sequence[JobMessage]], None]

_FIELD: Final = "connection"
_NO_TABLES: Final = ("42P01", "3F000", "42703")
_NO_RIGHTS: Final = "42501"
_FOREIGN_KEY: Final = "23503"


class Caller(Protocol):
    """The caller's connection."""

    def open(self) -> bool:
        """Have the connection ready; return whether `after_commit` can be used."""

    def run(self, statement: str, values: Mapping[str, Any]) -> list[str]:
        """Run a statement in the caller's transaction; return its first column."""

    def after_commit(self, publish: Publish, messages: Sequence[JobMessage]) -> None:
        """Publish once the transaction has committed, and never if it does not."""


class AsyncCaller(Protocol):
    """The caller's connection on an event loop; as `Caller`."""

    def open(self) -> Awaitable[bool]:
        """Have the connection ready; return whether `after_commit` can be used."""

    def run(self, statement: str, values: Mapping[str, Any]) -> Awaitable[list[str]]:
        """Run a statement in the caller's transaction; return its first column."""

    def after_commit(self, publish: Publish, messages: Sequence[JobMessage]) -> None:
        """Publish once the transaction has committed, and never if it does not."""


def caller_of(connection: object) -> Caller:
    """Tell what `connection=` is, without using it; raise `InvalidJob` if it will not do."""
    if isinstance(connection, scoped_session):
        connection = connection()
    if isinstance(connection, Session):
        return _SessionCaller(connection)
    if isinstance(connection, Connection):
        return _ConnectionCaller(connection)
    if isinstance(connection, psycopg.Connection):
        return _PsycopgCaller(connection)
    if _is_django(connection):
        return _DjangoCaller(connection)
    if _is_async(connection):
        raise InvalidJob(_FIELD, f"is an {_kind(connection)}: it needs an AsyncSluice")
    raise InvalidJob(
        _FIELD,
        "must be a SQLAlchemy Session or Connection, a psycopg Connection or Django's connection; "
        f"it is a {_kind(connection)}",
    )


def async_caller_of(connection: object) -> AsyncCaller:
    """Tell what `connection=` is; as `caller_of`."""
    if isinstance(connection, async_scoped_session):
        connection = connection()
    if isinstance(connection, AsyncSession):
        return _AsyncSessionCaller(connection)
    if isinstance(connection, AsyncConnection):
        return _AsyncConnectionCaller(connection)
    if isinstance(connection, psycopg.AsyncConnection):
        return _AsyncPsycopgCaller(connection)
    kinds = (Session, scoped_session, Connection, psycopg.Connection)
    if isinstance(connection, kinds) or _is_django(connection):
        raise InvalidJob(
            _FIELD, f"is a {_kind(connection)}, which would block the loop: use Sluice"
        )
    raise InvalidJob(
        _FIELD,
        "must be a SQLAlchemy AsyncSession or AsyncConnection, or a psycopg AsyncConnection; "
        f"it is a {_kind(connection)}",
    )


def join(
    caller: Caller, drafts: Sequence[Draft], settings: Settings, publish: Publish
) -> list[Accepted]:
    """Store drafts in the caller's transaction, all or none, and publish them after its commit.

    Raises `InvalidJob` if this is not the database of the settings, `IdempotencyConflict`. What
    else goes wrong on the caller's connection is the caller's, and is raised as it comes.
    """
    statements = joining(settings.database_schema)
    jobs: list[Accepted] = []
    with _explained(settings):
        if not caller.open():
            drafts = _parked(drafts)
        try:
            for batch in batches(drafts):
                stored = load_stored(caller.run(statements.insert, parameters(batch)))
                left = missing(batch, stored)
                found = load_stored(caller.run(statements.find, parameters(left))) if left else ()
                jobs += accept(batch, stored, found)
        except IdempotencyConflict:
            caller.run(statements.take_back, {"id": [draft.id for draft in drafts]})
            raise
        caller.after_commit(publish, _messages(jobs))
    return jobs


async def join_async(
    caller: AsyncCaller, drafts: Sequence[Draft], settings: Settings, publish: Publish
) -> list[Accepted]:
    """Store drafts in the caller's transaction; as `join`."""
    statements = joining(settings.database_schema)
    jobs: list[Accepted] = []
    with _explained(settings):
        if not await caller.open():
            drafts = _parked(drafts)
        try:
            for batch in batches(drafts):
                stored = load_stored(await caller.run(statements.insert, parameters(batch)))
                left = missing(batch, stored)
                found = await caller.run(statements.find, parameters(left)) if left else ()
                jobs += accept(batch, stored, load_stored(found))
        except IdempotencyConflict:
            await caller.run(statements.take_back, {"id": [draft.id for draft in drafts]})
            raise
        caller.after_commit(publish, _messages(jobs))
    return jobs


def _parked(drafts: Sequence[Draft]) -> list[Draft]:
    return [replace(draft, state=State.PARKED) for draft in drafts]


def _messages(jobs: Sequence[Accepted]) -> list[JobMessage]:
    return [job.message for job in jobs if job.message is not None]


def _kind(connection: object) -> str:
    return type(connection).__name__


def _is_async(connection: object) -> bool:
    kinds = (AsyncSession, async_scoped_session, AsyncConnection, psycopg.AsyncConnection)
    return isinstance(connection, kinds)


def _is_django(connection: object) -> bool:
    # Known by what it does: `django.db.connection` is a stand-in for the thread's own, and Django
    # is not ours to import.
    return all(hasattr(connection, name) for name in ("vendor", "on_commit", "in_atomic_block"))


@contextmanager
def _explained(settings: Settings) -> Iterator[None]:
    """Say in one sentence what is wrong where the connection leads somewhere else."""
    try:
        yield
    except Exception as error:
        # Django's errors have the driver's as their cause.
        code = sqlstate(error) or sqlstate(error.__cause__ or error)
        schema = settings.database_schema
        if code in _NO_TABLES:
            url = make_url(settings.database_dsn)
            raise InvalidJob(
                _FIELD,
                f"leads to a database without this version's tables in the schema {schema}; it "
                f"must be the one of SLUICE_DATABASE_URL, {url.host}:{url.port}/{url.database}, "
                "after `sluice db upgrade`",
            ) from error
        if code == _NO_RIGHTS:
            raise InvalidJob(
                _FIELD,
                f"is of a user who may not store jobs: grant USAGE on the schema {schema}, and "
                "SELECT, INSERT and DELETE on its tables jobs and job_bodies",
            ) from error
        if code == _FOREIGN_KEY:
            raise InvalidJob(
                "account", "is not in the database that connection= leads to, or was deleted"
            ) from error
        raise


# SQLAlchemy


class _ConnectionCaller:
    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def open(self) -> bool:
        _check_dialect(self._connection)
        return False

    def run(self, statement: str, values: Mapping[str, Any]) -> list[str]:
        return _run(self._connection, statement, values)

    def after_commit(self, publish: Publish, messages: Sequence[JobMessage]) -> None:
        """Do nothing: the jobs are parked, and the sweep hears of them."""


class _AsyncConnectionCaller:
    def __init__(self, connection: AsyncConnection) -> None:
        self._connection = connection

    async def open(self) -> bool:
        _check_dialect(self._connection)
        return False

    async def run(self, statement: str, values: Mapping[str, Any]) -> list[str]:
        return await self._connection.run_sync(_run, statement, values)

    def after_commit(self, publish: Publish, messages: Sequence[JobMessage]) -> None:
        """Do nothing: the jobs are parked, and the sweep hears of them."""


class _SessionCaller:
    def __init__(self, session: Session) -> None:
        self._session = session
        self._connection: Connection | None = None

    def open(self) -> bool:
        self._connection = self._session.connection()
        return _tells(self._session, self._connection)

    def run(self, statement: str, values: Mapping[str, Any]) -> list[str]:
        assert self._connection is not None
        return _run(self._connection, statement, values)

    def after_commit(self, publish: Publish, messages: Sequence[JobMessage]) -> None:
        _collect(self._session, publish, messages)


class _AsyncSessionCaller:
    def __init__(self, session: AsyncSession) -> None:
        self._session = session.sync_session
        self._open = session.connection
        self._connection: AsyncConnection | None = None

    async def open(self) -> bool:
        self._connection = await self._open()
        return _tells(self._session, self._connection.sync_connection)

    async def run(self, statement: str, values: Mapping[str, Any]) -> list[str]:
        assert self._connection is not None
        return await self._connection.run_sync(_run, statement, values)

    def after_commit(self, publish: Publish, messages: Sequence[JobMessage]) -> None:
        _collect(self._session, publish, messages)


def _check_dialect(connection: Connection | AsyncConnection) -> None:
    dialect = connection.dialect
    if dialect.name != "postgresql" or dialect.paramstyle != "pyformat":
        raise InvalidJob(
            _FIELD,
            f"goes to {dialect.name} with the driver {dialect.driver}; jobs are stored in "
            "Postgres, with the driver psycopg",
        )


def _run(connection: Connection, statement: str, values: Mapping[str, Any]) -> list[str]:
    result = connection.exec_driver_sql(
        statement, dict(values), execution_options={"stream_results": False}
    )
    return [row[0] for row in result]


def _tells(session: Session, connection: Connection | None) -> bool:
    """Whether the session's commit is the one that makes its statements last."""
    assert connection is not None
    _check_dialect(connection)
    if isinstance(session.bind, Connection):
        return False  # whoever began the transaction commits it
    driver: Any = connection.connection.dbapi_connection
    return not driver.autocommit


#: What each session has to publish, in order, by who publishes it.
_waiting: WeakKeyDictionary[Session, dict[Publish, list[JobMessage]]] = WeakKeyDictionary()


def _collect(session: Session, publish: Publish, messages: Sequence[JobMessage]) -> None:
    if not messages:
        return
    if session not in _waiting:
        # They stay for the life of the session: an event cannot be given up while it happens.
        event.listen(session, "after_commit", _committed)
        event.listen(session, "after_transaction_end", _ended)
        _waiting[session] = {}
    _waiting[session].setdefault(publish, []).extend(messages)


def _committed(session: Session) -> None:
    if session.in_nested_transaction():
        return  # a savepoint: what it holds may still be rolled back
    waiting = _waiting[session]
    while waiting:
        publish = next(iter(waiting))
        _publish(publish, waiting.pop(publish))


def _ended(session: Session, transaction: SessionTransaction) -> None:
    if transaction.parent is None:
        _waiting[session].clear()


def _publish(publish: Publish, messages: Sequence[JobMessage]) -> None:
    try:
        publish(messages)
    except Exception as error:  # noqa: BLE001 - it has committed: whatever it is, the sweep publishes
        log.warning("the sweep will publish what is accepted (jobs: %d): %r", len(messages), error)


# psycopg


class _PsycopgCaller:
    def __init__(self, connection: psycopg.Connection[Any]) -> None:
        self._connection = connection

    def open(self) -> bool:
        return False

    def run(self, statement: str, values: Mapping[str, Any]) -> list[str]:
        # A plain cursor, whatever kind the connection makes.
        with psycopg.Cursor(self._connection, row_factory=tuple_row) as cursor:
            cursor.execute(statement.encode(), values)
            return [row[0] for row in cursor.fetchall()]

    def after_commit(self, publish: Publish, messages: Sequence[JobMessage]) -> None:
        """Do nothing: the jobs are parked, and the sweep hears of them."""


class _AsyncPsycopgCaller:
    def __init__(self, connection: psycopg.AsyncConnection[Any]) -> None:
        self._connection = connection

    async def open(self) -> bool:
        return False

    async def run(self, statement: str, values: Mapping[str, Any]) -> list[str]:
        async with psycopg.AsyncCursor(self._connection, row_factory=tuple_row) as cursor:
            await cursor.execute(statement.encode(), values)
            return [row[0] for row in await cursor.fetchall()]

    def after_commit(self, publish: Publish, messages: Sequence[JobMessage]) -> None:
        """Do nothing: the jobs are parked, and the sweep hears of them."""


# Django


class _DjangoCaller:
    def __init__(self, connection: Any) -> None:
        self._connection = connection

    def open(self) -> bool:
        if self._connection.vendor != "postgresql":
            raise InvalidJob(
                _FIELD, f"goes to {self._connection.vendor}; jobs are stored in Postgres"
            )
        # Without atomic() and without autocommit the commit is the caller's, and Django says no.
        return bool(self._connection.in_atomic_block or self._connection.get_autocommit())

    def run(self, statement: str, values: Mapping[str, Any]) -> list[str]:
        with self._connection.cursor() as cursor:
            cursor.execute(statement, dict(values))
            return [row[0] for row in cursor.fetchall()]

    def after_commit(self, publish: Publish, messages: Sequence[JobMessage]) -> None:
        if messages:
            self._connection.on_commit(partial(_publish, publish, messages))
