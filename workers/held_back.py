"""Why a job waits, in words: placement writes them, people and the waker read them."""

from __future__ import annotations

from typing import Final

from sluicegate.shared.admission.gate import Reason

PAUSED: Final = "it is paused"
FORCED_OPEN: Final = "its breaker is forced open"
SAID_NO: Final = "its last call failed"
FOR_GOOD: Final = "it has refused this job for good"

#: In all that is said of a budget.
BUDGET: Final = "budget"

WORDS: Final = {
    Reason.BREAKER: "its breaker is open",
    Reason.COOLDOWN: "it asked for a rest",
    Reason.REQUESTS: "it is at its limit of requests a minute",
    Reason.TOKENS: "it is at its limit of tokens a minute",
    Reason.CONCURRENCY: "it has as many calls under way as it takes",
    Reason.RETRIES: "it gets no second tries for now",
    Reason.SUSPENDED: "it refused this account's key or quota and is suspended for it",
    Reason.BUDGET_SPENT: "the account's budget is spent",
    Reason.BUDGET_HELD: "calls under way hold the rest of the account's budget",
}


def by(provider: str, why: str) -> str:
    """Say who it was."""
    return f"{provider}: {why}"
