"""Writing the results of a batch to a file: JSON Lines or CSV, a row at a time."""

from __future__ import annotations

import csv
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, TextIO

import orjson

from sluicegate.producers.batches import BatchResult
from sluicegate.producers.bulk_formats import FileFormat
from sluicegate.shared.errors import SluiceError

#: Metadata is a column each in a CSV file, up to so many.
_MAX_COLUMNS: Final = 200
_COLUMNS: Final = (
    "line",
    "job_id",
    "state",
    "text",
    "error",
    "model",
    "finish_reason",
    "cost_nano_usd",
    "input_tokens",
    "output_tokens",
)


def write_results(
    read: Callable[[], Iterable[BatchResult]], path: Path | None, kind: FileFormat
) -> int:
    """Write all results, to standard output if there is no path; return how many.

    A file appears when it is complete, or not at all. Raises `SluiceError` if it cannot be written.
    """
    with _opened(path) as file:
        if kind is FileFormat.CSV:
            return _write_csv(read, file)
        written = 0
        for result in read():
            file.write(orjson.dumps(_entry(result), option=orjson.OPT_APPEND_NEWLINE).decode())
            written += 1
        return written


def _entry(one: BatchResult) -> dict[str, Any]:
    result = one.result
    entry = {
        "line": one.line,
        "job_id": one.job_id,
        "state": one.state,
        "text": result.text if result else None,
        "error": result.error.message if result and result.error else None,
        "model": result.model if result else None,
        "finish_reason": result.finish_reason if result else None,
        "cost_nano_usd": one.cost_nano_usd,
        "input_tokens": result.usage.total_input if result else None,
        "output_tokens": result.usage.output if result else None,
        "metadata": one.metadata,
    }
    if result and result.purged_at:
        entry["purged_at"] = result.purged_at
    if result and result.tool_calls:
        entry["tool_calls"] = [call.model_dump() for call in result.tool_calls]
    return entry


def _write_csv(read: Callable[[], Iterable[BatchResult]], file: TextIO) -> int:
    """Write a table: read twice, because a table has to know its columns first."""
    names = _metadata_names(read())
    writer = csv.writer(file)
    writer.writerow([*_COLUMNS, *(f"metadata.{name}" for name in names)])
    written = 0
    for result in read():
        entry = _entry(result)
        row = [entry[name] for name in _COLUMNS]
        writer.writerow([*row, *(result.metadata.get(name) for name in names)])
        written += 1
    return written


def _metadata_names(results: Iterable[BatchResult]) -> Sequence[str]:
    names: dict[str, None] = {}
    for result in results:
        names.update(dict.fromkeys(result.metadata))
        if len(names) > _MAX_COLUMNS:
            raise SluiceError(
                f"the jobs have more than {_MAX_COLUMNS} kinds of metadata, too many for a table; "
                "write a .jsonl file"
            )
    return list(names)


@contextmanager
def _opened(path: Path | None) -> Iterator[TextIO]:
    """Open standard output, or a file that takes its name once it is complete."""
    if path is None:
        yield sys.stdout
        sys.stdout.flush()
        return
    try:
        number, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(number, "w", encoding="utf-8", newline="") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            # As `open` would have made it.
            mask = os.umask(0)
            os.umask(mask)
            Path(name).chmod(0o666 & ~mask)
            Path(name).replace(path)
        except BaseException:
            with suppress(OSError):
                Path(name).unlink()
            raise
    except OSError as error:
        raise SluiceError(f"{path} cannot be written: {error.strerror}") from error
