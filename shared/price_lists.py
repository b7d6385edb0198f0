"""Price lists: what each model costs, and which list this process books by.

A list comes with the installed `genai-prices`. It counts until the fleet has adopted another
(`sluice prices update`); nothing else changes it, not even an application around us that lets
`genai-prices` refresh its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from datetime import date, datetime, time
from decimal import Decimal
from functools import cache
from importlib.metadata import version
from typing import Any, Final, Literal, get_args

from genai_prices.data_snapshot import DataSnapshot
from genai_prices.types import (
    ModelInfo,
    ModelPrice,
    PriceVariant,
    Provider,
    TieredPrices,
    TimeOfDateConstraint,
    # What `genai-prices` reads its own downloads with; it has no public name.
    _providers_from_raw,
)
from pydantic import ValidationError

from sluicegate.shared.errors import SluiceError, UnknownPrice

#: How a call is processed, which both providers price: at once, within a day, when there is room,
#: or before others.
Processing = Literal["standard", "batch", "flex", "priority"]
PROCESSINGS: Final[tuple[Processing, ...]] = get_args(Processing)

#: The name of the list that comes with the package.
BUNDLED_VERSION: Final = f"genai-prices {version('genai-prices')}"

#: Of the many providers of a list, those whose APIs we speak.
_OURS: Final = ("openai", "anthropic")
#: What the list calls a processing.
_CONTEXTS: Final[dict[Processing, dict[str, str]]] = {
    "standard": {},
    "batch": {"processing": "batch"},
    "flex": {"service_tier": "flex"},
    "priority": {"service_tier": "priority"},
}


class InvalidPriceList(SluiceError):
    """This is not a price list that the installed genai-prices can read."""


@dataclass(frozen=True, slots=True, eq=False)
class PriceList:
    """The prices of both providers' models, by date. Compared by identity: it is large."""

    #: Written beside every cost entry that is booked by it.
    version: str
    _snapshot: DataSnapshot

    @classmethod
    def of(cls, name: str, raw: object) -> PriceList:
        """Make a list of decoded JSON in the format of genai-prices.

        Only our providers are kept. Raises InvalidPriceList.
        """
        try:
            providers = [one for one in _providers_from_raw(raw) if one.id in _OURS]
        except (ValidationError, ValueError, TypeError, AssertionError, RecursionError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InvalidPriceList(
                f"this is not a price list that {BUNDLED_VERSION} can read ({reason})"
            ) from error
        if not any(one.models for one in providers):
            raise InvalidPriceList(f"the price list names no model of {' or '.join(_OURS)}")
        for provider in providers:
            for model in provider.models:
                _check(model)
        return cls(name, DataSnapshot(providers=providers, from_auto_update=False))

    def find(self, provider: str, model: str) -> ModelInfo | None:
        """Return what the list says of a model, None if it does not know it."""
        try:
            return self._snapshot.find_provider_model(model, None, provider, None)[1]
        except LookupError:
            return None

    def prices(self, provider: str, model: str, processing: Processing, at: datetime) -> ModelPrice:
        """Return what a model's calls of this processing cost at a time. Raises UnknownPrice."""
        found = self.find(provider, model)
        if found is None:
            raise UnknownPrice(
                f"the price of {provider} model {model!r} is not known; "
                "set one on its provider row to use it"
            )
        if any(isinstance(one, TimeOfDateConstraint) for one in _constraints(found)):
            raise UnknownPrice(
                f"the price of {provider} model {model!r} changes over the day; "
                "set one on its provider row to use it"
            )
        context = _CONTEXTS[processing]
        # A context that nothing matches would silently get the standard price.
        if context and not any(
            variant.when == context and _active(variant, at)
            for variant in found.price_variants or ()
        ):
            raise UnknownPrice(f"the {processing} price of {provider} model {model!r} is not known")
        return found.get_prices(at, context)

    def as_json(self) -> list[Any]:
        """Return the list as `of` reads it, without what no price depends on."""
        return [_plain(_slim(provider)) for provider in self._snapshot.providers]


class _InUse:
    adopted: PriceList | None = None


_in_use = _InUse()


def in_use() -> PriceList:
    """Return the list that this process books by."""
    return _in_use.adopted or bundled()


def use(prices: PriceList | None) -> None:
    """Book by this list from now on; None: by the one that comes with the package."""
    _in_use.adopted = prices


@cache
def bundled() -> PriceList:
    """Return the list that comes with the installed `genai-prices`."""
    from genai_prices.data import providers  # noqa: PLC0415 - it is large

    ours = [one for one in providers if one.id in _OURS]
    return PriceList(BUNDLED_VERSION, DataSnapshot(providers=ours, from_auto_update=False))


def _active(variant: PriceVariant, at: datetime) -> bool:
    return variant.constraint is None or variant.constraint.active(at)


def _constraints(model: ModelInfo) -> Iterator[object]:
    dated = model.prices if isinstance(model.prices, list) else ()
    for one in (*dated, *(model.price_variants or ())):
        yield one.constraint


def _check(model: ModelInfo) -> None:
    """Raise InvalidPriceList for what would fail only once a job asks for the model."""
    try:
        model.is_match("")
    except re.error as error:
        raise InvalidPriceList(f"the names of model {model.id!r} cannot be read") from error
    dated = model.prices if isinstance(model.prices, list) else [model]
    if not dated:
        raise InvalidPriceList(f"model {model.id!r} has no prices")
    for one in (*dated, *(model.price_variants or ())):
        assert isinstance(one.prices, ModelPrice)
        for price in vars(one.prices).values():
            tiers = price.tiers if isinstance(price, TieredPrices) else []
            base = price.base if isinstance(price, TieredPrices) else price
            amounts = [base or Decimal(0), *(tier.price for tier in tiers)]
            if not all(amount.is_finite() and amount >= 0 for amount in amounts) or any(
                tier.start < 0 for tier in tiers
            ):
                raise InvalidPriceList(f"model {model.id!r} has a price that is none")


def _slim(provider: Provider) -> Provider:
    models = [replace(one, description=None, price_comments=None) for one in provider.models]
    return replace(
        provider,
        models=models,
        extractors=None,
        pricing_urls=None,
        description=None,
        price_comments=None,
    )


def _plain(value: object) -> Any:
    """Return parts of a list as JSON has them; what is absent is left out."""
    match value:
        case None | bool() | int() | str():
            return value
        case Decimal():
            return str(value)
        case date() | time():
            return value.isoformat()
        case list():
            return [_plain(item) for item in value]
        case ModelPrice() | dict():
            named = value if isinstance(value, dict) else vars(value)
            return {name: _plain(item) for name, item in named.items() if item is not None}
        case _:
            assert is_dataclass(value), value
            # The list's own words are Python's, too: `or`, `and`.
            return {
                one.name.rstrip("_"): _plain(item)
                for one in fields(value)
                if (item := getattr(value, one.name)) is not None
            }
