"""Watching a batch: a progress bar in a terminal, a line now and then in a pipe."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import Final

import typer

from sluicegate.producers.batches import POLL_S, Batch, BatchProgress, BatchView
from sluicegate.shared.errors import QueueUnavailable
from sluicegate.shared.terminal import console, money, note

#: How often a line is printed where there is no terminal.
_LINE_S: Final = 5.0
#: How often the cost is summed up: that reads every job.
_COST_S: Final = 10.0
#: An outage of Postgres that a watch outlasts.
_OUTAGE_S: Final = 60.0


def watch(batch: Batch, *, quiet: bool = False) -> BatchView:
    """Show how far a batch is until it has ended; raises as `Batch.view`.

    quiet: show nothing where there is no terminal.
    """
    if console(stderr=True).is_terminal:
        _show_bar(batch)
    elif quiet:
        for _ in _looks(batch):
            pass
    else:
        _print_lines(batch)
    return batch.view()


def _looks(batch: Batch) -> Iterator[BatchView]:
    """Look once a second until the batch has ended; outlast an outage."""
    view = batch.view()
    cost_at = seen_at = time.monotonic()
    while True:
        yield view
        if view.finished_at is not None:
            return
        time.sleep(POLL_S)
        now = time.monotonic()
        try:
            if now - cost_at >= _COST_S:
                view, cost_at = batch.view(), now
            else:
                progress: BatchProgress = batch.progress()
                view = BatchView(**dict(progress), cost_nano_usd=view.cost_nano_usd)
        except QueueUnavailable:
            if now - seen_at > _OUTAGE_S:
                raise
            continue
        seen_at = now


def describe(view: BatchProgress) -> str:
    """Say in a few words how far a batch is."""
    counts = {
        "succeeded": view.succeeded,
        "failed": view.failed,
        "cancelled": view.cancelled,
        "expired": view.expired,
    }
    parts = [f"{count:,} {state}" for state, count in counts.items() if count]
    return f"{view.ended:,} of {view.total:,} have ended" + "".join(f", {one}" for one in parts)


def _print_lines(batch: Batch) -> None:
    """Print a line every few seconds: state by state, cost, jobs a second, seconds left."""
    began_at, printed_at, first = time.monotonic(), 0.0, None
    for view in _looks(batch):
        now = time.monotonic()
        first = view.ended if first is None else first
        if now - printed_at < _LINE_S and view.finished_at is None:
            continue
        printed_at = now
        rate = (view.ended - first) / max(now - began_at, POLL_S)
        left = "" if not rate else f", about {(view.total - view.ended) / rate:,.0f} s left"
        line = f"{describe(view)}, {money(view.cost_nano_usd)}"
        typer.echo(line if view.finished_at else f"{line}, {rate:.1f} a second{left}")
        sys.stdout.flush()


def _show_bar(batch: Batch) -> None:
    from rich.progress import (  # noqa: PLC0415 - only once there is a bar to draw
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    with Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TimeRemainingColumn(),
        console=console(stderr=True),
    ) as bar:
        task = None
        for view in _looks(batch):
            words = f"{view.failed + view.expired + view.cancelled:,} without an answer"
            if task is None:
                task = bar.add_task("", total=view.total)
            bar.update(
                task,
                completed=view.ended,
                description=f"{words}, {money(view.cost_nano_usd)}, {_rate(bar.tasks[0].speed)}",
            )
    note(describe(view))


def _rate(per_second: float | None) -> str:
    return f"{per_second or 0.0:.1f} a second"
