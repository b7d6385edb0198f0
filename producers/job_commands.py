"""Commands for jobs: `sluice job show|list|cancel|retry|events`."""

# What takes long to import is imported by the command that needs it.
# ruff: noqa: PLC0415

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sluicegate.shared.errors import IllegalTransition, InvalidJob, NotFound
from sluicegate.shared.jobs import Lane, State
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
    from sluicegate.producers.client import Sluice
    from sluicegate.producers.views import JobView
    from sluicegate.shared.events import Event

app = typer.Typer(pretty_exceptions_enable=False)
job = typer.Typer(help="Look at jobs, and steer them.")
app.add_typer(job, name="job")

#: How long `cancel` waits for workers to end the calls of all its jobs.
_WAIT_S = 10.0
#: From so many jobs on progress is shown.
_MANY = 20
_NOT_OVER = [State.QUEUED, State.PARKED, State.RUNNING]

_EXAMPLE_ID = "0192f0c1-7a2b-7cc3-9d4e-5f6071829304"

_Id = Annotated[str, typer.Argument(metavar="ID", help="The job's id.")]
_Ids = Annotated[
    list[str] | None, typer.Argument(metavar="ID", help="Ids of jobs; or choose by options.")
]
_States = Annotated[
    list[State] | None,
    typer.Option(
        "--state",
        metavar="STATE",
        help=f"One of {', '.join(State)}; may be given several times.",
    ),
]
_Since = Annotated[
    str | None, typer.Option(help="Submitted since: 30s, 15m, 1h, 2d ago, or a time.")
]
_Account = Annotated[str | None, typer.Option(help="Name or id of the account.")]
_UseCase = Annotated[str | None, typer.Option(help="Of this use case.")]
_Lane = Annotated[Lane | None, typer.Option(help="In this lane.")]
_Queue = Annotated[str | None, typer.Option(help="In this queue.")]
_Batch = Annotated[str | None, typer.Option(help="Of the batch with this id.")]
_Limit = Annotated[int, typer.Option(help="The newest so many.")]
_Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


@job.command("show", epilog=f"Example: sluice job show {_EXAMPLE_ID}")
def show_job(job_id: _Id, *, as_json: AsJson = False) -> None:
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
    result = view.result
    batch = None if view.batch_id is None else f"{view.batch_id}, line {view.batch_line}"
    rare = (
        ("held back", view.held_back),
        ("tried again", view.held_back and moment(view.run_at)),
        ("finished", moment(view.finished_at)),
        ("purged", view.purged_at and f"{moment(view.purged_at)}: request and answer are gone"),
        ("cancel asked", moment(view.cancel_requested_at)),
        ("reply to", view.reply_to),
        ("batch", batch),
        ("idempotency key", view.idempotency_key),
        ("request id", view.request_id),
        *((f"metadata {name}", value) for name, value in view.metadata.items()),
        ("model", result and result.model),
        ("error", result and result.error and result.error.message),
        ("answer", result and result.text),
    )
    return rows + [(name, value) for name, value in rare if value]


@job.command("list", epilog="Example: sluice job list --state failed --since 1h")
def list_jobs(
    *,
    state: _States = None,
    since: _Since = None,
    account: _Account = None,
    use_case: _UseCase = None,
    lane: _Lane = None,
    queue: _Queue = None,
    batch: _Batch = None,
    limit: _Limit = 50,
    as_json: AsJson = False,
) -> None:
    """List jobs, newest first."""
    from sluicegate.producers.client import Sluice

    filters = _filters(
        state=state,
        since=since,
        account=account,
        use_case=use_case,
        lane=lane,
        queue=queue,
        batch=batch,
    )
    with Sluice() as sluice:
        found = sluice.list_jobs(limit=limit, **filters)
    if as_json:
        print_json({"jobs": [one.model_dump(mode="json") for one in found]})
        return
    print_table(
        ("job", "state", "queue", "account", "attempts", "cost", "age", "error"),
        [
            (
                str(one.id),
                one.state,
                one.queue,
                one.account,
                f"{one.attempts} of {one.max_attempts}",
                money(one.cost_nano_usd),
                age(one.created_at),
                one.error or "",
            )
            for one in found
        ],
    )


