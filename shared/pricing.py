"""What tokens cost: price cards compiled from `genai-prices`, in integers.

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
from importlib.metadata import version

import genai_prices
from genai_prices.types import TieredPrices

from sluicegate.shared.errors import UnknownPrice
from sluicegate.shared.messages import Usage

#: Written beside every cost entry: which price list it was made with.
PRICE_VERSION = f"genai-prices {version('genai-prices')}"
OVERRIDE_VERSION = "provider row"

#: Largest amount kept: beyond it Redis' doubles are no longer exact (nine million dollars).
MAX_NANO_USD = 2**53

_PICO_PER_NANO = 1000
#: $1 a million tokens is a million pico-USD a token.
_PICO_PER_USD_MTOK = 1_000_000

_CLASSES = ("input", "cache_read", "cache_write_5m", "cache_write_1h", "output")
_SOURCES = {
    "input": "input_mtok",
    "cache_read": "cache_read_mtok",
    "cache_write_5m": "cache_write_mtok",
    "cache_write_1h": "cache_write_1h_mtok",
    "output": "output_mtok",
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


def price_card(provider: str, model: str, override: Mapping[str, float] | None = None) -> PriceCard:
    """Return the card of a model; raise `UnknownPrice` if neither list nor row has one.

    `override` is a provider row's own price: nano-USD a token by class; `input` and `output` are
    needed, the cache classes default to the input's.
    """
    if override is not None:
        return _override_card(tuple(sorted(override.items())))
    # A price may change on a date: a process that runs for weeks asks again each day.
    return _listed_card(provider, model, datetime.now(UTC).date().isoformat())


@lru_cache(maxsize=1024)
def _override_card(items: tuple[tuple[str, float], ...]) -> PriceCard:
    given = {name: round(nano * _PICO_PER_NANO) for name, nano in items}
    missing = {"input", "output"} - given.keys()
    unknown = given.keys() - set(_CLASSES)
    if missing or unknown or min(given.values()) < 0:
        raise UnknownPrice(
            "a price override needs input and output, and may have "
            f"{', '.join(_CLASSES[1:4])}, in nano-USD a token"
        )
    rates = {name: given.get(name, given["input"]) for name in _CLASSES}
    return PriceCard(((0, Rates(**rates)),), OVERRIDE_VERSION)


@lru_cache(maxsize=1024)
def _listed_card(provider: str, model: str, _day: str) -> PriceCard:
    try:
        priced = genai_prices.calc_price(
            genai_prices.Usage(input_tokens=1), model, provider_id=provider
        ).model_price
    except LookupError:
        raise UnknownPrice(
            f"the price of {provider} model {model!r} is not known; "
            "set one on its provider row to use it"
        ) from None
    listed = {name: getattr(priced, source) for name, source in _SOURCES.items()}
    if listed["input"] is None or listed["output"] is None:
        raise UnknownPrice(
            f"{provider} model {model!r} has no price for text in and out; "
            "set one on its provider row to use it"
        )
    starts = {0} | {
        tier.start
        for price in listed.values()
        if isinstance(price, TieredPrices)
        for tier in price.tiers
    }
    return PriceCard(
        tuple((start, _rates_above(listed, start)) for start in sorted(starts)), PRICE_VERSION
    )


def _rates_above(listed: Mapping[str, Decimal | TieredPrices | None], start: int) -> Rates:
    picos: dict[str, int] = {}
    for name in _CLASSES:
        price = listed[name]
        if price is None:
            # A class that the list does not tell apart is billed as its parent.
            picos[name] = picos["cache_write_5m" if name == "cache_write_1h" else "input"]
            continue
        usd_mtok = price.base if isinstance(price, TieredPrices) else price
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
    try:
        usage = genai_prices.Usage(input_tokens=1)
        return genai_prices.calc_price(usage, model, provider_id=provider).model.context_window
    except LookupError:
        return None


@lru_cache(maxsize=64)
def baseline_provider(model: str) -> str:
    """Return whose price list names the baseline model; raise `UnknownPrice` if none does."""
    for provider in ("openai", "anthropic"):
        try:
            price_card(provider, model)
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
