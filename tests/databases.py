"""Databases for tests: copies of a migrated one, cleaned after use and used again.

Making one takes a quarter of a second of the kernel's time on some machines, cleaning one a tenth
of that. A database that a test has changed otherwise than by rows is thrown away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from uuid import uuid4

import psycopg
from sqlalchemy import Connection, Engine, create_engine, make_url, text
from sqlalchemy.pool import NullPool

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
FROM pg_sequences WHERE schemaname = 'sluicegate'
"""
#: Nothing else may empty it, on purpose.
_AUDIT = "audit_entries"
_EMPTY_AUDIT = (
    f"ALTER TABLE sluicegate.{_AUDIT} DISABLE TRIGGER USER",
    f"TRUNCATE sluicegate.{_AUDIT}",
    f"ALTER TABLE sluicegate.{_AUDIT} ENABLE TRIGGER USER",
)
#: Settings of the database, or that nobody may connect.
_IS_SET = """
SELECT NOT datallowconn OR EXISTS (SELECT FROM pg_db_role_setting s WHERE s.setdatabase = d.oid)
FROM pg_database d WHERE datname = :name
"""


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
        with _connected(with_database(self.url, name)) as connection:
            if connection.scalar(text(_SHAPE)) != _shape(self.url, self.template):
                return False
            tables = list(connection.scalars(text(_TABLES)))
            used = connection.execute(
                text("SELECT " + ", ".join(f"EXISTS (SELECT FROM sluicegate.{t})" for t in tables))
            ).one()
            changed = [
                t for t, is_used in zip(tables, used, strict=True) if is_used and t != _AUDIT
            ]
            listed = ", ".join(f"sluicegate.{table}" for table in changed)
            connection.execute(text(f"TRUNCATE {listed} CASCADE"))
            for table, rows in _seed(self.url, self.template).items():
                with _cursor(connection).copy(f"COPY sluicegate.{table} FROM STDIN") as into:
                    into.write(rows)
            # Filling them was noted, too.
            for statement in _EMPTY_AUDIT:
                connection.execute(text(statement))
            connection.execute(text(_RESTART))
        return True


def with_database(url: str, name: str) -> str:
    """Return the URL of another database of the same server."""
    return make_url(url).set(database=name).render_as_string(hide_password=False)


@contextmanager
def _connected(url: str) -> Iterator[Connection]:
    engine = create_engine(url, poolclass=NullPool)
    with engine.begin() as connection:
        yield connection


@cache
def _administrator(url: str) -> Engine:
    return create_engine(url, pool_size=1, pool_pre_ping=True, isolation_level="AUTOCOMMIT")


@cache
def _shape(url: str, template: str) -> str:
    with _connected(with_database(url, template)) as connection:
        shape: str = connection.execute(text(_SHAPE)).scalar_one()
    return shape


@cache
def _seed(url: str, template: str) -> dict[str, bytes]:
    """Return what tables begin with, those first that others name."""
    seed: dict[str, bytes] = {}
    with _connected(with_database(url, template)) as connection:
        for table in sorted(connection.scalars(text(_TABLES)), key=lambda t: (t != "accounts", t)):
            with _cursor(connection).copy(f"COPY sluicegate.{table} TO STDOUT") as rows:
                if content := b"".join(bytes(row) for row in rows):
                    seed[table] = content
    return seed


def _cursor(connection: Connection) -> psycopg.Cursor[Any]:
    driver: Any = connection.connection.driver_connection
    cursor: psycopg.Cursor[Any] = driver.cursor()
    return cursor