@job.command("cancel", epilog=f"Example: sluice job cancel {_EXAMPLE_ID}")
def cancel_jobs(
    job_ids: _Ids = None,
    *,
    state: _States = None,
    since: _Since = None,
    account: _Account = None,
    use_case: _UseCase = None,
    lane: _Lane = None,
    queue: _Queue = None,
    batch: _Batch = None,
    limit: _Limit = 1000,
    yes: _Yes = False,
    wait: Annotated[
        bool, typer.Option(help="Wait until running calls are cut off; 10 s at most.")
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Cancel jobs: waiting ones at once, running ones by cutting off their call.

    Without ids the options choose, among jobs that are not over.
    """
    from sluicegate.producers.client import Sluice

    filters = _filters(
        state=state,
        since=since,
        account=account,
        use_case=use_case,
        lane=lane,
        queue=queue,
        batch=batch,
    )
    with Sluice() as sluice:
        wanted = _choose(sluice, "Cancel", job_ids, filters, _NOT_OVER, limit=limit, yes=yes)
        steered, refused = _steer(sluice, "Cancelling", wanted, sluice.cancel)
        if wait:
            _await_cancelled(sluice, steered)
    expected = (State.CANCELLED,) if wait else (State.CANCELLED, State.RUNNING)
    for job_id, ended in steered.items():
        if ended is State.RUNNING and wait:
            note(f"job {job_id} still runs; it is cancelled once its worker is heard of")
        elif ended is not None and ended not in expected:
            note(f"job {job_id} was over before: it {ended}")
    _report(steered, refused, expected, as_json=as_json)


def _await_cancelled(sluice: Sluice, steered: dict[str, State | None]) -> None:
    """Wait for the jobs that were running; put in how they ended."""
    from sluicegate.shared.errors import JobEnded, ResultTimeout

    give_up_at = time.monotonic() + _WAIT_S
    for job_id, state in steered.items():
        if state is not State.RUNNING:
            continue
        try:
            result = sluice.handle(job_id).result(max(0.0, give_up_at - time.monotonic()))
            steered[job_id] = result.state
        except JobEnded as ended:
            steered[job_id] = State(ended.state)
        except ResultTimeout:
            # Asked for once more it says where it is now.
            steered[job_id] = sluice.cancel(job_id)


@job.command("retry", epilog="Example: sluice job retry --state failed --since 1h --yes")
def retry_jobs(
    job_ids: _Ids = None,
    *,
    state: _States = None,
    since: _Since = None,
    account: _Account = None,
    use_case: _UseCase = None,
    lane: _Lane = None,
    queue: _Queue = None,
    batch: _Batch = None,
    limit: _Limit = 1000,
    yes: _Yes = False,
    as_json: AsJson = False,
) -> None:
    """Try failed, cancelled or expired jobs again, with fresh attempts and a fresh deadline.

    Without ids the options choose, among failed jobs unless they name a state.
    """
    from sluicegate.producers.client import Sluice

    filters = _filters(
        state=state,
        since=since,
        account=account,
        use_case=use_case,
        lane=lane,
        queue=queue,
        batch=batch,
    )
    with Sluice() as sluice:

        def retry(job_id: str) -> State:
            sluice.retry(job_id)
            return State.QUEUED

        wanted = _choose(sluice, "Retry", job_ids, filters, [State.FAILED], limit=limit, yes=yes)
        steered, refused = _steer(sluice, "Retrying", wanted, retry)
    _report(steered, refused, (State.QUEUED,), as_json=as_json)


@job.command("events", epilog=f"Example: sluice job events {_EXAMPLE_ID} --json")
def print_events(
    job_id: _Id,
    *,
    last_id: Annotated[str, typer.Option(help="Begin after the event with this id.")] = "0",
    timeout: Annotated[float | None, typer.Option(help="Give up after so many seconds.")] = None,
    as_json: AsJson = False,
) -> None:
    """Print a job's events as they come, until it ends; with --json an object a line."""
    from sluicegate.producers.client import Sluice

    with Sluice() as sluice:
        events = sluice.handle(job_id).events(last_id, timeout)
        # A job that is not there, or a server that is away, is known at once, without a wait.
        sluice.get(job_id)
        for event in events:
            if as_json:
                print_json({"id": event.id, **event.payload.model_dump(mode="json")})
            else:
                typer.echo(f"{event.id}\t{event.type}\t{_describe(event)}")
            sys.stdout.flush()


def _describe(event: Event) -> str:
    """Say on one line what an event brings."""
    from sluicegate.shared.events import Completed, Delta, Failed, Reset, Started

    match event.payload:
        case Started(model=model, attempt=attempt) | Reset(model=model, attempt=attempt):
            return f"attempt {attempt} at {model}"
        case Delta(text=text, tool_calls=calls):
            return json.dumps(text, ensure_ascii=False) + (" and tool calls" if calls else "")
        case Completed(result=result):
            return f"{len(result.text)} characters for {money(result.cost_nano_usd)}"
        case Failed(result=result):
            reason = result.error.message if result.error else ""
            return f"{result.state}: {' '.join(reason.split())}"


def _filters(*, state: list[State] | None, since: str | None, **others: Any) -> dict[str, Any]:
    """Collect the filters that were given."""
    from sluicegate.producers.listing import read_since

    since_when = None if since is None else read_since(since)
    given = {"state": state or None, "since": since_when, **others}
    return {name: value for name, value in given.items() if value is not None}


def _choose(
    sluice: Sluice,
    what: str,
    job_ids: list[str] | None,
    filters: dict[str, Any],
    states: list[State],
    *,
    limit: int,
    yes: bool,
) -> list[str]:
    """Return the jobs that are named, or those that the filters choose and somebody confirms."""
    from sluicegate.producers.submission import parse_job_id

    if job_ids:
        if filters:
            raise InvalidJob("job_id", "stands beside options that choose jobs; give one of both")
        return [str(parse_job_id(job_id)) for job_id in dict.fromkeys(job_ids)]
    if not filters:
        raise InvalidJob("job_id", "is missing; name jobs, or choose some, such as by --since 1h")
    found = sluice.list_jobs(limit=limit, **{"state": states, **filters})
    if not found:
        note("no job meets these options")
        return []
    jobs = "1 job" if len(found) == 1 else f"{len(found)} jobs"
    more = f" (the newest {limit}; run it again for the rest)" if len(found) == limit else ""
    if not yes:
        if not sys.stdin.isatty():
            raise InvalidJob("--yes", f"is missing, and nobody can be asked about {jobs}")
        typer.confirm(f"{what} {jobs}{more}?", abort=True, err=True)
    return [str(one.id) for one in found]


def _steer(
    sluice: Sluice, doing: str, job_ids: Sequence[str], steer: Callable[[str], State]
) -> tuple[dict[str, State | None], set[str]]:
    """Steer one job after the other; a note says why one is refused.

    Returns the state of each, None for one that is not there, and those that were refused.
    """
    steered: dict[str, State | None] = {}
    refused: set[str] = set()
    for job_id in _progress(doing, job_ids):
        try:
            steered[job_id] = steer(job_id)
        except (NotFound, IllegalTransition, InvalidJob) as error:
            note(str(error))
            refused.add(job_id)
            steered[job_id] = _state(sluice, job_id)
    return steered, refused


def _state(sluice: Sluice, job_id: str) -> State | None:
    try:
        return sluice.get(job_id).state
    except NotFound:
        return None


def _progress(doing: str, job_ids: Sequence[str]) -> Iterable[str]:
    """Show how far it is, where there are many jobs and somebody looks."""
    stderr = console(stderr=True)
    if len(job_ids) < _MANY or not stderr.is_terminal:
        return job_ids
    from rich.progress import track

    return track(job_ids, f"{doing} {len(job_ids)} jobs", console=stderr, transient=True)


def _report(
    steered: dict[str, State | None],
    refused: set[str],
    expected: tuple[State, ...],
    *,
    as_json: bool,
) -> None:
    """Print what became of each job; exit with 1 unless all are as expected."""
    if as_json:
        print_json({"jobs": [{"id": job_id, "state": state} for job_id, state in steered.items()]})
    elif steered:
        print_table(None, [(job_id, state or "not there") for job_id, state in steered.items()])
    if refused or not set(steered.values()) <= set(expected):
        raise typer.Exit(1)
