"""What a job may ask for, through real workers, the SDKs and both wires of the sandbox."""

from __future__ import annotations

import base64
from typing import Any
from uuid import uuid4

import pytest

from sluicegate import (
    ErrorClass,
    FilePart,
    ImagePart,
    JobFailed,
    Message,
    Result,
    TextPart,
    ToolCallPart,
    ToolResultPart,
)
from sluicegate.shared.events import Delta, Reset
from tests.harness import Rig

WAIT_S = 60
#: By wire: a use case whose first candidate speaks it, and one of its models that reasons.
BOTH = pytest.mark.parametrize(
    ("use_case", "model"), [("draft", "claude-haiku-5-5"), ("general", "gpt-6-luna")]
)
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "summary": {"type": "string", "maxLength": 200},
        "score": {"type": "integer"},
    },
    "required": ["summary"],
}
NAMES = {"summary", "score"}
REPAIRED = "an answer did not fit the JSON schema, and was asked for once more"


@pytest.fixture(scope="module", autouse=True)
def _workers(module_rig: Rig) -> None:
    workers = [
        module_rig.begin_worker("openai", ["general", "vision"]),
        module_rig.begin_worker("anthropic", ["draft", "general", "complex"]),
    ]
    module_rig.start_sweep()
    for worker in workers:
        module_rig.await_worker(worker)


def _said(prompt: str = "Note the call.") -> str:
    """Return a prompt that only one job has."""
    return f"{prompt}\n[{uuid4().hex}]"


# JSON


@BOTH
def test_an_answer_that_does_not_fit_is_repaired_once(rig: Rig, use_case: str, model: str) -> None:
    prompt = _said()
    rig.sandbox.add_fault("bad_json", prompt_contains=prompt, times=1)
    job = rig.client.submit(use_case, prompt, response_format={"json_schema": SCHEMA})
    result = job.result(WAIT_S)
    assert set(result.parsed) == NAMES
    assert (result.attempts, result.model) == (2, model)
    assert result.warnings == (
        "an answer did not fit the JSON schema, and was asked for once more",
    )
    _check_repair(rig, result)


@BOTH
def test_a_stream_begins_again_with_the_repair(rig: Rig, use_case: str, model: str) -> None:
    prompt = _said()
    rig.sandbox.add_fault("bad_json", prompt_contains=prompt, times=1)
    asked = {"json_schema": SCHEMA}
    job = rig.client.submit(use_case, prompt, response_format=asked, stream=True)
    shown: list[str] = []
    resets = 0
    for event in job.events(timeout=WAIT_S):
        match event.payload:
            case Delta(text=text):
                shown.append(text)
            case Reset():
                shown.clear()
                resets += 1
            case _:
                pass
    result = job.result(WAIT_S)
    assert ("".join(shown), resets) == (result.text, 1)
    assert set(result.parsed) == NAMES
    _check_repair(rig, result)


def _check_repair(rig: Rig, result: Result) -> None:
    """Both calls are attempts that cost what was billed, and no breaker minds."""
    attempts = sorted(rig.attempts([result.job_id])[result.job_id], key=lambda one: one.number)
    assert [(one.state, one.error_class, one.entries, one.kind) for one in attempts] == [
        ("failed", "invalid_answer", 1, "actual"),
        ("succeeded", None, 1, "actual"),
    ]
    billed = {call["request_id"]: call["billed_nano_usd"] for call in rig.sandbox.calls()}
    assert [one.booked for one in attempts] == [billed[one.request_id] for one in attempts]
    assert result.cost_nano_usd == sum(one.booked for one in attempts) > 0
    first, second = attempts
    assert second.reserved_nano_usd > first.reserved_nano_usd  # for the answer that it repeats
    assert "this is not what was asked for" not in first.error_message


@BOTH
def test_a_second_answer_that_does_not_fit_is_a_failure(
    rig: Rig, use_case: str, model: str
) -> None:
    prompt = _said()
    rig.sandbox.add_fault("bad_json", prompt_contains=prompt)
    job = rig.client.submit(use_case, prompt, response_format={"json_schema": SCHEMA})
    with pytest.raises(JobFailed, match='it lacks "summary"; it was asked for twice') as caught:
        job.result(WAIT_S)
    assert caught.value.error_class == ErrorClass.INVALID_ANSWER
    view = rig.client.get(job.id)
    assert [one.error_class for one in view.history] == [ErrorClass.INVALID_ANSWER] * 2
    assert view.cost_nano_usd == rig.booked_nano_usd([job.id]) > 0


