"""Routing: which rows may serve a job, and in which order."""

from __future__ import annotations

import itertools
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any, Literal
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sluicegate.shared.catalogue import Catalogue, Provider, UseCase
from sluicegate.shared.errors import InvalidJob
from sluicegate.shared.jobs import build_spec
from sluicegate.shared.messages import FilePart, ImagePart, Message, TextPart
from sluicegate.shared.routing import (
    LONG_PROMPT_TOKENS,
    Needs,
    answer_tokens,
    check_models,
    detect_use_case,
    needs_of,
    route,
)

NOW = datetime(2026, 11, 22, tzinfo=UTC)
MINE, THEIRS = UUID(int=1001), UUID(int=1002)
Mode = Literal["current", "original"]

_numbers = itertools.count(1)


def row(name: str, **values: Any) -> Provider:
    defaults: dict[str, Any] = {
        "id": UUID(int=next(_numbers)),
        "provider": "openai",
        "model": f"model-{name}",
        "base_url": None,
        "is_default": False,
        "use_case": {"draft"},
        "failover": set(),
        "max_tokens": 4096,
        "context_tokens": 100_000,
        "capabilities": {"vision", "tools", "json_schema"},
        "account_id": None,
        "catalogue": None,
        "priority": 100,
        "retires_at": None,
        "successor": None,
        "price_override": {"input": 1, "output": 1},
    }
    merged = defaults | values
    for field in ("use_case", "failover", "capabilities"):
        merged[field] = frozenset(merged[field])
    return Provider(name=name, **merged)


def use_case(name: str = "draft", **values: Any) -> UseCase:
    defaults: dict[str, Any] = {
        "description": "",
        "prefer": "priority",
        "max_tokens": 1024,
        "unknown_policy": "retry_once",
    }
    return UseCase(name=name, **(defaults | values))


def needs(**values: Any) -> Needs:
    defaults: dict[str, Any] = {
        "use_case": "draft",
        "capabilities": frozenset(),
        "prompt_tokens": 10,
        "max_tokens": None,
        "model": None,
    }
    return Needs(**(defaults | values))


def routed(
    *rows: Provider,
    wanted: Needs | None = None,
    case: UseCase | None = None,
    mode: Mode = "current",
    now: datetime = NOW,
    first_token_ms: dict[UUID, float] | None = None,
) -> list[str]:
    case = case or use_case()
    candidates = route(
        wanted or needs(use_case=case.name),
        Catalogue(rows, {case.name: case}),
        account_id=MINE,
        mode=mode,
        now=now,
        first_token_ms=first_token_ms or {},
    )
    return [candidate.name for candidate in candidates]


def refused(*rows: Provider, **values: Any) -> InvalidJob:
    with pytest.raises(InvalidJob) as caught:
        routed(*rows, **values)
    return caught.value


# Who serves


def test_rows_meant_for_it_come_before_those_that_stand_in() -> None:
    rows = [row("a", use_case=(), failover=["draft"]), row("b"), row("c", use_case=["voice"])]
    assert routed(*rows) == ["b", "a"]


def test_standing_in_is_better_than_the_default() -> None:
    rows = [row("a", use_case=(), failover=["draft"]), row("b", use_case=(), is_default=True)]
    assert routed(*rows) == ["a"]


def test_the_default_takes_what_nobody_claims() -> None:
    rows = [row("a", use_case=["voice"]), row("b", use_case=["voice"], is_default=True)]
    assert routed(*rows) == ["b"]
    error = refused(rows[0])
    assert error.field == "use_case"
    assert "no active provider serves 'draft'" in error.problem


def test_an_unknown_use_case_names_those_that_there_are() -> None:
    error = refused(row("a"), wanted=needs(use_case="nonsense"))
    assert error.field == "use_case"
    assert "'nonsense' is not known; there are draft" in error.problem


def test_an_account_has_rows_of_its_own() -> None:
    rows = [row("a"), row("b", account_id=MINE, priority=900), row("c", account_id=THEIRS)]
    assert routed(*rows) == ["b", "a"]
    # A row of the same name stands in the global one's place.
    assert routed(row("a"), row("a", account_id=MINE), row("a", account_id=THEIRS)) == ["a"]


