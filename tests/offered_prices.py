"""Price lists as somebody may offer them: the installed one, with other prices."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sluicegate.shared.price_lists import bundled


def listed() -> list[dict[str, Any]]:
    """Return the installed list as JSON, to be changed at will."""
    return bundled().as_json()


def model_of(raw: list[dict[str, Any]], provider: str, model: str) -> dict[str, Any]:
    """Return a model of a list, to be changed at will."""
    (models,) = (one["models"] for one in raw if one["id"] == provider)
    found: dict[str, Any]
    (found,) = (one for one in models if one["id"] == model)
    return found


def with_prices(provider: str, model: str, **prices: object) -> list[dict[str, Any]]:
    """Return the installed list with prices of a model replaced, in $ a million tokens."""
    raw = listed()
    model_of(raw, provider, model)["prices"].update(prices)
    return raw


def without(provider: str, model: str) -> list[dict[str, Any]]:
    """Return the installed list without a model."""
    raw = listed()
    for one in raw:
        if one["id"] == provider:
            one["models"] = [other for other in one["models"] if other["id"] != model]
    return raw


def written(raw: object, name: str = "prices.json") -> str:
    """Write a list to a file; return its name."""
    Path(name).write_text(json.dumps(raw))
    return name
