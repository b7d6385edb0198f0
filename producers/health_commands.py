"""Commands for whoever keeps the fleet alive: `sluice doctor`, and `sluice health`."""

# What takes long to import is imported by the command that needs it.
# ruff: noqa: PLC0415

from __future__ import annotations

import socket
import sys
from collections.abc import Sequence
from contextlib import closing
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from sluicegate.shared.errors import SluiceError
from sluicegate.shared.terminal import AsJson, console, print_json, print_table

if TYPE_CHECKING:
    from sluicegate.producers.diagnosis import Finding

app = typer.Typer(pretty_exceptions_enable=False)

_WORKER = """
SELECT count(*) FROM workers
WHERE name LIKE %(name)s AND seen_at > now() - interval '30 seconds'
"""
_SWEEP = """
SELECT count(*) FROM pg_stat_activity
WHERE datname = current_database() AND application_name LIKE 'sluice sweep%%'
"""

_COLOURS = {"ok": "green", "warning": "yellow", "problem": "bold red"}


class Part(StrEnum):
    """What of the fleet a container holds."""

    SERVERS = "servers"
    WORKER = "worker"
    SWEEP = "sweep"


@app.command(epilog="Example: sluice doctor")
def doctor(*, as_json: AsJson = False) -> None:
    """Look for what is wrong: servers, schema, clocks, keys, models, workers, settings.

    Exits with 1 if there is a problem; warnings are none.
    """
    from sluicegate.producers.diagnosis import Level
    from sluicegate.producers.doctor import examine
    from sluicegate.shared.settings import get_settings

    findings = examine(get_settings())
    problems = sum(finding.level is Level.PROBLEM for finding in findings)
    if as_json:
        print_json(
            {
                "problems": problems,
                "findings": [
                    {
                        "level": finding.level.value,
                        "subject": finding.subject,
                        "found": finding.found,
                        "advice": finding.advice,
                    }
                    for finding in findings
                ],
            }
        )
    else:
        _print(findings)
    raise typer.Exit(1 if problems else 0)


@app.command(epilog="Example: sluice health worker")
def health(
    part: Annotated[
        Part, typer.Argument(help="What of the fleet runs in this container.")
    ] = Part.SERVERS,
    *,
    as_json: AsJson = False,
) -> None:
    """Say in one line whether this container does its work: for health checks.

    servers: Postgres answers with this version's schema, and so does Redis. worker: a worker of
    this host has shown life in the last 30 s. sweep: one is connected. Exits with 0 or 1.

    A worker outlives an outage of its servers: let this tell who is ready, not whom to kill.
    """
    from sluicegate.shared.connecting import connection
    from sluicegate.shared.database import check_schema

    with connection() as line:
        check_schema(line)
        if part is Part.WORKER:
            name = {"name": f"%@{socket.gethostname()}"}
            if not line.exec_driver_sql(_WORKER, name).scalar():
                raise SluiceError("no worker of this host has shown life in the last 30 s")
        if part is Part.SWEEP and not line.exec_driver_sql(_SWEEP, {}).scalar():
            raise SluiceError("no sweep is connected to Postgres")
    if part is Part.SERVERS:
        _ping_redis()
    if as_json:
        print_json({"healthy": True, "part": part.value})
    else:
        typer.echo("healthy")


def _ping_redis() -> None:
    # Workers and the sweep go on while Redis is away: that is no reason to end them.
    import redis

    from sluicegate.shared.redis_client import make_redis
    from sluicegate.shared.settings import get_settings

    with closing(make_redis(get_settings())) as client:
        try:
            client.ping()
        except redis.RedisError as error:
            raise SluiceError(f"Redis does not answer ({error}); check SLUICE_REDIS_URL") from None


def _print(findings: Sequence[Finding]) -> None:
    if not sys.stdout.isatty():
        print_table(None, [(f.level.value, f.subject, f.found, f.advice) for f in findings])
        return
    from rich.text import Text

    out = console()
    for finding in findings:
        line = Text(f"{finding.level.value:<8} ", style=_COLOURS[finding.level.value])
        out.print(line.append(f"{finding.subject}: {finding.found}", style="default"))
        if finding.advice:
            out.print(Text(f"{'':8} -> {finding.advice}"))
