"""What commands show of provider rows."""

# What takes long to import is imported once there is something to show.
# ruff: noqa: PLC0415

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from sluicegate.shared.connecting import connection
from sluicegate.shared.settings import get_settings
from sluicegate.shared.terminal import moment, note, print_json

if TYPE_CHECKING:
    from sluicegate.shared.catalogue import Provider
    from sluicegate.shared.provider_changes import ProviderEntry


def entries() -> list[tuple[ProviderEntry, str]]:
    """Return all rows, and where the key of each comes from; empty: there is none."""
    from sluicegate.shared.provider_listing import read_entries

    with connection() as line:
        return read_entries(line, get_settings())


def find(
    name: str, account: str | None, *, or_everybodys: bool = False
) -> tuple[ProviderEntry, str]:
    """Return a row as `entries` does; raise NotFound."""
    from sluicegate.shared.accounts import account_id_of
    from sluicegate.shared.provider_changes import no_provider

    with connection() as line:
        account_id = account_id_of(line, account)
    listed = entries()
    for whose in (account_id, None) if or_everybodys else (account_id,):
        for entry, key in listed:
            if entry.provider.name == name and entry.provider.account_id == whose:
                return entry, key
    known = [e.provider.name for e, _ in listed if e.provider.account_id in (account_id, None)]
    raise no_provider(name, known, account)


def tell(name: str, account: str | None, *, as_json: bool, new_key: bool = False) -> None:
    """Show what a change has made of a row, and what keeps jobs from it.

    new_key: the change has given it one.
    """
    from sluicegate.shared.provider_keys import readers
    from sluicegate.shared.secrets import Keyring
    from sluicegate.workers.secrets_commands import warn_of

    entry, key = find(name, account)
    row = entry.provider
    if as_json:
        print_json(as_json_object(entry, key))
    else:
        typer.echo(
            "\t".join(
                (
                    *(row.name, row.provider, row.model, use_cases(row) or "no use case"),
                    "active" if entry.is_active else "disabled",
                )
            )
        )
    if not (row.use_case or row.failover or row.is_default):
        note(f"it serves no use case yet; jobs reach it by the model {row.name}")
    if not key and not row.base_url:
        note(f"there is no key for it here; `sluice secrets set {row.provider}` stores one")
    if new_key:
        with connection() as line:
            warn_of(readers(line, Keyring.of(get_settings()), row.provider))


def use_cases(row: Provider) -> str:
    """Write which use cases a row serves."""
    failover = (f"{name} (failover)" for name in sorted(row.failover))
    default = ["(default)"] if row.is_default else []
    return ", ".join([*sorted(row.use_case), *failover, *default])


def prices(row: Provider) -> tuple[str, str]:
    """Write what a million tokens in and out cost, in the tier of short prompts."""
    from sluicegate.shared.provider_listing import usd_per_million

    return tuple(  # type: ignore[return-value]  # two in, two out
        "?" if usd is None else f"{usd:g}" for usd in usd_per_million(row)
    )


def as_json_object(entry: ProviderEntry, key: str) -> dict[str, Any]:
    """Return all of a row for JSON, and nothing of its key but where that comes from."""
    from sluicegate.shared.provider_listing import describe

    shown = describe(entry, key)
    return shown | {"retires_at": moment(shown["retires_at"]) or None}


def word(value: object) -> str:
    """Write a value of `as_json_object` for people."""
    match value:
        case None:
            return ""
        case bool():
            return "yes" if value else "no"
        case list():
            return ", ".join(value)
        case dict():
            return ", ".join(f"{name} {one:g}" for name, one in value.items())
        case _:
            return str(value)
