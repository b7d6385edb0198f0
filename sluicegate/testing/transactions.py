"""The caller's own transaction, watched: a fake's job is there once it has committed.

Nothing is stored in it, so any database of a test will do, SQLite too. Only a plain psycopg
connection tells nobody how its transaction ended; there Postgres is asked.
"""

from __future__ import annotations

from typing import Any, Final, Protocol

import psycopg
from psycopg.rows import tuple_row
from sqlalchemy import Connection, event
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, async_scoped_session
from sqlalchemy.orm import Session, scoped_session

from sluicegate.producers.joining import async_caller_of, caller_of

_XID: Final = "SELECT pg_current_xact_id()::text"


class Transaction(Protocol):
    """A transaction that a job was submitted in."""

    @property
    def committed(self) -> bool | None:
        """Whether it committed; None while it is under way."""


def watch(connection: Any) -> Transaction:
    """Watch the transaction of `connection=`; raise `InvalidJob` if `Sluice` does not take it."""
    caller_of(connection)
    if isinstance(connection, Session | scoped_session):
        return _SqlAlchemy(connection.connection())
    if isinstance(connection, Connection):
        return _SqlAlchemy(connection)
    if isinstance(connection, psycopg.Connection):
        found = connection.cursor(row_factory=tuple_row).execute(_XID).fetchone()
        assert found is not None
        return _Psycopg(connection, found[0])
    return _Django(connection)


async def watch_async(connection: Any) -> Transaction:
    """Watch the transaction of `connection=`; raise `InvalidJob` as `AsyncSluice` does."""
    async_caller_of(connection)
    if isinstance(connection, AsyncSession | async_scoped_session):
        connection = await connection.connection()
    if isinstance(connection, AsyncConnection):
        assert connection.sync_connection is not None
        return _SqlAlchemy(connection.sync_connection)
    cursor = await connection.cursor(row_factory=tuple_row).execute(_XID)
    (xid,) = await cursor.fetchone()
    return _Psycopg(connection, xid)


class _SqlAlchemy:
    """Told by the connection's events; a savepoint that was there before takes the job with it."""

    def __init__(self, connection: Connection) -> None:
        self.committed: bool | None = None
        #: How deep in savepoints the connection is, and the job; both from where it was submitted.
        self._depth = self._job_depth = 0
        event.listen(connection, "commit", self._commit)
        event.listen(connection, "rollback", self._rollback)
        if connection.in_nested_transaction():
            event.listen(connection, "savepoint", self._savepoint)
            event.listen(connection, "release_savepoint", self._release)
            event.listen(connection, "rollback_savepoint", self._rollback_savepoint)

    # A connection may be used for a next transaction: the first end is this one's.

    def _commit(self, _connection: Connection) -> None:
        if self.committed is None:
            self.committed = True

    def _rollback(self, _connection: Connection) -> None:
        if self.committed is None:
            self.committed = False

    def _savepoint(self, _connection: Connection, _name: str | None) -> None:
        self._depth += 1

    def _release(self, _connection: Connection, _name: str, _context: None) -> None:
        self._depth -= 1
        self._job_depth = min(self._job_depth, self._depth)

    def _rollback_savepoint(self, connection: Connection, _name: str, _context: None) -> None:
        if self._job_depth >= self._depth:
            self._rollback(connection)
        self._depth -= 1


class _Psycopg:
    """Asked of Postgres on a connection of our own, as the caller's may be closed by then."""

    def __init__(
        self, connection: psycopg.Connection[Any] | psycopg.AsyncConnection[Any], xid: str
    ) -> None:
        self._dsn = connection.info.dsn
        self._password = connection.info.password
        self._xid = xid

    @property
    def committed(self) -> bool | None:
        with psycopg.connect(self._dsn, password=self._password, autocommit=True) as connection:
            row = connection.execute("SELECT pg_xact_status(%s::xid8)", [self._xid]).fetchone()
        assert row is not None
        return None if row[0] == "in progress" else row[0] == "committed"


class _Django:
    """Told by `on_commit`; a transaction that is over without that was rolled back."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self._done = False
        connection.on_commit(self._commit)

    def _commit(self) -> None:
        self._done = True

    @property
    def committed(self) -> bool | None:
        if self._done:
            return True
        return None if self._connection.in_atomic_block else False
