"""What the sandbox provider bills: its own price list, so that it can contradict the product's.

List prices as both providers published them in November 2026, in integer nano-USD a token
($1 per million tokens = 1,000). This table shares nothing with `sluicegate.shared.pricing`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

WireName = Literal["openai", "anthropic"]

#: Every model with this prefix exists on both wires and costs what SANDBOX_PRICED_LIKE costs.
SANDBOX_PREFIX = "sandbox-"
SANDBOX_PRICED_LIKE = "gpt-6-luna"


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens of one call in disjoint classes; `reasoning` is a part of `output`."""

    input: int = 0
    cache_read: int = 0
    cache_write_5m: int = 0
    cache_write_1h: int = 0
    output: int = 0
    reasoning: int = 0

    @property
    def prompt(self) -> int:
        """All prompt tokens, cached or not."""
        return self.input + self.cache_read + self.cache_write_5m + self.cache_write_1h

    def cut(self, output: int) -> Usage:
        """Return the usage of the same call when it ended after `output` tokens."""
        output = max(0, min(output, self.output))
        return replace(self, output=output, reasoning=min(self.reasoning, output))


class Rate(NamedTuple):
    """Nano-USD a token, for calls of more than `above` prompt tokens."""

    above: int
    input: int
    cache_read: int
    cache_write_5m: int
    cache_write_1h: int
    output: int


#: Tiers by rising `above`. The tier of the whole prompt applies to every token of the call.
#: OpenAI has one kind of cache write; Anthropic's one-hour writes cost twice the input.
PRICES: dict[str, tuple[Rate, ...]] = {
    "gpt-6.1-sol": (
        Rate(0, 2_000, 100, 2_500, 2_500, 10_000),
        Rate(272_000, 4_000, 200, 5_000, 5_000, 15_000),
    ),
    "gpt-6.1-terra": (
        Rate(0, 1_000, 50, 1_250, 1_250, 5_000),
        Rate(272_000, 2_000, 100, 2_500, 2_500, 7_500),
    ),
    "gpt-6-luna": (
        Rate(0, 100, 10, 125, 125, 500),
        Rate(272_000, 200, 20, 250, 250, 750),
    ),
    "gpt-4o": (Rate(0, 2_500, 1_250, 2_500, 2_500, 10_000),),
    "gpt-4o-mini": (Rate(0, 150, 75, 150, 150, 600),),
    "claude-opus-5-5": (Rate(0, 4_000, 200, 5_000, 8_000, 20_000),),
    "claude-sonnet-5-5": (Rate(0, 2_000, 100, 2_500, 4_000, 10_000),),
    "claude-haiku-5-5": (
        Rate(0, 100, 10, 125, 200, 500),
        Rate(100_000, 500, 50, 625, 1_000, 2_500),
    ),
    "claude-sonnet-4-5": (
        Rate(0, 3_000, 300, 3_750, 6_000, 15_000),
        Rate(200_000, 6_000, 600, 7_500, 12_000, 22_500),
    ),
    "claude-haiku-4-5": (Rate(0, 1_000, 100, 1_250, 2_000, 5_000),),
}


def wire_of(model: str) -> WireName:
    """Say which wire format a model of the price list speaks."""
    return "anthropic" if model.startswith("claude-") else "openai"


def serves(model: str, wire: WireName) -> bool:
    """Say whether this wire knows this model."""
    return model.startswith(SANDBOX_PREFIX) or (model in PRICES and wire_of(model) == wire)


def bill_nano_usd(model: str, usage: Usage) -> int:
    """Return what a call costs, in nano-USD; exact, because every rate is an integer.

    Raises KeyError for a model that is neither in the list nor a sandbox model.
    """
    tiers = PRICES[SANDBOX_PRICED_LIKE if model.startswith(SANDBOX_PREFIX) else model]
    rate = next(tier for tier in reversed(tiers) if usage.prompt > tier.above or tier is tiers[0])
    return (
        usage.input * rate.input
        + usage.cache_read * rate.cache_read
        + usage.cache_write_5m * rate.cache_write_5m
        + usage.cache_write_1h * rate.cache_write_1h
        + usage.output * rate.output
    )