def test_a_job_that_left_its_worker_in_between_is_repaired_no_further(rig: Rig) -> None:
    """It is called for anew: what it had been answered is not kept, how often it was is."""
    prompt = _said()
    rig.sandbox.add_fault("bad_json", prompt_contains=prompt, times=1)
    rig.sandbox.add_fault("http_429", prompt_contains=prompt, times=1, retry_after_s=5)
    rig.sandbox.add_fault("bad_json", prompt_contains=prompt)
    asked = {"json_schema": SCHEMA}
    job = rig.client.submit("draft", prompt, response_format=asked, model="claude-haiku-5-5")
    with pytest.raises(JobFailed, match="it was asked for twice"):
        job.result(WAIT_S)
    history = [one.error_class for one in rig.client.get(job.id).history]
    assert history == [
        ErrorClass.INVALID_ANSWER,
        ErrorClass.RATE_LIMITED,
        ErrorClass.INVALID_ANSWER,
    ]


def test_a_job_with_one_attempt_has_no_repair(rig: Rig) -> None:
    prompt = _said("ECHO: no JSON at all")
    asked = {"json_schema": SCHEMA}
    job = rig.client.submit("draft", prompt, response_format=asked, max_attempts=1)
    with pytest.raises(JobFailed, match=r"it is not JSON .* no attempt is left to repair it"):
        job.result(WAIT_S)


@BOTH
def test_a_schema_that_providers_do_not_keep_is_kept_all_the_same(
    rig: Rig, use_case: str, model: str
) -> None:
    """Names are not known beforehand: neither provider keeps to that by itself."""
    schema = {"type": "object", "additionalProperties": {"type": "integer"}, "minProperties": 1}
    asked: dict[str, Any] = {"response_format": {"json_schema": schema}}
    good, bad = (
        rig.client.submit(use_case, _said(), system=f"ECHO: {text}", **asked)
        for text in ('{"Ada": 3}', '{"Ada": "three"}')
    )
    assert good.result(WAIT_S).parsed == {"Ada": 3}
    with pytest.raises(JobFailed) as caught:
        bad.result(WAIT_S)
    assert '* is not of type "integer"' in str(caught.value)
    assert "Ada" not in str(caught.value)


def test_what_max_tokens_has_cut_is_an_answer(rig: Rig) -> None:
    asked = {"json_schema": SCHEMA}
    job = rig.client.submit("general", _said(), response_format=asked, max_tokens=2)
    result = job.result(WAIT_S)
    assert (result.finish_reason, result.attempts) == ("length", 1)
    assert result.warnings == ("the answer was cut by max_tokens, so it is no whole JSON",)


# Tools


@BOTH
def test_tools_over_several_turns(rig: Rig, use_case: str, model: str) -> None:
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}}
    tools = [{"name": name, "parameters": parameters} for name in ("weather", "time")]
    messages = [Message.user(_said("TOOL: weather, time\nIs it time for a walk in Bern?"))]
    for answers, following in (("TOOL: weather", "sunny"), ("noon", "ECHO: Yes, go now.")):
        result = rig.client.submit(use_case, messages, tools=tools).result(WAIT_S)
        assert result.finish_reason == "tool_calls"
        messages.append(Message(role="assistant", content=result.tool_calls))
        results = [
            ToolResultPart(tool_call_id=call.id, content=content)
            for call, content in zip(result.tool_calls, (answers, following), strict=False)
        ]
        if len(results) == 1:
            results = [ToolResultPart(tool_call_id=result.tool_calls[0].id, content=following)]
        # Each in a message of its own, as clients of OpenAI's wire have it.
        messages += [Message(role="user", content=(one,)) for one in reversed(results)]
    assert [len(one.content) for one in messages if one.role == "assistant"] == [2, 1]
    result = rig.client.submit(use_case, messages, tools=tools).result(WAIT_S)
    assert (result.text, result.tool_calls) == ("Yes, go now.", ())


