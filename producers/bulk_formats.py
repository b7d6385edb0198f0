"""The formats of files of bulk, and how a name tells them."""

from __future__ import annotations

from enum import StrEnum
from typing import Final

from sluicegate.shared.errors import InvalidJob


class FileFormat(StrEnum):
    """What a file of rows or results may be."""

    JSONL = "jsonl"
    CSV = "csv"


_FORMATS: Final = {
    ".jsonl": FileFormat.JSONL,
    ".ndjson": FileFormat.JSONL,
    ".csv": FileFormat.CSV,
    ".tsv": FileFormat.CSV,
}


def format_of(name: str) -> FileFormat:
    """Tell a file's format by its name; raise `InvalidJob` if that does not say."""
    for suffix, found in _FORMATS.items():
        if name.lower().endswith(suffix):
            return found
    raise InvalidJob(
        "file", f"{name} is neither .jsonl nor .csv; say which with --format (jsonl or csv)"
    )
