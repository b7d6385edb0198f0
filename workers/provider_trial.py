"""One real, tiny call to a provider, outside the fleet: whether it answers, and how fast."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from uuid import UUID

from sluicegate.shared.catalogue import Catalogue, Provider
from sluicegate.shared.jobs import build_spec
from sluicegate.shared.messages import Usage
from sluicegate.shared.secrets import Keyring
from sluicegate.shared.settings import Settings
from sluicegate.workers.providers.access import adapter_for
from sluicegate.workers.providers.base import Adapters, Call, Deadlines

#: Enough for models that think before the first word, and a fraction of a cent.
_MAX_TOKENS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What came of it."""

    #: The model that the provider says has answered.
    model: str
    text: str
    #: None when not streamed.
    first_token_ms: int | None
    duration_ms: int
    #: None, and so no cost: the provider sent none.
    usage: Usage | None
    cost_nano_usd: int | None


def try_provider(
    provider: Provider,
    account_id: UUID | None,
    *,
    catalogue: Catalogue,
    settings: Settings,
    stream: bool,
) -> Trial:
    """Call a provider as a worker would for this account; raises ProviderError, SettingsError.

    It costs what the provider takes for it, and is booked to nobody.
    """
    keyring = Keyring.of(settings)
    spec = build_spec("trial", "Reply with the word ok.", stream=stream)

    async def call() -> Trial:
        adapters = Adapters(max_connections=1)
        try:
            adapter = adapter_for(
                provider,
                account_id,
                adapters=adapters,
                settings=settings,
                keyring=keyring,
                catalogue=catalogue,
            )
            answer = await adapter.call(
                Call(
                    spec=spec,
                    model=provider.model,
                    max_tokens=min(_MAX_TOKENS, provider.max_tokens),
                    stream=stream,
                    deadlines=Deadlines(
                        connect_s=settings.connect_deadline_s,
                        first_token_s=settings.first_token_deadline_s,
                        response_s=settings.response_deadline_s,
                        idle_s=settings.idle_deadline_s,
                        total_s=settings.total_deadline_s,
                    ),
                ),
                (lambda _text, _fragments: None) if stream else None,
            )
        finally:
            await adapters.close()
        usage = answer.usage
        return Trial(
            model=answer.model,
            text=answer.text,
            first_token_ms=answer.first_token_ms,
            duration_ms=answer.duration_ms,
            usage=usage,
            cost_nano_usd=None
            if usage is None
            else provider.card_of(answer.service_tier).cost_nano_usd(usage),
        )

    return asyncio.run(call())
