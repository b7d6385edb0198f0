from hashlib import sha256
from typing import Any

import orjson
import pytest

from sluicegate.workers.local.sandbox_answers import (
    Answer,
    Ask,
    answer,
    count_tokens,
    json_string,
    prose,
)
from sluicegate.workers.local.sandbox_anthropic import AnthropicWire
from sluicegate.workers.local.sandbox_checks import RefusedError
from sluicegate.workers.local.sandbox_openai import OpenAIWire
from sluicegate.workers.local.sandbox_prices import Usage


def ask(*lines: str, **more: Any) -> Ask:
    body = {"model": "gpt-6-luna", "messages": [{"role": "user", "content": "\n".join(lines)}]}
    return OpenAIWire().read(body | more)


def answered(request: Ask) -> Answer:
    return answer(request, request.digest())


def test_prose_is_deterministic_whole_sentences_of_40_to_120_tokens() -> None:
    sizes = set()
    for number in range(500):
        digest = sha256(str(number).encode()).digest()
        text = prose(digest)
        assert text == prose(digest)
        assert text.endswith(".")
        sizes.add(count_tokens(text))
    assert min(sizes) >= 40
    assert max(sizes) <= 120
    assert len(sizes) > 50


@pytest.mark.parametrize("tokens", [0, 1, 2, 7, 40, 5_000])
def test_prose_of_a_wanted_length(tokens: int) -> None:
    assert count_tokens(prose(b"x" * 32, tokens=tokens)) == tokens


def test_echo_is_exact() -> None:
    got = answered(ask("Please.", "ECHO:  spaced, and: colons \r", "thanks"))
    assert got.text == " spaced, and: colons "
    assert got.stop == "end"
    assert got.usage.output == count_tokens(got.text)
    assert answered(ask("ECHO:")).text == ""


def test_directives_of_the_user_win_over_the_system() -> None:
    body = {
        "model": "gpt-6-luna",
        "messages": [
            {"role": "developer", "content": "TOKENS: 9"},
            {"role": "user", "content": "ECHO: old turn"},
            {"role": "assistant", "content": "ECHO: mine"},
            {"role": "user", "content": "TOKENS: 5"},
        ],
    }
    assert answered(OpenAIWire().read(body)).usage.output == 5


def test_usage_follows_the_directives() -> None:
    lines = ("TOKENS: 50", "REASONING: 20", "INPUT: 1000", "CACHED: 300", "CACHE_WRITE: 100")
    got = answered(ask(*lines))
    assert got.usage == Usage(
        input=600, cache_read=300, cache_write_5m=100, output=50, reasoning=20
    )
    assert len(got.pieces()) == 30
    assert answered(ask("CACHED: 9999", "INPUT: 10")).usage.prompt == 10


def test_numbers_that_are_none_are_prose() -> None:
    for line in ("TOKENS: many", "TOKENS: -5", "TOKENS: ", "TOKENS: 99999999999", "TOKENS: ²"):
        assert 40 <= answered(ask(line)).usage.output <= 120


def test_input_is_counted_by_the_rule() -> None:
    text = "a" * 101
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    content = [{"type": "text", "text": text}, image, image, {"type": "file", "file": {}}]
    body = {"model": "gpt-4o", "messages": [{"role": "user", "content": content}]}
    assert answered(OpenAIWire().read(body)).usage.input == 26 + 2_000 + 2_000


@pytest.mark.parametrize("limit", [1, 10, 29])
def test_limit_cuts_text_and_reasoning(limit: int) -> None:
    got = answered(ask("TOKENS: 30", "REASONING: 10", max_completion_tokens=limit))
    assert got.stop == "length"
    assert got.usage.output == limit
    assert got.usage.reasoning == min(10, limit)
    assert answered(ask("TOKENS: 30", max_completion_tokens=30)).stop == "end"


def test_stop_sequences_cut() -> None:
    got = answered(ask("ECHO: one END two", model="gpt-4o", stop=["nowhere", "END"]))
    assert (got.text, got.stop, got.stop_sequence) == ("one ", "sequence", "END")