def test_a_retired_model_is_never_chosen() -> None:
    old = row("a", retires_at=NOW)
    assert routed(old, row("b")) == ["b"]
    assert routed(old, row("b"), now=NOW - timedelta(microseconds=1)) == ["a", "b"]
    assert refused(old).field == "use_case"
    assert refused(old, wanted=needs(model="a")).field == "model"


def test_the_original_catalogue_comes_first_while_its_models_live() -> None:
    rows = [
        row("new", catalogue="current"),
        row("new-stand-in", catalogue="current", use_case=(), failover=["draft"], priority=1),
        row("old", catalogue="original", retires_at=NOW, priority=900),
        row("own", catalogue=None),
    ]
    before = NOW - timedelta(days=1)
    assert routed(*rows, now=before) == ["new", "own", "new-stand-in"]
    assert routed(*rows, mode="original", now=before) == ["own", "old", "new", "new-stand-in"]
    assert routed(*rows, mode="original") == ["own", "new", "new-stand-in"]


# Who is able


@pytest.mark.parametrize("capability", ["vision", "tools", "json_schema"])
def test_a_job_goes_where_it_can_be_done(capability: str) -> None:
    able, unable = row("able", priority=900), row("unable", capabilities=())
    wanted = needs(capabilities=frozenset({capability}))
    assert routed(unable, able, wanted=wanted) == ["able"]
    error = refused(unable, wanted=wanted)
    assert capability in error.problem


def test_a_longer_answer_than_any_model_gives_is_refused() -> None:
    rows = [row("short", max_tokens=100), row("long", max_tokens=200)]
    assert routed(*rows, wanted=needs(max_tokens=100)) == ["long", "short"]
    assert routed(*rows, wanted=needs(max_tokens=101)) == ["long"]
    error = refused(*rows, wanted=needs(max_tokens=201))
    assert error.field == "max_tokens"
    assert error.problem == "201 is above the model's limit; 1 to 200 is allowed"


def test_a_prompt_goes_where_it_fits() -> None:
    rows = [row("narrow", context_tokens=100), row("wide", context_tokens=200)]
    assert routed(*rows, wanted=needs(prompt_tokens=100)) == ["narrow", "wide"]
    assert routed(*rows, wanted=needs(prompt_tokens=101)) == ["wide"]
    error = refused(*rows, wanted=needs(prompt_tokens=201))
    assert error.field == "prompt"
    assert "about 201 tokens; the models take up to 200" in error.problem


def test_a_model_may_be_named_by_either_name() -> None:
    rows = [row("a"), row("b", use_case=["voice"]), row("c", model="model-b", priority=50)]
    assert routed(*rows, wanted=needs(model="a")) == ["a"]
    assert set(routed(*rows, wanted=needs(model="model-b"))) == {"b", "c"}
    error = refused(*rows, wanted=needs(model="gpt-1"))
    assert error.field == "model"
    assert error.problem == "'gpt-1' is not in use here; there are a, b, c"


# In which order


def test_priority_decides_and_names_break_ties() -> None:
    assert routed(row("b"), row("c", priority=1), row("a")) == ["c", "a", "b"]


def test_the_cheapest_first() -> None:
    case = use_case(prefer="cheapest")
    dear_prompts = row("a", price_override={"input": 10, "output": 1})
    dear_answers = row("b", price_override={"input": 1, "output": 10})
    assert routed(dear_prompts, dear_answers, case=case) == ["a", "b"]
    wanted = needs(prompt_tokens=50_000)
    assert routed(dear_prompts, dear_answers, case=case, wanted=wanted) == ["b", "a"]


def test_the_fastest_first_and_unknown_ones_get_a_chance() -> None:
    case = use_case(prefer="fastest")
    slow, fast, new = row("a"), row("b"), row("c")
    known = {slow.id: 900.0, fast.id: 200.0}
    assert routed(slow, fast, new, case=case, first_token_ms=known) == ["c", "b", "a"]
    assert routed(slow, fast, new, first_token_ms=known) == ["a", "b", "c"]


