"""A connection to Postgres for one command."""

# What takes long to import is imported once a command connects.
# ruff: noqa: PLC0415

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from sluicegate.shared.audit import Actor
    from sluicegate.shared.settings import Settings


@contextmanager
def catalogue_change() -> Iterator[Connection]:
    """Connect to change the catalogue, all or nothing, and tell running processes that it has."""
    from sluicegate.shared.catalogue import announce
    from sluicegate.shared.settings import get_settings
    from sluicegate.shared.terminal import note

    settings = get_settings()
    with transaction() as line:
        yield line
    if not announce(settings):
        note(
            "Redis did not answer, so running processes see the change within "
            f"{settings.catalogue_ttl_s:g} s (SLUICE_CATALOGUE_TTL_S)"
        )


@contextmanager
def transaction(
    settings: Settings | None = None, actor: Actor | None = None
) -> Iterator[Connection]:
    """Connect for one transaction: all that is done, or nothing of it; see `connection`."""
    with connection(settings, actor) as line:
        line.execution_options(isolation_level="READ COMMITTED")
        with line.begin():
            yield line


@contextmanager
def connection(
    settings: Settings | None = None, actor: Actor | None = None
) -> Iterator[Connection]:
    """Connect, in autocommit; what Postgres refuses is a `SluiceError` of one sentence.

    settings: those of the environment if not given. actor: who changes something, for the audit;
    the user of this command if not given.
    """
    from sluicegate.shared.audit import command_actor, sign
    from sluicegate.shared.database import DATABASE_ERRORS, explain
    from sluicegate.shared.settings import get_settings

    try:
        with connected(settings or get_settings()) as line:
            sign(line, actor or command_actor(), for_transaction=False)
            line.commit()  # in autocommit that ends nothing but SQLAlchemy's own count
            yield line
    except DATABASE_ERRORS as error:
        raise explain(error) from error


@contextmanager
def connected(settings: Settings) -> Iterator[Connection]:
    """Connect, in autocommit; what Postgres refuses is raised as it comes."""
    from sluicegate.shared.database import make_engine

    engine = make_engine(settings, application_name="sluice command", pool_size=1)
    try:
        with engine.connect() as line:
            yield line
    finally:
        engine.dispose()
