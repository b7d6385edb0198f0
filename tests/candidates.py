"""Candidates of a test's own: provider rows whose gates concern no other test.

Each is at a model of the sandbox that nothing else calls, so that the sandbox's log can be read by
candidate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from uuid import UUID

from sqlalchemy import Connection, create_engine
from sqlalchemy.pool import NullPool

from sluicegate.shared.accounts import add_account
from sluicegate.shared.provider_changes import ProviderChange, add_provider, find_provider
from sluicegate.shared.use_case_changes import UseCaseChange, add_use_case
from sluicegate.workers.local.sandbox_prices import PRICES, SANDBOX_PRICED_LIKE
from tests.harness import Rig

_RATE = PRICES[SANDBOX_PRICED_LIKE][0]
#: What the sandbox bills for the models it makes up.
_PRICE = {
    "input": _RATE.input,
    "cache_read": _RATE.cache_read,
    "cache_write_5m": _RATE.cache_write_5m,
    "cache_write_1h": _RATE.cache_write_1h,
    "output": _RATE.output,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A provider row."""

    id: UUID
    name: str
    pool: str
    model: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A candidate that is to be."""

    pool: str
    context_tokens: int = 100_000
    #: None: one of its own.
    model: str | None = None


def other(pool: str) -> str:
    """Return the other pool."""
    return "anthropic" if pool == "openai" else "openai"


Wishes = Mapping[str, Sequence[Wanted | str]]


def add_candidates(
    rig: Rig, *, accounts: Wishes, use_cases: Wishes | None = None
) -> dict[str, list[Candidate]]:
    """Add candidates in the order in which they are to be asked, and take all others out of use.

    accounts: new ones, whose own rows serve `general`. use_cases: new ones, served for everybody.
    A string stands for a pool. Processes that run do not hear of it: start them afterwards.
    """
    engine = create_engine(rig.settings.database_dsn, poolclass=NullPool)
    found = {}
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE llm_providers SET is_active = false")
        for name, wanted in accounts.items():
            add_account(connection, name)
            found[name] = _add(connection, name, wanted, use_case="general", account=name)
        for name, wanted in (use_cases or {}).items():
            add_use_case(connection, name, UseCaseChange(), providers=())
            found[name] = _add(connection, name, wanted, use_case=name, account=None)
    return found


def _add(
    connection: Connection,
    prefix: str,
    wanted: Sequence[Wanted | str],
    *,
    use_case: str,
    account: str | None,
) -> list[Candidate]:
    added = []
    candidates = [Wanted(pool=one) if isinstance(one, str) else one for one in wanted]
    for number, one in enumerate(candidates, start=1):
        name = f"{prefix}-{number}"
        model = one.model or f"sandbox-{name}"
        change = ProviderChange.of(
            model=model,
            use_case=frozenset({use_case}),
            max_tokens=min(4096, one.context_tokens),
            context_tokens=one.context_tokens,
            priority=number,
            price_override=_PRICE,
        )
        add_provider(connection, name, one.pool, change, account=account)
        row = find_provider(connection, name, account)
        added.append(Candidate(id=row.id, name=name, pool=one.pool, model=model))
    return added
