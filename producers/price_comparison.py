"""Two price lists beside each other, for the models of the catalogue."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from sqlalchemy import Connection, select

from sluicegate.shared.errors import UnknownPrice
from sluicegate.shared.price_lists import PriceList, Processing
from sluicegate.shared.pricing import PriceCard, Rates, baseline_provider, listed_card
from sluicegate.shared.tables import llm_providers

#: How the fleet calls its models.
_COMPARED: Final[tuple[Processing, ...]] = ("standard", "batch")


@dataclass(frozen=True, slots=True, kw_only=True)
class PricedModel:
    """A model that a price list has to know."""

    provider: str
    model: str
    #: Names of the provider rows that are priced by the list.
    rows: tuple[str, ...] = ()
    #: Whether one of them is in use, or the baseline is this model.
    is_needed: bool
    is_baseline: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The rates of a model for one processing and prompts above a length, in both lists."""

    priced: PricedModel
    processing: Processing
    above_tokens: int
    #: None: the list has no price.
    now: Rates | None
    new: Rates | None

    @property
    def changed(self) -> bool:
        """Whether the lists differ."""
        return self.now != self.new


def read_models(connection: Connection, baseline_model: str) -> list[PricedModel]:
    """Return the models of the catalogue, and the baseline; not those with a price of their own."""
    table = llm_providers.c
    found: dict[tuple[str, str], dict[str, bool]] = {}
    for row in connection.execute(
        select(table.name, table.provider, table.model, table.is_active)
        .where(table.price_override.is_(None))
        .order_by(table.provider, table.model, table.name)
    ):
        rows = found.setdefault((row.provider, row.model), {})
        rows[row.name] = rows.get(row.name, False) or row.is_active
    baseline: tuple[str, str] | None = None
    with suppress(UnknownPrice):
        baseline = (baseline_provider(baseline_model), baseline_model)
        found.setdefault(baseline, {})
    return [
        PricedModel(
            provider=provider,
            model=model,
            rows=tuple(rows),
            is_needed=any(rows.values()) or (provider, model) == baseline,
            is_baseline=(provider, model) == baseline,
        )
        for (provider, model), rows in found.items()
    ]


def compare(now: PriceList, new: PriceList, models: Iterable[PricedModel]) -> list[Comparison]:
    """Put the rates of today in both lists beside each other, each prompt length on its own."""
    return [
        comparison
        for priced in models
        for processing in _COMPARED
        for comparison in _compare(priced, processing, now, new)
    ]


def lost(comparisons: Sequence[Comparison]) -> list[PricedModel]:
    """Return the models in need of a price that only the list of now has."""
    return [
        one.priced
        for one in comparisons
        if one.priced.is_needed
        and one.processing == "standard"
        and one.above_tokens == 0
        and one.now is not None
        and one.new is None
    ]


def _compare(
    priced: PricedModel, processing: Processing, now: PriceList, new: PriceList
) -> Iterable[Comparison]:
    cards = [_card(prices, priced, processing) for prices in (now, new)]
    if processing != "standard" and cards == [None, None]:
        return
    for above in sorted({0} | {above for card in cards if card for above, _ in card.tiers}):
        of_now, of_new = (card.rates(above + 1) if card else None for card in cards)
        yield Comparison(
            priced=priced, processing=processing, above_tokens=above, now=of_now, new=of_new
        )


def _card(prices: PriceList, priced: PricedModel, processing: Processing) -> PriceCard | None:
    try:
        return listed_card(prices, priced.provider, priced.model, processing)
    except UnknownPrice:
        return None
