"""A file through a real fleet: submitted, watched and read by commands, every line done once."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from sluicegate.shared.jobs import Lane
from sluicegate.shared.settings import Settings
from tests.command_line import Command
from tests.harness import FULL, Rig
from tests.polling import eventually

LINES = 20_000 if FULL else 400
_TIMEOUT_S = 900 if FULL else 120


@pytest.fixture(scope="module", autouse=True)
def _workers(module_rig: Rig) -> None:
    module_rig.settings = module_rig.settings.model_copy(update={"stage_ahead_jobs": 100})
    worker = module_rig.begin_worker("anthropic", ["summary"], Lane.BULK, jobs_in_flight=50)
    module_rig.start_sweep()
    module_rig.await_worker(worker)


@pytest.fixture
def bulk(
    rig: Rig, command_line: Callable[[Settings], Command], monkeypatch: pytest.MonkeyPatch
) -> Command:
    """Return `sluice bulk`, as an operator runs it beside the fleet."""
    monkeypatch.chdir(rig.folder)
    return partial(command_line(rig.settings), "bulk")


def write_notes(rig: Rig, name: str, lines: int) -> list[str]:
    """Write a file of notes; return what each prompt ends with, and no other."""
    markers = [f"[{name} {n}]" for n in range(1, lines + 1)]
    with (rig.folder / name).open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "note"])
        writer.writerows((n, f"Call no. {n},\nlong.\n{mark}") for n, mark in enumerate(markers, 1))
    return markers


def calls_by_marker(rig: Rig) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for call in rig.sandbox.calls():
        tail = call["prompt_tail"]
        found.setdefault(tail[tail.rfind("[") :], []).append(call)
    return found


_SUBMIT = ("--use-case", "summary", "--template", "Summarise: {note}")


@pytest.mark.timeout(_TIMEOUT_S)
def test_every_line_of_a_file_is_done_once(rig: Rig, bulk: Command) -> None:
    markers = write_notes(rig, "notes.csv", LINES)
    submitted = bulk("submit", "notes.csv", *_SUBMIT)
    assert submitted.code == 0, submitted.err
    batch_id = submitted.out.strip()
    watched = bulk("watch", batch_id, "--json")
    assert watched.code == 0, watched.err
    view = json.loads(watched.out)
    assert (view["total"], view["succeeded"], view["failed"]) == (LINES, LINES, 0)

    written = bulk("results", batch_id, "-o", "results.csv")
    assert written.code == 0, written.err
    with (rig.folder / "results.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["metadata.id"] for row in table] == [str(n) for n in range(1, LINES + 1)]
    assert all(row["state"] == "succeeded" and row["text"] for row in table)

    calls = calls_by_marker(rig)
    assert sorted(calls) == sorted(markers)
    assert all(len(of_one) == 1 for of_one in calls.values())
    billed = rig.sandbox.bill()["billed_nano_usd"]
    assert view["cost_nano_usd"] == sum(int(row["cost_nano_usd"]) for row in table) == billed > 0
    # The same again costs nothing.
    again = bulk("submit", "notes.csv", *_SUBMIT, "--watch")
    assert (again.code, again.out.splitlines()[0]) == (0, batch_id), again.err
    assert rig.sandbox.bill()["billed_nano_usd"] == billed


def test_a_batch_is_cancelled_while_it_runs(rig: Rig, bulk: Command) -> None:
    # Twenty seconds of work.
    lines = 1000
    rig.sandbox.settings(latency_ms=1000)
    # What is tried again comes back after the batch was cancelled.
    rig.sandbox.add_fault("http_500", prompt_contains="[cancelled.csv 1]")
    markers = write_notes(rig, "cancelled.csv", lines)
    batch_id = bulk("submit", "cancelled.csv", *_SUBMIT).out.strip()
    batch = rig.client.batch(UUID(batch_id))
    eventually(lambda: batch.progress().ended > 20)
    cancelled = bulk("cancel", batch_id)
    assert (cancelled.code, "jobs are cancelled" in cancelled.out) == (0, True), cancelled
    view = batch.wait(timeout=60)
    assert view.succeeded + view.cancelled + view.failed == lines
    assert view.cancelled > 0
    assert view.succeeded > 0
    assert view.cancelled_at is not None

    results = list(batch.results())
    calls = calls_by_marker(rig)
    assert set(calls) <= set(markers)
    for marker, result in zip(markers, results, strict=True):
        made = len(calls.get(marker, ()))
        assert made == (result.state == "succeeded") or "[cancelled.csv 1]" in marker, result
    ids = [result.job_id for result in results]
    assert rig.booked_nano_usd(ids) == view.cost_nano_usd
    assert bulk("watch", batch_id).code == 1


def test_lines_that_cannot_succeed_are_told(rig: Rig, bulk: Command) -> None:
    rig.sandbox.add_fault("http_400", prompt_contains="[failing.csv 2]")
    write_notes(rig, "failing.csv", 3)
    outcome = bulk("submit", "failing.csv", *_SUBMIT, "--watch")
    assert outcome.code == 1
    batch_id, *_, last = outcome.out.splitlines()
    assert last.startswith("3 of 3 have ended, 2 succeeded, 1 failed, $0.0")
    failed = bulk("results", batch_id, "--state", "failed").out
    assert Path(rig.folder / "failing.csv").exists()
    entry = json.loads(failed)
    assert (entry["metadata"], entry["text"]) == ({"id": "2"}, "")
    assert len(entry["error"]) > 20
