"""Commands for batches: `sluice bulk submit|watch|list|show|results|cancel`."""

# What takes long to import is imported by the command that needs it.
# ruff: noqa: PLC0415

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sluicegate.producers.bulk_formats import FileFormat, format_of
from sluicegate.shared.errors import InvalidJob
from sluicegate.shared.jobs import State
from sluicegate.shared.terminal import (
    AsJson,
    age,
    console,
    moment,
    money,
    note,
    print_json,
    print_table,
)

if TYPE_CHECKING:
    from sluicegate.producers.batches import Batch, BatchView
    from sluicegate.producers.bulk import Form, Row
    from sluicegate.producers.bulk_files import RejectsFile, RowFile
    from sluicegate.producers.bulk_storing import Stored

app = typer.Typer(pretty_exceptions_enable=False)
bulk = typer.Typer(help="Batches: files of jobs that are cheap and steady rather than soon.")
app.add_typer(bulk, name="bulk")

_SOME_FAILED = 1
_WAS_OVER = 1
#: The progress bar moves after so many rows.
_ROWS_A_STEP = 200

AsFormat = Annotated[
    FileFormat | None, typer.Option("--format", help="If the file's name does not say.")
]
BatchId = Annotated[str, typer.Argument(metavar="ID", help="The batch's id.")]


@bulk.command(
    epilog="Example: sluice bulk submit notes.csv --use-case summary "
    "--template 'Summarise: {note}' --watch"
)
def submit(
    file: Annotated[str, typer.Argument(help="A .jsonl or .csv file; - reads stdin.")],
    *,
    use_case: Annotated[str, typer.Option(help="Such as summary.")],
    template: Annotated[
        str | None, typer.Option(help="The prompt, with {columns} in braces.")
    ] = None,
    kind: AsFormat = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(help="A column to keep as metadata, instead of all others; repeatable."),
    ] = None,
    account: Annotated[str | None, typer.Option(help="Name or id.")] = None,
    system: Annotated[str | None, typer.Option(help="Standing instructions.")] = None,
    model: Annotated[str | None, typer.Option(help="A model, instead of the best choice.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Longest answer in tokens.")] = None,
    max_attempts: Annotated[int | None, typer.Option(help="Paid calls a job at most.")] = None,
    deadline: Annotated[
        float | None, typer.Option(help="Seconds after which a job is not worth doing.")
    ] = None,
    reply_to: Annotated[
        str | None, typer.Option(help="A shared channel that results go to as well.")
    ] = None,
    rejects: Annotated[
        Path | None,
        typer.Option(help="Where lines go that are no jobs; default FILE.rejects.jsonl."),
    ] = None,
    max_rejects: Annotated[
        int, typer.Option(min=0, help="More of them than this, and nothing is stored.")
    ] = 1000,
    strict: Annotated[bool, typer.Option("--strict", help="Store all lines or nothing.")] = False,
    again: Annotated[
        bool, typer.Option("--again", help="Submit it anew, though it was submitted before.")
    ] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Wait until all jobs have ended.")] = False,
    as_json: AsJson = False,
) -> int:
    """Submit a file of jobs as one batch, and print the batch's id.

    A line of JSON is a prompt with a job's options, or what a template needs. A row of CSV fills
    the template, or has a column "prompt"; its other columns become metadata. The exit code is 1 if
    some lines were rejected.
    """
    from sluicegate.producers.bulk import Form, Template
    from sluicegate.producers.bulk_files import STDIN, RejectsFile, RowFile

    if kind is None and file == STDIN:
        raise InvalidJob(
            "file", "is standard input; say with --format (jsonl or csv) what it holds"
        )
    given = {
        "account": account,
        "system": system,
        "model": model,
        "max_tokens": max_tokens,
        "max_attempts": max_attempts,
        "deadline": deadline,
        "reply_to": reply_to,
    }
    kind = kind or format_of(file)
    form = Form(
        use_case=use_case,
        common={name: value for name, value in given.items() if value is not None},
        template=None if template is None else Template(template),
        tabular=kind is FileFormat.CSV,
        keep=tuple(keep) if keep else None,
    )
    path = rejects or RejectsFile.default_path(file)
    with (
        RowFile(file, kind) as rows,
        RejectsFile(path, limit=0 if strict else max_rejects) as refused,
    ):
        try:
            stored = _store(rows, form, refused, again=again)
        except KeyboardInterrupt:
            note("stopped; nothing is stored")
            raise
    _tell(stored, refused, as_json=as_json)
    code = _SOME_FAILED if stored.rejected and stored.is_new else 0
    return _watch(str(stored.batch_id), as_json=as_json) or code if watch else code


