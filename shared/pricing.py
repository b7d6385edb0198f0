"""What tokens cost: price cards compiled from a price list, in integers.

`genai-prices` computes with decimals and takes about 130 µs a call; a job needs two prices (its
own and the baseline's), so its rates are compiled once into a card of integers and each price is
a dot product. A test holds the cards to `genai-prices` over random usages, tiers included.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from functools import lru_cache
from typing import Final

from genai_prices.types import ModelPrice, TieredPrices

from sluicegate.shared.errors import UnknownPrice
from sluicegate.shared.messages import Usage
from sluicegate.shared.price_lists import PriceList, Processing, in_use

OVERRIDE_VERSION = "provider row"

#: Largest amount kept: beyond it Redis' doubles are no longer exact (nine million dollars).
MAX_NANO_USD = 2**53

_PICO_PER_NANO = 1000
#: $1 a million tokens is a million pico-USD a token.
_PICO_PER_USD_MTOK = 1_000_000

#: Our classes of tokens, each with the list's names for its rate, the most exact one first. What a
#: list does not tell apart costs what the next name says: a one-hour write what a write costs.
CLASSES: Final[dict[str, tuple[str, ...]]] = {
    "input": ("input_mtok",),
    "cache_read": ("cache_read_mtok", "input_mtok"),
    "cache_write_5m": ("cache_write_5m_mtok", "cache_write_mtok", "input_mtok"),
    "cache_write_1h": ("cache_write_1h_mtok", "cache_write_mtok", "input_mtok"),
    "output": ("output_mtok",),
}
#: What a provider's own tools cost: no request of ours names one.
_TOOLS: Final = {
    f"{tool}_kcount"
    for tool in ("web_searches", "social_searches", "storage_searches", "code_executions")
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Pico-USD a token, by class."""

    input: int
    cache_read: int
    cache_write_5m: int
    cache_write_1h: int
    output: int

    @property
    def dearest_input(self) -> int:
        """The most that a prompt token can cost."""
        return max(self.input, self.cache_read, self.cache_write_5m, self.cache_write_1h)


