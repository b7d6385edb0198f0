"""What a request is checked for, and what becomes of it, without any server."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any, cast
from uuid import UUID, uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

import sluicegate
from sluicegate.producers.storing import accept, batches, missing, parameters
from sluicegate.producers.submission import (
    AccountBook,
    Desk,
    Draft,
    parse_job_id,
    read_request,
    read_requests,
)
from sluicegate.shared.catalogue import Catalogue, Provider, UseCase
from sluicegate.shared.errors import IdempotencyConflict, InvalidJob
from sluicegate.shared.jobs import JobSpec, Lane, State, build_spec
from sluicegate.shared.settings import Settings

ACCOUNT = uuid4()
PNG = "iVBORw0KGgo="


def provider(**values: Any) -> Provider:
    given: dict[str, Any] = {
        "id": uuid4(),
        "name": "anthropic-haiku",
        "provider": "anthropic",
        "model": "claude-haiku-4-5",
        "base_url": None,
        "is_default": True,
        "use_case": frozenset({"draft"}),
        "failover": frozenset(),
        "max_tokens": 8000,
        "context_tokens": 2_000_000,
        "capabilities": frozenset({"tools", "json_schema"}),
        "account_id": None,
        "catalogue": None,
        "priority": 1,
        "retires_at": None,
        "successor": None,
        "price_override": None,
    }
    return Provider(**{**given, **values})


def use_case(name: str) -> UseCase:
    return UseCase(
        name=name, description="", prefer="priority", max_tokens=1024, unknown_policy="retry_once"
    )


def desk(**settings: Any) -> Desk:
    return Desk(
        settings=Settings(_env_file=None, **settings),
        catalogue=Catalogue(
            (
                provider(),
                provider(name="openai-mini", provider="openai", use_case=frozenset({"general"})),
            ),
            {name: use_case(name) for name in ("draft", "general")},
        ),
        accounts={"default": ACCOUNT},
    )


def draft(name: object = "draft", prompt: object = "hello", **options: Any) -> Draft:
    return desk().draft(read_request(name, prompt, options))


def test_an_interactive_job_is_queued_where_its_first_candidate_is() -> None:
    job = draft("general")
    assert (job.queue, job.state, job.account_id) == ("general.openai", State.QUEUED, ACCOUNT)
    assert job.deadline_s == 300
    assert job.request == build_spec("general", "hello").dump()
    assert job.submitted_by


def test_a_bulk_job_is_parked() -> None:
    job = draft(lane="bulk")
    assert (job.queue, job.state, job.lane) == ("draft.anthropic.bulk", State.PARKED, Lane.BULK)
    assert job.deadline_s == 86_400


def test_terms_are_the_callers_where_given() -> None:
    job = draft(deadline=7, max_attempts=2, submitted_by="crm", request_id="r-1")
    assert (job.deadline_s, job.max_attempts) == (7, 2)
    assert (job.submitted_by, job.request_id) == ("crm", "r-1")


def test_a_messages_content_may_be_plain_text() -> None:
    as_text = draft(prompt=[{"role": "user", "content": "hello"}])
    as_parts = draft(prompt=[{"role": "user", "content": [{"type": "text", "text": "hello"}]}])
    assert as_text.request_hash == as_parts.request_hash == draft().request_hash


REFUSED: list[tuple[str, Any, Any, dict[str, Any]]] = [
    ('""', "draft", "hello", {"": None}),
    ("use_case", "nope", "hi", {}),
    ("use_case", "Not A Name", "hi", {}),
    ("use_case", 7, "hi", {}),
    ("prompt", "draft", "", {}),
    ("prompt", "draft", "  \n", {}),
    ("prompt", "draft", None, {}),
    ("prompt", "draft", 7, {}),
    ("prompt", "draft", b"bytes", {}),
    ("prompt", "draft", "\ud800", {}),
    ("prompt", "draft", "x" * 2_000_000, {}),
    ("messages", "draft", [], {}),
    ("messages.0.role", "draft", [{"role": "system", "content": "hi"}], {}),
    ("messages", "draft", [{"role": "user", "content": [{"type": "image", "data": PNG}]}], {}),
    ("max_tokens", "draft", "hi", {"max_tokens": 0}),
    ("max_tokens", "draft", "hi", {"max_tokens": 8001}),
    ("max_tokens", "draft", "hi", {"max_tokens": "many"}),
    ("model", "draft", "hi", {"model": "gpt-1"}),
    ("account", "draft", "hi", {"account": "nobody"}),
    ("account", "draft", "hi", {"account": uuid4()}),
    ("account", "draft", "hi", {"account": "a\x00"}),
    ("account", "draft", "hi", {"account": None}),
    ("lane", "draft", "hi", {"lane": "fast"}),
    ("deadline", "draft", "hi", {"deadline": 0}),
    ("deadline", "draft", "hi", {"deadline": 31 * 86_400}),
    ("deadline", "draft", "hi", {"deadline": float("nan")}),
    ("max_attempts", "draft", "hi", {"max_attempts": 0}),
    ("idempotency_key", "draft", "hi", {"idempotency_key": ""}),
    ("idempotency_key", "draft", "hi", {"idempotency_key": "\ud800"}),
    ("idempotency_key", "draft", "hi", {"idempotency_key": "k" * 256}),
    ("request_id", "draft", "hi", {"request_id": "a\nb"}),
    ("temperature", "draft", "hi", {"temperature": "warm"}),
    ("temperature", "draft", "hi", {"temperature": 3}),
    ("top_p", "draft", "hi", {"top_p": 0}),
    ("stop", "draft", "hi", {"stop": 7}),
    ("stop", "draft", "hi", {"stop": ["a", "b", "c", "d", "e"]}),
    ("fallbacks", "draft", "hi", {"fallbacks": ["gpt-1"]}),
    ("fallbacks", "draft", "hi", {"fallbacks": "openai-mini"}),
    ("parallel_tool_calls", "draft", "hi", {"parallel_tool_calls": "no"}),
    (
        "response_format.json_schema",
        "draft",
        "hi",
        {"response_format": {"json_schema": {"type": "objekt"}}},
    ),
    (
        "response_format.json_schema",
        None,
        "hi",
        {"response_format": {"json_schema": {"$ref": "https://a.test/b"}}},
    ),
    ("metadata.a", "draft", "hi", {"metadata": {"a": 1}}),
]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"metadata": {"lead": 1}}, "metadata.lead: must be text"),
        ({"reply_to": "a b"}, "reply_to: must be 1 to 128 letters, digits, or . _ : -, with a"),
        ({"deadline": "1h"}, "deadline: must be seconds, a timedelta or a moment with a time zone"),
        ({"response_format": int}, "response_format: must be a pydantic model class, or a Resp"),
        ({"max_tokens": "many"}, "max_tokens: must be a whole number"),
        ({"max_attempts": 0}, "max_attempts: must be greater than or equal to 1"),
        ({"effort": "huge"}, "effort: must be 'low', 'medium' or 'high'"),
        ({"tool_choice": "a b"}, "tool_choice: must be 1 to 64 letters, digits, - or _"),
        ({"tool_choice": "required"}, "tool_choice: needs tools; leave it out, or give some"),
        ({"idempotency_key": "k" * 256}, "idempotency_key: must have at most 255 characters"),
        ({"request_id": "a\nb"}, "request_id: must be text without control characters"),
    ],
)
def test_a_refusal_is_a_plain_sentence(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InvalidJob) as refused:
        draft(**options)
    assert str(refused.value).startswith(sentence)


@pytest.mark.parametrize(("field", "name", "prompt", "options"), REFUSED)
def test_what_cannot_be_done_is_refused_by_the_name_of_its_field(
    field: str, name: Any, prompt: Any, options: dict[str, Any]
) -> None:
    with pytest.raises(InvalidJob) as refused:
        draft(name, prompt, **options)
    assert refused.value.field == field
    assert "\n" not in str(refused.value)


@given(st.text(max_size=300), st.text(max_size=300), st.text(max_size=40))
def test_any_text_is_either_a_job_or_refused(prompt: str, key: str, account: str) -> None:
    try:
        job = draft(prompt=prompt, idempotency_key=key, account=account)
    except InvalidJob as error:
        assert error.field in ("prompt", "idempotency_key", "account")  # noqa: PT017 - both ways are fine
    else:
        assert prompt.strip()
        assert "\x00" not in key
        job.request.decode()


def wide_desk(*, complex_is_active: bool = True) -> Desk:
    names = ("draft", "general", "complex", "vision")
    cases = {name: use_case(name) for name in names}
    cases["complex"] = replace(cases["complex"], is_active=complex_is_active)
    return Desk(
        settings=Settings(_env_file=None),
        catalogue=Catalogue((provider(use_case=frozenset(names)),), cases),
        accounts={"default": ACCOUNT},
    )


WEATHER = {"name": "weather", "parameters": {"type": "object"}}


def test_a_use_case_that_is_left_out_is_chosen_by_what_is_asked() -> None:
    plain = wide_desk().draft(read_request(None, "hello", {}))
    assert (plain.use_case, plain.queue) == ("general", "general.anthropic")
    assert JobSpec.model_validate_json(plain.request).use_case_detected
    assert wide_desk().draft(read_request(None, "hi", {"tools": [WEATHER]})).use_case == "complex"
    assert not JobSpec.model_validate_json(draft("general").request).use_case_detected


def test_a_use_case_that_takes_no_jobs_is_not_chosen() -> None:
    request = read_request(None, "hi", {"tools": [WEATHER]})
    jobs = [wide_desk(complex_is_active=active).draft(request) for active in (True, False)]
    assert [job.use_case for job in jobs] == ["complex", "general"]
    # What was asked for is the same, so an idempotency key gives the same job.
    assert jobs[0].request_hash == jobs[1].request_hash
    named = wide_desk().draft(read_request("general", "hi", {"tools": [WEATHER]}))
    assert named.request_hash != jobs[0].request_hash


def test_fallbacks_are_among_what_is_asked() -> None:
    assert draft(fallbacks=["openai-mini"]).queue == "draft.anthropic"
    assert draft(model="openai-mini", fallbacks=["anthropic-haiku"]).queue == "draft.openai"
    with pytest.raises(InvalidJob, match="'gpt-1' is not in use here; there are"):
        draft(fallbacks=["openai-mini", "gpt-1"])


def test_items_take_what_is_common_and_say_what_differs() -> None:
    requests = read_requests(
        "draft", ["a", {"prompt": "b", "use_case": "general", "lane": "interactive"}],
        {"lane": "bulk"},
    )  # fmt: skip
    first, second = desk().draft_all(requests)
    assert (first.queue, second.queue) == ("draft.anthropic.bulk", "general.openai")


def test_a_refused_item_is_named() -> None:
    with pytest.raises(InvalidJob, match=r"max_tokens: .*job 1 of the list") as refused:
        desk().draft_all(read_requests("draft", ["a", {"prompt": "b", "max_tokens": 0}], {}))
    assert refused.value.field == "max_tokens"


@pytest.mark.parametrize("items", ["text", {"prompt": "x"}])
def test_a_single_prompt_is_not_a_list_of_jobs(items: Any) -> None:
    with pytest.raises(InvalidJob, match="jobs"):
        read_requests("draft", items, {})


def test_one_key_for_two_requests_of_a_list_is_a_conflict() -> None:
    items = [{"prompt": text, "idempotency_key": "k"} for text in ("a", "b")]
    with pytest.raises(IdempotencyConflict):
        desk().draft_all(read_requests("draft", items, {}))


def test_batches_are_bounded_by_jobs_and_bytes() -> None:
    small = desk().draft_all(read_requests("draft", ["x"] * 1201, {}))
    assert [len(batch) for batch in batches(small)] == [500, 500, 201]
    large = desk().draft_all(read_requests("draft", ["x" * 900_000] * 20, {}))
    sizes = [sum(len(job.request) for job in batch) for batch in batches(large)]
    assert len(sizes) == 3
    assert max(sizes) <= 8_000_000


def stored(job: Draft) -> Any:
    return SimpleNamespace(id=job.id, published_at=datetime.now(UTC))


def standing(job: Draft, **values: Any) -> Any:
    row = {
        "draft_id": job.id,
        "id": job.id,
        "state": "queued",
        "published_at": datetime.now(UTC),
        "request_hash": job.request_hash,
    }
    return SimpleNamespace(**{**row, **values})


def test_a_stored_job_is_published() -> None:
    job = draft()
    (accepted,) = accept([job], [stored(job)], [])
    assert accepted.message is not None
    assert accepted.message.queue == "draft.anthropic"
    assert accepted.message.job_ids == (job.id,)


def test_a_job_that_an_earlier_try_stored_is_published_and_another_with_its_key_is_not() -> None:
    job = draft(idempotency_key="k")
    other = uuid4()
    assert missing([job], []) == [job]
    (again,) = accept([job], [], [standing(job)])
    assert again.id == job.id
    assert again.message is not None
    (same,) = accept([job], [], [standing(job, id=other)])
    assert same.id == other
    assert same.message is None
    with pytest.raises(IdempotencyConflict, match="'k'"):
        accept([job], [], [standing(job, id=other, request_hash=b"another")])


def test_all_columns_have_a_value_for_each_job() -> None:
    columns = parameters([draft(), draft(lane="bulk")])
    assert {len(column) for name, column in columns.items() if name != "submitted_from"} == {2}


def test_accounts_are_remembered_for_a_short_while() -> None:
    now = [0.0]
    book = AccountBook(clock=lambda: now[0])
    requests = [read_request("draft", "hi", {})]
    assert book.known(requests) == ({}, ["default"])
    book.learn([cast("Any", SimpleNamespace(name="default", id=ACCOUNT))])
    assert book.known(requests) == ({"default": ACCOUNT}, [])
    now[0] = 60.0
    assert book.known(requests) == ({}, ["default"])


@pytest.mark.parametrize("bad", ["", "7", None, 7, "zz"])
def test_an_id_that_is_no_uuid_is_refused(bad: Any) -> None:
    with pytest.raises(InvalidJob, match="job_id"):
        parse_job_id(bad)


def test_an_id_may_be_text() -> None:
    assert parse_job_id(str(ACCOUNT)) == ACCOUNT == parse_job_id(UUID(str(ACCOUNT)))


def test_the_package_has_all_it_promises() -> None:
    assert [name for name in sluicegate.__all__ if getattr(sluicegate, name, None) is None] == []
    with pytest.raises(AttributeError):
        _ = sluicegate.nothing
