"""Retry: what to do after an attempt that ended without an answer. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from celery.utils.time import get_exponential_backoff_interval

from sluicegate.shared.errors import ErrorClass

#: Another try at the same provider may well succeed: one is made there before the next is asked.
_PASSING = frozenset({ErrorClass.SERVER, ErrorClass.CONNECT})
#: The provider is in trouble, or too slow for this job: another try costs the caller time.
_TROUBLED = frozenset(
    {
        ErrorClass.OVERLOADED,
        ErrorClass.TIMEOUT,
        ErrorClass.STREAM_BROKEN,
        ErrorClass.TRUNCATED,
        ErrorClass.GARBAGE,
    }
)
#: This provider will not take this job; another may.
_NOT_HERE = frozenset({ErrorClass.NOT_FOUND, ErrorClass.CONTEXT_TOO_LONG})
#: It takes none of this account's, until somebody sees to that.
_LOCKED_OUT = frozenset({ErrorClass.AUTH, ErrorClass.QUOTA})

_TRIES_HERE = 2


@dataclass(frozen=True, slots=True)
class Retry:
    """Call the same provider again after this many seconds."""

    after_s: float


@dataclass(frozen=True, slots=True)
class Next:
    """Ask at once who takes the job now: this provider has said no, or has to rest."""


@dataclass(frozen=True, slots=True)
class GiveUp:
    """End the job as failed; `why` completes the sentence that the caller reads."""

    why: str


@dataclass(frozen=True, slots=True)
class Expire:
    """End the job as expired: its time ran out while it was called."""

    why: str


Decision = Retry | Next | GiveUp | Expire


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """How long to wait between tries at one provider, in seconds: at first, and at most."""

    base_s: float
    max_s: float

    def decide(  # noqa: PLR0911 - a table of cases, in their order
        self,
        error_class: ErrorClass,
        *,
        tries_here: int,
        others: bool,
        attempts_used: int,
        max_attempts: int,
        retry_after_s: float | None,
        left_s: float,
        gated: bool = True,
        patient: bool = False,
    ) -> Decision:
        """Decide after an attempt, the job's `attempts_used`th and the `tries_here`th at its row.

        others: whether a candidate is left that has not said no. left_s: to the job's deadline.
        gated: whether the gates were asked for this call, and so know when the next may leave.
        patient: nobody waits for the answer right now, so it may wait for a key to be repaired.
        The wait is full jitter over an exponential backoff, as Celery computes it, and never
        shorter than what the provider asked for.
        """
        if error_class is ErrorClass.RATE_LIMITED and (gated or others):
            # Nothing was paid, and the fleet has heard of it: the gates say how long to wait.
            return Next()
        if error_class in _NOT_HERE | _LOCKED_OUT:
            waits = patient and error_class in _LOCKED_OUT and attempts_used < max_attempts
            return Next() if others or waits else GiveUp("it is not tried again by itself")
        if not error_class.transient:
            return GiveUp("it is not tried again by itself")
        if attempts_used >= max_attempts:
            return GiveUp(f"all {max_attempts} attempts are used")
        if others and (error_class in _TROUBLED or tries_here >= _TRIES_HERE):
            return Next()
        least_s = self.base_s if error_class is ErrorClass.RATE_LIMITED else 0.0
        after_s = max(self._backoff_s(tries_here), least_s, retry_after_s or 0.0)
        if others and after_s > self.base_s and error_class in _PASSING:
            return Next()
        if after_s < left_s:
            return Retry(after_s)
        if error_class is ErrorClass.TIMEOUT:
            # It was the job's own deadline that ended the call, or nearly so.
            return Expire("its deadline has passed")
        return GiveUp(f"the next attempt would be {after_s:.0f} s from now, past its deadline")

    def _backoff_s(self, tries_here: int) -> float:
        # Counted in Celery's whole seconds, stretched by ours.
        units = get_exponential_backoff_interval(
            factor=1000,
            retries=max(0, tries_here - 1),
            maximum=round(1000 * self.max_s),
            full_jitter=True,
        )
        return min(units / 1000 * self.base_s, self.max_s)
