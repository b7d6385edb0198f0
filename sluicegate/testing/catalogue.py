"""The catalogue of a fresh database, without a database."""

from __future__ import annotations

from importlib.resources import files
from typing import Any
from uuid import UUID

from alembic.script import ScriptDirectory

from sluicegate.shared.catalogue import Catalogue, Provider, UseCase

#: The migration that fills a new database.
_SEED = "0002"


def fresh_catalogue() -> tuple[Catalogue, UUID]:
    """Return what a new database starts with, read where it comes from; and the default account."""
    scripts = ScriptDirectory(str(files("sluicegate") / "migrations"))
    # Its rows are its own: Alembic knows only that it is a module.
    seed: Any = scripts.get_revision(_SEED).module
    providers = tuple(_provider(row) for row in seed.PROVIDER_ROWS)
    use_cases = {row["name"]: UseCase(**row) for row in seed.USE_CASE_ROWS}
    return Catalogue(providers, use_cases), seed.DEFAULT_ACCOUNT


def _provider(row: dict[str, Any]) -> Provider:
    sets = {name: frozenset(row[name]) for name in ("use_case", "failover", "capabilities")}
    absent = {"base_url": None, "account_id": None, "price_override": None, "priority": 100}
    return Provider(**{**absent, **row, **sets})
