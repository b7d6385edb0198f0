"""Changes of use cases: the kinds of work that jobs are, and who serves them."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any, Literal

from sqlalchemy import Connection, any_, func, select, update
from sqlalchemy.dialects.postgresql import insert

from sluicegate.shared.catalogue import read
from sluicegate.shared.catalogue_changes import (
    WAITING,
    Change,
    Count,
    Line,
    Mode,
    check_served,
    queues_of,
    refuse,
)
from sluicegate.shared.errors import NotFound
from sluicegate.shared.provider_changes import no_provider
from sluicegate.shared.queues import POOLS
from sluicegate.shared.tables import jobs, llm_providers, use_cases

_NAME = re.compile(r"[a-z][a-z0-9_-]{0,31}")


class UseCaseChange(Change):
    """Fields of a use case beside its name; see `catalogue.UseCase`."""

    description: Line = ""
    prefer: Literal["priority", "cheapest", "fastest"] = "priority"
    #: Longest answer when the job names none.
    max_tokens: Count = 1024
    unknown_policy: Literal["retry_once", "fail"] = "retry_once"


def add_use_case(
    connection: Connection,
    name: str,
    change: UseCaseChange,
    *,
    providers: Collection[str] | None = None,
) -> None:
    """Add a use case, served by these of everybody's rows; None: by the default rows.

    Raises SettingsError that names the field.
    """
    if not _NAME.fullmatch(name):
        refuse("name", "must be 1 to 32 small letters, digits, _ or -, and start with a letter")
    added = connection.scalar(
        insert(use_cases)
        .values(name=name, **change.values())
        .on_conflict_do_nothing()
        .returning(use_cases.c.name)
    )
    if added is None:
        refuse("name", f"{name!r} exists already; change it with `sluice usecase set {name}`")
    if providers is not None:
        _claim(connection, name, providers)


def set_use_case(
    connection: Connection,
    name: str,
    change: UseCaseChange,
    *,
    mode: Mode,
    providers: Collection[str] | None = None,
    force: bool = False,
) -> None:
    """Change what is given; `providers` are then the rows that serve it, and no other.

    Raises as `add_use_case`; NotFound; and SettingsError if no provider would be left, or jobs
    that wait would have none in their pool, unless forced.
    """
    _update(connection, name, change.values())
    if providers is None:
        return
    before = read(connection)
    _claim(connection, name, providers)
    if not force:
        check_served(connection, before, read(connection), account_id=None, mode=mode)


def switch_use_case(connection: Connection, name: str, *, active: bool) -> int:
    """Let a use case take new jobs or not; return how many of its jobs wait. Raises NotFound.

    Those that wait are done in any case.
    """
    _update(connection, name, {"is_active": active})
    waiting = connection.scalar(
        select(func.count())
        .select_from(jobs)
        .where(jobs.c.queue.in_(queues_of(name, POOLS)), jobs.c.state.in_(WAITING))
    )
    return int(waiting or 0)


def _update(connection: Connection, name: str, values: dict[str, Any]) -> None:
    # A row that nothing changes in is looked for all the same.
    found = connection.execute(
        update(use_cases).where(use_cases.c.name == name).values(**{"name": name, **values})
    )
    if not found.rowcount:
        known = connection.scalars(select(use_cases.c.name).order_by(use_cases.c.name)).all()
        raise NotFound(f"there is no use case {name!r}; there are {', '.join(known)}")


def _claim(connection: Connection, use_case: str, providers: Collection[str]) -> None:
    """Have these of everybody's rows serve the use case, and no other of everybody's."""
    columns = llm_providers.c
    shared = columns.account_id.is_(None)
    known = connection.scalars(select(columns.name).where(shared)).all()
    for name in providers:
        if name not in known:
            refuse("provider", str(no_provider(name, known)))
    without = func.array_remove(columns.use_case, use_case)
    connection.execute(
        update(llm_providers)
        .where(shared, any_(columns.use_case) == use_case, columns.name.not_in(providers))
        .values(use_case=without, updated_at=func.now())
    )
    connection.execute(
        update(llm_providers)
        .where(shared, columns.name.in_(providers))
        .values(use_case=func.array_append(without, use_case), updated_at=func.now())
    )