ROWS = st.builds(
    row,
    st.sampled_from("abcdef"),
    use_case=st.sets(st.sampled_from(["draft", "voice"])),
    failover=st.sets(st.sampled_from(["draft", "voice"])),
    is_default=st.booleans(),
    max_tokens=st.sampled_from([10, 100, 1000]),
    context_tokens=st.sampled_from([10, 1000]),
    capabilities=st.sets(st.sampled_from(["vision", "tools"])),
    account_id=st.sampled_from([None, MINE, THEIRS]),
    catalogue=st.sampled_from([None, "current", "original"]),
    priority=st.integers(1, 3),
    retires_at=st.sampled_from([None, NOW, NOW + timedelta(days=1)]),
)


@given(
    rows=st.lists(ROWS, max_size=8),
    mode=st.sampled_from(["current", "original"]),
    prefer=st.sampled_from(["priority", "cheapest", "fastest"]),
    max_tokens=st.sampled_from([None, 1, 100, 5000]),
    capabilities=st.frozensets(st.sampled_from(["vision", "tools"])),
    shuffle=st.randoms(use_true_random=False),
)
def test_whatever_the_catalogue_holds(
    *,
    rows: list[Provider],
    mode: Mode,
    prefer: str,
    max_tokens: int | None,
    capabilities: frozenset[str],
    shuffle: Any,
) -> None:
    case = use_case(prefer=prefer)
    wanted = needs(max_tokens=max_tokens, capabilities=capabilities)

    def decide(order: list[Provider]) -> tuple[Provider, ...] | str:
        try:
            return route(
                wanted,
                Catalogue(tuple(order), {"draft": case}),
                account_id=MINE,
                mode=mode,
                now=NOW,
                first_token_ms={},
            )
        except InvalidJob as error:
            return error.field

    chosen = decide(rows)
    if isinstance(chosen, str):
        assert chosen in ("use_case", "messages", "max_tokens", "prompt")
        return
    assert chosen
    assert len({candidate.id for candidate in chosen}) == len(chosen)
    for candidate in chosen:
        assert candidate.account_id in (None, MINE)
        assert candidate.retires_at is None or candidate.retires_at > NOW
        assert capabilities <= candidate.capabilities
        assert 1 <= answer_tokens(wanted, case, candidate) <= candidate.max_tokens
        assert mode == "original" or candidate.catalogue != "original"
        assert "draft" in candidate.use_case | candidate.failover or candidate.is_default
    # The order of reading does not matter (rows of one name and place differ in their ids only).
    shuffled = list(rows)
    shuffle.shuffle(shuffled)
    again = decide(shuffled)
    assert not isinstance(again, str)
    assert [candidate.name for candidate in again] == [candidate.name for candidate in chosen]


# What a job needs


def test_needs_are_read_from_the_spec() -> None:
    tool = {"name": "t", "description": "d" * 30, "parameters": {"type": "object"}}
    image: dict[str, Any] = {"type": "image", "url": "https://a.test/b.png"}
    plain = needs_of(build_spec("draft", "x" * 300))
    assert plain.capabilities == frozenset()
    assert plain.prompt_tokens >= 100
    assert (plain.use_case, plain.max_tokens, plain.model) == ("draft", None, None)

    everything = needs_of(
        build_spec(
            "vision",
            [{"role": "user", "content": [{"type": "text", "text": "x" * 300}, image]}],  # type: ignore[list-item]  # as JSON gives it
            system="s" * 30,
            tools=[tool],
            response_format={"json_schema": {"type": "object"}},
            max_tokens=7,
            model="m",
        )
    )
    assert everything.capabilities == {"vision", "tools", "json_schema"}
    assert (everything.max_tokens, everything.model) == (7, "m")
    assert everything.prompt_tokens > plain.prompt_tokens + 20


def test_the_answer_is_as_long_as_asked_or_as_the_use_case_says() -> None:
    case = use_case(max_tokens=1024)
    small = replace(row("a"), max_tokens=100)
    assert answer_tokens(needs(max_tokens=7), case, small) == 7
    assert answer_tokens(needs(), case, small) == 100
    assert answer_tokens(needs(), case, row("b")) == 1024


# What the caller named


