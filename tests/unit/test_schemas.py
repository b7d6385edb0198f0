"""JSON schemas of callers, and answers held against them."""

from __future__ import annotations

import json
from typing import Any

import jsonschema_rs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sluicegate.shared.answers import strict_schema
from sluicegate.shared.errors import InvalidJob
from sluicegate.shared.schemas import check_schema, misfit

NOTE: dict[str, Any] = {
    "type": "object",
    "properties": {
        "stage": {"enum": ["won", "lost"]},
        "people": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"name": {"type": "string", "pattern": "^[A-Z]"}},
                "required": ["name"],
            },
        },
    },
    "required": ["stage"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"type": "objekt"}, "type is not valid"),
        ({"properties": []}, 'properties is not of type "object"'),
        ({"properties": {"a": {"pattern": "("}}}, 'properties.a.pattern is not a "regex"'),
        ({"$ref": "#/$defs/Missing"}, "'/$defs/Missing' does not exist"),
        ({"$schema": "https://a.test/mine"}, "Unknown meta-schema"),
        ({"a": 2**70}, "JSON cannot carry"),
        ({"enum": ["x" * 100_000]}, "takes 100,013 bytes; 100,000 are allowed for a schema"),
    ],
    ids=lambda one: str(one)[:30],
)
def test_what_is_no_schema_is_refused(schema: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidJob) as refused:
        check_schema(schema, "response_format.json_schema")
    assert refused.value.field == "response_format.json_schema"
    assert said in refused.value.problem
    assert "\n" not in str(refused.value)


def test_nothing_is_fetched() -> None:
    """Least of all from addresses that only this machine reaches."""
    with pytest.raises(InvalidJob, match="Retrieval is disabled"):
        check_schema({"$ref": "http://127.0.0.1:9/schema"}, "schema")


def test_an_answer_that_fits() -> None:
    assert misfit('{"stage": "won", "people": [{"name": "Ada"}]}', NOTE) is None
    assert misfit(' {"stage": "won"}\n', NOTE) is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "it is not JSON ("),
        ('```json\n{"stage": "won"}\n```', "it is not JSON (unexpected character"),
        ('{"stage": "won"', "it is not JSON (unexpected end of data"),
        ("[]", 'it is not of type "object"'),
        ("{}", 'it lacks "stage"'),
        ('{"stage": "sold"}', 'stage is not one of "won" or "lost"'),
        ('{"stage": "won", "Ada": 1}', "it has properties that the schema does not know"),
        ('{"stage": "won", "people": [{"name": "ada"}]}', "people.0.name does not match"),
        ('{"people": [{}, {}, {}, {}]}', 'people.0 lacks "name"; people.1 lacks "name"'),
    ],
)
def test_what_does_not_fit_is_said(text: str, said: str) -> None:
    problem = misfit(text, NOTE)
    assert problem is not None
    assert said in problem


def test_what_is_said_holds_nothing_of_the_answer() -> None:
    answer = {"stage": "SECRET", "SECRET": "SECRET", "people": [{"name": "sECRET"}]}
    schema = NOTE | {"additionalProperties": {"type": "integer"}}
    for one in (NOTE, schema):
        problem = misfit(json.dumps(answer), one)
        assert problem is not None
        assert "SECRET" not in problem
        assert "sECRET" not in problem


# As providers keep it


def test_limits_become_words_and_every_property_is_asked_for() -> None:
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "properties": {
            "n": {"type": ["integer", "null"], "minimum": 3},
            "next": {"$ref": "#/$defs/Next"},
        },
        "$defs": {"Next": {"type": "object", "properties": {"at": {"type": "string"}}}},
    }
    assert strict_schema(schema) == {
        "type": "object",
        "properties": {
            "n": {
                "anyOf": [
                    {"type": "integer", "description": "{minimum: 3}"},
                    {"type": "null", "description": "{minimum: 3}"},
                ]
            },
            "next": {"$ref": "#/$defs/Next"},
        },
        "required": ["n", "next"],
        "additionalProperties": False,
        "$defs": {
            "Next": {
                "type": "object",
                "properties": {"at": {"type": "string"}},
                "required": ["at"],
                "additionalProperties": False,
            }
        },
    }


@pytest.mark.parametrize(
    "schema",
    [
        {},
        {"type": "object"},
        {"type": "array", "items": {"type": "string"}},
        {"type": "object", "additionalProperties": {"type": "string"}},
        {"type": "object", "properties": {"a": True}},
        {"type": "object", "properties": {"a": {}}},
        {"type": "object", "properties": {"a": {"$ref": "#/properties/b"}, "b": {}}},
        {"type": "object", "properties": {"a": {"$ref": "#/$defs/No"}}},
        {"type": "object", "anyOf": [{"required": ["a"]}], "properties": {"a": {"type": "null"}}},
    ],
    ids=str,
)
def test_what_cannot_be_strict_stays_as_it_is(schema: dict[str, Any]) -> None:
    assert strict_schema(schema) is None


def test_definitions_that_double_at_every_step_stay_as_they_are() -> None:
    both = {name: {"$ref": "#/$defs/D0", "description": name} for name in ("left", "right")}
    schema: dict[str, Any] = {"type": "object", "properties": both, "$defs": {}}
    for depth in range(40):
        twice = {
            name: {"$ref": f"#/$defs/D{depth + 1}", "description": name} for name in ("one", "two")
        }
        schema["$defs"][f"D{depth}"] = {"type": "object", "properties": twice}
    schema["$defs"]["D40"] = {"type": "string"}
    assert strict_schema(schema) is None


_LEAVES: st.SearchStrategy[dict[str, Any]] = st.sampled_from(
    [
        {"type": "string"},
        {"type": "string", "maxLength": 3},
        {"type": ["integer", "null"]},
        {"enum": ["a", 1, None]},
        {"const": 3},
        {"type": "array", "items": {"type": "boolean"}, "minItems": 1},
    ]
)


def _objects(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    properties = st.dictionaries(st.sampled_from("abc"), inner, min_size=1)
    return properties.map(lambda given: {"type": "object", "properties": given})


_SCHEMAS = _objects(st.recursive(_LEAVES, _objects, max_leaves=6))


@given(_SCHEMAS)
def test_what_is_strict_stays_so(schema: dict[str, Any]) -> None:
    strict = strict_schema(schema)
    assert strict is not None
    assert strict_schema(strict) == strict
    jsonschema_rs.validator_for(strict)
    for part in _parts(strict):
        if "properties" in part:
            assert part["additionalProperties"] is False
            assert part["required"] == [*part["properties"]]


def _parts(part: Any) -> list[dict[str, Any]]:
    if isinstance(part, dict):
        return [part, *(found for inner in part.values() for found in _parts(inner))]
    return []
