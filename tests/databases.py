"""Databases for tests: copies of a migrated one, cleaned after use and used again.

Making one takes a quarter of a second of the kernel's time on some machines, cleaning one a tenth
of that, if what was changed is small: to truncate tables takes new files for them and for all that
name them. A database that a test has changed otherwise than by rows is thrown away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from uuid import uuid4

import psycopg
from sqlalchemy import Engine, create_engine, make_url, text

#: Runs a statement, with values by name, and returns its rows: the fixture `rows`.
Rows = Callable[..., list[Any]]

_OURS = "n.nspname NOT LIKE 'pg\\_%' AND n.nspname <> 'information_schema'"
#: What rows do not change.
_SHAPE = f"""
SELECT md5(string_agg(line, ',' ORDER BY line)) FROM (
    SELECT concat_ws(' ', n.nspname, c.relname, c.relkind, a.attname, a.atttypid) AS line
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    LEFT JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 WHERE {_OURS}
    UNION ALL
    SELECT p.proname FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace WHERE {_OURS}
    UNION ALL
    SELECT concat_ws(' ', tgname, tgenabled) FROM pg_trigger WHERE NOT tgisinternal
    UNION ALL
    SELECT conname FROM pg_constraint c JOIN pg_namespace n ON n.oid = c.connamespace WHERE {_OURS}
) shape
"""
_TABLES = "SELECT tablename FROM pg_tables WHERE schemaname = 'sluicegate' ORDER BY tablename"
_RESTART = """
SELECT setval(format('%I.%I', schemaname, sequencename)::regclass, start_value, false)
FROM pg_sequences WHERE schemaname = 'sluicegate' AND last_value IS NOT NULL
"""
#: No trigger runs: nothing is noted, and what may not be deleted is. A superuser may do that.
_NO_TRIGGERS = "SET LOCAL session_replication_role = replica"
#: A table that takes more, with what was deleted before, is truncated.
_LARGE_BYTES = 131_072
#: Settings of the database, or that nobody may connect.
_IS_SET = """
SELECT NOT datallowconn OR EXISTS (SELECT FROM pg_db_role_setting s WHERE s.setdatabase = d.oid)
FROM pg_database d WHERE datname = :name
"""
#: Others have a new one each time.
_MAY_CLEAN = "SELECT current_setting('is_superuser') = 'on'"


@dataclass(frozen=True)
class Databases:
    """A PostgreSQL server that has databases ready."""

    #: Of a database to connect to while others are made and dropped.
    url: str
    #: A migrated database to copy.
    template: str
    #: The names of those that are clean, and the shape of such.
    _free: list[str] = field(default_factory=list)

    @contextmanager
    def database(self, *, template: str = "template1") -> Iterator[str]:
        """Make a database for the length of a `with`; yield its URL."""
        name = self._make(template)
        try:
            yield with_database(self.url, name)
        finally:
            self._drop(name)

    @contextmanager
    def migrated(self) -> Iterator[str]:
        """Have a migrated database for the length of a `with`; yield its URL."""
        name = self._free.pop() if self._free else self._make(self.template)
        try:
            yield with_database(self.url, name)
        finally:
            if self._clean(name):
                self._free.append(name)
            else:
                self._drop(name)

    def close(self) -> None:
        """Drop those that are free."""
        while self._free:
            self._drop(self._free.pop())

    def _make(self, template: str) -> str:
        name = f"test_{uuid4().hex}"
        self._run(f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY FILE_COPY")
        return name

    def _drop(self, name: str) -> None:
        self._run(f"DROP DATABASE {name} WITH (FORCE)")

    def _run(self, statement: str) -> None:
        with _administrator(self.url).connect() as connection:
            connection.execute(text(statement))

    def _clean(self, name: str) -> bool:
        """Make it as its template is; False if that takes more than rows."""
        with _administrator(self.url).connect() as connection:
            # Whoever is still there, as a drop would.
            connection.execute(
                text(
                    "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
                    " WHERE datname = :name"
                ),
                {"name": name},
            )
            if connection.scalar(text(_IS_SET), {"name": name}):
                return False
            if not connection.scalar(text(_MAY_CLEAN)):
                return False
        seed = _seed(self.url, self.template)
        with _connected(with_database(self.url, name)) as connection:
            if _one(connection, _SHAPE) != _one_of(self.url, self.template, _SHAPE):
                return False
            sizes = _sizes(connection)
            changed = [
                table
                for table in sorted(sizes.keys() | seed.keys())
                if table not in seed or _content(connection, table) != seed[table]
            ]
            connection.execute(_NO_TRIGGERS)
            if any(sizes.get(table, 0) > _LARGE_BYTES for table in changed):
                listed = ", ".join(f"sluicegate.{table}" for table in sizes)
                connection.execute(f"TRUNCATE {listed} CASCADE")
                changed = list(seed)
            else:
                for table in changed:
                    connection.execute(f"DELETE FROM sluicegate.{table}")
            for table in seed.keys() & set(changed):
                with connection.cursor().copy(f"COPY sluicegate.{table} FROM STDIN") as into:
                    into.write(seed[table])
            connection.execute(_RESTART)
            # What is counted, deadlocks for one, was another test's.
            connection.execute("SELECT pg_stat_reset()")
        return True


def with_database(url: str, name: str) -> str:
    """Return the URL of another database of the same server."""
    return make_url(url).set(database=name).render_as_string(hide_password=False)


def _connected(url: str) -> psycopg.Connection[Any]:
    """Return a connection for a `with`, at whose end it commits."""
    plain = make_url(url).set(drivername="postgresql")
    return psycopg.connect(plain.render_as_string(hide_password=False))


@cache
def _administrator(url: str) -> Engine:
    return create_engine(url, pool_size=1, pool_pre_ping=True, isolation_level="AUTOCOMMIT")


@cache
def _one_of(url: str, name: str, statement: str) -> str:
    with _connected(with_database(url, name)) as connection:
        return _one(connection, statement)


def _one(connection: psycopg.Connection[Any], statement: str) -> str:
    row = connection.execute(statement).fetchone()
    assert row is not None
    return str(row[0])


@cache
def _seed(url: str, template: str) -> dict[str, bytes]:
    """Return what tables begin with."""
    with _connected(with_database(url, template)) as connection:
        return {table: _content(connection, table) for table in _sizes(connection)}


def _sizes(connection: psycopg.Connection[Any]) -> dict[str, int]:
    """Return how many bytes those tables take that have rows."""
    tables = [name for (name,) in connection.execute(_TABLES)]
    each = " UNION ALL ".join(
        f"SELECT '{table}', pg_table_size('sluicegate.{table}')"
        f" WHERE EXISTS (SELECT FROM sluicegate.{table})"
        for table in tables
    )
    return dict(connection.execute(each).fetchall())


def _content(connection: psycopg.Connection[Any], table: str) -> bytes:
    with connection.cursor().copy(f"COPY sluicegate.{table} TO STDOUT") as rows:
        return b"".join(bytes(row) for row in rows)
