"""Batches of a program's own rows: the small things `submit_batch` needs. No I/O here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final
from uuid import UUID

from sluicegate.producers.bulk import Form, Row, Template
from sluicegate.producers.submission import JobOptions, read_request
from sluicegate.shared.errors import IdempotencyConflict, InvalidJob, SluiceError

_KEY: Final = "idempotency_key"


def batch_form(use_case: str | None, template: str | None, options: JobOptions) -> Form:
    """Return how the rows become jobs; raise `InvalidJob` if use case or template are no good."""
    if use_case is None:
        raise InvalidJob("use_case", "must be named: a batch has one for all its rows")
    common: dict[str, Any] = {name: value for name, value in options.items() if name != _KEY}
    return Form(
        use_case=use_case,
        common=common,
        template=None if template is None else Template(template),
    )


def batch_key(options: JobOptions) -> str | None:
    """Return the batch's own idempotency key; raise `InvalidJob` if it cannot be one."""
    key = options.get(_KEY)
    return read_request(None, None, {_KEY: key}).terms.idempotency_key


def batch_rows(rows: Iterable[Any]) -> Iterator[Row]:
    """Give each row its place, from 1; raise `InvalidJob` if these are no rows, or none."""
    if isinstance(rows, str | bytes | Mapping):
        raise InvalidJob("rows", "must be a list of prompts, or of mappings with a prompt each")
    number = 0
    for number, values in enumerate(rows, 1):
        yield Row(number, "", values)
    if not number:
        raise InvalidJob("rows", "is empty")


class _Refuse:
    """Ends it all at the first row that cannot be a job."""

    def reject(self, row: Row, error: SluiceError) -> None:
        """Raise the error, with the row's place."""
        where = f"(row {row.line})"
        if isinstance(error, InvalidJob):
            raise InvalidJob(error.field, f"{error.problem} {where}")
        raise IdempotencyConflict(f"{error} {where}")

    def repeat(self, row: Row, job_id: UUID) -> None:
        """Leave it out: it is counted."""

    def nothing_left(self) -> SluiceError:
        """Say that all rows had jobs: none was rejected, or it would have ended there."""
        return SluiceError("all rows were submitted before, so there is nothing to store")


refuse: Final = _Refuse()
