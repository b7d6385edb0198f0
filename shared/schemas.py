"""JSON schemas of callers: whether one is a schema, and whether an answer fits it.

Nothing here fetches what a schema refers to, and what is said of an answer holds none of it: it is
stored with the attempt, and read by operators.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

import orjson

from sluicegate.shared.errors import InvalidJob

if TYPE_CHECKING:
    from jsonschema_rs import ValidationError, Validator

#: OpenAI takes 120,000 characters. It is read on a worker's event loop.
MAX_SCHEMA_BYTES: Final = 100_000

#: Stands for the value in what the library says of it.
_IT: Final = "it"
#: How many things that are wrong with an answer are said.
_LISTED: Final = 3


def check_schema(schema: Mapping[str, Any], field: str) -> None:
    """Raise `InvalidJob` for this field if it is no JSON schema that stands for itself."""
    try:
        written = orjson.dumps(schema, option=orjson.OPT_SORT_KEYS)
    except orjson.JSONEncodeError as error:
        raise InvalidJob(field, f"holds a value that JSON cannot carry: {error}") from None
    if len(written) > MAX_SCHEMA_BYTES:
        raise InvalidJob(
            field, f"takes {len(written):,} bytes; {MAX_SCHEMA_BYTES:,} are allowed for a schema"
        )
    try:
        _compiled(written)
    except ValueError as error:
        raise InvalidJob(field, f"is no JSON schema: {_said(error)}") from None


def misfit(text: str, schema: Mapping[str, Any]) -> str | None:
    """Say in what an answer does not fit a schema, such as `notes.0 lacks "date"`; None: it does.

    The schema is one that `check_schema` has found none of these problems in.
    """
    try:
        answer = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        return f"it is not JSON ({error.msg} in line {error.lineno})"
    validator, names = _compiled(orjson.dumps(schema, option=orjson.OPT_SORT_KEYS))
    if validator.is_valid(answer):
        return None
    said: list[str] = []
    for wrong in islice(validator.iter_errors(answer), _LISTED):
        # A key that the model made up is a piece of its answer.
        place = ".".join(
            str(step) if isinstance(step, int) or step in names else "*"
            for step in wrong.instance_path
        )
        said.append(f"{place or _IT} {_problem(wrong)}")
    return "; ".join(said)


@lru_cache(maxsize=256)
def _compiled(written: bytes) -> tuple[Validator, frozenset[str]]:
    """Return what validates, and all names of properties; raise ValueError if it is no schema."""
    # Imported here because it takes its time, and most jobs have no schema.
    from jsonschema_rs import validator_for  # noqa: PLC0415

    schema = orjson.loads(written)
    # `offline`: a reference to another address is refused, not followed.
    return validator_for(schema, mask=_IT, offline=True), frozenset(_properties(schema))


def _properties(part: object) -> Iterator[str]:
    if isinstance(part, dict):
        properties = part.get("properties")
        if isinstance(properties, dict):
            yield from properties
        for inner in part.values():
            yield from _properties(inner)
    elif isinstance(part, list):
        for inner in part:
            yield from _properties(inner)


def _problem(error: ValidationError) -> str:
    match error.schema_path[-1:]:
        case ["required"]:
            return f"lacks {error.message.removesuffix(' is a required property')}"
        case ["additionalProperties" | "unevaluatedProperties"]:
            return "has properties that the schema does not know"
        case _:
            return error.message.removeprefix(f"{_IT} ")


def _said(error: ValueError) -> str:
    """Say in one line what the library finds wrong with a schema."""
    line = str(error).partition("\n")[0]
    path = getattr(error, "instance_path", None)
    place = ".".join(map(str, path)) if path else ""
    return f"{place} {line.removeprefix(f'{_IT} ')}" if place else line
