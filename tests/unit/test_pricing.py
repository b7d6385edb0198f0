"""Prices: equal to `genai-prices` to the nano-dollar, and never reserved too low."""

from __future__ import annotations

import math
from decimal import Decimal

import genai_prices
import pytest
from genai_prices import data_snapshot
from hypothesis import given
from hypothesis import strategies as st

from sluicegate.shared.errors import UnknownPrice
from sluicegate.shared.messages import Usage
from sluicegate.shared.price_lists import BUNDLED_VERSION, PROCESSINGS, Processing
from sluicegate.shared.pricing import (
    MAX_NANO_USD,
    OVERRIDE_VERSION,
    PriceCard,
    baseline_nano_usd,
    baseline_provider,
    context_window,
    estimate_prompt_tokens,
    price_card,
    price_version,
    tier_card,
)

#: Every model of the two providers that answers text with text.
MODELS: list[tuple[str, str]] = []
#: Models that do not: they speak, listen, draw, embed or judge.
OTHERS: list[tuple[str, str]] = []
for listed in data_snapshot.get_snapshot().providers:
    if listed.id in ("openai", "anthropic"):
        for model in listed.models:
            try:
                price_card(listed.id, model.id)
            except UnknownPrice:
                OTHERS.append((listed.id, model.id))
            else:
                MODELS.append((listed.id, model.id))

#: What `genai-prices` calls a processing.
CONTEXTS = {
    "standard": None,
    "batch": {"processing": "batch"},
    "flex": {"service_tier": "flex"},
    "priority": {"service_tier": "priority"},
}


def _is_priced(provider: str, model: str, processing: Processing) -> bool:
    try:
        return bool(price_card(provider, model, processing=processing))
    except UnknownPrice:
        return False


#: The same models with every processing that they have a price for.
PRICED = [
    (provider, model, processing)
    for provider, model in MODELS
    for processing in PROCESSINGS
    if _is_priced(provider, model, processing)
]

SEEDED = [
    ("anthropic", "claude-haiku-5-5"),
    ("anthropic", "claude-sonnet-5-5"),
    ("openai", "gpt-6.1-sol"),
    ("openai", "gpt-6-luna"),
    ("anthropic", "claude-haiku-4-5"),
    ("anthropic", "claude-sonnet-4-5"),
    ("openai", "gpt-4o"),
    ("openai", "gpt-4o-mini"),
]

#: Small numbers, the edges of long-context tiers, and large ones.
TOKENS = st.one_of(
    st.integers(0, 2000),
    st.sampled_from(
        [99_999, 100_000, 100_001, 199_999, 200_000, 200_001, 271_999, 272_000, 272_001]
    ),
    st.integers(0, 1_000_000),
)


@st.composite
def usages(draw: st.DrawFn, provider: str) -> Usage:
    output = draw(TOKENS)
    return Usage(
        input=draw(TOKENS),
        cache_read=draw(TOKENS),
        cache_write_5m=draw(TOKENS),
        # OpenAI has one kind of cache write only.
        cache_write_1h=draw(TOKENS) if provider == "anthropic" else 0,
        output=output,
        reasoning=draw(st.integers(0, output)),
    )


def reference_nano_usd(
    provider: str, model: str, usage: Usage, processing: Processing = "standard"
) -> Decimal:
    """The exact price by `genai-prices`, before any rounding."""
    tokens = {
        "input_tokens": usage.total_input,
        "cache_read_tokens": usage.cache_read,
        "cache_write_tokens": usage.cache_write_5m + usage.cache_write_1h,
        "output_tokens": usage.output,
    }
    if provider == "anthropic":
        tokens["cache_write_1h_tokens"] = usage.cache_write_1h
    priced = genai_prices.calc_price(
        genai_prices.Usage(**tokens),
        model,
        provider_id=provider,
        price_context=CONTEXTS[processing],
    )
    return priced.total_price * 10**9


def test_there_is_something_to_compare() -> None:
    assert set(SEEDED) <= set(MODELS)
    assert len(MODELS) > 80
    assert {len(price_card(*model).tiers) for model in MODELS} == {1, 2}
    assert {(*model, "batch") for model in SEEDED} <= set(PRICED)
    assert {processing for _, _, processing in PRICED} == set(PROCESSINGS)


