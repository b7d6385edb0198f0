"""Bulk: what one row of a file asks for. No I/O here.

A row is checked by what checks a job of `submit`: the bulk lane takes exactly what `submit` takes.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import orjson

from sluicegate.producers.submission import Request, read_request
from sluicegate.shared.errors import InvalidJob
from sluicegate.shared.jobs import Lane

#: What a row of data may say beside what fills the template or becomes metadata.
_KEY: Final = "idempotency_key"
_PROMPT: Final = "prompt"
#: Entries that a job's metadata has at most.
_MAX_METADATA: Final = 32

_PLACE = re.compile(r"\{\{|\}\}|\{([^{}]+)\}|[{}]")


class Row(NamedTuple):
    """One row: where it begins, from 1, what was written there, and what that says."""

    line: int
    raw: str
    values: object = None
    #: Why it cannot be read, or nothing.
    problem: str = ""


class Template:
    """A prompt with places for the fields of a row, as in `Summarise: {note}`.

    A place is a name in braces and nothing else; `{{` and `}}` are braces. What a field holds is
    put in as it is. Raises `InvalidJob` if the text cannot be read, or has no place.
    """

    def __init__(self, text: str) -> None:
        self.text: Final = text
        #: Text and names of fields in turn; it begins and ends with text.
        self._parts = [""]
        end = 0
        for match in _PLACE.finditer(text):
            self._parts[-1] += text[end : match.start()]
            end = match.end()
            if match[1] is not None:
                self._parts += [match[1], ""]
            elif match[0] in ("{{", "}}"):
                self._parts[-1] += match[0][0]
            else:
                raise InvalidJob(
                    "template",
                    f"has a single {match[0]!r} at character {match.start() + 1}; a field is "
                    "{name}, and a brace is written twice",
                )
        self._parts[-1] += text[end:]
        #: The fields that it needs, in the order in which it names them.
        self.fields: Final = tuple(dict.fromkeys(self._parts[1::2]))
        if not self.fields:
            raise InvalidJob("template", "names no field; write it as in 'Summarise: {note}'")

    def fill(self, values: Mapping[str, object]) -> str:
        """Return the prompt for a row; raise `InvalidJob` where it lacks what the places need."""
        filled = {name: _text(name, values) for name in self.fields}
        if not any(text.strip() for text in filled.values()):
            raise InvalidJob(self.fields[0], "is empty, so there is nothing to ask")
        parts = list(self._parts)
        parts[1::2] = [filled[name] for name in parts[1::2]]
        return "".join(parts)


def _text(name: str, values: Mapping[str, object]) -> str:
    value = values.get(name)
    if value is None:
        raise InvalidJob(name, "is missing, and the template needs it")
    return as_text(value)


def as_text(value: object) -> str:
    """Return a field as text: what is no text already as JSON."""
    if isinstance(value, str):
        return value
    try:
        return orjson.dumps(value).decode()
    except orjson.JSONEncodeError as error:
        raise InvalidJob("template", f"cannot take this value: {error}") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """How the rows of a batch become jobs: what they have in common, and what each one says.

    A row is a prompt; or the options of a job, `prompt` or `messages` among them. With a template,
    or if it is `tabular` as a CSV file is, a row is data: fields that make no prompt become
    metadata, all or those to `keep`, and `idempotency_key` is the job's.
    """

    use_case: str
    #: Options that all jobs have where their row does not say otherwise.
    common: Mapping[str, Any]
    template: Template | None = None
    tabular: bool = False
    keep: tuple[str, ...] | None = None

    @property
    def prompt_fields(self) -> tuple[str, ...]:
        """The fields that a row of data must have."""
        return self.template.fields if self.template else (_PROMPT,)

    def check_columns(self, columns: Collection[str]) -> None:
        """Raise `InvalidJob` unless rows with these columns can be jobs."""
        there = ", ".join(name for name in columns if name) or "none"
        asked = [*self.prompt_fields, *(self.keep or ())]
        missing = [name for name in asked if name not in columns]
        if missing:
            hint = "" if self.template else "; give a --template that names others"
            raise InvalidJob("file", f"has no column {missing[0]!r}, only {there}{hint}")
        if len(self._metadata_names(columns)) > _MAX_METADATA:
            raise InvalidJob(
                "file", f"has more than {_MAX_METADATA} columns to keep; name some with --keep"
            )

    def request(self, values: object) -> Request:
        """Read one row; raise `InvalidJob` that names the field which is refused."""
        if not isinstance(values, Mapping):
            if self.template is not None:
                raise InvalidJob("row", "must be a mapping, because there is a template to fill")
            return self._request(values, {})
        if self.template is None and not self.tabular:
            return self._spelled_out(dict(values))
        prompt = self.template.fill(values) if self.template else _text(_PROMPT, values)
        return self._request(prompt, self._data_options(values))

    def _spelled_out(self, options: dict[str, Any]) -> Request:
        if _PROMPT in options and "messages" in options:
            raise InvalidJob("messages", "cannot stand beside a prompt; use one of them")
        messages = options.pop("messages", None)
        return self._request(options.pop(_PROMPT, messages), options)

    def _data_options(self, values: Mapping[str, object]) -> dict[str, Any]:
        options: dict[str, Any] = {}
        metadata = {
            name: as_text(values[name])
            for name in self._metadata_names(values)
            if values.get(name) is not None
        }
        if metadata:
            options["metadata"] = {**self.common.get("metadata", {}), **metadata}
        if values.get(_KEY):
            options[_KEY] = values[_KEY]
        return options

    def _metadata_names(self, names: Iterable[str]) -> Sequence[str]:
        if self.keep is not None:
            return self.keep
        used = {*self.prompt_fields, _KEY, ""}
        return [name for name in names if name not in used]

    def _request(self, prompt: object, own: Mapping[str, Any]) -> Request:
        options = {**self.common, **own}
        if options.get("lane", Lane.BULK) != Lane.BULK:
            raise InvalidJob("lane", "is bulk for every job of a batch; leave it out")
        return read_request(self.use_case, prompt, {**options, "lane": Lane.BULK})
