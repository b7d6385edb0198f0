"""The job contract: states, specs that are refused with the field's name, canonical bytes."""

from __future__ import annotations

import base64
import itertools
import json
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from sluicegate.shared.errors import ErrorClass, IllegalTransition, InvalidJob
from sluicegate.shared.jobs import (
    TERMINAL,
    TRANSITIONS,
    JobError,
    JobSpec,
    Result,
    State,
    build_spec,
    check_transition,
)
from sluicegate.shared.messages import MAX_ATTACHMENT_BYTES, MAX_REQUEST_BYTES, Message

# States

#: As the design draws them; the last three are the commands' alone.
EDGES = {
    ("queued", "running"),
    ("queued", "parked"),
    ("queued", "cancelled"),
    ("queued", "expired"),
    ("running", "succeeded"),
    ("running", "failed"),
    ("running", "cancelled"),
    ("running", "expired"),
    ("running", "queued"),
    ("running", "parked"),
    ("parked", "queued"),
    ("parked", "cancelled"),
    ("parked", "expired"),
    ("failed", "queued"),
    ("cancelled", "queued"),
    ("expired", "queued"),
}


@pytest.mark.parametrize(("old", "new"), list(itertools.product(State, State)))
def test_every_edge_and_every_other_pair(old: State, new: State) -> None:
    if (old, new) in EDGES:
        check_transition(old, new)
    else:
        with pytest.raises(IllegalTransition, match=f"from {old} to {new}"):
            check_transition(old, new)


def test_terminal_states() -> None:
    assert {state for state in State if state.terminal} == TERMINAL
    assert {State.SUCCEEDED, State.FAILED, State.CANCELLED, State.EXPIRED} == TERMINAL
    assert set(TRANSITIONS) == set(State)
    assert not TRANSITIONS[State.SUCCEEDED]


# Specs

TOOL = {"name": "find_contact", "parameters": {"type": "object", "default": None}}
IMAGE = {"type": "image", "data": base64.b64encode(b"not really a png").decode()}


def turn(*parts: dict[str, Any], role: str = "user") -> Any:
    return {"role": role, "content": parts}


def said(text: str, role: str = "user") -> Any:
    return turn({"type": "text", "text": text}, role=role)


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"use_case": ""}, "use_case"),
        ({"use_case": "Draft"}, "use_case"),
        ({"use_case": "a.b"}, "use_case"),
        ({"use_case": 7}, "use_case"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": " \n\t"}, "prompt"),
        ({"prompt": None}, "messages"),
        ({"prompt": 7}, "messages"),
        ({"prompt": []}, "messages"),
        ({"prompt": "x" * 2_000_000}, "prompt"),
        ({"prompt": "a lone \ud800"}, "messages.0.content.0.text.text"),
        ({"prompt": [said("x", role="system")]}, "messages.0.role"),
        ({"prompt": [turn()]}, "messages.0.content"),
        ({"prompt": [turn({"type": "video"})]}, "messages.0.content.0"),
        ({"prompt": [turn({"type": "image"})]}, "messages.0.content.0.image"),
        ({"prompt": [turn(IMAGE | {"url": "https://a.test/b"})]}, "messages.0.content.0.image"),
        (
            {"prompt": [turn({"type": "image", "url": "http://a.test/b"})]},
            "messages.0.content.0.image.url",
        ),
        ({"prompt": [turn({"type": "file", "data": "?"})]}, "messages.0.content.0.file.data"),
        ({"prompt": [said("x"), said("y", role="assistant")]}, "messages"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 2**40}, "max_tokens"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"max_tokens": "7"}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"model": ""}, "model"),
        ({"tools": [TOOL | {"name": "with space"}]}, "tools.0.name"),
        ({"tools": "find_contact"}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": "other"}, "tool_choice"),
        ({"response_format": {"name": "x"}}, "response_format.json_schema"),
        ({"effort": "enormous"}, "effort"),
        ({"stream": "yes"}, "stream"),
        ({"stream": 1}, "stream"),
        ({"metadata": {"crm_id": 7}}, "metadata.crm_id"),
        ({"metadata": {str(n): "" for n in range(33)}}, "metadata"),
        ({"metadata": {"a": "\ud800"}}, "job"),
        ({"system": "\udfff"}, "job"),
        ({"tools": [TOOL | {"parameters": {"a": 2**70}}]}, "job"),
        ({"tools": [TOOL | {"parameters": {"a": object()}}]}, "job"),
        ({"version": 2}, "version"),
        ({"temperature": 2.5}, "temperature"),
    ],
)
def test_bad_input_names_the_field(given: dict[str, Any], field: str) -> None:
    values = {"use_case": "draft", "prompt": "Hello"} | given
    with pytest.raises(InvalidJob) as caught:
        build_spec(**values)
    assert caught.value.field == field
    assert str(caught.value) == f"{field}: {caught.value.problem}"
    assert "\n" not in str(caught.value)
    assert "pydantic" not in str(caught.value)