@BOTH
def test_one_tool_at_a_time_and_none(rig: Rig, use_case: str, model: str) -> None:
    tools = [{"name": name} for name in ("weather", "time")]
    counts = [
        len(
            rig.client.submit(use_case, _said("TOOL: weather, time"), tools=tools, **more)
            .result(WAIT_S)
            .tool_calls
        )
        for more in (
            {"parallel_tool_calls": True},
            {"parallel_tool_calls": False},
            {"tool_choice": "none"},
            {"tool_choice": "time"},
        )
    ]
    assert counts == [2, 1, 0, 1]


# Pictures and papers


@BOTH
def test_pictures_and_papers_are_passed_on(rig: Rig, use_case: str, model: str) -> None:
    png = base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(100)).decode()
    pdf = base64.b64encode(b"%PDF-1.7 " + bytes(100)).decode()
    parts = (
        TextPart(text=_said("What is this?")),
        ImagePart(data=png),
        ImagePart(url="https://example.com/a.png"),
        FilePart(data=pdf),
    )
    job = rig.client.submit(use_case, [Message(role="user", content=parts)])
    usage = job.result(WAIT_S).usage
    # Of the sandbox: 1,000 tokens a picture, 2,000 a paper.
    assert 4_000 < usage.total_input < 4_100


# What a model does not take


@BOTH
def test_what_a_model_does_not_take_is_left_out_and_said(
    rig: Rig, use_case: str, model: str
) -> None:
    options: dict[str, Any] = {"temperature": 0.2, "top_p": 0.5, "stop": ["\n\n", "END"]}
    job = rig.client.submit(use_case, _said(), parallel_tool_calls=True, effort="low", **options)
    result = job.result(WAIT_S)
    assert result.model == model
    stop = {
        "general": "stop is not taken by gpt-6-luna and was left out",
        "draft": "a stop of blanks alone is not taken by claude-haiku-5-5 and was left out",
    }
    assert sorted(result.warnings) == sorted(
        [
            f"temperature is not taken by {model} and was left out",
            f"top_p is not taken by {model} and was left out",
            "parallel_tool_calls means nothing without tools, and was left out",
            stop[use_case],
        ]
    )


def test_what_says_the_usual_is_left_out_in_silence(rig: Rig) -> None:
    job = rig.client.submit("draft", _said(), temperature=1, top_p=1, stop="END")
    assert job.result(WAIT_S).warnings == ()


# Which model


def test_the_result_says_that_the_use_case_was_chosen(rig: Rig) -> None:
    plain = rig.client.submit(None, _said())
    tools = rig.client.submit(None, _said(), tools=[{"name": "weather"}])
    for job, use_case in ((plain, "general"), (tools, "complex")):
        result = job.result(WAIT_S)
        said = f"no use case was named, and the job was taken for {use_case}"
        assert (result.use_case, result.warnings) == (use_case, (said,))
    assert rig.client.submit("general", _said()).result(WAIT_S).warnings == ()


def test_a_fallback_answers_where_the_model_does_not(rig: Rig) -> None:
    prompt = _said("ECHO: here I am")
    rig.sandbox.add_fault("http_503", prompt_contains=prompt, model="claude-sonnet-5-5")
    rig.sandbox.add_fault("http_404", prompt_contains=prompt, model="gpt-6.1-sol")
    job = rig.client.submit(
        "general",
        prompt,
        model="claude-sonnet-5-5",
        fallbacks=["openai-gpt-6.1-sol", "claude-haiku-5-5"],
    )
    result = job.result(WAIT_S)
    assert (result.text, result.model) == ("here I am", "claude-haiku-5-5")
    models = [call["model"] for call in rig.sandbox.calls() if call["prompt_tail"] == prompt]
    assert models == ["claude-sonnet-5-5", "gpt-6.1-sol", "claude-haiku-5-5"]


def test_a_conversation_may_change_providers(rig: Rig) -> None:
    """Ids of tool calls that only some server makes up are taken by both."""
    call_id = "functions.weather:0"
    messages = [
        Message.user("Weather?"),
        Message(
            role="assistant", content=(ToolCallPart(id=call_id, name="weather", arguments={}),)
        ),
        Message(
            role="user", content=(ToolResultPart(tool_call_id=call_id, content="ECHO: sunny"),)
        ),
    ]
    for use_case in ("draft", "general"):
        job = rig.client.submit(use_case, messages, tools=[{"name": "weather"}])
        assert job.result(WAIT_S).text == "sunny"
