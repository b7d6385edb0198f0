from typing import Any

import pytest
from pydantic import ValidationError

from sluicegate.workers.local import sandbox_faults
from sluicegate.workers.local.sandbox_answers import Ask
from sluicegate.workers.local.sandbox_faults import Fault, FaultArgs, FaultBook, FaultRule
from sluicegate.workers.local.sandbox_log import CallLog
from sluicegate.workers.local.sandbox_openai import OpenAIWire
from sluicegate.workers.local.sandbox_prices import Usage


def ask(text: str = "hello", model: str = "gpt-6-luna") -> Ask:
    return OpenAIWire().read({"model": model, "messages": [{"role": "user", "content": text}]})


def strikes(book: FaultBook, *asks: Ask) -> list[str | None]:
    hits = [book.strike(one) for one in asks]
    return [hit.fault.value if hit else None for hit in hits]


def test_every_nth_and_times() -> None:
    book = FaultBook()
    book.add(FaultRule(fault=Fault.HTTP_500, every_nth=3, times=2))
    hits = strikes(book, *[ask()] * 12)
    assert [number for number, hit in enumerate(hits, 1) if hit] == [3, 6]
    assert book.rules()[0]["fired"] == 2


def test_a_rule_asks_for_model_wire_and_text() -> None:
    book = FaultBook()
    book.add(FaultRule(fault=Fault.HANG, model="gpt-4o", prompt_contains="note 7"))
    book.add(FaultRule(fault=Fault.HTTP_503, wire="anthropic"))
    asks = (ask("note 7"), ask("note 8", "gpt-4o"), ask("see note 7.", "gpt-4o"))
    assert strikes(book, *asks) == [None, None, "hang"]


def test_the_oldest_rule_that_fires_decides_and_rules_can_go() -> None:
    book = FaultBook()
    first = book.add(FaultRule(fault=Fault.HTTP_500))
    book.add(FaultRule(fault=Fault.HANG))
    assert strikes(book, ask()) == ["http_500"]
    assert book.remove(first)
    assert not book.remove(first)
    assert strikes(book, ask()) == ["hang"]
    book.clear()
    assert strikes(book, ask()) == [None]


def test_model_names_carry_faults() -> None:
    names = ("sandbox-http_429", "sandbox-cut-stream", "sandbox-fast", "gpt-4o")
    asks = [ask(model=name) for name in names]
    assert strikes(FaultBook(), *asks) == ["http_429", "cut_stream", None, None]


@pytest.mark.parametrize(
    "values",
    [
        {"fault": "http_418"},
        {"fault": "hang", "times": 0},
        {"fault": "hang", "when": "now"},
        {"fault": "hang", "args": {"fraction": 2}},
        {"fault": "answer_text", "args": {"text_json": 'a"b'}},
        {"fault": "answer_text", "args": {"text_json": "\\u00"}},
    ],
    ids=str,
)
def test_bad_rules_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        FaultRule.model_validate(values)


def test_answer_text_holds_what_utf8_cannot() -> None:
    assert FaultArgs(text_json="a\\u0000\\ud800").text == "a\x00\ud800"


def test_rules_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox_faults, "MAX_RULES", 2)
    book = FaultBook()
    book.add(FaultRule(fault=Fault.HANG))
    book.add(FaultRule(fault=Fault.HANG))
    with pytest.raises(ValueError, match="delete some"):
        book.add(FaultRule(fault=Fault.HANG))


def test_the_log_forgets_calls_but_never_money() -> None:
    log = CallLog(keep_calls=10)
    for _ in range(25):
        call = log.begin(wire="openai", model="gpt-6-luna", request_id="req_1")
        log.bill(call, Usage(input=10, output=2))
        log.bill(call, Usage(input=99, output=99))
        log.finish(call)
    assert [call["seq"] for call in log.calls(after=0, limit=100)] == list(range(16, 26))
    assert [call["seq"] for call in log.calls(after=18, limit=3)] == [19, 20, 21]
    totals = log.totals()
    assert (totals["calls"], totals["billed_calls"], totals["in_flight"]) == (25, 25, 0)
    assert totals["billed_nano_usd"] == 25 * (10 * 100 + 2 * 500)


def test_a_call_from_before_a_reset_counts_no_more() -> None:
    log = CallLog()
    call = log.begin(wire="openai", model="gpt-6-luna", request_id="req_1")
    log.reset()
    log.bill(call, Usage(input=10))
    log.finish(call)
    assert log.totals()["billed_nano_usd"] == 0
    assert log.totals()["in_flight"] == 0
