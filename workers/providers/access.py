"""From a provider row to the adapter that calls it: which address, and with which key."""

from __future__ import annotations

from collections.abc import Mapping
from uuid import UUID

from sluicegate.shared.catalogue import PoolName, Provider
from sluicegate.shared.errors import ErrorClass
from sluicegate.shared.provider_keys import choose_key, environment_key
from sluicegate.shared.secrets import Keyring, SecretUnreadable
from sluicegate.shared.settings import Settings
from sluicegate.workers.providers.base import Adapter, Adapters, ProviderError


def adapter_for(
    provider: Provider,
    account_id: UUID | None,
    *,
    adapters: Adapters,
    settings: Settings,
    keyring: Keyring,
    keys: Mapping[tuple[PoolName, UUID | None], str],
) -> Adapter:
    """Return what calls this provider for an account, with the key of `choose_key`.

    Raises `ProviderError`, never sent, where there is no usable key.
    """
    pool = provider.provider
    key = choose_key(provider, account_id, keys, environment_key(settings, pool))
    try:
        secret = key.open(keyring) if key else None
    except SecretUnreadable:
        raise ProviderError(
            f"The key of {provider.name} in the database cannot be decrypted: put the key it was "
            "encrypted with into SLUICE_ENCRYPTION_KEYS, or set the provider's key anew.",
            error_class=ErrorClass.AUTH,
            sent=False,
        ) from None
    base_url = provider.base_url
    if base_url is None:
        openai, anthropic = settings.openai_base_url, settings.anthropic_base_url
        base_url = openai if pool == "openai" else anthropic
    return adapters.get(pool, base_url, secret)
