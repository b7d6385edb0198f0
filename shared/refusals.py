"""What pydantic says of a value, in our words: one sentence that names the field."""

from __future__ import annotations

import json
import re
from typing import Any, Final

from pydantic import ValidationError

from sluicegate.shared.errors import InvalidJob

_NAME: Final = "must be 1 to 64 letters, digits, - or _"

#: By the kind of error; what is not here is said as pydantic says it, without its type names.
_WORDS: Final = {
    "string_type": "must be text",
    "string_unicode": "must be text without control characters or lone surrogates",
    "string_pattern_mismatch": "must be text without control characters or lone surrogates",
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "uuid_type": "must be a UUID",
    "uuid_parsing": "must be a UUID",
    "datetime_type": "must be a time with a time zone",
    "datetime_parsing": "must be a time with a time zone",
    "datetime_from_date_parsing": "must be a time with a time zone",
    "timezone_aware": "must be a time with a time zone",
    "bool_type": "must be true or false",
    "dict_type": "must be a mapping",
    "tuple_type": "must be a list",
    "model_type": "must be a mapping",
    "missing": "is missing",
    "extra_forbidden": "is not known here",
}
#: By the last step of its place, where the pattern of a text stands for more than characters.
_PATTERNS: Final = {
    "use_case": "must be the name of a use case, such as draft",
    "reply_to": "must be 1 to 128 letters, digits, or . _ : -, with a letter or a digit first",
    "tool_choice": _NAME,
    "name": _NAME,
    "url": "must be an https address",
    "data": "must be base64",
}
_DEADLINE: Final = "must be seconds, a timedelta or a moment with a time zone"
_SUBJECT = re.compile(r"^\w+ should ")
_DECODER: Final = json.JSONDecoder()
_DETAIL = re.compile(r"( after validation)?(, not \d+|, (unable|got|found) .*)$")


def first_errors(error: ValidationError, most: int) -> list[dict[str, Any]]:
    """Return up to so many of pydantic's errors: `type`, `loc` and `msg` of each.

    What was given can have tens of thousands, and pydantic makes objects of all of them or of none.
    So they are read from JSON, one after the other.
    """
    text = error.json(include_url=False, include_input=False, include_context=False)
    found: list[dict[str, Any]] = []
    end = 0
    while text[end] != "]" and len(found) < most:
        one, end = _DECODER.raw_decode(text, end + 1)  # after the bracket or the comma
        found.append(one)
    return found


def refusal(error: ValidationError, whole: str = "job") -> InvalidJob:
    """Build the error that says what is wrong with the first field that is; else the `whole`."""
    (first,) = first_errors(error, 1)
    place = ".".join(str(step) for step in first["loc"])
    return InvalidJob(place or whole, problem_words(first["type"], first["msg"], place))


def problem_words(kind: str, message: str, place: str) -> str:
    """Return what is wrong, from pydantic's kind of error and message, with a value at a place."""
    if kind == "value_error":
        return message.removeprefix("Value error, ")
    if place == "deadline" and kind.startswith("float"):
        return _DEADLINE
    if kind == "string_pattern_mismatch":
        return _PATTERNS.get(place.rpartition(".")[2], _WORDS[kind])
    if kind in _WORDS:
        return _WORDS[kind]
    words = _DETAIL.sub("", _SUBJECT.sub("must ", message))
    return words[0].lower() + words[1:]
