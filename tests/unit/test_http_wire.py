"""The client for HTTP has the interface of the other one, and understands what a server says."""

from __future__ import annotations

import inspect
from typing import Any
from uuid import UUID, uuid4

import httpx2
import orjson
import pytest

from sluicegate import (
    AsyncSluice,
    BudgetExceeded,
    IdempotencyConflict,
    InvalidJob,
    NotFound,
    QueueUnavailable,
    SettingsError,
    Sluice,
    SluiceError,
)
from sluicegate.producers import http_wire
from sluicegate.producers.http_async_client import AsyncHttpSluice
from sluicegate.producers.http_client import HttpSluice
from sluicegate.producers.http_wire import Busy, EventText, Waiting
from sluicegate.producers.submission import read_request

URL = "https://llm.example.com"
#: What HTTP cannot do takes anything, and raises.
NOT_THERE = {"submit_batch", "batch"}


def _public(kind: type) -> dict[str, Any]:
    return {
        name: value
        for name, value in inspect.getmembers(kind, inspect.isfunction)
        if not name.startswith("_") and name != "forget_lines"
    }


@pytest.mark.parametrize(
    ("direct", "remote"), [(Sluice, HttpSluice), (AsyncSluice, AsyncHttpSluice)]
)
def test_both_have_the_same_methods_which_take_the_same(direct: type, remote: type) -> None:
    ours = _public(remote)
    for name, method in _public(direct).items():
        assert name in vars(remote), f"{name} is not made for HTTP"
        if name not in NOT_THERE:
            found, wanted = inspect.signature(ours[name]), inspect.signature(method)
            assert list(found.parameters.values()) == list(wanted.parameters.values()), name
        assert inspect.iscoroutinefunction(ours[name]) == inspect.iscoroutinefunction(method), name


def test_an_address_makes_the_client_for_http() -> None:
    with Sluice(URL, api_key="sk-sluice-x") as sluice:
        assert isinstance(sluice, HttpSluice)
    assert isinstance(AsyncSluice(f"{URL}/"), AsyncHttpSluice)


def test_the_address_may_be_given_by_its_keyword() -> None:
    with Sluice(settings=URL, api_key="sk-sluice-x") as sluice:
        assert isinstance(sluice, HttpSluice)
    assert isinstance(AsyncSluice(settings=URL), AsyncHttpSluice)


@pytest.mark.parametrize("account", ["acme", UUID(int=7), str(UUID(int=7))])
def test_the_account_it_acts_for_is_named_in_each_request(account: Any) -> None:
    assert http_wire.headers_of(None, account)["X-Sluice-Account"] == str(account)
    assert "X-Sluice-Account" not in http_wire.headers_of("sk-sluice-x", None)


@pytest.mark.parametrize("account", ["", "two words", "имя", "line\n"])
def test_what_can_be_no_account_is_refused(account: Any) -> None:
    with pytest.raises(SettingsError, match=r"^account: must "):
        Sluice(URL, account=account)


@pytest.mark.parametrize(
    "url", ["", "llm.example.com", "ftp://host", "postgresql://h/d", "http://"]
)
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(SettingsError, match=r"^url: .* is not the address of `sluice http`"):
        Sluice(url)


@pytest.mark.parametrize("key", ["", "two words", "ключ", "line\n"])
def test_what_can_be_no_key_is_refused(key: str) -> None:
    with pytest.raises(SettingsError, match=r"^api_key: "):
        Sluice(URL, api_key=key)


@pytest.mark.parametrize("patience_s", [-1, float("nan"), float("inf"), "long"])
def test_patience_is_a_number_of_seconds(patience_s: Any) -> None:
    with pytest.raises(SettingsError, match=r"^patience_s: "):
        Sluice(URL, patience_s=patience_s)


def test_every_submit_can_be_repeated() -> None:
    given = http_wire.submit(read_request("draft", "hi", {"idempotency_key": "mine"}))
    assert b'"idempotency_key":"mine"' in (given.content or b"")
    made = http_wire.submit(read_request("draft", "hi", {}))
    assert b'"idempotency_key":"auto-' in (made.content or b"")
    assert given.repeatable
    assert not http_wire.retry(uuid4()).repeatable


def test_what_json_cannot_carry_is_refused_before_it_is_sent() -> None:
    with pytest.raises(InvalidJob, match="job: holds a value that JSON cannot carry"):
        http_wire.submit(read_request("draft", [object()], {}))


def _response(status: int, code: str, message: str, **more: Any) -> httpx2.Response:
    error = {"code": code, "message": message, "field": None, "requestId": "r-1", **more}
    return httpx2.Response(status, json={"error": error}, headers={"Retry-After": "3"})


