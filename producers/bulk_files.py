"""The files of `sluice bulk submit`: the rows it reads, and those it could not store."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Final, Self
from uuid import UUID

import orjson

from sluicegate.producers.bulk import Form, Row
from sluicegate.producers.bulk_formats import FileFormat
from sluicegate.producers.bulk_reading import CsvFile, Lines, read_jsonl
from sluicegate.shared.errors import InvalidJob, SluiceError

STDIN: Final = "-"


class RowFile:
    """A file of rows, or standard input. A context manager: the file is open within.

    path: `-` for standard input. Raises `InvalidJob` if it cannot be read at all.
    """

    def __init__(self, path: str, kind: FileFormat) -> None:
        self._path = path
        self._kind = kind
        self._stream: BinaryIO
        self._lines: Lines
        self._is_read = False
        #: None where nobody can know before the end.
        self.size_bytes: int | None = None

    def __enter__(self) -> Self:
        try:
            if self._path == STDIN:
                self._stream = sys.stdin.buffer
            else:
                self._stream = Path(self._path).open("rb")
                if Path(self._path).is_file():
                    self.size_bytes = Path(self._path).stat().st_size
        except OSError as error:
            raise InvalidJob("file", f"{self._path} cannot be read: {error.strerror}") from None
        self._lines = Lines(self._stream)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._path != STDIN:
            self._stream.close()

    @property
    def name(self) -> str:
        """What a batch that is made from it is called."""
        name = "standard input" if self._path == STDIN else Path(self._path).name
        return "".join(one if one.isprintable() else "?" for one in name)

    @property
    def read_bytes(self) -> int:
        """How much of it has been read."""
        return self._lines.read_bytes

    def rows(self, form: Form) -> Iterator[Row]:
        """Return the rows, to be iterated once; both raise `InvalidJob` if none can be a job."""
        if self._kind is FileFormat.JSONL:
            return self._to_the_end(read_jsonl(self._lines), "is empty")
        file = CsvFile(self._lines)
        if not file.columns:
            raise InvalidJob("file", f"{self.name} is empty")
        form.check_columns(file.columns)
        return self._to_the_end(iter(file), "has a header and no rows")

    def _to_the_end(self, rows: Iterator[Row], if_none: str) -> Iterator[Row]:
        row = None
        for row in rows:
            yield row
        if row is None:
            raise InvalidJob("file", f"{self.name} {if_none}")
        self._is_read = True

    def key(self, form: Form) -> str | None:
        """Idempotency key of a batch made from it: of its bytes, and of what is asked of them.

        None for what can be read only once and has not been.
        """
        content = self._lines.digest() if self._is_read else self._digest()
        if content is None:
            return None
        template = None if form.template is None else form.template.text
        asked = [self._kind, form.use_case, template, form.keep, dict(form.common)]
        options = orjson.dumps(asked, option=orjson.OPT_SORT_KEYS)
        return "file:" + hashlib.sha256(content + options).hexdigest()

    def _digest(self) -> bytes | None:
        if self.size_bytes is None:
            return None
        with Path(self._path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()


class RejectsFile:
    """The rows that were not stored, as JSON Lines: where, why, and as they were.

    Made when the first one is written; an older one is replaced. limit: more rejected rows than
    this end it all with a `SluiceError`.
    """

    def __init__(self, path: Path, *, limit: int) -> None:
        self.path = path
        self._limit = limit
        self._file: BinaryIO | None = None
        self._rejected = 0
        #: Where and why the first one was.
        self._first = ""

    @staticmethod
    def default_path(path: str) -> Path:
        """Return the place for the rejects of a file: beside it."""
        return Path("stdin.rejects.jsonl" if path == STDIN else f"{path}.rejects.jsonl")

    @property
    def is_written(self) -> bool:
        """Whether there was anything to write."""
        return self._file is not None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()

    def reject(self, row: Row, error: SluiceError) -> None:
        """Note a row that cannot be a job; raise `SluiceError` when there are too many."""
        self._rejected += 1
        self._write(row, str(error))
        if not self._first:
            # What is wrong with a whole row needs no field to name it.
            reason = error.problem if row.problem and isinstance(error, InvalidJob) else error
            self._first = f"line {row.line}: {reason}"
        if self._rejected > self._limit:
            raise self._nothing_stored(
                f"more than {self._limit:,} lines cannot be jobs ({self._first})"
                if self._limit
                else self._first
            )

    def repeat(self, row: Row, job_id: UUID) -> None:
        """Note a row that was submitted before."""
        self._write(row, f"was submitted before as job {job_id}", job_id=str(job_id))

    def nothing_left(self) -> SluiceError:
        """Say why none of the rows is left to store."""
        if not self._first:
            return self._nothing_stored("all lines were submitted before")
        return self._nothing_stored(f"no line can be a new job ({self._first})")

    def _nothing_stored(self, reason: str) -> SluiceError:
        return SluiceError(f"{reason}; nothing is stored, see {self.path}")

    def _write(self, row: Row, reason: str, **more: Any) -> None:
        entry = {"line": row.line, "reason": reason, **more, "raw": row.raw}
        try:
            if self._file is None:
                self._file = self.path.open("wb")
            self._file.write(orjson.dumps(entry, option=orjson.OPT_APPEND_NEWLINE))
            self._file.flush()
        except OSError as error:
            raise SluiceError(
                f"{self.path} cannot be written ({error.strerror}), so nothing is stored; choose "
                "another place with --rejects"
            ) from None
