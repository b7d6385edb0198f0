"""The limits' policy: how much of a provider row may be used, how fast, and by which lane.

Two things guard a rate. A bucket, refilled steadily and never fuller than one second of the rate,
keeps calls apart: one may leave while it is not in debt, so that large and small ones have the
same chance. A ring of half seconds remembers what was taken in the last minute, so that no minute
of the provider's takes in more than the limit, however large single calls are and whatever
corrections gave back. Both exist a second time for the bulk lane's share.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from sluicegate.shared.catalogue import Provider
from sluicegate.shared.settings import Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitPolicy:
    """One for the fleet; the scripts know its fields by these names."""

    #: A slot or probe permit that is not renewed for this long is free again.
    lease_us: int
    #: Rest after a 429 that does not say how long, doubled up to a minute.
    cooldown_us: int
    #: The longest rest that a provider can ask for.
    cooldown_max_us: int
    suspension_us: int
    #: The bulk lane's share of every limit, in parts per million.
    bulk_ppm: int
    #: What each first try adds to the retry bucket, in parts per million of a retry.
    retry_ppm: int

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """Return the policy that the settings ask for."""
        return cls(
            lease_us=round(settings.gate_lease_s * 1e6),
            cooldown_us=round(settings.cooldown_s * 1e6),
            cooldown_max_us=round(settings.cooldown_max_s * 1e6),
            suspension_us=round(settings.suspension_s * 1e6),
            bulk_ppm=round(settings.bulk_share * 1e6),
            retry_ppm=round(settings.retry_share * 1e6),
        )


def row_limits(provider: Provider) -> dict[str, int]:
    """Return the row's limits under the scripts' names; what is not limited is not in it."""
    limits = {
        "requests": provider.requests_per_minute,
        "tokens": provider.tokens_per_minute,
        "input": provider.input_tokens_per_minute,
        "output": provider.output_tokens_per_minute,
        "concurrent": provider.max_concurrent,
    }
    # Less than one would be never, which is what a pause is for.
    return {name: max(1, limit) for name, limit in limits.items() if limit is not None}
