"""Provider rows as they are shown: all but their keys."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection

from sluicegate.shared.catalogue import Provider, read
from sluicegate.shared.errors import UnknownPrice
from sluicegate.shared.provider_changes import ProviderEntry, list_providers
from sluicegate.shared.provider_keys import choose_key, environment_key
from sluicegate.shared.settings import Settings


def read_entries(connection: Connection, settings: Settings) -> list[tuple[ProviderEntry, str]]:
    """Return all rows, and where the key of each comes from; empty: there is none."""
    keys = read(connection).keys

    def source(row: Provider) -> str:
        key = choose_key(row, row.account_id, keys, environment_key(settings, row.provider))
        return "" if key is None else key.source.value

    return [(entry, source(entry.provider)) for entry in list_providers(connection)]


def usd_per_million(row: Provider) -> tuple[float | None, float | None]:
    """Return what a million tokens in and out cost, in the tier of short prompts."""
    try:
        rates = row.card.rates(0)
    except UnknownPrice:
        return None, None
    return rates.input / 1e6, rates.output / 1e6


def describe(entry: ProviderEntry, key: str) -> dict[str, Any]:
    """Return all of a row, by name, and nothing of its key but where that comes from."""
    row = entry.provider
    input_usd, output_usd = usd_per_million(row)
    return {
        "id": str(row.id),
        "name": row.name,
        "account": entry.account,
        "pool": row.provider,
        "model": row.model,
        "base_url": row.base_url,
        "is_active": entry.is_active,
        "is_default": row.is_default,
        "use_cases": sorted(row.use_case),
        "failover": sorted(row.failover),
        "priority": row.priority,
        "max_tokens": row.max_tokens,
        "context_tokens": row.context_tokens,
        "capabilities": sorted(row.capabilities),
        "input_usd_per_million": input_usd,
        "output_usd_per_million": output_usd,
        "price_override": row.price_override,
        "key": key or None,
        "requests_per_minute": row.requests_per_minute,
        "tokens_per_minute": row.tokens_per_minute,
        "input_tokens_per_minute": row.input_tokens_per_minute,
        "output_tokens_per_minute": row.output_tokens_per_minute,
        "max_concurrent": row.max_concurrent,
        "retires_at": row.retires_at,
        "successor": row.successor,
        "catalogue": row.catalogue,
    }