def _store(rows: RowFile, form: Form, rejects: RejectsFile, *, again: bool) -> Stored:
    from sluicegate.producers.bulk_storing import store_batch
    from sluicegate.shared.catalogue import read
    from sluicegate.shared.connecting import connection
    from sluicegate.shared.settings import get_settings

    with connection() as line:
        catalogue = read(line)
    found = rows.rows(form)
    with _progress(rows, found) as shown:
        return store_batch(
            shown,
            settings=get_settings(),
            catalogue=catalogue,
            form=form,
            name=rows.name,
            rejects=rejects,
            key=(lambda: None) if again else (lambda: rows.key(form)),
        )


@contextmanager
def _progress(file: RowFile, rows: Iterator[Row]) -> Iterator[Iterator[Row]]:
    """Show how much of the file has been read, if there is a terminal to show it on."""
    screen = console(stderr=True)
    if not screen.is_terminal:
        yield rows
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

    with Progress(BarColumn(), DownloadColumn(), TimeRemainingColumn(), console=screen) as bar:
        task = bar.add_task("", total=file.size_bytes)

        def counted() -> Iterator[Row]:
            for number, row in enumerate(rows):
                if number % _ROWS_A_STEP == 0:
                    bar.update(task, completed=file.read_bytes)
                yield row
            bar.update(task, completed=file.read_bytes)

        yield counted()


def _tell(stored: Stored, rejects: RejectsFile, *, as_json: bool) -> None:
    if as_json:
        print_json(
            {
                "batch_id": str(stored.batch_id),
                "is_new": stored.is_new,
                "jobs": stored.jobs,
                "rejected": stored.rejected,
                "repeated": stored.repeated,
                "rejects": str(rejects.path) if rejects.is_written else None,
            }
        )
    else:
        typer.echo(str(stored.batch_id))
    if not stored.is_new:
        note(
            f"this file was submitted before as batch {stored.batch_id}, so nothing new is stored; "
            "--again submits it anew"
        )
        return
    note(f"{stored.jobs:,} jobs are stored; follow them with `sluice bulk watch {stored.batch_id}`")
    if stored.repeated:
        note(f"{stored.repeated:,} lines were submitted before; see {rejects.path}")
    if stored.rejected:
        note(f"{stored.rejected:,} lines are rejected; see {rejects.path}")


@bulk.command(epilog="Example: sluice bulk watch 0192f0c1-7a2b-7cc3-9d4e-5f6071829304")
def watch(batch_id: BatchId, *, as_json: AsJson = False) -> int:
    """Watch a batch until all its jobs have ended; the exit code is 0 if all succeeded."""
    return _watch(batch_id, as_json=as_json)


def _watch(batch_id: str, *, as_json: bool) -> int:
    from sluicegate.producers import bulk_watching

    with _batch(batch_id) as batch:
        try:
            view = bulk_watching.watch(batch, quiet=as_json)
        except KeyboardInterrupt:
            note(f"batch {batch.id} goes on; see `sluice bulk watch {batch.id}`")
            raise
    if as_json:
        print_json(_as_json(view))
    return 0 if view.succeeded == view.total else _SOME_FAILED


