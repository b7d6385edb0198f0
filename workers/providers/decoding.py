"""JSON from a provider as values that every store downstream can hold."""

from __future__ import annotations

import json
import re
from typing import Any, Final, NoReturn

import orjson

#: PostgreSQL stores neither NUL nor a lone surrogate, and one of them in one answer would fail a
#: statement that carries many.
_UNSTORABLE: Final = re.compile("[\x00\ud800-\udfff]")
_REPLACEMENT: Final = "\ufffd"


def clean(text: str) -> str:
    """Replace NUL and lone surrogates by U+FFFD."""
    return _UNSTORABLE.sub(_REPLACEMENT, text)


def load_json(data: bytes | str) -> Any:
    r"""Decode JSON; all strings in it, keys too, come out clean.

    A surrogate pair that a server cuts in two, half in one chunk of a stream and half in the next,
    becomes two U+FFFD: each chunk is a JSON text of its own.

    Raises ValueError when it is no JSON. orjson refuses escapes of lone surrogates (`"\ud800"`),
    which models do produce; only such a text takes the standard library's slower way.
    """
    if isinstance(data, str):
        data = data.encode("utf-8", "surrogatepass")
    try:
        value = orjson.loads(data)
    except orjson.JSONDecodeError:
        if b"\\ud" not in data and b"\\uD" not in data:
            raise
    else:
        return _clean_nested(value) if b"\\u0000" in data else value
    try:
        return _clean_nested(json.loads(data, parse_constant=_refuse))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def count(value: object) -> int | None:
    """Return a number of tokens, None when there is none; what is no whole number is none."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    return None


def mapping(value: object) -> dict[str, Any]:
    """Return an object as it is, an empty one for anything else."""
    return value if isinstance(value, dict) else {}


def string(value: object) -> str | None:
    """Return a text as it is, None for anything else."""
    return value if isinstance(value, str) else None


def _clean_nested(value: Any) -> Any:
    try:
        return _clean_all(value)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _clean_all(value: Any) -> Any:
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, list):
        return [_clean_all(item) for item in value]
    if isinstance(value, dict):
        return {clean(key): _clean_all(item) for key, item in value.items()}
    return value


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")
