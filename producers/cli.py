"""Commands of producers: `submit`, `job show`, `account add`, `account list`."""

# What takes long to import is imported by the command that needs it.
# ruff: noqa: PLC0415

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sluicegate.shared.errors import InvalidJob
from sluicegate.shared.jobs import Lane

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from sluicegate.producers.client import JobHandle
    from sluicegate.producers.views import JobView
    from sluicegate.shared.jobs import Result

app = typer.Typer(pretty_exceptions_enable=False)
job = typer.Typer(help="Look at jobs.")
account = typer.Typer(help="Accounts: on whose behalf jobs run.")
app.add_typer(job, name="job")
app.add_typer(account, name="account")

#: More than any request may have: what is longer is refused, not read.
_STDIN_BYTES = 40_000_000

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.command(epilog="Example: sluice submit draft 'Write a follow-up about the meeting.' --stream")
def submit(
    use_case: Annotated[str, typer.Argument(help="Such as draft, summary or general.")],
    prompt: Annotated[str, typer.Argument(help="What to ask; - reads it from stdin.")],
    *,
    account: Annotated[str | None, typer.Option(help="Name or id.")] = None,
    system: Annotated[str | None, typer.Option(help="Standing instructions.")] = None,
    model: Annotated[str | None, typer.Option(help="A model, instead of the best choice.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Longest answer in tokens.")] = None,
    lane: Annotated[Lane, typer.Option(help="Bulk is cheap and steady.")] = Lane.INTERACTIVE,
    deadline: Annotated[
        float | None, typer.Option(help="Seconds after which the job is not worth doing.")
    ] = None,
    idempotency_key: Annotated[
        str | None, typer.Option(help="The same key and request give the same job.")
    ] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Print the answer as it comes.")] = False,
    as_json: AsJson = False,
) -> None:
    """Submit one job, wait, and print the answer."""
    from sluicegate.producers.client import Sluice

    given = {
        "account": account,
        "system": system,
        "model": model,
        "max_tokens": max_tokens,
        "deadline_s": deadline,
        "idempotency_key": idempotency_key,
    }
    options: Any = {name: value for name, value in given.items() if value is not None}
    text = _stdin() if prompt == "-" else prompt
    with Sluice() as sluice:
        handle = sluice.submit(use_case, text, lane=lane, stream=stream, **options)
        try:
            if as_json:
                typer.echo(handle.result().model_dump_json())
            elif stream:
                _print_stream(handle)
            else:
                _print_answer(handle.result())
        except KeyboardInterrupt:
            typer.echo(
                f"sluice: job {handle.id} goes on; see `sluice job show {handle.id}`", err=True
            )
            raise


@job.command("show", epilog="Example: sluice job show 0192f0c1-7a2b-7cc3-9d4e-5f6071829304")
def show_job(
    job_id: Annotated[str, typer.Argument(metavar="ID", help="The job's id.")],
    *,
    as_json: AsJson = False,
) -> None:
    """Show a job: its state, its attempts, what it cost, and how it ended."""
    from sluicegate.producers.client import Sluice

    with Sluice() as sluice:
        view = sluice.get(job_id)
    if as_json:
        typer.echo(view.model_dump_json())
        return
    _print_table(None, _job_rows(view))
    if view.history:
        _print_table(
            ("attempt", "provider", "model", "state", "cost", "duration", "error"),
            [
                (
                    str(attempt.number),
                    attempt.provider,
                    attempt.model,
                    attempt.state,
                    _dollars(attempt.cost_nano_usd),
                    "" if attempt.duration_ms is None else f"{attempt.duration_ms} ms",
                    attempt.error_message or attempt.error_class or "",
                )
                for attempt in view.history
            ],
        )


@account.command("add", epilog="Example: sluice account add acme --time-zone Europe/Berlin")
def add(
    name: Annotated[str, typer.Argument(help="What jobs will call it.")],
    time_zone: Annotated[str, typer.Option(help="Where its days and months turn.")] = "UTC",
) -> None:
    """Add an account."""
    from sluicegate.shared.accounts import add_account

    with _connection() as connection:
        added = add_account(connection, name, time_zone)
    typer.echo(f"{added.name}\t{added.id}\t{added.time_zone}")


