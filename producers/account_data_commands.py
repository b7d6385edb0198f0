"""Commands for what is held of an account: `sluice account erase|export`."""

# What takes long to import is imported by the command that needs it.
# ruff: noqa: PLC0415

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sluicegate.shared.connecting import connection
from sluicegate.shared.errors import InvalidJob, QueueUnavailable
from sluicegate.shared.terminal import AsJson, console, note, print_json

if TYPE_CHECKING:
    from collections.abc import Callable

    from sluicegate.producers.erasing import Erasure

data = typer.Typer(pretty_exceptions_enable=False)

_Who = Annotated[str, typer.Argument(metavar="NAME", help="Its name or its id.")]

#: What takes longer than this shows how far it is.
_SOON_S = 1.5
_STDOUT = "-"


@data.command("erase", epilog="Example: sluice account erase initech --yes")
def erase(
    name: _Who,
    *,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: AsJson = False,
) -> None:
    """Erase all that is personal of an account, at once; there is no way back.

    Its jobs that are not over are cancelled. Requests, answers, replies, keys and names go; what
    its calls cost stays, without a name. It takes ten seconds at least, until every client knows.
    If it is cut off, run it again.
    """
    import redis

    from sluicegate.producers.erasing import Eraser
    from sluicegate.shared.catalogue import announce
    from sluicegate.shared.celery_app import make_celery
    from sluicegate.shared.redis_client import make_redis
    from sluicegate.shared.settings import get_settings

    settings = get_settings()
    client, app = make_redis(settings), make_celery(settings)
    try:
        with connection() as line, _shown() as progress:
            eraser = Eraser(
                connection=line,
                client=client,
                app=app,
                prefix=settings.redis_prefix,
                account=name,
                progress=progress,
            )
            if not yes:
                _ask(eraser.erasure.name)
            erased = eraser.run()
    except redis.RedisError as error:
        raise QueueUnavailable(
            f"Redis did not answer ({error}), so it is not all erased; run it again"
        ) from error
    finally:
        app.close()
        client.close()
    announce(settings)
    if as_json:
        print_json(erased.as_json())
        return
    typer.echo(
        f"{erased.name} is erased and called {erased.erased_name} now: {erased.erased:,} of "
        f"{erased.total:,} jobs, {erased.cancelled:,} of them cancelled for it"
    )


def _ask(name: str) -> None:
    if not sys.stdin.isatty():
        raise InvalidJob("--yes", f"is missing, and nobody can be asked about erasing {name}")
    typer.confirm(f"Erase all that is held of {name}, for ever?", abort=True, err=True)


@contextmanager
def _shown() -> Iterator[Callable[[Erasure], None]]:
    """Show how far it is, if somebody looks and it takes a while."""
    screen = console(stderr=True)
    if not screen.is_terminal:
        yield lambda _erasure: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    began_at = time.monotonic()
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        console=screen,
        transient=True,
    )
    task = bar.add_task("Erasing", total=None)

    def progress(erasure: Erasure) -> None:
        waits = erasure.waits_for
        bar.update(
            task,
            description=f"Waiting for {waits}" if waits else "Erasing jobs",
            completed=erasure.done,
            total=erasure.total or None,
        )
        if not bar.live.is_started and time.monotonic() - began_at > _SOON_S:
            bar.start()

    try:
        yield progress
    finally:
        bar.stop()


@data.command("export", epilog="Example: sluice account export default --out default.jsonl")
def export(
    name: _Who,
    *,
    out: Annotated[
        str, typer.Option("--out", "-o", metavar="FILE", help="Where to; - is standard output.")
    ] = _STDOUT,
) -> None:
    """Write all that is held of an account as JSON Lines: each its type, jobs with their bodies.

    Keys are not among it. A file can be read by you alone, and is there when it is complete.
    """
    import psycopg

    from sluicegate.producers.exporting import export_account, opened
    from sluicegate.shared.accounts import find_account
    from sluicegate.shared.database import explain
    from sluicegate.shared.settings import get_settings

    with connection() as line:
        found = find_account(line, name)
    path = None if out == _STDOUT else Path(out)
    try:
        with opened(path) as file:
            jobs = export_account(get_settings(), found, file.write)
    except psycopg.Error as error:
        raise explain(error) from error
    if path is not None:
        note(f"{found.name} with {jobs:,} jobs is in {path}")
