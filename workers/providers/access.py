"""From a provider row to the adapter that calls it: which address, and with which key."""

from __future__ import annotations

from uuid import UUID

from sluicegate.shared.catalogue import Catalogue, Provider
from sluicegate.shared.errors import ErrorClass
from sluicegate.shared.provider_keys import KeySource, ProviderKey, choose_key, environment_key
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
    catalogue: Catalogue,
) -> Adapter:
    """Return what calls this provider for an account, with the key of `choose_key`.

    Raises `ProviderError`, never sent, where there is no usable key.
    """
    pool = provider.provider
    key = choose_key(provider, account_id, catalogue.keys, environment_key(settings, pool))
    secret = None
    if key is not None:
        try:
            secret = key.open(keyring)
        except SecretUnreadable:
            raise ProviderError(
                f"The worker cannot decrypt {_name(key, provider, account_id, catalogue)}: put "
                "what it was encrypted with into the worker's SLUICE_ENCRYPTION_KEYS and restart "
                "it, or set the key anew; then run `sluice job retry`.",
                error_class=ErrorClass.AUTH,
                sent=False,
            ) from None
    base_url = provider.base_url
    if base_url is None:
        openai, anthropic = settings.openai_base_url, settings.anthropic_base_url
        base_url = openai if pool == "openai" else anthropic
    return adapters.get(pool, base_url, secret)


def _name(
    key: ProviderKey, provider: Provider, account_id: UUID | None, catalogue: Catalogue
) -> str:
    """Say whose key it is: whoever has to set it anew must know."""
    match key.source:
        case KeySource.ACCOUNT if account_id is not None:
            return f"{catalogue.key_owners[account_id]}'s {provider.provider} key"
        case KeySource.ACCOUNT_ROW:
            return f"the account's own key of provider {provider.name}"
        case KeySource.ROW:
            return f"the key of provider {provider.name}"
        case _:
            return f"the {provider.provider} key for every account"
