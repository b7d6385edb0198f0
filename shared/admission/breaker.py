"""The breaker's policy: when it opens, for how long, and whom it then lets through.

Closed, open, half-open, and closed again; the transitions are in `row.lua`, so that the fleet
makes each of them once. An operator's levers, forced open and disabled, are the provider row's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from sluicegate.shared.settings import Settings

#: So many buckets are the window in which calls and failures are counted.
WINDOW_BUCKETS = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class BreakerPolicy:
    """One for the fleet; the scripts know its fields by these names."""

    #: At first, and at most; doubled with each failed probe in between, a fifth more or less.
    open_us: int
    open_max_us: int
    #: Permits of a half-open breaker.
    probes: int
    #: Failures in a row that open it,
    streak: int
    #: or this share (parts per million) of at least so many calls in the window.
    failure_ppm: int
    min_calls: int
    bucket_us: int

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """Return the policy that the settings ask for."""
        open_us = round(settings.breaker_open_s * 1e6)
        return cls(
            open_us=open_us,
            open_max_us=max(open_us, round(settings.breaker_open_max_s * 1e6)),
            probes=settings.breaker_probes,
            streak=settings.breaker_streak,
            failure_ppm=round(settings.breaker_failure_share * 1e6),
            min_calls=settings.breaker_min_calls,
            bucket_us=max(1, round(settings.breaker_bucket_s * 1e6)),
        )
