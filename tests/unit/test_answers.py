"""A pydantic model as a schema for both providers, and answers read by it."""

from __future__ import annotations

import datetime
import pickle
from collections.abc import Iterator
from enum import StrEnum
from typing import Any, Generic, Literal, TypeVar
from uuid import uuid4

import pytest
from anthropic.lib._parse._transform import transform_schema
from openai.lib._pydantic import to_strict_json_schema
from pydantic import BaseModel, ConfigDict, Field, RootModel

from sluicegate.producers.submission import read_request
from sluicegate.shared.answers import response_format_of
from sluicegate.shared.errors import InvalidAnswer, InvalidJob
from sluicegate.shared.jobs import Result, State

T = TypeVar("T")


class Tone(StrEnum):
    WARM = "warm"
    DRY = "dry"


class Contact(BaseModel):
    """Somebody at the customer's."""

    model_config = ConfigDict(extra="allow")

    name: str = Field(description="As they sign.", max_length=40)
    calls: int = Field(0, ge=0)


class Folder(BaseModel):
    title: str
    inside: list[Folder] = []


class Mail(BaseModel):
    subject: str
    body: str = "empty"
    tone: Tone | None = None
    kind: Literal["mail"] = "mail"
    to: list[Contact]
    lead: Contact = Field(description="Who decides.")
    due: datetime.date | None = None
    folder: Folder
    score: float = Field(ge=0, le=1)


class Pair(BaseModel, Generic[T]):
    left: T
    right: T


def objects(schema: Any) -> Iterator[dict[str, Any]]:
    """Every part of a schema that is an object of its own."""
    if isinstance(schema, dict):
        if "properties" in schema and isinstance(schema.get("required"), list | None):
            yield schema
        for part in schema.values():
            yield from objects(part)
    if isinstance(schema, list):
        for part in schema:
            yield from objects(part)


def test_a_model_becomes_a_strict_schema() -> None:
    found = response_format_of(Mail)
    assert found.name == "Mail"
    schema = found.json_schema
    assert len(list(objects(schema))) == 4  # the mail, a contact, the lead in full, a folder
    for part in objects(schema):
        assert part["additionalProperties"] is False
        assert part["required"] == list(part["properties"])
        assert not {"default", "title"} & set(part)
    properties = schema["properties"]
    assert properties["body"] == {"type": "string"}
    assert properties["kind"] == {"enum": ["mail"], "type": "string"}
    assert properties["to"] == {"type": "array", "items": {"$ref": "#/$defs/Contact"}}
    assert properties["due"]["anyOf"] == [{"type": "string", "format": "date"}, {"type": "null"}]
    assert properties["lead"]["description"] == "Who decides."
    assert properties["folder"] == {"$ref": "#/$defs/Folder"}
    assert schema["$defs"]["Folder"]["properties"]["inside"]["items"] == {"$ref": "#/$defs/Folder"}
    # What is no keyword of both is told in words; a field may be called title.
    assert "{maximum: 1, minimum: 0}" in properties["score"]["description"]
    name = schema["$defs"]["Contact"]["properties"]["name"]
    assert name == {"type": "string", "description": "As they sign.\n\n{maxLength: 40}"}
    assert "title" in schema["$defs"]["Folder"]["properties"]


@pytest.mark.parametrize("model", [Mail, Folder, Contact, Pair[int], Pair[Contact]])
def test_the_providers_own_converters_have_nothing_to_add(model: type[BaseModel]) -> None:
    schema = response_format_of(model).json_schema
    # What OpenAI's demands of strict mode, and Anthropic's of structured output.
    theirs = to_strict_json_schema(model)
    assert list(theirs.get("properties", schema["properties"])) == list(schema["properties"])
    assert transform_schema(schema)["required"] == schema["required"]
    assert all(part["additionalProperties"] is False for part in objects(transform_schema(schema)))
    assert set(transform_schema(schema)) == set(schema)


def test_a_name_is_made_fit() -> None:
    assert response_format_of(Pair[int]).name == "Pair_int_"


class AnyKeys(BaseModel):
    counts: dict[str, int]


class AnyType(BaseModel):
    value: object


class Tupled(BaseModel):
    pair: tuple[int, str]


class Listed(RootModel[list[int]]):
    pass


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (AnyKeys, "AnyKeys.counts has keys that are not known"),
        (AnyType, "AnyType.value has no type"),
        (Tupled, "Tupled.pair must be a list whose items have one type"),
        (Listed, "Listed must be a model with fields"),
    ],
)
def test_what_no_provider_keeps_to_is_refused_by_place(model: type[BaseModel], says: str) -> None:
    with pytest.raises(InvalidJob, match=says) as refused:
        response_format_of(model)
    assert refused.value.field == "response_format"


def test_a_request_remembers_its_model() -> None:
    request = read_request("draft", "hello", {"response_format": Mail})
    assert request.answer_type is Mail
    assert request.fields["response_format"] == response_format_of(Mail)
    plain = read_request("draft", "hello", {"response_format": {"json_schema": {}}})
    assert plain.answer_type is None


def result(text: str, **values: Any) -> Result:
    given: dict[str, Any] = {"job_id": uuid4(), "state": State.SUCCEEDED, "use_case": "draft"}
    return Result(**given, text=text, **values)


def test_an_answer_is_read_as_its_model_or_as_plain_data() -> None:
    text = '{"name": "Ada", "calls": 2}'
    ada = Contact(name="Ada", calls=2)
    assert result(text).expecting(Contact).parsed == ada
    assert result(text).parse_as(Contact) == ada
    assert result(text).parsed == {"name": "Ada", "calls": 2}
    assert result("[1, 2]").parsed == [1, 2]


def test_expecting_a_model_changes_nothing_else() -> None:
    plain = result('{"name": "Ada"}')
    typed = plain.expecting(Contact)
    assert typed.model_dump_json() == plain.model_dump_json()
    assert plain.parsed == {"name": "Ada"}


@pytest.mark.parametrize(
    ("text", "values", "model", "says"),
    [
        ("Dear Ada", {}, None, "is not JSON"),
        ("", {}, None, "is not JSON"),
        ('{"name": ', {"finish_reason": "length"}, None, "cut short by max_tokens"),
        ('{"calls": 1}', {}, Contact, "does not fit Contact: name: Field required"),
        ('{"name": "secret", "calls": "x"}', {}, Contact, "calls: Input should be a valid integer"),
        ('{"name": ', {"finish_reason": "length"}, Contact, "cut short by max_tokens"),
    ],
)
def test_an_answer_that_does_not_fit_says_which_job_and_why(
    text: str, values: dict[str, Any], model: type[BaseModel] | None, says: str
) -> None:
    unfit = result(text, **values).expecting(model)
    with pytest.raises(InvalidAnswer, match=says) as refused:
        unfit.parsed  # noqa: B018
    assert refused.value.job_id == str(unfit.job_id)
    assert str(unfit.job_id) in str(refused.value)
    assert "secret" not in str(refused.value)
    assert str(pickle.loads(pickle.dumps(refused.value))) == str(refused.value)
    assert unfit.text == text
