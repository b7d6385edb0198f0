"""Commands for jobs: `sluice job show`."""

# What takes long to import is imported by the command that needs it.
# ruff: noqa: PLC0415

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from sluicegate.shared.terminal import AsJson, moment, money, print_table

if TYPE_CHECKING:
    from sluicegate.producers.views import JobView

app = typer.Typer(pretty_exceptions_enable=False)
job = typer.Typer(help="Look at jobs, and steer them.")
app.add_typer(job, name="job")


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
    print_table(None, _job_rows(view))
    if view.history:
        print_table(
            ("attempt", "provider", "model", "state", "cost", "duration", "error"),
            [
                (
                    str(attempt.number),
                    attempt.provider,
                    attempt.model,
                    attempt.state,
                    money(attempt.cost_nano_usd),
                    "" if attempt.duration_ms is None else f"{attempt.duration_ms} ms",
                    attempt.error_message or attempt.error_class or "",
                )
                for attempt in view.history
            ],
        )


def _job_rows(view: JobView) -> list[tuple[str, str]]:
    rows = [
        ("job", str(view.id)),
        ("state", view.state),
        ("use case", view.use_case),
        ("lane", view.lane),
        ("queue", view.queue),
        ("account", view.account),
        ("attempts", f"{view.attempts} of {view.max_attempts}"),
        ("cost", money(view.cost_nano_usd)),
        ("created", moment(view.created_at)),
        ("deadline", moment(view.deadline_at)),
    ]
    if view.finished_at is not None:
        rows.append(("finished", moment(view.finished_at)))
    if view.result is not None and view.result.model is not None:
        rows.append(("model", view.result.model))
    if view.result is not None and view.result.error is not None:
        rows.append(("error", view.result.error.message))
    if view.result is not None and view.result.text:
        rows.append(("answer", view.result.text))
    return rows
