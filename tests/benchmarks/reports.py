"""How long spend reports over many cost entries take: `./dev bench --reports`.

A month of a million entries, all accounts, each `--by`; then what one account asks for. The servers
are embedded, the tables are warm, and each question is asked several times.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table
from sqlalchemy import Engine

from sluicegate.producers.spend import By, spend_report
from sluicegate.shared import migrations
from sluicegate.shared.database import make_engine
from sluicegate.shared.settings import load_settings
from sluicegate.workers.local.servers import EmbeddedPostgres
from tests.spending import DAYS, START, fill

#: Cost entries; few of them to see that all runs.
ENTRIES, TINY = 1_000_000, 5_000

_LAST = START.date() + timedelta(days=DAYS - 1)


def main(console: Console, *, entries: int, rounds: int) -> None:
    """Print a JSON line for each question on stdout, and a table for people."""
    table = Table(title=f"Reports over {entries:,} cost entries, {rounds} times each")
    table.add_column("question", no_wrap=True)
    for heading in ("rows", "median", "slowest"):
        table.add_column(heading, justify="right")
    with tempfile.TemporaryDirectory(prefix="sluice-bench-") as folder:
        Path(folder).chmod(0o711)  # the server's own user walks through it
        with EmbeddedPostgres(data_dir=Path(folder) / "postgres", fsync=False) as server:
            settings = load_settings(database_url=server.url, command_timeout_s=600)
            migrations.upgrade(settings)
            engine = make_engine(settings)
            with engine.connect() as connection:
                fill(connection, entries)
            for question, options in _questions():
                line = {"question": question} | _time(engine, rounds, options)
                sys.stdout.write(f"{json.dumps(line)}\n")
                median_ms, slowest_ms = (
                    f"{line['median_ms']:.0f} ms",
                    f"{line['slowest_ms']:.0f} ms",
                )
                table.add_row(question, str(line["rows"]), median_ms, slowest_ms)
            engine.dispose()
    console.print(table)


def _questions() -> list[tuple[str, dict[str, Any]]]:
    month = {"first_day": START.date(), "last_day": _LAST}
    return [
        *((f"the month by {by}", month | {"by": by}) for by in By),
        ("the month by use_case, for a plot", month | {"by": By.USE_CASE, "daily": True}),
        ("an account's month by model", month | {"by": By.MODEL, "account": "acme"}),
        ("a day by model", {"first_day": _LAST, "last_day": _LAST, "by": By.MODEL}),
    ]


def _time(engine: Engine, rounds: int, options: dict[str, Any]) -> dict[str, Any]:
    taken_ms = []
    for _ in range(rounds):
        with engine.connect() as connection:
            began = time.perf_counter()
            report = spend_report(connection, **options)
        taken_ms.append(1000 * (time.perf_counter() - began))
    return {
        "rows": len(report.rows),
        "median_ms": round(median(taken_ms), 1),
        "slowest_ms": round(max(taken_ms), 1),
    }
