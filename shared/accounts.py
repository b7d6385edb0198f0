"""Accounts: on whose behalf jobs run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from uuid import UUID
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from sqlalchemy import Connection, func, select, update
from sqlalchemy.dialects.postgresql import insert

from sluicegate.shared.budgets import recount_budgets
from sluicegate.shared.errors import InvalidJob, NotFound
from sluicegate.shared.ids import new_id
from sluicegate.shared.tables import (
    accounts,
    cost_entries,
    jobs,
    llm_providers,
    provider_keys,
)

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What there is of an account."""

    jobs: Mapping[str, int]
    #: Since the month began in the account's time zone, and in all.
    cost_month_nano_usd: int
    cost_nano_usd: int
    #: Names of its own provider rows.
    providers: tuple[str, ...]
    #: Pools for which it has a key of its own.
    keys: tuple[str, ...]


def check_name(name: object) -> str:
    """Return the name; raise `InvalidJob` if an account cannot be called this."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidJob(
            "account",
            "must be 1 to 128 letters, digits or _ . @ -, and start with one of the first two",
        )
    if isinstance(name_or_id(name), UUID):
        raise InvalidJob("account", "must not look like an id (UUID); choose another name")
    return name


def name_or_id(account: str) -> str | UUID:
    """Return the id that this is written as, or the name that it is if it is none.

    What can be read as an id is one everywhere, so that no name stands before another one's id.
    """
    try:
        return UUID(account)
    except ValueError:
        return account


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


def find_account(connection: Connection, account: str) -> Account:
    """Return an account by name or id, active or not; raise `NotFound`."""
    columns = accounts.c
    wanted = name_or_id(account)
    found = connection.execute(
        select(columns.id, columns.name, columns.time_zone, columns.is_active).where(
            (columns.id if isinstance(wanted, UUID) else columns.name) == wanted
        )
    ).first()
    if found is None:
        raise NotFound(f"there is no account {account!r}")
    return Account(**found._mapping)


def account_id_of(connection: Connection, account: str | None) -> UUID | None:
    """Return the id of an account by name or id; None stays None. Raises `InvalidJob`."""
    try:
        return None if account is None else find_account(connection, account).id
    except NotFound as error:
        raise InvalidJob("account", str(error)) from None


def set_account(
    connection: Connection,
    account: str,
    *,
    name: str | None = None,
    time_zone: str | None = None,
    is_active: bool | None = None,
) -> Account:
    """Change what is given of an account; raise `NotFound`, or `InvalidJob` that names the field.

    An account that is not active keeps its jobs and gets no new ones.
    """
    found = find_account(connection, account)
    values: dict[str, object] = {"id": found.id}
    if name is not None and name != found.name:
        if found.name == DEFAULT_ACCOUNT:
            raise InvalidJob("account", "the default account keeps its name: jobs rely on it")
        taken = connection.scalar(select(accounts.c.id).where(accounts.c.name == check_name(name)))
        if taken is not None:
            raise InvalidJob("account", f"{name!r} exists already")
        values["name"] = name
    if time_zone is not None and time_zone != found.time_zone:
        values["time_zone"] = check_time_zone(time_zone)
        recount_budgets(connection, found.id, time_zone)
    if is_active is not None:
        values["is_active"] = is_active
    columns = accounts.c
    row = connection.execute(
        update(accounts)
        .where(columns.id == found.id)
        .values(**values)
        .returning(columns.id, columns.name, columns.time_zone, columns.is_active)
    ).one()
    return Account(**row._mapping)


def figures(connection: Connection, account: Account) -> Figures:
    """Count an account's jobs and money; for a command, as it reads all of them."""
    counts = connection.execute(
        select(jobs.c.state, func.count().label("n"))
        .where(jobs.c.account_id == account.id)
        .group_by(jobs.c.state)
        .order_by(jobs.c.state)
    )
    local_now = func.timezone(account.time_zone, func.now())
    month = func.timezone(account.time_zone, func.date_trunc("month", local_now))
    amount = func.sum(cost_entries.c.amount_nano_usd)
    this_month = amount.filter(cost_entries.c.dispatched_at >= month)
    cost, cost_month = connection.execute(
        select(func.coalesce(amount, 0), func.coalesce(this_month, 0)).where(
            cost_entries.c.account_id == account.id
        )
    ).one()
    rows = llm_providers.c
    names = connection.scalars(
        select(rows.name).where(rows.account_id == account.id).order_by(rows.name)
    )
    keys = provider_keys.c
    pools = connection.scalars(
        select(keys.provider).where(keys.account_id == account.id).order_by(keys.provider)
    )
    return Figures(
        jobs={row.state: row.n for row in counts},
        cost_month_nano_usd=int(cost_month),
        cost_nano_usd=int(cost),
        providers=tuple(names),
        keys=tuple(pools),
    )
