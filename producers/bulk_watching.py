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

#: How often the cost is summed up, and a line printed where there is no terminal.
_COST_S: Final = 5.0
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


def _looks(batch: Batch) -> Iterator[BatchProgress | None]:
    """Look once a second until the batch has ended; outlast an outage.

    The first look, the last one and some between are `BatchView`s: the cost is read with them. None
    stands for one that Postgres did not answer.
    """
    seen: BatchProgress = batch.view()
    cost_at = seen_at = time.monotonic()
    is_away = False
    yield seen
    while seen.finished_at is None:
        time.sleep(POLL_S)
        now = time.monotonic()
        try:
            look = batch.progress()
            if look.finished_at is not None or now - cost_at >= _COST_S:
                look, cost_at = batch.view(), now
        except QueueUnavailable:
            if now - seen_at > _OUTAGE_S:
                raise
            if not is_away:
                note("Postgres does not answer; still trying")
            is_away = True
            yield None
            continue
        seen, seen_at, is_away = look, now, False
        yield seen


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


class _Pace:
    """How fast a batch goes since somebody began to watch it."""

    def __init__(self) -> None:
        self._first: int | None = None
        self._began_at = 0.0

    def describe(self, view: BatchProgress) -> str:
        """Say how many jobs end a second, and how long it takes; nothing at the first look."""
        now = time.monotonic()
        if self._first is None:
            self._first, self._began_at = view.ended, now
            return ""
        rate = (view.ended - self._first) / max(now - self._began_at, POLL_S)
        left = "" if rate <= 0 else f", about {(view.total - view.ended) / rate:,.0f} s left"
        return f", {rate:.1f} a second{left}"


def _print_lines(batch: Batch) -> None:
    """Print a line every few seconds: state by state, cost, jobs a second, seconds left."""
    pace = _Pace()
    for view in _looks(batch):
        if isinstance(view, BatchView):
            goes = pace.describe(view) if view.finished_at is None else ""
            typer.echo(f"{describe(view)}, {money(view.cost_nano_usd)}{goes}")
            sys.stdout.flush()


def _show_bar(batch: Batch) -> None:
    from rich.progress import (  # noqa: PLC0415 - only once there is a bar to draw
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
    )

    pace, cost, last = _Pace(), "", None
    columns = BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}")
    with Progress(*columns, console=console(stderr=True)) as bar:
        task = bar.add_task("", total=None)
        for view in _looks(batch):
            if view is None:
                bar.update(task, description="Postgres does not answer")
                continue
            if isinstance(view, BatchView):
                cost = money(view.cost_nano_usd)
            without = f"{view.failed + view.expired + view.cancelled:,} without an answer"
            words = f"{without}, {cost}{pace.describe(view)}"
            bar.update(task, completed=view.ended, total=view.total, description=words)
            last = view
    if last is not None:
        note(describe(last))
