"""Affording: what becomes of a job that its account's budget has no room for. Pure."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Final

from sluicegate.shared.jobs import Lane
from sluicegate.workers.ledger import Full

#: How long a job that somebody waits for stays in its worker for calls under way to end, and how
#: often it looks.
PATIENCE_S: Final = 2.0
_REST_S: Final = (0.05, 0.3)
#: How long it is parked otherwise: until some of them must have ended.
_PARK_S: Final = (2.0, 5.0)
#: How many stay in a process at most, and which part of its slots: they stand in the way of other
#: accounts' jobs.
_PATIENT_MAX: Final = 64
_PATIENT_SHARE: Final = 4


@dataclass(frozen=True, slots=True)
class Refuse:
    """The job fails: nothing but the next window, or a larger limit, would help."""


@dataclass(frozen=True, slots=True)
class Park:
    """The job waits in Postgres."""

    after_s: float


@dataclass(frozen=True, slots=True)
class Rest:
    """The job waits in its worker."""

    rest_s: float


def patient_max(slots: int) -> int:
    """Return how many jobs may stay in a worker of so many slots."""
    return min(_PATIENT_MAX, slots // _PATIENT_SHARE)


def afford(full: Full, lane: Lane, *, patience_s: float) -> Refuse | Park | Rest:
    """Decide for a job; `patience_s` is how much longer it may stay in its worker."""
    if full.by_spend:
        # Somebody waits for an interactive job, and is told at once.
        return Park(full.resets_in_s) if lane is Lane.BULK else Refuse()
    if lane is Lane.BULK or patience_s <= 0:
        return Park(random.uniform(*_PARK_S))  # noqa: S311 - spreads jobs, guards nothing
    return Rest(random.uniform(*_REST_S))  # noqa: S311 - as above
