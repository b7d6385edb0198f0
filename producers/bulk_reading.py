"""Reading the files of bulk: JSON Lines and CSV, row by row, in constant memory.

No row is read further than a job may be long, so a file of any size and any content is safe to
begin. What cannot be read is a row with a problem; only a file that can hold no row is an error.
"""

from __future__ import annotations

import csv
import hashlib
from collections import deque
from collections.abc import Iterator, Sequence
from typing import BinaryIO, Final, NamedTuple

import orjson

from sluicegate.producers.bulk import Row
from sluicegate.shared.errors import InvalidJob, SluiceError

#: The longest row: the largest request with all its text as JSON's six-byte escapes, and more.
MAX_ROW_BYTES: Final = 8_000_000

_DELIMITERS = (",", ";", "\t")
_BOM = b"\xef\xbb\xbf"
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")
#: How much of a row that is too long goes into the rejects file.
_SHOWN_BYTES = 1000


class Line(NamedTuple):
    """One physical line, with its end; cut if it is too long for a row."""

    number: int
    data: bytes
    cut: bool


class Lines:
    """The physical lines of a file, counted and hashed as they are read."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._hash = hashlib.sha256()
        self.read_bytes = 0

    def __iter__(self) -> Iterator[Line]:
        number = 0
        while data := self._readline():
            number += 1
            cut = len(data) > MAX_ROW_BYTES
            while cut and not data.endswith(b"\n") and (rest := self._readline()):
                if rest.endswith(b"\n"):
                    break
            if number == 1:
                if data.startswith(_UTF_16):
                    raise InvalidJob("file", "is UTF-16 text; save it as UTF-8")
                data = data.removeprefix(_BOM)
            yield Line(number, data, cut)

    def digest(self) -> bytes:
        """Hash of what has been read so far (SHA-256)."""
        return self._hash.digest()

    def _readline(self) -> bytes:
        try:
            data = self._stream.readline(MAX_ROW_BYTES + 1)
        except OSError as error:
            raise SluiceError(f"the file cannot be read on: {error.strerror}") from error
        self._hash.update(data)
        self.read_bytes += len(data)
        return data


def read_jsonl(lines: Lines) -> Iterator[Row]:
    """Read a file with one JSON object a line; empty lines are left out."""
    for line in lines:
        if line.cut:
            yield _too_long(line)
        elif line.data.strip():
            yield _json_row(line)


def _json_row(line: Line) -> Row:
    raw = line.data.rstrip(b"\r\n").decode(errors="backslashreplace")
    try:
        values = orjson.loads(line.data.decode())
    except (UnicodeDecodeError, orjson.JSONDecodeError) as error:
        return Row(line.number, raw, problem=_reason(error))
    if not isinstance(values, dict):
        return Row(line.number, raw, problem='is not a JSON object, as in {"prompt": "..."}')
    return Row(line.number, raw, values)


class CsvFile:
    """A CSV file: its header row, then its rows as mappings of text. Iterate once.

    The delimiter is that of comma, semicolon and tab which makes most columns of the header. Quoted
    fields may hold line breaks. Raises `InvalidJob` if the header is none.
    """

    def __init__(self, lines: Lines) -> None:
        self._feed = _Feed(lines)
        # Python's own limit is 128 kB a field, and one for the whole process.
        csv.field_size_limit(max(csv.field_size_limit(), MAX_ROW_BYTES))
        self._reader = csv.reader(self._feed, delimiter=self._sniff(), strict=True)
        try:
            header = next(self._reader, [])
        except (csv.Error, UnicodeDecodeError, _TooLongError) as error:
            raise InvalidJob("file", f"has no readable header row: {_reason(error)}") from None
        #: Names of the columns; empty for a column without one, which is left out.
        self.columns: Final[Sequence[str]] = [name.strip() for name in header]
        named = [name for name in self.columns if name]
        twice = sorted({name for name in named if named.count(name) > 1})
        if twice:
            raise InvalidJob("file", f"has two columns {twice[0]!r}; rename one")

    def __iter__(self) -> Iterator[Row]:
        while True:
            self._feed.begin()
            try:
                fields = next(self._reader)
            except StopIteration:
                return
            except (csv.Error, UnicodeDecodeError, _TooLongError) as error:
                # A quote too many must not swallow the rows behind it: they are read again.
                first, *others = self._feed.taken
                self._feed.again.extendleft(reversed(others))
                yield _too_long(first) if first.cut else _unreadable(first, _reason(error))
                continue
            if fields:
                yield self._row(fields)

    def _row(self, fields: list[str]) -> Row:
        taken = self._feed.taken
        raw = b"".join(line.data for line in taken).decode().rstrip("\r\n")
        if len(fields) != len(self.columns):
            problem = f"has {len(fields)} fields, and the header row has {len(self.columns)}"
            return Row(taken[0].number, raw, problem=problem)
        values = dict(zip(self.columns, fields, strict=True))
        values.pop("", None)
        return Row(taken[0].number, raw, values)

    def _sniff(self) -> str:
        first = self._feed.peek()
        return max(
            _DELIMITERS,
            key=lambda delimiter: len(next(csv.reader([first], delimiter=delimiter), [])),
        )


class _TooLongError(Exception):
    """A row that does not end where the longest one would."""


class _Feed:
    """Hands a CSV reader its lines one by one, and knows those of the row at hand."""

    def __init__(self, lines: Lines) -> None:
        self._lines = iter(lines)
        #: Lines to be read again, before all others.
        self.again: deque[Line] = deque()
        self.taken: list[Line] = []
        self._taken_bytes = 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self.again.popleft() if self.again else next(self._lines)
        self.taken.append(line)
        self._taken_bytes += len(line.data)
        if self._taken_bytes > MAX_ROW_BYTES:
            raise _TooLongError
        return line.data.decode()

    def begin(self) -> None:
        """Forget the last row."""
        self.taken.clear()
        self._taken_bytes = 0

    def peek(self) -> str:
        """Return the first line that is not empty, which is still to be read."""
        for line in self._lines:
            if line.data.strip():
                self.again.append(line)
                return line.data.decode(errors="replace")
        return ""


def _too_long(line: Line) -> Row:
    shown = line.data[:_SHOWN_BYTES].decode(errors="backslashreplace")
    return Row(line.number, shown, problem=f"is longer than {MAX_ROW_BYTES:,} bytes")


def _unreadable(line: Line, reason: str) -> Row:
    raw = line.data.rstrip(b"\r\n").decode(errors="backslashreplace")
    return Row(line.number, raw, problem=reason)


def _reason(error: Exception) -> str:
    match error:
        case UnicodeDecodeError():
            return "is not UTF-8 text"
        case orjson.JSONDecodeError():
            if error.pos >= len(error.doc.rstrip()):
                return "is not JSON: it ends too early"
            return f"is not JSON: it goes wrong at column {error.colno}"
        case _TooLongError():
            return f"does not end within {MAX_ROW_BYTES:,} bytes; a quote may be missing"
        case _:
            return f"is not CSV: {error}"