def test_problems_become_the_errors_that_they_were() -> None:
    def told(*arguments: Any, **more: Any) -> SluiceError:
        with pytest.raises((SluiceError, Busy)) as raised:
            http_wire.check(URL, _response(*arguments, **more))
        error = raised.value
        return error.error if isinstance(error, Busy) else error  # type: ignore[return-value]

    refused = told(400, "invalid_request", "prompt: must not be empty", field="prompt")
    assert isinstance(refused, InvalidJob)
    assert (refused.field, refused.problem) == ("prompt", "must not be empty")
    assert isinstance(told(409, "idempotency_conflict", "used"), IdempotencyConflict)
    assert isinstance(told(404, "not_found", "there is no job"), NotFound)
    assert isinstance(told(503, "unavailable", "away"), QueueUnavailable)
    assert isinstance(told(429, "rate_limited", "too many"), QueueUnavailable)
    assert "r-1" in str(told(500, "internal", "something went wrong"))
    assert type(told(403, "forbidden", "this needs the role owner")) is SluiceError
    details = {
        "account": "acme",
        "use_case": None,
        "window": "day",
        "limit": "25.50",
        "spent": "25.5001",
        "resets_at": "2026-11-24T00:00:00+01:00",
    }
    full = told(402, "budget_exceeded", "it is full", details=details)
    assert isinstance(full, BudgetExceeded)
    assert (full.account, str(full.limit), str(full.spent)) == ("acme", "25.50", "25.5001")
    assert full.resets_at is not None


@pytest.mark.parametrize(
    ("status", "code", "is_refused"),
    [
        (429, "rate_limited", True),
        (503, "too_many_streams", True),
        (503, "stopping", True),
        (503, "unavailable", False),
        (504, "job_expired", False),
    ],
)
def test_what_may_have_been_done_is_not_called_refused(
    status: int, code: str, is_refused: bool
) -> None:
    with pytest.raises(Busy) as busy:
        http_wire.check(URL, _response(status, code, "later"))
    assert busy.value.refused is is_refused
    assert busy.value.retry_after_s == 3
    again = http_wire.repeat(http_wire.retry(uuid4()), 60)["retry"].predicate
    assert again(busy.value) is is_refused


def test_a_service_key_is_told_of_the_option_by_its_name() -> None:
    header = "X-Sluice-Account"
    with pytest.raises(InvalidJob, match=r"^account: name the account"):
        http_wire.check(
            URL, _response(400, "invalid_request", f"{header}: name the account", field=header)
        )


def test_an_answer_of_somebody_else_is_called_that() -> None:
    with pytest.raises(SluiceError, match="answered 404, and not as `sluice http` does"):
        http_wire.check(URL, httpx2.Response(404, text="<html>"))
    with pytest.raises(Busy) as busy:
        http_wire.check(URL, httpx2.Response(502, text="<html>"))
    assert isinstance(busy.value.error, QueueUnavailable)
    assert not busy.value.refused


def test_a_stream_is_read_in_whatever_pieces_it_comes() -> None:
    job_id = UUID(int=1)
    said = (
        'retry: 1000\n\n: waiting\n\nid: 1-1\r\nevent: delta\ndata: {"type":"delta",'
        '"text":"a line\u2028and more"}\n\n'
        f'id: 1-2\nevent: completed\ndata: {{"type":"completed","result":{{"job_id":"{job_id}",'
        '"state":"succeeded","use_case":"draft"}}\n\nevent: over\ndata: {}\n\n'
    ).encode()
    for size in (1, 7, len(said)):
        text = EventText()
        pieces = [said[n : n + size] for n in range(0, len(said), size)]
        first, last = [event for piece in pieces for event in text.feed(piece)]
        assert (first.id, first.payload.text) == ("1-1", "a line\u2028and more")  # type: ignore[union-attr]
        assert (last.id, last.terminal, text.over) == ("1-2", True, True)


def test_half_an_event_is_none() -> None:
    text = EventText()
    assert list(text.feed(b'id: 1-1\ndata: {"type":"delta","text":"half')) == []
    assert not text.over


def _broken(code: str) -> bytes:
    error = {"code": code, "message": "no key for it", "field": None, "requestId": "r-1"}
    return b"event: error\ndata: %b\n\n" % orjson.dumps({"error": error})


def test_a_stream_that_cannot_go_on_says_why() -> None:
    with pytest.raises(SluiceError, match=r"no key for it \(request id: r-1\)"):
        list(EventText().feed(_broken("internal")))
    with pytest.raises(Busy) as busy:
        list(EventText().feed(_broken("unavailable")))
    assert isinstance(busy.value.error, QueueUnavailable)
    with pytest.raises(SluiceError, match="cannot go on"):
        list(EventText().feed(b"event: error\ndata: {}\n\n"))


@pytest.mark.parametrize(
    ("said", "is_alive"),
    [(b"retry: 1000\n\n", False), (b": waiting\n\n", True), (b"event: over\ndata: {}\n\n", False)],
)
def test_a_comment_is_a_sign_of_life(said: bytes, is_alive: bool) -> None:
    text = EventText()
    assert list(text.feed(said)) == []
    assert text.is_alive is is_alive


def test_patience_ends_though_the_server_answers_each_time() -> None:
    waiting = Waiting(URL, uuid4(), "0", None, 0.0)
    waiting.heard()
    assert waiting.pause_after() > 0
    waiting.heard()
    with pytest.raises(QueueUnavailable, match="it ends each answer at once"):
        waiting.pause_after()
    waiting.progressed()
    assert waiting.pause_after() > 0
