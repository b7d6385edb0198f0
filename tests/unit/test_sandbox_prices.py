from datetime import UTC, datetime
from itertools import pairwise

import pytest
from genai_prices import Usage as ListedUsage
from genai_prices import calc_price

from sluicegate.workers.local.sandbox_prices import PRICES, Usage, bill_nano_usd, serves, wire_of

AT = datetime(2026, 11, 22, tzinfo=UTC)
USAGES = [
    Usage(input=1_000, output=77),
    Usage(input=900, cache_read=100, output=77),
    Usage(input=800, cache_read=100, cache_write_5m=100, output=1),
    Usage(input=100_000, output=10),
    Usage(input=100_001, output=10),
    Usage(input=150_000, cache_read=50_001, cache_write_5m=9, output=3),
    Usage(input=272_001, output=10),
    Usage(input=1, cache_read=300_000, output=0),
]


@pytest.mark.parametrize("model", PRICES)
@pytest.mark.parametrize("usage", USAGES, ids=str)
def test_bill_is_the_list_price(model: str, usage: Usage) -> None:
    _assert_listed(model, usage)


@pytest.mark.parametrize("model", [model for model in PRICES if wire_of(model) == "anthropic"])
def test_one_hour_cache_writes_cost_twice_the_input(model: str) -> None:
    _assert_listed(model, Usage(input=10, cache_write_5m=20, cache_write_1h=30, output=5))
    hour = bill_nano_usd(model, Usage(cache_write_1h=1_000))
    assert hour == 2 * bill_nano_usd(model, Usage(input=1_000))
    assert 4 * bill_nano_usd(model, Usage(cache_write_5m=1_000)) == 5 * hour // 2


def _assert_listed(model: str, usage: Usage) -> None:
    listed = calc_price(
        ListedUsage(
            input_tokens=usage.prompt,
            cache_read_tokens=usage.cache_read,
            cache_write_tokens=usage.cache_write_5m + usage.cache_write_1h,
            cache_write_1h_tokens=usage.cache_write_1h,
            output_tokens=usage.output,
        ),
        model,
        provider_id=wire_of(model),
        genai_request_timestamp=AT,
    ).total_price
    assert bill_nano_usd(model, usage) == listed * 10**9


def test_tiers_rise() -> None:
    for tiers in PRICES.values():
        assert tiers[0].above == 0
        assert all(low.above < high.above for low, high in pairwise(tiers))


def test_sandbox_models_cost_what_luna_costs() -> None:
    usage = Usage(input=123, cache_read=7, output=45)
    assert bill_nano_usd("sandbox-anything", usage) == bill_nano_usd("gpt-6-luna", usage)
    assert serves("sandbox-anything", "openai")
    assert serves("sandbox-anything", "anthropic")


def test_each_model_speaks_its_own_wire_only() -> None:
    assert serves("gpt-4o", "openai")
    assert not serves("gpt-4o", "anthropic")
    assert serves("claude-haiku-5-5", "anthropic")
    assert not serves("claude-haiku-5-5", "openai")
    assert not serves("gpt-5", "openai")
    with pytest.raises(KeyError):
        bill_nano_usd("gpt-5", Usage(input=1))


def test_a_call_cut_short_bills_what_was_generated() -> None:
    usage = Usage(input=10, output=100, reasoning=40)
    assert usage.cut(60) == Usage(input=10, output=60, reasoning=40)
    assert usage.cut(25) == Usage(input=10, output=25, reasoning=25)
    assert usage.cut(1_000) == usage