CHAIN = [
    row("a", model="m-a"),
    row("b", model="m-b", priority=1),
    row("c", use_case=["voice"], model="m-c"),
    row("d", use_case=(), failover=["draft"], model="m-d"),
    row("e", use_case=["voice"], model="m-c", provider="anthropic", priority=200),
]


def test_a_model_comes_before_its_fallbacks_and_nothing_else_after() -> None:
    wanted = needs(model="m-d", fallbacks=("m-c", "a"))
    assert routed(*CHAIN, wanted=wanted) == ["d", "c", "e", "a"]


def test_fallbacks_alone_come_after_who_is_meant_and_before_who_stands_in() -> None:
    assert routed(*CHAIN) == ["b", "a", "d"]
    assert routed(*CHAIN, wanted=needs(fallbacks=("e", "c"))) == ["b", "a", "e", "c", "d"]
    assert routed(*CHAIN, wanted=needs(fallbacks=("d", "e"))) == ["b", "a", "d", "e"]
    # Who is meant for it is so, named or not.
    assert routed(*CHAIN, wanted=needs(fallbacks=("c", "a"))) == ["b", "a", "c", "d"]


def test_a_model_that_is_its_own_fallback_is_asked_once() -> None:
    assert routed(*CHAIN, wanted=needs(model="a", fallbacks=("m-a", "b"))) == ["a", "b"]


def test_a_fallback_that_lacks_what_is_needed_is_passed_over() -> None:
    rows = [*CHAIN, row("blind", use_case=(), capabilities=())]
    wanted = needs(model="a", fallbacks=("blind", "b"), capabilities=frozenset({"vision"}))
    assert routed(*rows, wanted=wanted) == ["a", "b"]


def test_what_is_gone_since_the_job_was_submitted_is_passed_over() -> None:
    assert routed(*CHAIN, wanted=needs(model="a", fallbacks=("gone", "b"))) == ["a", "b"]
    assert routed(*CHAIN, wanted=needs(model="gone", fallbacks=("b",))) == ["b"]
    assert routed(*CHAIN, wanted=needs(fallbacks=("gone",))) == ["b", "a", "d"]
    assert refused(*CHAIN, wanted=needs(model="gone")).field == "model"


@pytest.mark.parametrize(
    ("named", "field"),
    [
        ({"model": "gone", "fallbacks": ("a",)}, "model"),
        ({"model": "a", "fallbacks": ("b", "gone")}, "fallbacks"),
        ({"fallbacks": ("gone",)}, "fallbacks"),
    ],
)
def test_who_submits_is_told_of_an_unknown_name(named: dict[str, Any], field: str) -> None:
    catalogue = Catalogue(tuple(CHAIN), {"draft": use_case()})
    with pytest.raises(InvalidJob, match="'gone' is not in use here; there are a, b, c") as caught:
        check_models(needs(**named), catalogue, account_id=MINE, mode="current", now=NOW)
    assert caught.value.field == field


# A use case that nobody named


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, "general"),
        ({"tools": ({"name": "now"},)}, "complex"),
        ({"system": "x" * 60_000}, "complex"),
        ({"response_format": {"json_schema": {"type": "object"}}}, "general"),
    ],
)
def test_the_use_case_follows_from_what_is_asked(asked: dict[str, Any], expected: str) -> None:
    assert detect_use_case(build_spec("general", "hi", **asked)) == expected


def test_what_is_to_be_seen_comes_first() -> None:
    for part in (ImagePart(url="https://a.test/b"), FilePart(data="AAAA")):
        message = Message(role="user", content=(part, TextPart(text="x" * 60_000)))
        spec = build_spec("general", [message], tools=({"name": "now"},))
        assert detect_use_case(spec) == "vision"


def test_a_prompt_is_long_from_one_length_on() -> None:
    lengths = range(40_000, 70_000, 500)
    specs = [build_spec("general", "x" * length) for length in lengths]
    tokens = [needs_of(spec).prompt_tokens for spec in specs]
    found = [detect_use_case(spec) for spec in specs]
    assert found == ["complex" if count >= LONG_PROMPT_TOKENS else "general" for count in tokens]
    assert {*found} == {"general", "complex"}
