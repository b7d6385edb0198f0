"""Who calls, and what that allows: roles, and the one rule that each route has."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final
from uuid import UUID

from sluicegate.shared.accounts import name_or_id
from sluicegate.shared.errors import NotFound


class Role(StrEnum):
    """What a caller is to an account; each may do what those before it may."""

    #: Submits jobs and reads its own.
    USER = "user"
    #: Reads all jobs of the account and what it spent, and sets its budget.
    OWNER = "owner"
    #: Manages providers, accounts, keys and breakers, for all accounts.
    ADMIN = "admin"


class Rule(StrEnum):
    """Who may use a route."""

    #: Without credentials.
    ANYONE = "anyone"
    USER = "user"
    OWNER = "owner"
    ADMIN = "admin"

    def allows(self, role: Role) -> bool:
        """Whether callers of this role may."""
        return self is Rule.ANYONE or _RANK[role] >= _RANK[Role(self.value)]


_RANK: Final = {role: rank for rank, role in enumerate(Role)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Whose request this is."""

    #: Who it is, as jobs and the audit name him: `key:<id>`, `jwt:<subject>` or `sandbox`.
    subject: str
    role: Role
    #: On whose behalf it is; what it submits and reads is this account's.
    account_id: UUID
    account: str

    def is_own(self, account: str) -> bool:
        """Whether the caller's account has this name or id."""
        return name_or_id(account) in (self.account, self.account_id)

    def account_meant(self, named: str | None) -> str | None:
        """Return the account that is meant, by name or id: the one that is named, or the own.

        None: all of them, for an admin who names none. For others there is none but their own:
        raises `NotFound`, which says the same of those that are there and those that are not.
        """
        if self.role is Role.ADMIN:
            return named
        if named is None or self.is_own(named):
            return str(self.account_id)
        raise NotFound(f"there is no account {named!r}")

    def may_read(self, *, account_id: UUID, submitted_by: str | None) -> bool:
        """Whether a job of this account, submitted by this subject, is there for the caller."""
        match self.role:
            case Role.ADMIN:
                return True
            case Role.OWNER:
                return account_id == self.account_id
            case Role.USER:
                return account_id == self.account_id and submitted_by == self.subject