def test_sizes_are_limited_apart() -> None:
    text = "x" * (MAX_REQUEST_BYTES - 1000)
    build_spec("draft", text)
    image = {"type": "image", "data": "A" * MAX_ATTACHMENT_BYTES}
    build_spec("vision", [turn({"type": "text", "text": text}, image)])
    with pytest.raises(InvalidJob, match="10,000,000 are allowed"):
        build_spec("vision", [turn(image, IMAGE)])
    # The limit is in bytes of UTF-8, not in characters.
    with pytest.raises(InvalidJob, match="1,000,000 are allowed"):
        build_spec("draft", "ü" * (MAX_REQUEST_BYTES // 2 + 1))


def test_a_prompt_is_one_user_turn() -> None:
    spec = build_spec("draft", "Hello", system="Be brief", max_tokens=5)
    assert spec.messages == (Message.user("Hello"),)
    assert spec == build_spec("draft", [Message.user("Hello")], system="Be brief", max_tokens=5)
    assert not spec.needs_vision
    assert build_spec("vision", [turn(IMAGE)]).needs_vision
    assert build_spec("vision", [turn({"type": "file", "data": "AAAA"})]).needs_vision


def test_a_spec_does_not_change() -> None:
    spec = build_spec("draft", "Hello")
    with pytest.raises(ValidationError, match="frozen"):
        spec.use_case = "voice"  # type: ignore[misc]  # what is tested


# Canonical bytes

FULL: dict[str, Any] = {
    "use_case": "complex",
    "prompt": [
        said("Who is Ada?"),
        turn(
            {"type": "text", "text": "Let me look."},
            {"type": "tool_call", "id": "1", "name": "find_contact", "arguments": {"q": None}},
            role="assistant",
        ),
        turn({"type": "tool_result", "tool_call_id": "1", "content": "Ada, ada@a.test"}, IMAGE),
    ],
    "system": "Be brief.\x00",
    "max_tokens": 100,
    "model": "gpt-4o",
    "tools": [TOOL],
    "tool_choice": "find_contact",
    "response_format": {"json_schema": {"type": "object", "default": None}},
    "effort": "low",
    "fallbacks": ("gpt-4o-mini",),
    "parallel_tool_calls": False,
    "temperature": 0.5,
    "top_p": 0.9,
    "stop": ("END",),
    "use_case_detected": True,
    "stream": True,
    "metadata": {"b": "2", "a": "1"},
}


def test_dump_reads_back_and_keeps_nulls_of_the_caller() -> None:
    spec = build_spec(**FULL)
    assert JobSpec.model_validate_json(spec.dump()) == spec
    assert JobSpec.model_validate_json(spec.dump()).dump() == spec.dump()
    dumped = json.loads(spec.dump())
    assert dumped["tools"][0]["parameters"] == TOOL["parameters"]
    assert dumped["messages"][1]["content"][1]["arguments"] == {"q": None}


def test_the_bytes_are_these() -> None:
    """Stored hashes are compared for as long as idempotency keys live: never change them."""
    spec = build_spec("draft", "Grüße", metadata={"b": "2", "a": "1"})
    assert spec.dump().decode() == (
        '{"messages":[{"content":[{"text":"Grüße","type":"text"}],"role":"user"}],'
        '"metadata":{"a":"1","b":"2"},"use_case":"draft","version":1}'
    )
    assert JobSpec.digest(spec.dump()).hex().startswith("a7568689e8441e25")
    assert len(JobSpec.digest(spec.dump())) == 32


def test_a_default_that_is_written_out_changes_nothing() -> None:
    plain = build_spec("draft", "Hello")
    written = build_spec(
        "draft", "Hello", version=1, tools=(), tool_choice="auto", stream=False, metadata={}
    )
    assert written.dump() == plain.dump()


def test_another_request_has_another_digest() -> None:
    variants = [
        {name: value}
        for name, value in FULL.items()
        if name not in ("use_case", "prompt", "tool_choice")
    ]
    base: dict[str, Any] = {"use_case": "draft", "prompt": "Hello"}
    variants += [{}, {"use_case": "voice"}, {"prompt": "Hello "}, {"max_tokens": 101}]
    digests = {JobSpec.digest(build_spec(**(base | variant)).dump()) for variant in variants}
    assert len(digests) == len(variants)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(
    text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip),
    arguments=st.dictionaries(st.text("abc"), JSON, max_size=4),
    metadata=st.dictionaries(st.text("xyz", max_size=3), st.text("123"), max_size=4),
)
def test_any_spec_reads_back_to_the_same_bytes(
    text: str, arguments: dict[str, Any], metadata: dict[str, str]
) -> None:
    call = {"type": "tool_call", "id": "1", "name": "t", "arguments": arguments}
    found = {"type": "tool_result", "tool_call_id": "1", "content": text}
    turns = [turn(call, role="assistant"), turn(found), said(text)]
    spec = build_spec("draft", turns, metadata=metadata)
    again = JobSpec.model_validate_json(spec.dump())
    assert again == spec
    assert again.dump() == spec.dump()
    backwards = dict(reversed(metadata.items()))
    assert build_spec("draft", spec.messages, metadata=backwards).dump() == spec.dump()


# Results


def test_a_result_reads_back_and_says_cost_and_latency() -> None:
    began = datetime(2026, 11, 22, 12, tzinfo=UTC)
    result = Result(
        job_id=UUID(int=1),
        state=State.FAILED,
        use_case="draft",
        cost_nano_usd=1_500_000_000,
        error=JobError(error_class=ErrorClass.QUOTA, message="no money", status=429),
        created_at=began,
        finished_at=began + timedelta(seconds=2.5),
    )
    assert Result.model_validate_json(result.model_dump_json()) == result
    assert str(result.cost) == "1.500000000"
    assert result.latency_s == 2.5
    assert Result(job_id=UUID(int=1), state=State.QUEUED, use_case="draft").latency_s is None


def test_what_is_nested_too_deep_is_refused() -> None:
    schema: dict[str, Any] = {}
    for _ in range(400):
        schema = {"type": "object", "properties": {"a": schema}}
    with pytest.raises(InvalidJob, match="JSON cannot carry"):
        build_spec("draft", "x", tools=[{"name": "deep", "parameters": schema}])
