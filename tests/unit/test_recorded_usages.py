"""Usages in the shape in which both providers send them, and what each call costs by the list."""

from __future__ import annotations

import json
import math
from decimal import Decimal
from pathlib import Path
from typing import Any

import genai_prices
import orjson
import pytest

from sluicegate.shared.messages import Usage
from sluicegate.shared.pricing import PriceCard, price_card, tier_card
from sluicegate.workers.providers.anthropic import AnthropicReading
from sluicegate.workers.providers.openai import OpenAIReading
from sluicegate.workers.providers.reading import Reading
from sluicegate.workers.providers.sse import ServerSentEvent

RECORDED: list[dict[str, Any]] = json.loads(
    (Path(__file__).parents[1] / "data" / "recorded_usages.json").read_text()
)

#: Nano-USD, worked out by hand from the providers' price pages: tokens x nano-USD a token, in the
#: order input + cache read + cache write 5 m + cache write 1 h + output. $1 a million tokens is
#: 1,000 nano-USD a token.
AMOUNTS: dict[str, int] = {
    # gpt-4o: $2.50 in, $1.25 cached, $10 out. gpt-4o-mini: $0.15, $0.075, $0.60.
    "openai: plain": 7_500_000,  # 1000 x 2500 + 500 x 10000
    "openai: without details": 181_350,  # 1117 x 150 + 23 x 600
    "openai: cached": 5_615_000,  # 86 x 2500 + 1920 x 1250 + 300 x 10000
    "openai: cached only": 76_800,  # 1024 x 75
    # Predictions that were not used are inside the 400.
    "openai: rejected predictions": 5_250_000,  # 500 x 2500 + 400 x 10000
    # gpt-6.1-sol: $2 in, $0.10 cached, $2.50 written, $10 out; above 272,000: $4, $0.20, $5, $15.
    # Reasoning is inside the output.
    "openai: reasoning": 19_754_000,  # 412 x 2000 + 1893 x 10000
    "openai: cache write": 14_548_000,  # 1104 x 2000 + 4096 x 2500 + 210 x 10000
    "openai: cache read and write": 14_350_400,  # 808x2000 + 6144x100 + 2048x2500 + 700x10000
    # gpt-6-luna: $0.10 in, $0.01 cached, $0.125 written, $0.50 out; above: $0.20, $0.02, $0.75 out.
    "openai: short": 29_200,  # 87 x 100 + 41 x 500
    "openai: zero": 0,
    "openai: long context, at its edge": 27_205_000,  # 272000 x 100 + 10 x 500
    "openai: long context, one above": 54_407_700,  # 272001 x 200 + 10 x 750
    "openai: long context, one below, cached": 2_963_900,  # 1999x100 + 270000x10 + 128x500
    # 992 x 4000 + 299008 x 200 + 1000 x 15000
    "openai: long context, above by what was cached": 78_769_600,
    # gpt-6.1-terra above 272,000: $2 in, $2.50 written, $7.50 out.
    "openai: long context, written": 680_009_500,  # 1 x 2000 + 272000 x 2500 + 1 x 7500
    # Images are tokens of the prompt.
    "openai: image": 2_942_500,  # 801 x 2500 + 94 x 10000
    "openai: image on mini": 3_864_000,  # 25520 x 150 + 60 x 600
    "openai: image, counted apart": 6_804_000,  # 1902 x 2000 + 300 x 10000
    # Batch is half: gpt-4o-mini $0.075 and $0.30, gpt-4o $1.25 and $5; what gpt-4o read from its
    # cache has no batch price and costs the ordinary $1.25.
    "openai: batch": 189_900,  # 1200 x 75 + 333 x 300
    "openai: batch, cached": 3_000_000,  # 976 x 1250 + 1024 x 1250 + 100 x 5000
    # gpt-6-luna in batch: $0.05 in, $0.005 cached, $0.0625 written, $0.25 out.
    "openai: batch, all classes": 81_973,  # 513x50 + 1027x5 + 511x62.5 + 77x250 = 81972.5
    # gpt-6.1-sol in batch above 272,000: $2 in, $7.50 out.
    "openai: batch, long context": 815_000_000,  # 400000 x 2000 + 2000 x 7500
    # Tiers that a project's settings may choose. gpt-4o: $4.25 in, $17 out. gpt-6-luna: half.
    "openai: priority": 5_950_000,  # 1000 x 4250 + 100 x 17000
    "openai: flex": 50_300,  # 1001 x 50 + 1 x 250
    # claude-haiku-4-5: $1 in, $5 out. claude-haiku-5-5: $0.10 in, $0.50 out.
    "anthropic: plain": 950_000,  # 350 x 1000 + 120 x 5000
    "anthropic: one token": 600,  # 1 x 100 + 1 x 500
    "anthropic: zero": 0,
    # claude-sonnet-5-5: $2 in, $0.10 cached, $2.50 written for 5 m, $4 for 1 h, $10 out.
    "anthropic: cache write 5m": 12_018_000,  # 14 x 2000 + 3188 x 2500 + 402 x 10000
    # claude-opus-5-5: $4 in, $0.20 cached, $5 written for 5 m, $8 for 1 h, $20 out.
    "anthropic: cache write 1h": 83_056_000,  # 9 x 4000 + 10240 x 8000 + 55 x 20000
    "anthropic: cache write without breakdown": 6_240_000,  # 10x4000 + 1200x5000 + 10x20000
    "anthropic: cache read": 4_146_800,  # 14 x 2000 + 3188 x 100 + 380 x 10000
    "anthropic: cached only": 20_480,  # 2048 x 10
    # 21 x 4000 + 12000 x 200 + 2000 x 5000 + 3000 x 8000 + 900 x 20000
    "anthropic: all classes": 54_484_000,
    "anthropic: thinking": 42_240_000,  # 640 x 2000 + 4096 x 10000
    "anthropic: image": 5_280_000,  # 1590 x 2000 + 210 x 10000
    # claude-haiku-5-5: $0.10, $0.01, $0.125, $0.20, $0.50; above 100,000 five times as much.
    "anthropic: long context, at its edge": 10_050_000,  # 100000 x 100 + 100 x 500
    # 1 x 500 + 100000 x 50 + 100 x 2500
    "anthropic: long context, above by what was cached": 5_250_500,
    # 99 x 100 + 90000 x 10 + 9000 x 125 + 900 x 200 + 64 x 500
    "anthropic: long context, one below, all classes": 2_246_900,
    # 101 x 500 + 90000 x 50 + 9000 x 625 + 900 x 1000 + 64 x 2500
    "anthropic: long context, one above, all classes": 11_235_500,
    # claude-sonnet-4-5: $3 in, $0.30 cached, $15 out; above 200,000: $6 in, $22.50 out.
    "anthropic: older long context, at its edge": 480_000_000,  # 150000x3000+50000x300+1000x15000
    "anthropic: older long context, one above": 1_222_506_000,  # 200001 x 6000 + 1000 x 22500
    # Batch is half, of caches and long contexts, too.
    "anthropic: batch": 1_000_000,  # 1000 x 500 + 200 x 2500
    # claude-haiku-5-5 in batch: 3x50 + 11x5 + 7x62.5 + 5x100 + 13x250 = 4392.5
    "anthropic: batch, all classes": 4_393,
    # 100001 x 250 + 1 x 312.5 + 2 x 1250 = 25003062.5
    "anthropic: batch, long context": 25_003_063,
    # 40 x 1000 + 20000 x 50 + 4000 x 2000 + 300 x 5000
    "anthropic: batch, cache write 1h": 10_540_000,
}


