"""What a pause is for: the provider row, account or use case that somebody names."""

from __future__ import annotations

from uuid import UUID

from sqlalchemy import Connection

from sluicegate.shared.accounts import find_account
from sluicegate.shared.gate_changes import PauseKind, check_use_case
from sluicegate.shared.provider_changes import find_provider, list_providers


def pause_subject(
    connection: Connection, kind: PauseKind, called: str, of: str | None
) -> tuple[UUID | str, str]:
    """Return what a pause is kept under, and the name of what is paused; raises `NotFound`.

    called: its name, or an account's id. of: the account whose own provider row it is.
    """
    match kind:
        case "provider":
            return find_provider(connection, called, of).id, called
        case "account":
            found = find_account(connection, called)
            return found.id, found.name
        case "use_case":
            check_use_case(connection, called)
            return called, called


def own_rows(connection: Connection, name: str) -> list[str]:
    """Return the accounts that have a provider row of their own by this name."""
    return [
        entry.account
        for entry in list_providers(connection)
        if entry.provider.name == name and entry.account is not None
    ]