@account.command("list", epilog="Example: sluice account list --json")
def list_all(*, as_json: AsJson = False) -> None:
    """List all accounts."""
    from sluicegate.shared.accounts import list_accounts

    with _connection() as connection:
        found = list_accounts(connection)
    if as_json:
        accounts = [
            {
                "id": str(one.id),
                "name": one.name,
                "time_zone": one.time_zone,
                "is_active": one.is_active,
            }
            for one in found
        ]
        typer.echo(json.dumps({"accounts": accounts}))
        return
    _print_table(
        ("name", "id", "time zone", "active"),
        [(one.name, str(one.id), one.time_zone, "yes" if one.is_active else "no") for one in found],
    )


@contextmanager
def _connection() -> Iterator[Connection]:
    from sluicegate.producers.outcomes import DATABASE_ERRORS, explain
    from sluicegate.shared.database import make_engine
    from sluicegate.shared.settings import get_settings

    engine = make_engine(get_settings(), application_name="sluice command", pool_size=1)
    try:
        with engine.connect() as connection:
            yield connection
    except DATABASE_ERRORS as error:
        raise explain(error) from error
    finally:
        engine.dispose()


def _stdin() -> str:
    data = sys.stdin.buffer.read(_STDIN_BYTES)
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise InvalidJob("prompt", "what stdin holds is not UTF-8 text") from None


def _print_stream(handle: JobHandle) -> None:
    """Print deltas as they come, and the whole answer again if some of them were lost."""
    from sluicegate.producers.outcomes import result_of
    from sluicegate.shared.events import Delta, Reset

    shown: list[str] = []
    for event in handle.events():
        match event.payload:
            case Delta(text=text):
                shown.append(text)
                typer.echo(text, nl=False)
            case Reset(model=model):
                _end_line(shown)
                typer.echo(f"sluice: starting again at {model}", err=True)
                shown.clear()
            case _ if event.terminal:
                _end_line(shown)
                result = result_of(event)
                if "".join(shown) != result.text:
                    if shown:
                        typer.echo("sluice: parts were lost, here is the whole answer", err=True)
                    _print_answer(result)


def _end_line(shown: Sequence[str]) -> None:
    if shown and not shown[-1].endswith("\n"):
        typer.echo()


def _print_answer(result: Result) -> None:
    if result.text:
        typer.echo(result.text)
    for call in result.tool_calls:
        typer.echo(json.dumps({"tool_call": {"name": call.name, "arguments": call.arguments}}))


def _job_rows(view: JobView) -> list[tuple[str, str]]:
    rows = [
        ("job", str(view.id)),
        ("state", view.state),
        ("use case", view.use_case),
        ("lane", view.lane),
        ("queue", view.queue),
        ("account", view.account),
        ("attempts", f"{view.attempts} of {view.max_attempts}"),
        ("cost", _dollars(view.cost_nano_usd)),
        ("created", view.created_at.isoformat(timespec="milliseconds")),
        ("deadline", view.deadline_at.isoformat(timespec="milliseconds")),
    ]
    if view.finished_at is not None:
        rows.append(("finished", view.finished_at.isoformat(timespec="milliseconds")))
    if view.result is not None and view.result.model is not None:
        rows.append(("model", view.result.model))
    if view.result is not None and view.result.error is not None:
        rows.append(("error", view.result.error.message))
    if view.result is not None and view.result.text:
        rows.append(("answer", view.result.text))
    return rows


def _dollars(nano_usd: int | None) -> str:
    return "" if nano_usd is None else f"${nano_usd / 1e9:.6f}"


def _print_table(head: Sequence[str] | None, rows: Iterable[Sequence[str]]) -> None:
    """Print a table for people; with a pipe at the other end, lines with tabs."""
    if not sys.stdout.isatty():
        for row in [head, *rows] if head else rows:
            typer.echo("\t".join(" ".join(cell.split()) for cell in row))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*(head or ("", "")), show_header=head is not None)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    Console().print(table)
