"""Accounts: on whose behalf jobs run."""

from __future__ import annotations

import re
from dataclasses import dataclass
from uuid import UUID
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from sqlalchemy import Connection, select
from sqlalchemy.dialects.postgresql import insert

from sluicegate.shared.errors import InvalidJob
from sluicegate.shared.ids import new_id
from sluicegate.shared.tables import accounts

#: Exists in every database, so that a first job needs no preparation.
DEFAULT_ACCOUNT = "default"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.@-]{0,127}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """One account; windows of its budgets are days and months of `time_zone`."""

    id: UUID
    name: str
    time_zone: str
    is_active: bool


def check_name(name: object) -> str:
    """Return the name; raise `InvalidJob` if an account cannot be called this."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidJob(
            "account",
            "must be 1 to 128 letters, digits or _ . @ -, and start with one of the first two",
        )
    return name


def check_time_zone(name: str) -> str:
    """Return the IANA time zone's name; raise `InvalidJob` if there is none such."""
    try:
        ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise InvalidJob(
            "time_zone", f"{name!r} is not an IANA time zone such as Europe/Berlin"
        ) from None
    return name


def add_account(connection: Connection, name: str, time_zone: str = "UTC") -> Account:
    """Add an account; raise `InvalidJob` if the name is taken."""
    statement = (
        insert(accounts)
        .values(id=new_id(), name=check_name(name), time_zone=check_time_zone(time_zone))
        .on_conflict_do_nothing(index_elements=["name"])
        .returning(accounts.c.id, accounts.c.name, accounts.c.time_zone, accounts.c.is_active)
    )
    row = connection.execute(statement).one_or_none()
    if row is None:
        raise InvalidJob("account", f"{name!r} exists already")
    return Account(**row._mapping)


def list_accounts(connection: Connection) -> list[Account]:
    """Return all accounts by name."""
    columns = accounts.c
    rows = connection.execute(
        select(columns.id, columns.name, columns.time_zone, columns.is_active).order_by(
            columns.name
        )
    )
    return [Account(**row._mapping) for row in rows]