@dataclass(frozen=True, slots=True)
class PriceCard:
    """All rates of a model. `tiers` are (prompt tokens above which they apply, rates), ascending.

    The tier of the whole prompt applies to every token of the call, as both providers bill it.
    """

    tiers: tuple[tuple[int, Rates], ...]
    version: str

    def rates(self, prompt_tokens: int) -> Rates:
        """Return the rates that hold for a prompt of this length, cached tokens included."""
        current = self.tiers[0][1]
        for above, rates in self.tiers[1:]:
            if prompt_tokens > above:
                current = rates
        return current

    def cost_nano_usd(self, usage: Usage) -> int:
        """Return the cost of one call, rounded up once."""
        rates = self.rates(usage.total_input)
        pico = (
            usage.input * rates.input
            + usage.cache_read * rates.cache_read
            + usage.cache_write_5m * rates.cache_write_5m
            + usage.cache_write_1h * rates.cache_write_1h
            + usage.output * rates.output
        )
        return -(-pico // _PICO_PER_NANO)

    def reserve_nano_usd(self, prompt_tokens: int, max_tokens: int) -> int:
        """Return the most that a call may cost: every prompt token of the dearest class."""
        rates = self.rates(prompt_tokens)
        pico = prompt_tokens * rates.dearest_input + max_tokens * rates.output
        return -(-pico // _PICO_PER_NANO)


def price_card(
    provider: str,
    model: str,
    override: Mapping[str, float] | None = None,
    processing: Processing = "standard",
) -> PriceCard:
    """Return the card of a model for calls that are processed so.

    `override` is a provider row's own price: nano-USD a token by class; `input` and `output` are
    needed, the cache classes default to the input's. It says what calls cost that are answered at
    once, and nothing of others.

    Raises UnknownPrice if neither list nor row has one.
    """
    if override is None:
        return listed_card(in_use(), provider, model, processing)
    if processing != "standard":
        raise UnknownPrice(
            f"the {processing} price of {provider} model {model!r} is not known: "
            "its provider row has a price of its own"
        )
    return _override_card(tuple(sorted(override.items())))


def listed_card(
    prices: PriceList, provider: str, model: str, processing: Processing = "standard"
) -> PriceCard:
    """Return the card that a list has for a model today. Raises UnknownPrice."""
    # A price may change on a date: a process that runs for weeks asks again each day.
    return _listed_card(prices, provider, model, processing, datetime.now(UTC).date().isoformat())


def price_version() -> str:
    """Return the name of the list that this process books by."""
    return in_use().version


#: How providers call what they did with a request; any other word is the ordinary way.
_TIERS: Final[dict[str | None, Processing]] = {
    "batch": "batch",
    "flex": "flex",
    "priority": "priority",
    "fast": "priority",
}


def tier_card(
    provider: str, model: str, override: Mapping[str, float] | None, service_tier: str | None
) -> PriceCard:
    """Return the card for a call that the provider says was served so. Raises UnknownPrice.

    We ask for no tier, but a project's settings at OpenAI may: priority costs about twice as much.
    A tier without a price of its own costs what calls cost, as Anthropic's priority does.
    """
    processing = _TIERS.get(service_tier, "standard")
    if processing != "standard":
        try:
            return price_card(provider, model, override, processing)
        except UnknownPrice:
            pass
    return price_card(provider, model, override)


@lru_cache(maxsize=1024)
def _override_card(items: tuple[tuple[str, float], ...]) -> PriceCard:
    given = {name: round(nano * _PICO_PER_NANO) for name, nano in items}
    missing = {"input", "output"} - given.keys()
    unknown = given.keys() - CLASSES.keys()
    if missing or unknown or min(given.values()) < 0:
        raise UnknownPrice(
            "a price override needs input and output, and may have "
            "cache_read, cache_write_5m, cache_write_1h, in nano-USD a token"
        )
    rates = {name: given.get(name, given["input"]) for name in CLASSES}
    return PriceCard(((0, Rates(**rates)),), OVERRIDE_VERSION)


@lru_cache(maxsize=1024)
def _listed_card(
    prices: PriceList, provider: str, model: str, processing: Processing, day: str
) -> PriceCard:
    at = datetime.fromisoformat(day).replace(tzinfo=UTC)
    priced = prices.prices(provider, model, processing, at)
    if priced.input_mtok is None or priced.output_mtok is None:
        raise UnknownPrice(
            f"{provider} model {model!r} has no price for text in and out; "
            "set one on its provider row to use it"
        )
    listed = {name for name, price in vars(priced).items() if price is not None}
    if apart := listed - _TOOLS - {name for names in CLASSES.values() for name in names}:
        # Sound, for one, costs sixteen times as much as text: never book it at the text's rate.
        raise UnknownPrice(
            f"{provider} model {model!r} has no price for text alone, for the list has "
            f"{', '.join(sorted(apart))} apart; set one on its provider row to use it"
        )
    starts = {0} | {
        tier.start
        for price in vars(priced).values()
        if isinstance(price, TieredPrices)
        for tier in price.tiers
    }
    return PriceCard(
        tuple((start, _rates_above(priced, start)) for start in sorted(starts)), prices.version
    )


def _rates_above(priced: ModelPrice, start: int) -> Rates:
    picos: dict[str, int] = {}
    for name, sources in CLASSES.items():
        price = next(one for source in sources if (one := getattr(priced, source)) is not None)
        usd_mtok: Decimal = price.base if isinstance(price, TieredPrices) else price
        if isinstance(price, TieredPrices):
            for tier in price.tiers:
                if start >= tier.start:
                    usd_mtok = tier.price
        pico = usd_mtok * _PICO_PER_USD_MTOK
        if pico != int(pico):
            raise UnknownPrice(f"a rate of ${usd_mtok} a million tokens is finer than a pico-USD")
        picos[name] = int(pico)
    return Rates(**picos)


def context_window(provider: str, model: str) -> int | None:
    """Return how many tokens the price list says that a model takes; None: it does not say."""
    found = in_use().find(provider, model)
    return None if found is None else found.context_window


def baseline_provider(model: str) -> str:
    """Return whose price list names the baseline model; raise `UnknownPrice` if none does."""
    return _baseline_provider(in_use(), model)


@lru_cache(maxsize=64)
def _baseline_provider(prices: PriceList, model: str) -> str:
    for provider in ("openai", "anthropic"):
        try:
            listed_card(prices, provider, model)
        except UnknownPrice:
            continue
        return provider
    raise UnknownPrice(f"SLUICE_BASELINE_MODEL: no price is known for {model!r}")


def baseline_nano_usd(usage: Usage, model: str) -> int:
    """Return what the same tokens would have cost on the baseline model."""
    return price_card(baseline_provider(model), model).cost_nano_usd(usage)


#: Characters a token, low enough that the estimate is an upper bound for ordinary prose.
_CHARACTERS_PER_TOKEN = 3
#: Fixed for a message's frame, and for one image or page until its real size is known.
_TOKENS_PER_MESSAGE = 8
_TOKENS_PER_ATTACHMENT = 6000


def estimate_prompt_tokens(*, characters: int, messages: int, attachments: int) -> int:
    """Return a careful upper estimate of a prompt's tokens; both providers count only remotely."""
    return (
        -(-characters // _CHARACTERS_PER_TOKEN)
        + _TOKENS_PER_MESSAGE * (messages + 1)
        + _TOKENS_PER_ATTACHMENT * attachments
    )
