"""Answers in a shape: pydantic models, and JSON schemas as both providers take them.

Providers keep a schema strictly only if it is written as they want it. What follows is what both
take, so that a job may go to either: every property required and no others, no defaults, no titles.
Limits that one of them does not know go into the description, as its own SDK writes them; the
answer is checked against the model in any case.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any, Final, TypeVar

import orjson
from pydantic import BaseModel, PydanticUserError, ValidationError

from sluicegate.shared.errors import InvalidAnswer, InvalidJob
from sluicegate.shared.messages import ResponseFormat

T = TypeVar("T", bound=BaseModel)

_FIELD: Final = "response_format"
#: Formats of strings that both know; others are only described.
_STRING_FORMATS: Final = frozenset(
    {"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid"}
)
#: What is left out, or is dealt with by name.
_DROPPED: Final = frozenset({
    "$defs", "$ref", "type", "title", "default", "examples", "discriminator", "description", "enum",
    "const", "anyOf", "oneOf", "allOf", "properties", "required", "additionalProperties", "items",
    "$schema", "$id", "$comment",
})  # fmt: skip
_DEFS: Final = "#/$defs/"
#: Parts of a schema that are written anew: definitions that refer to others twice each, written out
#: in full, would double at every step.
_PARTS_MAX: Final = 2_000


@lru_cache(maxsize=256)
def response_format_of(model: type[BaseModel]) -> ResponseFormat:
    """Return the format that asks for this model; raise `InvalidJob` if none can."""
    try:
        whole = model.model_json_schema()
    except (PydanticUserError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise InvalidJob(_FIELD, f"{model.__name__} has no JSON schema: {reason}") from None
    root = _strict(whole, model.__name__)
    if root.get("type") != "object":
        raise InvalidJob(_FIELD, f"{model.__name__} must be a model with fields of its own")
    return ResponseFormat(
        name=re.sub(r"[^a-zA-Z0-9_-]+", "_", model.__name__)[:64], json_schema=root
    )


def strict_schema(schema: dict[str, Any]) -> dict[str, Any] | None:
    """Write a caller's schema as both providers keep it strictly; None if that cannot be done.

    What fits it need not fit the caller's: limits become words, and the answer is checked.
    """
    return _strict_schema(orjson.dumps(schema))


@lru_cache(maxsize=256)
def _strict_schema(written: bytes) -> dict[str, Any] | None:
    try:
        root = _strict(orjson.loads(written), "the answer")
    except (InvalidJob, RecursionError):
        return None
    return root if root.get("type") == "object" else None


def _strict(whole: dict[str, Any], name: str) -> dict[str, Any]:
    defs = whole.get("$defs", {})
    strict = _Strict(defs)
    root = strict.write(whole, name)
    if "$ref" in root:  # a model that refers to itself
        root = strict.write(defs[_target(root["$ref"])], name)
    if defs:
        root["$defs"] = {name: strict.write(part, name) for name, part in defs.items()}
    return root


def answer_type_of(response_format: object) -> type[BaseModel] | None:
    """Return the model that an option `response_format` names; None if it is no model."""
    if isinstance(response_format, type) and issubclass(response_format, BaseModel):
        return response_format
    return None


def read_answer(text: str, model: type[T], *, job_id: object, cut: bool) -> T:
    """Read an answer as this model; raise `InvalidAnswer`.

    `cut`: whether the answer ended where `max_tokens` did.
    """
    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = ".".join(str(step) for step in first["loc"])
        problem = f"{place}: {first['msg']}" if place else first["msg"]
        raise _invalid(job_id, f"does not fit {model.__name__}: {problem}", cut=cut) from None


def read_json(text: str, *, job_id: object, cut: bool) -> Any:
    """Read an answer as JSON; raise `InvalidAnswer`."""
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise _invalid(job_id, f"is not JSON: {error.msg}", cut=cut) from None


def _invalid(job_id: object, problem: str, *, cut: bool) -> InvalidAnswer:
    why = " (it was cut short by max_tokens)" if cut else ""
    return InvalidAnswer(f"the answer of job {job_id} {problem}{why}", job_id=str(job_id))


def _target(reference: str) -> str:
    return reference.removeprefix(_DEFS)


class _Strict:
    def __init__(self, defs: dict[str, Any]) -> None:
        self._defs = defs
        self._parts = 0

    def write(
        self, part: dict[str, Any], place: str, within: frozenset[str] = frozenset()
    ) -> dict[str, Any]:
        """Write one part of a schema anew; `within` are the definitions that it is copied into."""
        self._check(part, place)
        if "$ref" in part:
            return self._reference(part, place, within)
        if isinstance(part.get("type"), list) and "enum" not in part:
            own = {name: value for name, value in part.items() if name != "type"}
            kinds = [{**own, "type": kind} for kind in part["type"]]
            return self.write({"anyOf": kinds}, place, within)
        choices = part.get("anyOf") or part.get("oneOf")
        inherited = part.get("allOf")
        if isinstance(inherited, list) and len(inherited) == 1:
            own = {name: value for name, value in part.items() if name != "allOf"}
            return self.write({**inherited[0], **own}, place, within)
        written: dict[str, Any] = {}
        if "const" in part or "enum" in part:
            written["enum"] = part.get("enum") or [part["const"]]
            if isinstance(part.get("type"), str):
                written["type"] = part["type"]
        elif choices:
            written["anyOf"] = [self.write(choice, place, within) for choice in choices]
        else:
            written |= self._of_type(part, place, within)
        left = {name: value for name, value in part.items() if name not in {*_DROPPED, *written}}
        texts = [part.get("description", "")]
        if left:
            texts.append("{" + ", ".join(f"{name}: {value}" for name, value in left.items()) + "}")
        if any(texts):
            written["description"] = "\n\n".join(filter(None, texts))
        return written

    def _check(self, part: object, place: str) -> None:
        if not isinstance(part, dict):
            raise self._refused(place, "must be a schema with a type")
        self._parts += 1
        if self._parts > _PARTS_MAX:
            raise self._refused(place, f"is more than {_PARTS_MAX:,} parts, written out in full")

    def _reference(
        self, part: dict[str, Any], place: str, within: frozenset[str]
    ) -> dict[str, Any]:
        reference = part["$ref"]
        name = _target(reference)
        if not reference.startswith(_DEFS) or name not in self._defs:
            raise self._refused(place, "refers to something else than its definitions")
        # Nothing may stand beside a reference: a field that says more is written out in full,
        # unless that would never end.
        if "description" not in part or name in within:
            return {"$ref": reference}
        own = {"description": part["description"]}
        return self.write({**self._defs[name], **own}, place, within | {name})

    def _of_type(self, part: dict[str, Any], place: str, within: frozenset[str]) -> dict[str, Any]:
        kind = part.get("type")
        if kind == "object":
            return self._object(part, place, within)
        if kind == "array":
            if not isinstance(part.get("items"), dict) or "prefixItems" in part:
                raise self._refused(place, "must be a list whose items have one type")
            return {"type": kind, "items": self.write(part["items"], place, within)}
        if kind is None:
            raise self._refused(place, "has no type that a provider could keep to")
        if part.get("format") in _STRING_FORMATS:
            return {"type": kind, "format": part["format"]}
        return {"type": kind}

    def _object(self, part: dict[str, Any], place: str, within: frozenset[str]) -> dict[str, Any]:
        if "properties" not in part and part.get("additionalProperties", True):
            raise self._refused(place, "has keys that are not known; make it a list of models")
        properties = part.get("properties", {})
        return {
            "type": "object",
            "properties": {
                name: self.write(one, f"{place}.{name}", within) for name, one in properties.items()
            },
            "required": list(properties),
            "additionalProperties": False,
        }

    def _refused(self, place: str, problem: str) -> InvalidJob:
        return InvalidJob(_FIELD, f"{place} {problem}")
