"""Retry: what to do after an attempt that ended without an answer. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from celery.utils.time import get_exponential_backoff_interval

from sluicegate.shared.errors import ErrorClass


@dataclass(frozen=True, slots=True)
class Retry:
    """Run the job again after this many seconds, by a countdown message."""

    after_s: float


@dataclass(frozen=True, slots=True)
class Park:
    """Run the job again after this many seconds; until then it waits in Postgres."""

    after_s: float


@dataclass(frozen=True, slots=True)
class GiveUp:
    """End the job as failed; `why` completes the sentence that the caller reads."""

    why: str


@dataclass(frozen=True, slots=True)
class Expire:
    """End the job as expired: its time ran out while it was called."""

    why: str


Decision = Retry | Park | GiveUp | Expire


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """How long to wait, in seconds, and from which wait on a job parks."""

    base_s: float
    max_s: float
    park_above_s: float

    def decide(
        self,
        error_class: ErrorClass,
        *,
        attempts_used: int,
        max_attempts: int,
        retry_after_s: float | None,
        left_s: float,
    ) -> Decision:
        """Decide after the attempt that made it `attempts_used`; `left_s` is to the deadline.

        The wait is full jitter over an exponential backoff, as Celery computes it, and never
        shorter than what the provider asked for.
        """
        if not error_class.transient:
            return GiveUp("it is not tried again by itself")
        if attempts_used >= max_attempts:
            return GiveUp(f"all {max_attempts} attempts are used")
        after_s = float(
            get_exponential_backoff_interval(
                factor=1, retries=attempts_used, maximum=round(self.max_s), full_jitter=True
            )
        )
        after_s = max(min(after_s * self.base_s, self.max_s), retry_after_s or 0.0)
        if after_s >= left_s:
            if error_class is ErrorClass.TIMEOUT:
                # It was the job's own deadline that ended the call, or nearly so.
                return Expire("its deadline has passed")
            return GiveUp(f"the next attempt would be {after_s:.0f} s from now, past its deadline")
        return Park(after_s) if after_s > self.park_above_s else Retry(after_s)