@bulk.command("list", epilog="Example: sluice bulk list --json")
def list_all(
    *,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="How many, newest first.")] = 20,
    as_json: AsJson = False,
) -> None:
    """List the newest batches."""
    from sluicegate.producers.batches import list_batches
    from sluicegate.shared.connecting import connection

    with connection() as line:
        found = list_batches(line, limit)
    if as_json:
        print_json({"batches": [one.model_dump(mode="json") for one in found]})
        return
    print_table(
        ("batch", "name", "use case", "ended", "of", "without answer", "state", "age"),
        [
            (
                str(one.id),
                one.name,
                one.use_case,
                str(one.ended),
                str(one.total),
                str(one.ended - one.succeeded),
                _state(one.finished_at is not None, one.cancelled_at is not None),
                age(one.created_at),
            )
            for one in found
        ],
    )


@bulk.command(epilog="Example: sluice bulk show 0192f0c1-7a2b-7cc3-9d4e-5f6071829304")
def show(batch_id: BatchId, *, as_json: AsJson = False) -> None:
    """Show a batch: how many of its jobs have ended in which way, and what it has cost."""
    with _batch(batch_id) as batch:
        view = batch.view()
    if as_json:
        print_json(_as_json(view))
        return
    rows = [
        ("batch", str(view.id)),
        ("name", view.name),
        ("state", _state(view.finished_at is not None, view.cancelled_at is not None)),
        ("account", view.account),
        ("use case", view.use_case),
        ("jobs", str(view.total)),
        ("succeeded", str(view.succeeded)),
        ("failed", str(view.failed)),
        ("cancelled", str(view.cancelled)),
        ("expired", str(view.expired)),
        ("rejected lines", str(view.rejected)),
        ("cost", money(view.cost_nano_usd)),
        ("submitted by", view.submitted_by or ""),
        ("created", moment(view.created_at)),
        ("cancel asked", moment(view.cancelled_at)),
        ("finished", moment(view.finished_at)),
    ]
    print_table(None, [row for row in rows if row[1]])


@bulk.command(epilog="Example: sluice bulk results 0192f0c1-7a2b-7cc3-9d4e-5f6071829304 -o out.csv")
def results(
    batch_id: BatchId,
    *,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="A .jsonl or .csv file, not stdout.")
    ] = None,
    kind: AsFormat = None,
    state: Annotated[State | None, typer.Option(help="Only jobs in this state.")] = None,
) -> None:
    """Write what came out of a batch, a line a job, in the order of the file it came from."""
    from sluicegate.producers.bulk_results import write_results

    if kind is None:
        kind = FileFormat.JSONL if output is None else format_of(output.name)
    with _batch(batch_id) as batch:
        written = write_results(lambda: batch.results(state), output, kind)
        left = batch.progress()
    if output is not None:
        note(f"{written:,} results are in {output}")
    if left.finished_at is None:
        note(f"{left.total - left.ended:,} of {left.total:,} jobs have not ended yet")


@bulk.command(epilog="Example: sluice bulk cancel 0192f0c1-7a2b-7cc3-9d4e-5f6071829304")
def cancel(batch_id: BatchId, *, as_json: AsJson = False) -> int:
    """Cancel all jobs of a batch that wait; calls that run are let finish.

    The exit code is 1 if the batch was over before, and had not been cancelled.
    """
    from sluicegate.producers.bulk_watching import describe

    with _batch(batch_id) as batch:
        was_over = batch.progress().finished_at is not None
        cancelled = batch.cancel()
        view = batch.view()
    if was_over:
        note(f"batch {view.id} was over before: {describe(view)}")
    elif view.ended < view.total:
        note(f"{view.total - view.ended:,} jobs run and may finish; none is started any more")
    if as_json:
        print_json({**_as_json(view), "newly_cancelled": cancelled})
    elif not was_over:
        typer.echo(f"{cancelled:,} jobs are cancelled")
    return _WAS_OVER if was_over and view.cancelled_at is None else 0


@contextmanager
def _batch(batch_id: str) -> Iterator[Batch]:
    from sluicegate.producers.client import Sluice

    with Sluice() as sluice:
        yield sluice.batch(batch_id)


def _state(is_finished: bool, is_cancelled: bool) -> str:
    if is_cancelled:
        return "cancelled" if is_finished else "cancelling"
    return "finished" if is_finished else "under way"


def _as_json(view: BatchView) -> dict[str, Any]:
    return view.model_dump(mode="json")
