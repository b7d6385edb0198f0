"""Price lists: read as genai-prices reads them, refused when they are none, used once adopted."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from genai_prices import data_snapshot

from sluicegate.producers.price_comparison import Comparison, PricedModel, compare, lost
from sluicegate.shared.errors import UnknownPrice
from sluicegate.shared.messages import Usage
from sluicegate.shared.price_lists import (
    PROCESSINGS,
    InvalidPriceList,
    PriceList,
    bundled,
    in_use,
    use,
)
from sluicegate.shared.pricing import (
    baseline_nano_usd,
    baseline_provider,
    context_window,
    listed_card,
    price_card,
    price_version,
)
from tests.offered_prices import listed, model_of, with_prices, without

NOW = datetime(2026, 11, 23, 12, tzinfo=UTC)
THOUSAND = Usage(input=1000, output=1000)


def offered(raw: object) -> PriceList:
    """Return a list that has been written as JSON and read again."""
    return PriceList.of("offered", json.loads(json.dumps(raw)))


def test_a_list_survives_being_stored() -> None:
    again = offered(listed())
    assert again.as_json() == listed()
    compared = 0
    for provider in data_snapshot.get_snapshot().providers:
        for model in provider.models if provider.id in ("openai", "anthropic") else ():
            for processing in PROCESSINGS:
                try:
                    expected = bundled().prices(provider.id, model.id, processing, NOW)
                except UnknownPrice:
                    with pytest.raises(UnknownPrice):
                        again.prices(provider.id, model.id, processing, NOW)
                else:
                    assert again.prices(provider.id, model.id, processing, NOW) == expected
                    compared += 1
    assert compared > 200


def test_only_our_providers_are_kept() -> None:
    other = {"id": "groq", "name": "Groq", "api_pattern": "x", "models": []}
    assert [one["id"] for one in offered([*listed(), other]).as_json()] == ["anthropic", "openai"]


def _with(change: Callable[[dict[str, Any]], object]) -> list[dict[str, Any]]:
    raw = listed()
    change(model_of(raw, "openai", "gpt-4o"))
    return raw


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({}, "not a price list"),
        ("prices", "not a price list"),
        ([1], "not a price list"),
        ([{"id": "openai"}], "not a price list"),
        ([], "names no model of openai or anthropic"),
        ([{"id": "openai", "name": "", "api_pattern": ""}], "names no model"),
        (_with(lambda one: one["prices"].update(input_mtok="-1")), "'gpt-4o' has a price that is"),
        (_with(lambda one: one["prices"].update(input_mtok="NaN")), "not a price list"),
        (_with(lambda one: one["prices"].update(input_mtok="cheap")), "not a price list"),
        (_with(lambda one: one.update(prices=[])), "'gpt-4o' has no prices"),
        (_with(lambda one: one.update(match={"regex": "("})), "names of model 'gpt-4o'"),
        (_with(lambda one: one.update(match={"sounds_like": "x"})), "not a price list"),
    ],
)
def test_what_is_no_price_list_is_refused(raw: object, words: str) -> None:
    with pytest.raises(InvalidPriceList, match=words):
        offered(raw)


def test_a_process_books_by_the_list_it_was_told() -> None:
    before = price_card("openai", "gpt-4o").cost_nano_usd(THOUSAND)
    assert (price_version(), baseline_nano_usd(THOUSAND, "gpt-4o")) == (bundled().version, before)
    use(offered(with_prices("openai", "gpt-4o", input_mtok="3", output_mtok="12.5")))
    card = price_card("openai", "gpt-4o")
    assert (card.cost_nano_usd(THOUSAND), card.version) == (15_500_000, "offered")
    assert price_version() == in_use().version == "offered"
    assert baseline_nano_usd(THOUSAND, "gpt-4o") == 15_500_000
    use(None)
    assert price_card("openai", "gpt-4o").cost_nano_usd(THOUSAND) == before


def test_a_new_list_knows_new_models_and_may_know_others_no_longer() -> None:
    raw = without("openai", "gpt-4o-mini")
    added = {**model_of(raw, "openai", "gpt-4o"), "id": "gpt-7", "match": {"equals": "gpt-7"}}
    next(one for one in raw if one["id"] == "openai")["models"].append(added)
    with pytest.raises(UnknownPrice):
        price_card("openai", "gpt-7")
    use(offered(raw))
    assert baseline_provider("gpt-7") == "openai"
    assert context_window("openai", "gpt-7") == 128_000
    with pytest.raises(UnknownPrice, match="'gpt-4o-mini' is not known"):
        price_card("openai", "gpt-4o-mini")


def test_nobody_else_changes_our_prices() -> None:
    before = price_card("openai", "gpt-4o")
    data_snapshot.set_custom_snapshot(
        data_snapshot.DataSnapshot(providers=[], from_auto_update=True)
    )
    try:
        assert in_use() is bundled()
        assert price_card("openai", "gpt-4o") == before
    finally:
        data_snapshot.set_custom_snapshot(None)


def test_a_price_begins_on_its_date() -> None:
    def dated(days: int) -> list[dict[str, Any]]:
        raw = listed()
        model = model_of(raw, "openai", "gpt-4o")
        starts = (datetime.now(UTC) + timedelta(days=days)).date().isoformat()
        new = {**model["prices"], "input_mtok": "9"}
        model["prices"] = [
            {"prices": model["prices"]},
            {"constraint": {"start_date": starts}, "prices": new},
        ]
        return raw

    usage = Usage(input=1000)
    assert listed_card(offered(dated(-2)), "openai", "gpt-4o").cost_nano_usd(usage) == 9_000_000
    assert listed_card(offered(dated(+2)), "openai", "gpt-4o").cost_nano_usd(usage) == 2_500_000


def test_a_price_that_changes_over_the_day_is_refused() -> None:
    raw = listed()
    model = model_of(raw, "openai", "gpt-4o")
    night = {"start_time": "16:30:00+00:00", "end_time": "00:30:00+00:00"}
    model["prices"] = [
        {"prices": model["prices"]},
        {"constraint": night, "prices": model["prices"]},
    ]
    with pytest.raises(UnknownPrice, match="changes over the day"):
        listed_card(offered(raw), "openai", "gpt-4o")


@pytest.mark.parametrize("key", ["cache_write_12h_mtok", "requests_kcount", "output_citation_mtok"])
def test_what_is_not_counted_here_is_not_booked_at_another_rate(key: str) -> None:
    prices = offered(with_prices("openai", "gpt-4o", **{key: "20"}))
    with pytest.raises(UnknownPrice, match=f"for the list has {key} apart"):
        listed_card(prices, "openai", "gpt-4o")


def test_the_most_exact_rate_counts() -> None:
    raw = with_prices("anthropic", "claude-sonnet-5-5", cache_write_5m_mtok="2.75")
    usage = Usage(cache_write_5m=1000)
    card = listed_card(offered(raw), "anthropic", "claude-sonnet-5-5")
    assert card.cost_nano_usd(usage) == 2_750_000
    assert price_card("anthropic", "claude-sonnet-5-5").cost_nano_usd(usage) == 2_500_000


def test_a_rate_may_be_any_kind_of_number() -> None:
    for rate in (0.1, "0.1", Decimal("0.1"), 1):
        raw = with_prices("openai", "gpt-4o", input_mtok=rate)
        card = listed_card(PriceList.of("offered", raw), "openai", "gpt-4o")
        assert card.cost_nano_usd(Usage(input=1000)) == Decimal(str(rate)) * 1_000_000


GPT_4O = PricedModel(provider="openai", model="gpt-4o", is_needed=True)
MINI = PricedModel(provider="openai", model="gpt-4o-mini", is_needed=False)
HAIKU = PricedModel(provider="anthropic", model="claude-haiku-5-5", is_needed=True)


def _where(found: list[Comparison]) -> list[tuple[str, str, int, bool]]:
    return [(one.priced.model, one.processing, one.above_tokens, one.changed) for one in found]


def test_lists_are_compared_by_processing_and_prompt_length() -> None:
    new = offered(with_prices("openai", "gpt-4o", output_mtok="11"))
    found = compare(bundled(), new, [GPT_4O, HAIKU])
    assert _where(found) == [
        ("gpt-4o", "standard", 0, True),
        ("gpt-4o", "batch", 0, False),
        ("claude-haiku-5-5", "standard", 0, False),
        ("claude-haiku-5-5", "standard", 100_000, False),
        ("claude-haiku-5-5", "batch", 0, False),
        ("claude-haiku-5-5", "batch", 100_000, False),
    ]
    now, later = found[0].now, found[0].new
    assert now is not None
    assert later is not None
    assert (now.output, later.output) == (10_000_000, 11_000_000)
    assert found[3].now is not None
    assert found[3].now.input == 500_000


def test_a_length_that_only_one_list_has_is_compared_all_the_same() -> None:
    tiers = {"base": "2.5", "tiers": [{"start": 64_000, "price": "5"}]}
    new = offered(with_prices("openai", "gpt-4o", input_mtok=tiers))
    for one, other in ((bundled(), new), (new, bundled())):
        found = compare(one, other, [GPT_4O])
        assert _where(found)[:2] == [
            ("gpt-4o", "standard", 0, False),
            ("gpt-4o", "standard", 64_000, True),
        ]


def test_a_price_that_is_gone_matters_where_it_is_needed() -> None:
    poorer = offered(without("openai", "gpt-4o"))
    assert lost(compare(bundled(), poorer, [GPT_4O, HAIKU])) == [GPT_4O]
    # It was not there before either; or nobody needs it.
    assert lost(compare(poorer, poorer, [GPT_4O])) == []
    assert lost(compare(bundled(), offered(without("openai", "gpt-4o-mini")), [MINI])) == []
