"""Answers of both wires, whole and in pieces, as they are read."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sluicegate.shared.errors import ErrorClass
from sluicegate.shared.messages import ToolCallPart, Usage
from sluicegate.workers.providers.anthropic import AnthropicReading
from sluicegate.workers.providers.decoding import clean, load_json
from sluicegate.workers.providers.failures import Fault
from sluicegate.workers.providers.openai import OpenAIReading
from sluicegate.workers.providers.reading import Reading
from sluicegate.workers.providers.sse import ServerSentEvent

USAGE = {"prompt_tokens": 9, "completion_tokens": 4}


def gpt_whole(message: dict[str, Any], **changes: Any) -> OpenAIReading:
    body = {
        "model": "gpt-x",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": USAGE,
    }
    body["choices"][0] |= {key: changes.pop(key) for key in ("finish_reason",) if key in changes}  # type: ignore[index]  # a list of dicts
    reading = OpenAIReading()
    reading.whole(body | changes)
    return reading


def claude_whole(*content: dict[str, Any], **changes: Any) -> AnthropicReading:
    reading = AnthropicReading()
    reading.whole(
        {
            "model": "claude-x",
            "content": list(content),
            "stop_reason": "end_turn",
            "usage": {"input_tokens": 9, "output_tokens": 4},
        }
        | changes
    )
    return reading


def feed(reading: Reading, *events: dict[str, Any] | bytes) -> Reading:
    for event in events:
        data = event if isinstance(event, bytes) else json.dumps(event).encode()
        reading.event(ServerSentEvent(b"", data))
    return reading


def chunk(delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
    return {
        "model": "gpt-x",
        "choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}],
        "usage": None,
    }


def test_whole_answers() -> None:
    for reading in (
        gpt_whole({"content": "Hi."}, service_tier="default"),
        claude_whole(
            {"type": "thinking", "thinking": "Hm."},
            {"type": "text", "text": "Hi."},
            usage={"input_tokens": 9, "output_tokens": 4, "service_tier": "default"},
        ),
    ):
        assert reading.conclude() == ("stop", ())
        assert reading.text == "Hi."
        assert reading.usage() == Usage(input=9, output=4)
        assert reading.service_tier == "default"
        assert reading.partial().exact


@pytest.mark.parametrize(
    ("finish", "ours"),
    [
        ("stop", "stop"),
        ("length", "length"),
        ("tool_calls", "tool_calls"),
        ("function_call", "tool_calls"),
        ("something_new", "something_new"),
    ],
)
def test_finish_reasons_of_openai(finish: str, ours: str) -> None:
    assert gpt_whole({"content": "Hi."}, finish_reason=finish).conclude()[0] == ours


@pytest.mark.parametrize(
    ("stop", "ours"),
    [
        ("end_turn", "stop"),
        ("stop_sequence", "stop"),
        ("max_tokens", "length"),
        ("tool_use", "tool_calls"),
        ("pause_turn", "pause_turn"),
    ],
)
def test_finish_reasons_of_anthropic(stop: str, ours: str) -> None:
    reading = claude_whole({"type": "text", "text": "Hi."}, stop_reason=stop)
    assert reading.conclude()[0] == ours


@pytest.mark.parametrize(
    ("reading", "error_class", "words"),
    [
        (
            gpt_whole({"content": "I c"}, finish_reason="content_filter"),
            ErrorClass.CONTENT_FILTER,
            None,
        ),
        (
            gpt_whole({"content": "I c", "refusal": "No."}, finish_reason="content_filter"),
            ErrorClass.CONTENT_FILTER,
            "No.",
        ),
        (
            gpt_whole({"content": None, "refusal": "I cannot help."}),
            ErrorClass.CONTENT_FILTER,
            "I cannot help.",
        ),
        (
            claude_whole(
                stop_reason="refusal", stop_details={"type": "refusal", "category": "cyber"}
            ),
            ErrorClass.CONTENT_FILTER,
            "cyber",
        ),
        (
            claude_whole(stop_reason="model_context_window_exceeded"),
            ErrorClass.CONTEXT_TOO_LONG,
            None,
        ),
        (claude_whole(stop_reason=None), ErrorClass.TRUNCATED, None),
        (gpt_whole({"content": "Hi."}, finish_reason=None), ErrorClass.TRUNCATED, None),
    ],
)
def test_answers_that_are_none_but_were_paid(
    reading: Reading, error_class: ErrorClass, words: str | None
) -> None:
    with pytest.raises(Fault) as caught:
        reading.conclude()
    assert (caught.value.error_class, caught.value.words) == (error_class, words)
    assert reading.partial().usage == Usage(input=9, output=4)
    assert reading.partial().exact


def test_usage_of_openai_is_made_disjoint() -> None:
    raw = {
        "prompt_tokens": 100,
        "completion_tokens": 50,
        "prompt_tokens_details": {"cached_tokens": 60, "cache_write_tokens": 30},
        "completion_tokens_details": {"reasoning_tokens": 20},
    }
    reading = gpt_whole({"content": "Hi."}, usage=raw)
    assert reading.usage() == Usage(
        input=10, cache_read=60, cache_write_5m=30, output=50, reasoning=20
    )
    assert reading.raw_usage == raw


def test_usage_of_anthropic_is_disjoint_already() -> None:
    raw = {
        "input_tokens": 10,
        "cache_read_input_tokens": 60,
        "cache_creation_input_tokens": 37,
        "cache_creation": {"ephemeral_5m_input_tokens": 30, "ephemeral_1h_input_tokens": 7},
        "output_tokens": 50,
        "output_tokens_details": {"thinking_tokens": 20},
    }
    usage = Usage(
        input=10, cache_read=60, cache_write_5m=30, cache_write_1h=7, output=50, reasoning=20
    )
    assert claude_whole(usage=raw).usage() == usage
    assert claude_whole(usage=raw).raw_usage == raw
    undivided = claude_whole(usage=raw | {"cache_creation": None}).usage()
    assert undivided == usage.model_copy(update={"cache_write_5m": 37, "cache_write_1h": 0})


@pytest.mark.parametrize(
    ("raw", "usage"),
    [
        (None, None),
        ({}, None),
        ({"prompt_tokens": 3}, None),
        ({"prompt_tokens": "3", "completion_tokens": -1}, None),
        ({"prompt_tokens": 0, "completion_tokens": 0}, Usage()),
        (
            {
                "prompt_tokens": 3,
                "completion_tokens": 2,
                "prompt_tokens_details": {"cached_tokens": 9},
                "completion_tokens_details": {"reasoning_tokens": 9},
            },
            Usage(cache_read=3, output=2, reasoning=2),
        ),
    ],
)
def test_missing_usage_is_not_zero_and_nonsense_is_never_negative(
    raw: dict[str, Any] | None, usage: Usage | None
) -> None:
    assert gpt_whole({"content": "Hi."}, usage=raw).usage() == usage


_NUMBER = st.integers(-5, 100) | st.none() | st.text(max_size=2) | st.booleans()
_DETAILS = st.none() | st.integers() | st.dictionaries(st.sampled_from(
    ["cached_tokens", "cache_write_tokens", "reasoning_tokens", "thinking_tokens",
     "ephemeral_5m_input_tokens", "ephemeral_1h_input_tokens"]), _NUMBER)  # fmt: skip
_COUNTS = ("prompt_tokens", "completion_tokens", "input_tokens", "output_tokens",
           "cache_creation_input_tokens", "cache_read_input_tokens")  # fmt: skip
_BREAKDOWNS = ("prompt_tokens_details", "completion_tokens_details", "cache_creation",
               "output_tokens_details")  # fmt: skip
_RAW = st.fixed_dictionaries(
    {}, optional=dict.fromkeys(_COUNTS, _NUMBER) | dict.fromkeys(_BREAKDOWNS, _DETAILS)
)


@given(raw=_RAW)
def test_any_usage_object_gives_a_usage_or_none(raw: dict[str, Any]) -> None:
    gpt, claude = gpt_whole({"content": "Hi."}, usage=raw), claude_whole(usage=raw)
    usage = gpt.usage()
    if usage is not None:
        assert usage.total_input == raw["prompt_tokens"]
        assert usage.reasoning <= usage.output == raw["completion_tokens"]
    claude.usage()


def test_tool_calls_of_a_whole_answer() -> None:
    calls = (
        ToolCallPart(id="c1", name="weather", arguments={"city": "Bern"}),
        ToolCallPart(id="c2", name="now", arguments={}),
    )
    gpt = gpt_whole(
        {
            "content": None,
            "tool_calls": [
                {"id": "c1", "function": {"name": "weather", "arguments": '{"city": "Bern"}'}},
                {"id": "c2", "function": {"name": "now", "arguments": ""}},
            ],
        },
        finish_reason="stop",  # what OpenAI says of a call that was forced by name
    )
    claude = claude_whole(
        {"type": "tool_use", "id": "c1", "name": "weather", "input": {"city": "Bern"}},
        {"type": "tool_use", "id": "c2", "name": "now", "input": {}},
        stop_reason="tool_use",
    )
    for reading in (gpt, claude):
        assert reading.conclude() == ("tool_calls", calls)


@pytest.mark.parametrize("arguments", ['{"city": ', "[]", '"Bern"', "null"])
def test_a_tool_call_that_cannot_be_read_is_garbage_unless_it_was_cut(arguments: str) -> None:
    message = {"tool_calls": [{"id": "c1", "function": {"name": "w", "arguments": arguments}}]}
    with pytest.raises(Fault) as caught:
        gpt_whole(message, finish_reason="tool_calls").conclude()
    assert caught.value.error_class is ErrorClass.GARBAGE
    assert gpt_whole(message, finish_reason="length").conclude() == ("length", ())


def test_a_stream_of_openai() -> None:
    reading = feed(OpenAIReading(), chunk({"role": "assistant", "content": ""}))
    assert not reading.began
    assert reading.fresh() is None
    reading = feed(reading, chunk({"content": "Hel"}), chunk({"content": "lo"}))
    assert reading.began
    assert reading.fresh() == ("Hello", ())
    call = {"index": 0, "id": "c1", "function": {"name": "weather", "arguments": ""}}
    more = {"index": 0, "function": {"arguments": '{"city":"Bern"}'}}
    feed(reading, chunk({"tool_calls": [call]}), chunk({"tool_calls": [more]}))
    assert reading.fresh() == (
        "",
        (
            {"index": 0, "id": "c1", "name": "weather"},
            {"index": 0, "arguments": '{"city":"Bern"}'},
        ),
    )
    assert not reading.partial().exact
    reading = feed(reading, chunk({}, "tool_calls"))
    assert not reading.complete
    reading = feed(reading, {"model": "gpt-x", "choices": [], "usage": USAGE}, b"[DONE]")
    assert reading.ended
    assert reading.conclude() == (
        "tool_calls",
        (ToolCallPart(id="c1", name="weather", arguments={"city": "Bern"}),),
    )
    assert reading.usage() == Usage(input=9, output=4)


@pytest.mark.parametrize(
    ("events", "complete"),
    [
        ((chunk({"content": "Hi."}), chunk({}, "stop")), False),
        ((chunk({"content": "Hi."}), b"[DONE]"), False),
        ((chunk({"content": "Hi."}), {"choices": [], "usage": USAGE}), False),
        ((chunk({"content": "Hi."}, "stop"), b"[DONE]"), True),
        ((chunk({"content": "Hi."}, "stop"), {"choices": [], "usage": USAGE}), True),
        ((chunk({"content": "Hi."}, "stop") | {"usage": USAGE},), True),
    ],
)
def test_what_completes_a_stream_of_openai(events: Any, complete: bool) -> None:
    reading = feed(OpenAIReading(), *events)
    if complete:
        assert reading.conclude() == ("stop", ())
        return
    with pytest.raises(Fault) as caught:
        reading.conclude()
    assert caught.value.error_class is ErrorClass.TRUNCATED


def test_a_refusal_in_a_stream() -> None:
    reading = feed(
        OpenAIReading(), chunk({"refusal": "I cann"}), chunk({"refusal": "ot."}, "stop"), b"[DONE]"
    )
    with pytest.raises(Fault) as caught:
        reading.conclude()
    assert (caught.value.error_class, caught.value.words) == (
        ErrorClass.CONTENT_FILTER,
        "I cannot.",
    )


def test_azure_names_what_it_filtered() -> None:
    results = {"hate": {"filtered": False, "severity": "safe"}, "violence": {"filtered": True}}
    cut = chunk({"content": "I c"}, "content_filter")
    cut["choices"][0]["content_filter_results"] = results
    with pytest.raises(Fault) as caught:
        feed(OpenAIReading(), cut, b"[DONE]").conclude()
    assert (caught.value.error_class, caught.value.words) == (
        ErrorClass.CONTENT_FILTER,
        "violence",
    )


@pytest.mark.parametrize(
    ("events", "words"),
    [
        ((chunk({"content": "I c"}), chunk({}, "content_filter")), None),
        ((chunk({"refusal": "I cannot."}), chunk({}, "stop")), "I cannot."),
    ],
)
def test_a_filter_without_its_end_marker_is_one(events: Any, words: str | None) -> None:
    with pytest.raises(Fault) as caught:
        feed(OpenAIReading(), *events).conclude()
    assert (caught.value.error_class, caught.value.words) == (ErrorClass.CONTENT_FILTER, words)


def claude_start(**usage: Any) -> dict[str, Any]:
    usage = {"input_tokens": 9, "output_tokens": 1, "service_tier": "standard"} | usage
    return {"type": "message_start", "message": {"model": "claude-x", "usage": usage}}


def claude_end(stop_reason: str = "end_turn", **usage: Any) -> tuple[dict[str, Any], ...]:
    return (
        {
            "type": "message_delta",
            "delta": {"stop_reason": stop_reason},
            "usage": {"output_tokens": 4} | usage,
        },
        {"type": "message_stop"},
    )


def claude_delta(index: int, kind: str, **delta: Any) -> dict[str, Any]:
    return {"type": "content_block_delta", "index": index, "delta": {"type": kind, **delta}}


def test_a_stream_of_anthropic() -> None:
    reading = feed(AnthropicReading(), claude_start(), {"type": "ping"}, {"type": "something_new"})
    assert not reading.began
    assert reading.partial().usage == Usage(input=9, output=1)
    assert not reading.partial().exact
    reading = feed(
        reading,
        {"type": "content_block_start", "index": 0, "content_block": {"type": "thinking"}},
        claude_delta(0, "thinking_delta", thinking="Hm."),
        claude_delta(0, "signature_delta", signature="x"),
    )
    assert reading.began
    assert reading.fresh() is None
    text = {"type": "text", "text": ""}
    tool = {"type": "tool_use", "id": "c1", "name": "weather", "input": {}}
    feed(
        reading,
        {"type": "content_block_start", "index": 1, "content_block": text},
        claude_delta(1, "text_delta", text="Hello"),
        {"type": "content_block_stop", "index": 1},
        {"type": "content_block_start", "index": 2, "content_block": tool},
        claude_delta(2, "input_json_delta", partial_json=""),
        claude_delta(2, "input_json_delta", partial_json='{"city":'),
        claude_delta(2, "input_json_delta", partial_json='"Bern"}'),
    )
    assert reading.fresh() == (
        "Hello",
        (
            {"index": 0, "id": "c1", "name": "weather"},
            {"index": 0, "arguments": '{"city":'},
            {"index": 0, "arguments": '"Bern"}'},
        ),
    )
    feed(reading, *claude_end("tool_use", output_tokens_details={"thinking_tokens": 2}))
    assert reading.conclude() == (
        "tool_calls",
        (ToolCallPart(id="c1", name="weather", arguments={"city": "Bern"}),),
    )
    assert reading.usage() == Usage(input=9, output=4, reasoning=2)
    assert reading.service_tier == "standard"
    assert reading.partial().exact


def test_a_stream_of_anthropic_needs_its_last_event() -> None:
    delta, stop = claude_end()
    for events in ((delta,), (stop,)):
        with pytest.raises(Fault) as caught:
            feed(AnthropicReading(), claude_start(), *events).conclude()
        assert caught.value.error_class is ErrorClass.TRUNCATED


@pytest.mark.parametrize(
    ("reading", "event", "error_class"),
    [
        (
            AnthropicReading(),
            {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}},
            ErrorClass.OVERLOADED,
        ),
        (
            AnthropicReading(),
            {"type": "error", "error": {"type": "api_error", "message": "Oops"}},
            ErrorClass.STREAM_BROKEN,
        ),
        (
            OpenAIReading(),
            {"error": {"type": "server_error", "message": "Oops"}},
            ErrorClass.STREAM_BROKEN,
        ),
        (
            OpenAIReading(),
            {"error": {"code": "content_filter", "message": "No."}},
            ErrorClass.CONTENT_FILTER,
        ),
        (OpenAIReading(), {"error": "Oops"}, ErrorClass.STREAM_BROKEN),
    ],
)
def test_error_events(reading: Reading, event: dict[str, Any], error_class: ErrorClass) -> None:
    with pytest.raises(Fault) as caught:
        feed(reading, event)
    assert caught.value.error_class is error_class
    assert caught.value.words


def test_what_cannot_be_stored_is_replaced_in_all_that_an_answer_holds() -> None:
    arguments = '{"a\\u0000": ["\\ud800", {"b": "\\ud83d\\ude00"}]}'
    body = {
        "model": "gpt\x00x",
        "choices": [
            {
                "message": {
                    "content": "a\x00b\ud800c😀",
                    "tool_calls": [
                        {"id": "\x00", "function": {"name": "w", "arguments": arguments}}
                    ],
                },
                "finish_reason": "stop",
            }
        ],
        "usage": {**USAGE, "note": "\udfff"},
    }
    reading = OpenAIReading()
    reading.whole(load_json(json.dumps(body).encode()))
    _, (call,) = reading.conclude()
    assert reading.text == "a\ufffdb\ufffdc😀"
    assert reading.model == "gpt\ufffdx"
    assert call == ToolCallPart(
        id="\ufffd", name="w", arguments={"a\ufffd": ["\ufffd", {"b": "😀"}]}
    )
    assert reading.raw_usage == {**USAGE, "note": "\ufffd"}


def test_a_surrogate_pair_that_is_cut_in_two_becomes_two_replacements() -> None:
    head, tail = b'{"choices":[{"delta":{"content":"', b'"}}]}'
    reading = feed(OpenAIReading(), head + b"\\ud83d" + tail, head + b"\\ude00" + tail)
    assert reading.text == "\ufffd\ufffd"


@given(st.text(st.characters(codec=None, exclude_categories=[]), max_size=20))
def test_any_text_comes_out_clean(text: str) -> None:
    for encoded in (json.dumps([text]), json.dumps({text: text})):
        value = load_json(encoded)
        (out,) = value
        out.encode()
        assert "\x00" not in out
        assert out == clean(text)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"NaN",
        b'["\\ud800", NaN]',
        b'["\\ud800',
        b"\xff",
        b"[" * 5000 + b'"\\ud800"' + b"]" * 5000,
        b"[" * 1000 + b'"\\u0000"' + b"]" * 1000,
    ],
)
def test_what_is_no_json_is_a_value_error(data: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - of several kinds
        load_json(data)
