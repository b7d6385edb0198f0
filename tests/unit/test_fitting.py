"""What a job asks for beyond what a model takes is left out, and said."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sluicegate.shared.catalogue import Provider
from sluicegate.shared.fitting import fit, left_out
from sluicegate.shared.jobs import JobSpec, build_spec
from sluicegate.workers.providers.call_ids import wire_id
from tests.unit.test_routing import row

REASONS = {"capabilities": {"vision", "tools", "json_schema", "effort"}}
GPT = row("gpt", model="gpt-6-luna", **REASONS)
OLD_GPT = row("old-gpt", model="gpt-4o")
CLAUDE = row("claude", provider="anthropic", model="claude-haiku-5-5", **REASONS)
OLD_CLAUDE = row("old-claude", provider="anthropic", model="claude-haiku-4-5")

ALL: dict[str, Any] = {
    "temperature": 0.2,
    "top_p": 0.5,
    "stop": ("END",),
    "effort": "low",
    "parallel_tool_calls": False,
}


@pytest.mark.parametrize(
    ("model", "taken"),
    [
        (GPT, {"effort"}),
        (OLD_GPT, {"temperature", "top_p", "stop"}),
        (CLAUDE, {"effort", "stop"}),
        (OLD_CLAUDE, {"stop"}),
    ],
    ids=lambda one: getattr(one, "name", ""),
)
def test_each_model_gets_what_it_takes(model: Provider, taken: set[str]) -> None:
    spec = build_spec("draft", "Hi", **ALL)
    fitted = fit(spec, model)
    plain = build_spec("draft", "Hi")
    kept = {name for name in ALL if getattr(fitted, name) != getattr(plain, name)}
    assert kept == taken
    assert {said.split()[0] for said in left_out(spec, model)} == ALL.keys() - taken
    assert all("was left out" in said for said in left_out(spec, model))


def test_who_asks_for_nothing_special_gets_the_same_spec() -> None:
    spec = build_spec("draft", "Hi", tools=({"name": "now"},), max_tokens=5)
    for model in (GPT, OLD_GPT, CLAUDE, OLD_CLAUDE):
        assert fit(spec, model) is spec
        assert left_out(spec, model) == ()


def test_with_tools_their_being_parallel_means_something() -> None:
    spec = build_spec("draft", "Hi", tools=({"name": "now"},), parallel_tool_calls=False)
    assert fit(spec, CLAUDE) is spec


def test_what_says_the_usual_is_left_out_in_silence() -> None:
    spec = build_spec("draft", "Hi", temperature=1, top_p=1)
    assert fit(spec, CLAUDE).temperature is None
    assert left_out(spec, CLAUDE) == ()


def test_a_stop_of_blanks_alone_is_not_for_anthropic() -> None:
    spec = build_spec("draft", "Hi", stop=("\n\n", "END"))
    assert fit(spec, CLAUDE).stop == ("END",)
    assert left_out(spec, CLAUDE) == (
        "a stop of blanks alone is not taken by claude-haiku-5-5 and was left out",
    )
    assert fit(spec, OLD_GPT) is spec


def test_nothing_else_of_the_spec_changes() -> None:
    spec = build_spec("draft", "Hi", system="Be brief.", metadata={"a": "b"}, **ALL)
    same = {name: value for name, value in fit(spec, CLAUDE) if name not in ALL}
    assert same == {name: value for name, value in spec if name not in ALL}
    assert isinstance(fit(spec, CLAUDE), JobSpec)


@given(st.text(min_size=1), st.text(min_size=1))
def test_any_id_of_a_tool_call_becomes_one_that_both_take(one: str, another: str) -> None:
    assert re.fullmatch(r"[a-zA-Z0-9_-]{1,40}", wire_id(one))
    assert (wire_id(one) == wire_id(another)) == (one == another)


def test_an_id_that_both_take_stays() -> None:
    assert wire_id("toolu_01ABC-def") == "toolu_01ABC-def"
