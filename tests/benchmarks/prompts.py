"""The prompts of every benchmark: the size of a CRM note, and an answer of a known length."""

from __future__ import annotations

ANSWER_TOKENS = 100
STREAMED_TOKENS = 120

_NOTE = """\
Summarise this call for the account team in four or five sentences and name the next step.

Call {n} with the operations lead of a logistics company with 140 vehicles. They are content with
the pilot at the northern depot: planning a tour takes 12 minutes instead of 45. Finance wants the
price for three depots in writing before the quarter ends and asks whether the set-up fee can be
spread. Security asked for the report on the last penetration test. A competitor has offered a
lower price without on-site training. They would like to begin on the first Monday of next month.
"""


def prompt(n: int, tokens: int = ANSWER_TOKENS) -> str:
    """Return the n-th prompt; the sandbox answers it with this many tokens."""
    return f"{_NOTE.format(n=n)}\nTOKENS: {tokens}"