def name_of(recorded: dict[str, Any]) -> str:
    return f"{recorded['provider']}: {recorded['name']}"


each = pytest.mark.parametrize("recorded", RECORDED, ids=name_of)


def body_of(recorded: dict[str, Any]) -> dict[str, Any]:
    """Return the whole answer that the usage came with."""
    if recorded["provider"] == "anthropic":
        return {
            "type": "message",
            "model": recorded["model"],
            "content": [{"type": "text", "text": "So be it."}],
            "stop_reason": "end_turn",
            "usage": recorded["usage"],
        }
    return {
        "object": "chat.completion",
        "model": recorded["model"],
        "choices": [
            {"index": 0, "message": {"content": "So be it."}, "finish_reason": "stop"},
        ],
        "service_tier": recorded["service_tier"],
        "usage": recorded["usage"],
    }


def stream_of(recorded: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the events that say the same, as both providers spread it over a stream."""
    body, usage = body_of(recorded), recorded["usage"]
    if recorded["provider"] == "openai":
        delta = {"index": 0, "delta": {"content": "So be it."}, "finish_reason": "stop"}
        chunk = {name: body[name] for name in ("model", "service_tier")}
        return [{**chunk, "choices": [delta]}, {**chunk, "choices": [], "usage": usage}]
    begun = {**usage, "output_tokens": 1, "output_tokens_details": None}
    counts = ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")
    ended = ("output_tokens", "output_tokens_details")
    return [
        {"type": "message_start", "message": {**body, "content": [], "usage": begun}},
        {
            "type": "message_delta",
            "delta": {"stop_reason": "end_turn"},
            "usage": {name: usage[name] for name in (*counts, *ended) if name in usage},
        },
        {"type": "message_stop"},
    ]


def reading_of(recorded: dict[str, Any]) -> Reading:
    return AnthropicReading() if recorded["provider"] == "anthropic" else OpenAIReading()


def booked(recorded: dict[str, Any], reading: Reading) -> int:
    """Return what is booked for an answer once it was read."""
    usage = reading.usage()
    assert usage is not None
    return card_of(recorded, reading.service_tier).cost_nano_usd(usage)


def card_of(recorded: dict[str, Any], service_tier: str | None) -> PriceCard:
    provider, model = recorded["provider"], recorded["model"]
    # A row of OpenAI's batch does not say that it was one: who has sent it knows.
    if recorded["processing"] == "batch":
        return price_card(provider, model, processing="batch")
    return tier_card(provider, model, None, service_tier)


def test_every_amount_is_of_a_recorded_usage() -> None:
    assert [name_of(recorded) for recorded in RECORDED] == list(AMOUNTS)
    assert len(AMOUNTS) >= 40


@each
def test_a_whole_answer_costs_this(recorded: dict[str, Any]) -> None:
    reading = reading_of(recorded)
    reading.whole(body_of(recorded))
    assert booked(recorded, reading) == AMOUNTS[name_of(recorded)]


@each
def test_a_streamed_answer_costs_the_same(recorded: dict[str, Any]) -> None:
    reading = reading_of(recorded)
    for event in stream_of(recorded):
        reading.event(ServerSentEvent(b"", orjson.dumps(event)))
    assert reading.usage_is_final
    # Had the call failed now, its cost would be no less certain.
    assert reading.partial().usage == reading.usage()
    told = recorded.get("service_tier") or recorded["usage"].get("service_tier")
    assert reading.partial().service_tier == told
    assert booked(recorded, reading) == AMOUNTS[name_of(recorded)]


@each
def test_genai_prices_says_so_too(recorded: dict[str, Any]) -> None:
    provider = recorded["provider"]
    extracted = genai_prices.extract_usage(
        body_of(recorded),
        provider_id=provider,
        api_flavor="chat" if provider == "openai" else "default",
    )
    context = {
        "standard": None,
        "batch": {"processing": "batch"},
        "flex": {"service_tier": "flex"},
        "priority": {"service_tier": "priority"},
    }[recorded["processing"]]
    exact = extracted.calc_price(price_context=context).total_price * Decimal(10**9)
    assert math.ceil(exact) == AMOUNTS[name_of(recorded)]


@each
def test_the_reservation_was_enough(recorded: dict[str, Any]) -> None:
    reading = reading_of(recorded)
    reading.whole(body_of(recorded))
    usage = reading.usage()
    assert usage is not None
    card = card_of(recorded, reading.service_tier)
    assert card.reserve_nano_usd(usage.total_input, usage.output) >= AMOUNTS[name_of(recorded)]


def test_reasoning_beside_the_answer_is_billed() -> None:
    # Some compatible servers count the reasoning apart; their total says so.
    reading = OpenAIReading()
    reading.raw_usage = {
        "prompt_tokens": 32,
        "completion_tokens": 9,
        "total_tokens": 235,
        "completion_tokens_details": {"reasoning_tokens": 194},
    }
    assert reading.usage() == Usage(input=32, output=203, reasoning=194)
