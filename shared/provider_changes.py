"""Provider rows as operators see and change them: models behind APIs, and whom they serve."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Annotated, Any, Final, get_args
from urllib.parse import urlsplit

from pydantic import AwareDatetime, Field, field_validator
from sqlalchemy import Connection, Row, func, select, update
from sqlalchemy.dialects.postgresql import insert

from sluicegate.shared.accounts import account_id_of
from sluicegate.shared.catalogue import PROVIDERS, Capability, Provider, build, read
from sluicegate.shared.catalogue_changes import Change, Count, Line, Mode, check_served, refuse
from sluicegate.shared.errors import NotFound
from sluicegate.shared.ids import new_id
from sluicegate.shared.pricing import price_card
from sluicegate.shared.queues import POOLS
from sluicegate.shared.tables import accounts, llm_providers, use_cases

CAPABILITIES: Final[tuple[str, ...]] = get_args(Capability)

#: Nano-USD a token; a dollar a million tokens is a thousand of them.
_MAX_RATE: Final = 1e8
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")

_Names = frozenset[str]
_Rate = Annotated[float, Field(ge=0, le=_MAX_RATE, allow_inf_nan=False)]


class ProviderChange(Change):
    """Fields of a provider row beside its name, pool and account; see `catalogue.Provider`."""

    model: Annotated[Line, Field(min_length=1, max_length=200)] = ""
    base_url: Line | None = None
    is_default: bool = False
    use_case: _Names = frozenset()
    failover: _Names = frozenset()
    max_tokens: Count = 1
    context_tokens: Count = 1
    capabilities: _Names = frozenset()
    #: Lower is tried first.
    priority: Annotated[int, Field(ge=0, le=2**31 - 1)] = 100
    requests_per_minute: Count | None = None
    tokens_per_minute: Count | None = None
    input_tokens_per_minute: Count | None = None
    output_tokens_per_minute: Count | None = None
    max_concurrent: Count | None = None
    retires_at: AwareDatetime | None = None
    successor: str | None = None
    #: Nano-USD a token by class, in place of the price list; see `pricing.price_card`.
    price_override: Mapping[str, _Rate] | None = None
    api_key_encrypted: str | None = Field(default=None, repr=False)

    @field_validator("capabilities")
    @classmethod
    def _known(cls, value: _Names) -> _Names:
        for unknown in sorted(value - set(CAPABILITIES)):
            raise ValueError(f"{unknown!r} is not known; there are {', '.join(CAPABILITIES)}")
        return value

    @field_validator("base_url")
    @classmethod
    def _usable(cls, value: str | None) -> str | None:
        if value is None:
            return None
        try:
            parts = urlsplit(value)
            usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            usable = False
        if not usable or parts.query or parts.fragment:
            raise ValueError("must look like https://host/path")
        if parts.username is not None or parts.password is not None:
            raise ValueError("must not hold a password, as it is shown; a key has its own option")
        return value

    def values(self) -> dict[str, Any]:
        """Return what is given, by column."""
        return {
            name: sorted(value) if isinstance(value, frozenset) else value
            for name, value in super().values().items()
        }


def rates_of(usd_per_million: Mapping[str, float]) -> dict[str, float]:
    """Return prices in dollars a million tokens, by class, as a price override has them."""
    # A rate of $1 a million tokens is 1,000 nano-USD a token.
    return {rate: float(Decimal(str(usd)) * 1000) for rate, usd in usd_per_million.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class ProviderEntry:
    """A provider row, in use or not, and whose it is."""

    provider: Provider
    is_active: bool
    #: Whose it is; None: everybody's.
    account: str | None


def list_providers(connection: Connection) -> list[ProviderEntry]:
    """Return all rows, everybody's first, by name."""
    columns = llm_providers.c
    rows = connection.execute(
        select(columns.id, columns.is_active, accounts.c.name.label("account"))
        .outerjoin_from(llm_providers, accounts)
        .order_by(accounts.c.name.nulls_first(), columns.name)
    ).all()
    found = build(connection.execute(select(*PROVIDERS.selected_columns)), (), (), ()).providers
    providers = {provider.id: provider for provider in found}
    return [
        ProviderEntry(provider=providers[row.id], is_active=row.is_active, account=row.account)
        for row in rows
    ]


