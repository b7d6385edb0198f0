"""Commands that run the fleet: `up`, `worker`, `sweep`, `db upgrade`."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from sqlalchemy import select

from sluicegate.shared.connecting import connected
from sluicegate.shared.errors import SettingsError, SluiceError
from sluicegate.shared.jobs import Lane
from sluicegate.shared.migrations import current, upgrade
from sluicegate.shared.queues import POOLS, pool_queues
from sluicegate.shared.settings import Settings, get_settings
from sluicegate.shared.tables import use_cases

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
db = typer.Typer(no_args_is_help=True, help="The database schema.")
app.add_typer(db, name="db")

#: Where `sluice up` keeps its embedded servers' data, unless told otherwise.
DEFAULT_DATA_DIR = Path(".sluice")


def worker_argv(pool: str, lane: Lane, queues: list[str], *, follow: bool = False) -> list[str]:
    """Return the command line of a worker process: plain Celery, in this interpreter.

    follow: let it also serve the queues of use cases that are added while it runs.
    """
    name = f"{pool}-{lane.value}@%h"
    return [
        *(sys.executable, "-m", "celery", "--quiet", "-A", "sluicegate.workers.app", "worker"),
        *("-Q", ",".join(queues), "-n", name),
        *("--without-gossip", "--without-mingle", "--loglevel", "WARNING"),
        *(["--follow-use-cases"] if follow else []),
    ]


def known_use_cases(settings: Settings) -> list[str]:
    """Return the names of all use cases; raises a connection error if Postgres is away."""
    with connected(settings) as connection:
        return list(connection.scalars(select(use_cases.c.name).order_by(use_cases.c.name)))


@app.command(epilog="Example: sluice worker anthropic --lane bulk")
def worker(
    pool: Annotated[
        str, typer.Argument(metavar="POOL", help=f"Whose workers: {' or '.join(POOLS)}.")
    ],
    lane: Annotated[Lane, typer.Option(help="Which lane it serves.")] = Lane.INTERACTIVE,
    queues: Annotated[
        str | None,
        typer.Option(
            "-Q", "--queues", metavar="NAME", help="Only these queues, with commas between."
        ),
    ] = None,
) -> None:
    """Run one worker process of a pool, in the foreground. SIGTERM drains it."""
    if pool not in POOLS:
        raise SettingsError(f"POOL: {pool!r} is not a pool; there are {', '.join(POOLS)}")
    names = (
        queues.split(",") if queues else pool_queues(known_use_cases(get_settings()), pool, lane)
    )
    argv = worker_argv(pool, lane, names, follow=not queues)
    os.execv(argv[0], argv)  # noqa: S606 - our own interpreter, our own arguments


@app.command(epilog="Example: sluice sweep")
def sweep() -> None:
    """Run the sweep: stages bulk work, rescues dead workers' jobs, publishes what was lost."""
    from sluicegate.workers.sweep.loops import Sweep  # noqa: PLC0415 - other commands start faster

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")

    async def run() -> None:
        loops = asyncio.ensure_future(Sweep(get_settings()).run())
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, loops.cancel)
        try:
            await loops
        except asyncio.CancelledError:
            return

    asyncio.run(run())


@db.command("upgrade", epilog="Example: sluice db upgrade")
def db_upgrade(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Bring the database schema to this version."""
    settings = get_settings()
    upgrade(settings)
    revision = current(settings)
    if as_json:
        typer.echo(json.dumps({"revision": revision}))
    else:
        typer.echo(f"The schema is at revision {revision}.")


@app.command(epilog="Example: sluice up --sandbox")
def up(
    sandbox: Annotated[
        bool, typer.Option(help="Use the sandbox provider instead of paid ones.")
    ] = False,
    data_dir: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Where embedded servers keep their data.")
    ] = DEFAULT_DATA_DIR,
    bulk: Annotated[bool, typer.Option(help="Also run workers for the bulk lane.")] = True,
    flower: Annotated[
        str | None,
        typer.Option(
            metavar="PORT",
            help="Also run Flower, on PORT of 127.0.0.1 or on HOST:PORT. FLOWER_BASIC_AUTH, as "
            "user:password, says who may open it.",
        ),
    ] = None,
    http: Annotated[
        str | None,
        typer.Option(
            metavar="PORT",
            help="Also serve HTTP, on PORT of 127.0.0.1 or on HOST:PORT, to whoever has a key; "
            "with --sandbox this machine needs none.",
        ),
    ] = None,
) -> None:
    """Run the whole fleet in the foreground: servers unless URLs are given, workers, sweep."""
    try:
        # They need the local extra.
        from sluicegate.workers.local.fleet import Fleet  # noqa: PLC0415
        from sluicegate.workers.local.flower import Flower  # noqa: PLC0415
        from sluicegate.workers.local.http_door import HttpDoor  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise SluiceError(
            f"`sluice up` needs {error.name}; run `pip install 'sluicegate[local]'`"
        ) from None

    watcher = Flower.at(flower) if flower is not None else None
    door = HttpDoor.at(http, is_sandbox=sandbox) if http is not None else None
    console = Console(stderr=True, highlight=False)
    console.print("Starting the fleet ...")
    with Fleet(
        data_dir=data_dir, sandbox=sandbox, bulk=bulk, flower=watcher, http=door, echo=True
    ) as fleet:

        def tell() -> None:
            for pool in fleet.keyless_pools:
                console.print(
                    f"[yellow]There is no key for {pool}[/], so its jobs will fail: "
                    f"set {pool.upper()}_API_KEY and start again.",
                    soft_wrap=True,
                )
            console.print(f"[green]The fleet runs.[/] {fleet.where}. Stop: Ctrl-C", soft_wrap=True)
            if watcher is not None:
                console.print(f"Flower: {watcher.url}", soft_wrap=True)
            if door is not None:
                console.print(f"HTTP: {door.url}/docs", soft_wrap=True)
            for name, value in fleet.client_environment.items():
                typer.echo(f"export {name}={value}")

        code = fleet.run_until_stopped(tell)
    if code == 0:
        console.print("The fleet has stopped.")
    raise typer.Exit(code)
