"""Migrations: bring a database's schema to the one this version of the code needs.

The scripts are Alembic's, in the folder `alembic/` of a checkout and `sluicegate/migrations/` of an
installed package. `sluice db upgrade` and tests come here; the `alembic` command comes to the same
`env.py` by way of `alembic.ini`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Final

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import Connection, Engine, create_engine, make_url, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool

from sluicegate.shared.database import sqlstate
from sluicegate.shared.errors import SluiceError
from sluicegate.shared.settings import Settings

#: The advisory lock that one upgrade holds while others wait; any number would do.
LOCK_KEY: Final = int.from_bytes(b"sluice", "big")

_LOCK_WAIT_S = 300.0
_LOCK_POLL_S = 0.1


class MigrationError(SluiceError, CommandError):
    """The database could not be migrated.

    Also Alembic's own error, so that its command prints one line instead of a traceback.
    """


def upgrade(settings: Settings, revision: str = "head") -> None:
    """Upgrade the schema, all of it or nothing; raise `MigrationError`.

    Several processes may do this at once: one does it, the others wait for it. Threads of one
    process may not, because Alembic keeps the running migration in module globals.
    """
    config = _config(settings)
    with _sentences(settings):
        _check_known(current(settings), ScriptDirectory.from_config(config))
        command.upgrade(config, revision)


def _check_known(found: str | None, scripts: ScriptDirectory) -> None:
    """Raise `MigrationError` where a newer version of ours has been at the database."""
    if found is not None and found not in {script.revision for script in scripts.walk_revisions()}:
        raise MigrationError(
            f"the database is at revision {found}, which this version of Sluicegate does not know "
            f"(its own is {scripts.get_current_head()}); install the newer version, or set "
            "SLUICE_DATABASE_URL to another database"
        )


def downgrade(settings: Settings, revision: str) -> None:
    """Downgrade to a revision or to `base`, with loss of data; raise `MigrationError`."""
    with _sentences(settings):
        command.downgrade(_config(settings), revision)


def current(settings: Settings) -> str | None:
    """Return the revision that the database is at, None if at nothing; raise `MigrationError`."""
    with _sentences(settings), _engine(settings).connect() as connection:
        return MigrationContext.configure(connection).get_current_revision()


@contextmanager
def exclusive_connection(
    settings: Settings, *, lock_wait_s: float = _LOCK_WAIT_S
) -> Iterator[Connection]:
    """Connect, and hold the migration lock until the connection is closed.

    The lock is asked for again and again: a session that waits for it inside Postgres would hold a
    snapshot, and a `CREATE INDEX CONCURRENTLY` of the one that has the lock would wait for that.
    Raises `MigrationError` if the database cannot be used or the lock stays taken.
    """
    with _sentences(settings), _engine(settings).connect() as connection:
        give_up_at = time.monotonic() + lock_wait_s
        while not connection.scalar(text("SELECT pg_try_advisory_lock(:key)"), {"key": LOCK_KEY}):
            if time.monotonic() > give_up_at:
                raise MigrationError(
                    f"another migration of this database has not ended within {lock_wait_s:g} s; "
                    "see to that one, then try again"
                )
            time.sleep(_LOCK_POLL_S)
        connection.commit()
        yield connection


def make_schema(connection: Connection, settings: Settings) -> None:
    """Make the schema of `database_schema`, unless somebody did who was allowed to."""
    wanted = {"name": settings.database_schema}
    if connection.scalar(text("SELECT to_regnamespace(:name)"), wanted) is None:
        # The setting's pattern leaves nothing that would need quotes.
        connection.execute(text(f"CREATE SCHEMA {settings.database_schema}"))


def _config(settings: Settings) -> Config:
    """Alembic's configuration, without a file: an installed package has none."""
    config = Config(attributes={"settings": settings})
    # The configuration's own syntax gives % a meaning, in a folder's name it has none.
    config.set_main_option("script_location", str(_scripts()).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return config


def _scripts() -> Path:
    return Path(str(files("sluicegate") / "migrations"))


def _engine(settings: Settings) -> Engine:
    """Build an engine of its own: here statements may be slow and transactions span many."""
    url = make_url(settings.database_dsn)
    return create_engine(
        url,
        poolclass=NullPool,
        connect_args={
            "connect_timeout": max(1, round(settings.connect_timeout_s)),
            "application_name": "sluice migrations",
            # A table that is in use for long must not be waited for: everybody else would queue
            # up behind us.
            "options": f"{url.query.get('options', '')} -c timezone=UTC"
            f" -c lock_timeout={round(settings.command_timeout_s * 1000)}",
        },
    )


@contextmanager
def _sentences(settings: Settings) -> Iterator[None]:
    """Turn what Alembic, SQLAlchemy and Postgres raise into one sentence without a password."""
    try:
        yield
    except MigrationError:
        raise
    except CommandError as error:
        raise MigrationError(f"the database could not be migrated: {error}") from error
    except DBAPIError as error:
        # What follows the first line is advice of libpq's own, or the statement.
        reason = str(error.orig).partition("\n")[0]
        if sqlstate(error) is None:
            raise MigrationError(
                f"the database at {_place(settings)} cannot be used: {reason}; "
                "check SLUICE_DATABASE_URL and that PostgreSQL is running"
            ) from None
        raise MigrationError(
            f"the database at {_place(settings)} refused the migration, nothing was changed: "
            f"{reason}"
        ) from error


def _place(settings: Settings) -> str:
    url = make_url(settings.database_dsn)
    return f"{url.host or 'the local socket'}:{url.port or 5432}/{url.database or ''}"