def test_json_schema_is_fitted_also_when_it_refers_to_itself() -> None:
    note = {
        "type": "object",
        "properties": {
            "title": {"type": "string"},
            "score": {"type": "integer", "minimum": 3},
            "stage": {"enum": ["won", "lost"]},
            "tags": {"type": "array", "items": {"type": "string"}, "minItems": 2},
            "next": {"anyOf": [{"$ref": "#/$defs/Note"}, {"type": "null"}]},
            "all": {"type": "array", "items": {"$ref": "#/$defs/Note"}, "minItems": 99},
        },
    }
    schema = {"$ref": "#/$defs/Note", "$defs": {"Note": note}}
    response_format = {"type": "json_schema", "json_schema": {"name": "note", "schema": schema}}
    fitted = orjson.loads(answered(ask("x", response_format=response_format)).text)
    assert fitted["title"] == "confirmed"
    assert fitted["score"] == 3
    assert fitted["stage"] == "won"
    assert fitted["tags"] == ["confirmed", "confirmed"]


def test_json_strings_carry_what_utf8_cannot() -> None:
    assert json_string("a\x00b") == b'"a\\u0000b"'
    assert json_string("\ud800") == b'"\\ud800"'
    assert json_string("schön") == '"schön"'.encode()


DEEP: Any = {}
for _ in range(400):
    DEEP = {"a": DEEP}
USER = [{"role": "user", "content": "hello"}]


@pytest.mark.parametrize(
    "body",
    [
        None,
        [],
        {},
        {"model": 5, "messages": USER},
        {"model": "gpt-4o"},
        {"model": "gpt-4o", "messages": []},
        {"model": "gpt-4o", "messages": ["hello"]},
        {"model": "gpt-4o", "messages": [{"role": "king", "content": "x"}]},
        {"model": "gpt-4o", "messages": [{"role": ["user"], "content": "x"}]},
        {"model": "gpt-4o", "messages": [{"role": "user", "content": 5}]},
        {"model": "gpt-4o", "messages": [{"role": "user", "content": ["x"]}]},
        {"model": "gpt-4o", "messages": [{"role": "user", "content": [{"type": "text"}]}]},
        {"model": "gpt-4o", "messages": USER, "tools": [{"name": "x", "parameters": DEEP}]},
        {"model": "gpt-4o", "messages": USER, "max_tokens": "many"},
        {"model": "gpt-4o", "messages": USER, "max_tokens": True},
        {"model": "gpt-4o", "messages": USER, "tools": {"name": "x"}},
        {"model": "gpt-4o", "messages": USER, "tools": [{"function": {}}]},
        {"model": "gpt-4o", "messages": USER, "tool_choice": {"function": {"name": ["x"]}}},
        {"model": "gpt-4o", "messages": USER, "tool_choice": {"name": "x"}},
        {"model": "gpt-9", "messages": USER},
    ],
    ids=lambda body: repr(body)[:60],
)
def test_bad_requests_are_refused_on_both_wires(body: Any) -> None:
    with pytest.raises(RefusedError):
        OpenAIWire().read(body)
    if isinstance(body, dict) and body.get("model") == "gpt-4o":
        body = {"max_tokens": 5} | body | {"model": "claude-haiku-5-5"}
    with pytest.raises(RefusedError):
        AnthropicWire().read(body)


@pytest.mark.parametrize(
    "more",
    [
        {"max_completion_tokens": 0},
        {"n": 2},
        {"messages": [{"role": "assistant", "tool_calls": DEEP}]},
    ],
    ids=["limit", "n", "deep"],
)
def test_what_only_openai_refuses(more: dict[str, Any]) -> None:
    with pytest.raises(RefusedError):
        ask(**more)


@pytest.mark.parametrize(
    "more",
    [
        {"max_tokens": None},
        {"temperature": 0.5},
        {"messages": [*USER, {"role": "assistant", "content": "The answer is"}]},
        {"messages": [{"role": "developer", "content": "x"}]},
        {"system": 5},
    ],
    ids=str,
)
def test_what_only_anthropic_refuses(more: dict[str, Any]) -> None:
    with pytest.raises(RefusedError):
        AnthropicWire().read(
            {"model": "claude-haiku-5-5", "max_tokens": 5, "messages": USER} | more
        )