@given(data=st.data())
def test_cost_is_that_of_the_price_list_rounded_up_once(data: st.DataObject) -> None:
    provider, model, processing = data.draw(st.sampled_from(PRICED))
    usage = data.draw(usages(provider))
    exact = reference_nano_usd(provider, model, usage, processing)
    card = price_card(provider, model, processing=processing)
    assert card.cost_nano_usd(usage) == math.ceil(exact)


@pytest.mark.parametrize("processing", ["standard", "batch"])
@pytest.mark.parametrize(("provider", "model"), SEEDED)
def test_tiers_begin_where_the_list_says(provider: str, model: str, processing: Processing) -> None:
    card = price_card(provider, model, processing=processing)
    edges = {start + step for start, _ in card.tiers for step in (-1, 0, 1)} - {-1}
    for prompt in sorted(edges):
        usage = Usage(input=prompt, output=7)
        exact = reference_nano_usd(provider, model, usage, processing)
        assert card.cost_nano_usd(usage) == math.ceil(exact)


@given(data=st.data())
def test_a_reservation_covers_every_usage_within_it(data: st.DataObject) -> None:
    provider, model = data.draw(st.sampled_from(SEEDED + MODELS))
    usage = data.draw(usages(provider))
    prompt_tokens = usage.total_input + data.draw(st.integers(0, 300_000))
    max_tokens = usage.output + data.draw(st.integers(0, 1000))
    card = price_card(provider, model)
    assert card.reserve_nano_usd(prompt_tokens, max_tokens) >= card.cost_nano_usd(usage)


def test_known_prices() -> None:
    million = Usage(input=1_000_000)
    assert price_card("openai", "gpt-4o").cost_nano_usd(million) == 2_500_000_000
    # Above 100,000 prompt tokens every token costs five times as much.
    haiku = price_card("anthropic", "claude-haiku-5-5")
    assert haiku.cost_nano_usd(Usage(input=100_000)) == 10_000_000
    assert haiku.cost_nano_usd(Usage(input=100_001)) == 50_000_500
    assert haiku.version == price_version() == BUNDLED_VERSION
    assert price_card("openai", "gpt-4o").cost_nano_usd(Usage()) == 0


def test_half_a_nano_dollar_is_rounded_up() -> None:
    card = price_card("openai", "x", {"input": 0.001, "output": 0.5})
    assert card.cost_nano_usd(Usage(input=1)) == 1
    assert card.cost_nano_usd(Usage(input=1000)) == 1
    assert card.cost_nano_usd(Usage(input=1001)) == 2
    # Once for the call, not once for each class.
    assert card.cost_nano_usd(Usage(input=1, output=1)) == 1


@pytest.mark.parametrize("model", ["gpt-6.2-sol", "no-such-model", ""])
def test_a_model_that_is_not_listed_has_no_price(model: str) -> None:
    with pytest.raises(UnknownPrice, match="set one on its provider row"):
        price_card("openai", model)


@pytest.mark.parametrize(("provider", "model"), OTHERS)
def test_a_model_that_does_not_answer_text_has_no_price(provider: str, model: str) -> None:
    with pytest.raises(UnknownPrice, match="set one on its provider row"):
        price_card(provider, model)


@pytest.mark.parametrize(
    ("provider", "model"), [("openai", "gpt-audio"), ("openai", "gpt-realtime-2")]
)
def test_a_model_that_bills_sound_apart_is_not_booked_as_text(provider: str, model: str) -> None:
    with pytest.raises(UnknownPrice, match=r"price for text alone.*input_audio_mtok"):
        price_card(provider, model)


@pytest.mark.parametrize(
    ("provider", "model", "processing"),
    [
        ("openai", "gpt-4o", "flex"),
        ("anthropic", "claude-haiku-5-5", "priority"),
        ("anthropic", "claude-3-haiku-20240307", "batch"),
        ("openai", "no-such-model", "batch"),
    ],
)
def test_a_processing_without_a_price_never_gets_the_ordinary_one(
    provider: str, model: str, processing: Processing
) -> None:
    with pytest.raises(UnknownPrice, match="is not known"):
        price_card(provider, model, processing=processing)


