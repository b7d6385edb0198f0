"""Fitting: what a job asks for beyond what the model that is to answer takes.

A provider refuses a parameter that it does not know for a model with a 400. What would only have
tuned the answer is left out instead, and the caller is told; what a job cannot do without (tools,
images, a schema) is a matter of routing, which asks no row that lacks it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from sluicegate.shared.catalogue import PoolName, Provider
from sluicegate.shared.jobs import JobSpec

_Takes = Callable[[Provider], bool]


def _always(row: Provider) -> bool:
    del row
    return True


def _never(row: Provider) -> bool:
    del row
    return False


def _reasons(row: Provider) -> bool:
    return "effort" in row.capabilities


def _samples(row: Provider) -> bool:
    # OpenAI's reasoning models, which are those with an effort, choose their words by themselves.
    return not _reasons(row)


#: Who takes what, by wire. Anthropic's API of today knows no sampling parameters at all.
_TAKEN: Final[Mapping[str, Mapping[PoolName, _Takes]]] = {
    "temperature": {"openai": _samples, "anthropic": _never},
    "top_p": {"openai": _samples, "anthropic": _never},
    "stop": {"openai": _samples, "anthropic": _always},
    "effort": {"openai": _reasons, "anthropic": _reasons},
}
_UNSET: Final[Mapping[str, Any]] = {
    "temperature": None,
    "top_p": None,
    "stop": (),
    "effort": None,
    "parallel_tool_calls": None,
}
#: Where these say what every model does by itself, nobody need hear that they were left out.
_USUAL: Final[Mapping[str, Any]] = {"temperature": 1, "top_p": 1}


def fit(spec: JobSpec, row: Provider) -> JobSpec:
    """Return the spec as this row's model takes it."""
    changes = {name: value for name, (value, _) in _changes(spec, row).items()}
    return spec.model_copy(update=changes) if changes else spec


def left_out(spec: JobSpec, row: Provider) -> tuple[str, ...]:
    """Say what `fit` has left out, a sentence each."""
    return tuple(
        said
        for name, (_, said) in _changes(spec, row).items()
        if getattr(spec, name) != _USUAL.get(name)
    )


def _changes(spec: JobSpec, row: Provider) -> dict[str, tuple[Any, str]]:
    """Return the fields to change, each with its new value and what is said of that."""
    changes: dict[str, tuple[Any, str]] = {}
    for name, unset in _UNSET.items():
        if getattr(spec, name) == unset:
            continue
        if name == "parallel_tool_calls":
            if not spec.tools:
                changes[name] = (
                    None,
                    "parallel_tool_calls means nothing without tools, and was left out",
                )
        elif not _TAKEN[name][row.provider](row):
            changes[name] = unset, f"{name} is not taken by {row.model} and was left out"
    if row.provider == "anthropic" and "stop" not in changes:
        worded = tuple(text for text in spec.stop if text.strip())
        if worded != spec.stop:
            changes["stop"] = (
                worded,
                f"a stop of blanks alone is not taken by {row.model} and was left out",
            )
    return changes