def add_provider(
    connection: Connection, name: str, pool: str, change: ProviderChange, *, account: str | None
) -> None:
    """Add a row, everybody's or an account's own.

    `model`, `max_tokens` and `context_tokens` are needed. Raises SettingsError that names the
    field, and UnknownPrice.
    """
    if not _NAME.fullmatch(name):
        refuse("name", "must be 1 to 128 letters, digits or _ . -, and start with one of the first")
    if pool not in POOLS:
        refuse("pool", f"{pool!r} is not a pool; there are {', '.join(POOLS)}")
    for needed in ("model", "max_tokens", "context_tokens"):
        if needed not in change.model_fields_set:
            refuse(needed, "is needed")
    row = {"name": name, "provider": pool, **change.values()}
    _check(connection, row, change)
    added = connection.scalar(
        insert(llm_providers)
        .values(id=new_id(), account_id=account_id_of(connection, account), **row)
        .on_conflict_do_nothing(index_elements=["account_id", "name"])
        .returning(llm_providers.c.id)
    )
    if added is None:
        refuse("name", f"{name!r} exists already; change it with `sluice provider set {name}`")


def set_provider(
    connection: Connection,
    name: str,
    change: ProviderChange,
    *,
    account: str | None,
    mode: Mode,
    force: bool = False,
) -> None:
    """Change what is given, and nothing else.

    Raises as `add_provider`; NotFound; and SettingsError if a use case would be left without a
    provider, or waiting jobs without one in their pool, unless forced.
    """
    row = find_provider(connection, name, account)
    _check(connection, {**row._mapping, **change.values()}, change)
    _update(connection, row, change.values(), mode, force=force)


def switch_provider(
    connection: Connection,
    name: str,
    *,
    active: bool,
    account: str | None,
    mode: Mode,
    force: bool = False,
) -> None:
    """Put a row to use or out of it; raises as `set_provider`."""
    row = find_provider(connection, name, account)
    _update(connection, row, {"is_active": active}, mode, force=force)


def find_provider(connection: Connection, name: str, account: str | None) -> Row[Any]:
    """Return a row, active or not, and lock it; raise NotFound."""
    columns = llm_providers.c
    whose = columns.account_id.is_not_distinct_from(account_id_of(connection, account))
    found = connection.execute(
        select(llm_providers).where(columns.name == name, whose).with_for_update()
    ).one_or_none()
    if found is None:
        known = connection.scalars(select(columns.name).where(whose).order_by(columns.name)).all()
        raise no_provider(name, known, account)
    return found


def no_provider(name: str, known: Collection[str], account: str | None = None) -> NotFound:
    """Make the error that says which rows there are."""
    whose = f" of account {account}" if account else ""
    listed = f"there are {', '.join(sorted(known))}" if known else "there are none"
    return NotFound(f"there is no provider {name!r}{whose}; {listed}")


def _update(
    connection: Connection, row: Row[Any], values: Mapping[str, Any], mode: Mode, *, force: bool
) -> None:
    before = read(connection)
    connection.execute(
        update(llm_providers)
        .where(llm_providers.c.id == row.id)
        .values(**values, updated_at=func.now())
    )
    if not force:
        check_served(connection, before, read(connection), account_id=row.account_id, mode=mode)


def _check(connection: Connection, row: Mapping[str, Any], change: ProviderChange) -> None:
    """Check what depends on other rows, and what depends on several fields of this one."""
    known = connection.scalars(select(use_cases.c.name).order_by(use_cases.c.name)).all()
    for field, names in (("use_case", change.use_case), ("failover", change.failover)):
        for name in sorted(names - set(known)):
            refuse(
                field,
                f"{name!r} is not known; there are {', '.join(known)}, "
                f"and `sluice usecase add {name}` adds it",
            )
    successor = change.successor
    if successor is not None:
        columns = llm_providers.c
        found = connection.execute(select(columns.id).where(columns.name == successor)).first()
        if found is None or successor == row["name"]:
            refuse("successor", f"{successor!r} is not the name of another provider")
    if row["max_tokens"] > row["context_tokens"]:
        refuse(
            "max_tokens",
            f"{row['max_tokens']} is more than context_tokens, which is {row['context_tokens']}",
        )
    price_card(row["provider"], row["model"], row.get("price_override"))
