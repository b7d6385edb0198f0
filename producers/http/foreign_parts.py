"""Parts of foreign messages, read by hand: what is wrong with one is said by its place. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from pydantic import BaseModel, Field, ValidationError

from sluicegate.producers.http.problems import wrong
from sluicegate.shared.messages import Part, TextPart
from sluicegate.shared.refusals import refusal

Built = TypeVar("Built", bound=BaseModel)

#: Reads a part that is not text: its mapping, and its place.
ReadPart = Callable[[dict[str, Any], str], Iterable[Part]]


def turn_of(*roles: str) -> Any:
    """Describe a message for the document: what one schema can tell of it for all its roles.

    It is read by hand, and nothing is checked by this.
    """
    return Field(
        json_schema_extra={"required": ["role"], "properties": {"role": {"enum": list(roles)}}}
    )


def build(model: type[Built], place: str, **values: Any) -> Built:
    """Build one of our parts of what stands at this place; raise `Problem`."""
    try:
        return model(**values)
    except ValidationError as error:
        refused = refusal(error)
        where = place if place.endswith(refused.field) else f"{place}.{refused.field}"
        raise wrong(where, refused.problem) from None


def text_at(value: object, place: str) -> str:
    """Return the text at this place; raise `Problem`."""
    if not isinstance(value, str):
        raise wrong(place, "must be text")
    return value


def mapping_at(value: object, place: str) -> dict[str, Any]:
    """Return the mapping at this place; raise `Problem`."""
    if not isinstance(value, dict):
        raise wrong(place, "must be a mapping")
    return value


def list_at(value: object, place: str) -> list[Any]:
    """Return the list at this place; raise `Problem`."""
    if not isinstance(value, list):
        raise wrong(place, "must be a list")
    return value


def texts_at(content: object, place: str) -> list[str]:
    """Return the texts of content that can be nothing else; raise `Problem`."""
    if isinstance(content, str):
        return [content]
    texts = []
    for n, part in enumerate(list_at(content, place)):
        here = f"{place}.{n}"
        if mapping_at(part, here).get("type") != "text":
            raise wrong(f"{here}.type", "must be text")
        texts.append(text_at(part.get("text"), f"{here}.text"))
    return texts


def parts_at(content: object, place: str, read: ReadPart) -> Iterator[Part]:
    """Read content, which is text or a list of parts; text that is empty is none.

    read: for all parts but text, which every protocol writes alike.
    """
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    for n, part in enumerate(list_at(content, place)):
        here = f"{place}.{n}"
        if mapping_at(part, here).get("type") != "text":
            yield from read(part, here)
        elif text := text_at(part.get("text"), f"{here}.text"):
            yield TextPart(text=text)
