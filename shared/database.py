"""Engines for PostgreSQL, and what its failures mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import orjson
import psycopg
from sqlalchemy import Connection, Engine, create_engine, make_url, text
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from sluicegate.shared.errors import InvalidJob, QueueUnavailable, SchemaOutdated, SluiceError
from sluicegate.shared.settings import Settings

#: The migration this version of the code was written for.
SCHEMA_REVISION = "0007"

#: What a lost server, or a pool that waits for one, raises.
CONNECTION_ERRORS = (
    OperationalError,
    InterfaceError,
    PoolTimeoutError,
    psycopg.OperationalError,
    psycopg.InterfaceError,
    OSError,
)

#: What a statement of an engine raises when Postgres does not do it.
DATABASE_ERRORS: Final = (SQLAlchemyError, OSError)

_NO_SUCH_TABLE = ("42P01", "42703")
_FOREIGN_KEY = "23503"

#: Plans of statements that go by key must not depend on how full the tables were when they were
#: made: a plan made for an empty table would read a full one from end to end.
BY_KEY = ("enable_seqscan=off", "enable_hashjoin=off", "enable_mergejoin=off")
#: Statements that look for something are planned each time, for the tables as they are.
BY_SIZE = ("plan_cache_mode=force_custom_plan",)


def connect_options(
    settings: Settings, application_name: str, planner: Sequence[str]
) -> tuple[str, dict[str, Any]]:
    """Return what psycopg connects with: the connection string, and options as keywords."""
    url = make_url(settings.database_dsn).set(drivername="postgresql")
    given = str(url.query.get("options", ""))
    server = [
        f"statement_timeout={round(settings.command_timeout_s * 1000)}",
        "timezone=UTC",
        *planner,
    ]
    return url.render_as_string(hide_password=False), {
        "connect_timeout": max(1, round(settings.connect_timeout_s)),
        "application_name": application_name,
        "keepalives_idle": 10,
        "keepalives_interval": 5,
        "keepalives_count": 3,
        "tcp_user_timeout": round(settings.command_timeout_s * 1000),
        "options": " ".join([given, *(f"-c {option}" for option in server)]),
    }


def _options(settings: Settings, application_name: str, pool_size: int | None) -> dict[str, Any]:
    return {
        "pool_size": pool_size or settings.database_pool_size,
        "max_overflow": 0,
        # A burst waits for a connection as long as for an answer: whoever has one gives it back.
        "pool_timeout": settings.command_timeout_s,
        # Statements are whole transactions: no BEGIN, no COMMIT, one round trip each. Where
        # several belong together the caller opens a transaction of its own.
        "isolation_level": "AUTOCOMMIT",
        "skip_autocommit_rollback": True,
        "json_serializer": lambda value: orjson.dumps(value).decode(),
        "json_deserializer": orjson.loads,
        "connect_args": connect_options(settings, application_name, BY_SIZE)[1],
    }


def make_engine(
    settings: Settings, *, application_name: str = "sluice", pool_size: int | None = None
) -> Engine:
    """Build the synchronous engine, in autocommit; it connects at first use."""
    return create_engine(settings.database_dsn, **_options(settings, application_name, pool_size))


def make_async_engine(
    settings: Settings,
    *,
    application_name: str = "sluice",
    pool_size: int | None = None,
) -> AsyncEngine:
    """Build the asyncio engine, in autocommit; it connects at first use."""
    return create_async_engine(
        settings.database_dsn, **_options(settings, application_name, pool_size)
    )


def sqlstate(error: BaseException) -> str | None:
    """Return Postgres' own error code, or None if the server did not answer."""
    origin = error.orig if isinstance(error, DBAPIError) else error
    code = getattr(origin, "sqlstate", None)
    return code if isinstance(code, str) else None


def is_disconnect(error: BaseException) -> bool:
    """Whether the server cannot answer now, so that the same statement may be sent again.

    Class 08 is the connection, 53 resources (a full disk, too many connections), 57 an operator's
    hand or a statement's time limit, 58 an error of its system, 25006 a replica that is not yet
    the primary.
    """
    code = sqlstate(error)
    if code is None:
        return isinstance(error, CONNECTION_ERRORS)
    return code.startswith(("08", "53", "57", "58")) or code == "25006"


def is_conflict(error: BaseException) -> bool:
    """Whether the statement met another one (deadlock, serialisation) and is to be repeated."""
    return sqlstate(error) in ("40P01", "40001")


def is_bad_data(error: BaseException) -> bool:
    """Whether a value in the statement, not the server, is to blame (SQLSTATE 22, 23)."""
    code = sqlstate(error)
    return code is not None and code.startswith(("22", "23"))


def explain(error: Exception) -> SluiceError:
    """Say in one sentence what an error of the database means."""
    code = sqlstate(error)
    if is_disconnect(error):
        return QueueUnavailable("Postgres did not answer; try again, and check SLUICE_DATABASE_URL")
    if code in _NO_SUCH_TABLE:
        return SchemaOutdated()
    if code == _FOREIGN_KEY:
        return InvalidJob("account", "was deleted just now")
    if code is None and isinstance(getattr(error, "orig", error), psycopg.DataError):
        # The driver's own word: it was not even sent.
        return InvalidJob("request", "holds a NUL character, which Postgres does not take in text")
    reason = str(getattr(error, "orig", None) or error).partition("\n")[0]
    return QueueUnavailable(f"Postgres refused the statement: {reason}")


def check_schema(connection: Connection) -> None:
    """Raise `SchemaOutdated` unless the database is at this version's migration."""
    known = connection.scalar(text("SELECT to_regclass('alembic_version')"))
    found = connection.scalar(text("SELECT version_num FROM alembic_version")) if known else None
    if found != SCHEMA_REVISION:
        raise SchemaOutdated(
            f"the database schema is at {found or 'nothing'}, this version needs "
            f"{SCHEMA_REVISION}; run `sluice db upgrade`"
        )