def test_a_price_of_the_rows_own_says_nothing_of_batches() -> None:
    with pytest.raises(UnknownPrice, match="a price of its own"):
        price_card("openai", "gpt-4o", {"input": 1, "output": 1}, "batch")


@pytest.mark.parametrize(
    ("provider", "model", "tier", "processing"),
    [
        ("openai", "gpt-4o", "priority", "priority"),
        ("openai", "gpt-6-luna", "fast", "priority"),
        ("openai", "gpt-6-luna", "flex", "flex"),
        ("anthropic", "claude-haiku-5-5", "batch", "batch"),
        ("openai", "gpt-4o", None, "standard"),
        ("openai", "gpt-4o", "default", "standard"),
        ("openai", "gpt-4o", "scale", "standard"),
        # The list has no price for these: they cost what calls cost.
        ("openai", "gpt-4o", "flex", "standard"),
        ("anthropic", "claude-haiku-5-5", "priority", "standard"),
    ],
)
def test_a_call_costs_what_the_tier_costs_that_served_it(
    provider: str, model: str, tier: str | None, processing: Processing
) -> None:
    card = tier_card(provider, model, None, tier)
    assert card == price_card(provider, model, processing=processing)


def test_a_price_of_the_rows_own_counts_for_every_tier() -> None:
    own = {"input": 1.0, "output": 2.0}
    assert tier_card("openai", "gpt-4o", own, "priority") == price_card("openai", "gpt-4o", own)
    with pytest.raises(UnknownPrice):
        tier_card("openai", "no-such-model", None, "priority")


def test_the_context_window_is_the_lists() -> None:
    assert context_window("openai", "gpt-4o") == 128_000
    assert context_window("openai", "no-such-model") is None


def test_an_override_wins_and_says_so() -> None:
    card = price_card("openai", "gpt-4o", {"input": 3, "output": 4, "cache_read": 1})
    assert card.version == OVERRIDE_VERSION
    usage = Usage(input=10, cache_read=10, cache_write_5m=10, output=10, reasoning=10)
    assert card.cost_nano_usd(usage) == 30 + 10 + 30 + 40
    assert price_card("openai", "no-such-model", {"input": 1, "output": 1}).tiers


@pytest.mark.parametrize(
    "override",
    [{}, {"input": 1}, {"input": 1, "output": -1}, {"input": 1, "output": 1, "cached": 1}],
)
def test_an_override_that_cannot_be_used_is_refused(override: dict[str, float]) -> None:
    with pytest.raises(UnknownPrice, match="needs input and output"):
        price_card("openai", "gpt-4o", override)


def test_the_baseline() -> None:
    assert baseline_provider("gpt-4o") == "openai"
    assert baseline_provider("claude-sonnet-5-5") == "anthropic"
    with pytest.raises(UnknownPrice, match="SLUICE_BASELINE_MODEL"):
        baseline_provider("no-such-model")
    usage = Usage(input=1000, output=1000)
    assert baseline_nano_usd(usage, "gpt-4o") == 12_500_000
    # Cache writes, which gpt-4o does not know, are priced as its input.
    assert baseline_nano_usd(Usage(cache_write_1h=1000), "gpt-4o") == 2_500_000


@given(
    characters=st.integers(0, 10**6), messages=st.integers(1, 100), attachments=st.integers(0, 10)
)
def test_the_estimate_grows_with_everything(
    characters: int, messages: int, attachments: int
) -> None:
    def estimate(
        more_characters: int = 0, more_messages: int = 0, more_attachments: int = 0
    ) -> int:
        return estimate_prompt_tokens(
            characters=characters + more_characters,
            messages=messages + more_messages,
            attachments=attachments + more_attachments,
        )

    assert estimate() >= characters / 3
    assert estimate(3) > estimate()
    assert estimate(0, 1) > estimate()
    assert estimate(0, 0, 1) > estimate()


def test_the_largest_job_stays_exact_everywhere() -> None:
    dearest = max(price_card(*model).reserve_nano_usd(2_000_000, 200_000) for model in MODELS)
    assert dearest < MAX_NANO_USD


def test_a_card_is_a_value() -> None:
    assert isinstance(price_card("openai", "gpt-4o"), PriceCard)
    assert price_card("openai", "gpt-4o") == price_card("openai", "gpt-4o")
