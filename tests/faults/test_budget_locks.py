"""Many processes at the same few budgets: nobody waits for one who waits for him."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest

from sluicegate.shared.settings import Settings
from sluicegate.workers.local.processes import end, spawn
from tests.audit import Audit
from tests.books import Books
from tests.harness import FULL, environment_of
from tests.mixed_load import NAMES, USE_CASES

PROCESSES = 4
SECONDS = 60.0 if FULL else 5.0

pytestmark = pytest.mark.timeout(300 if FULL else 90)


def _run(settings: Settings, folder: Path) -> Counter[str]:
    """Run the load in several processes; return how often what was done."""
    processes = []
    try:
        for seed in range(PROCESSES):
            argv = [sys.executable, "-m", "tests.mixed_load", str(seed), str(SECONDS)]
            with (folder / f"load{seed}").open("wb") as output:
                process = spawn(
                    argv,
                    death_signal=signal.SIGKILL,
                    env=environment_of(settings),
                    cwd=folder,
                    output=output,
                )
            processes.append(process)
        done: Counter[str] = Counter()
        for seed, process in enumerate(processes):
            process.wait(SECONDS + 60)
            said = (folder / f"load{seed}").read_text()
            assert process.returncode == 0, said
            done += Counter(orjson.loads(said.splitlines()[-1]))
        return done
    finally:
        for process in processes:
            end(process)


async def _bury_all(settings: Settings) -> None:
    books = Books(settings)
    await books.rows("DELETE FROM workers")
    await books.resolve()
    await books.close()


def test_mixed_load_on_hot_accounts_meets_no_deadlock(
    settings: Settings, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    with Audit(settings) as audit:
        for name in NAMES:
            audit.add_account(name)
            audit.set_budget(name, day=10**6)
            audit.set_budget(name, use_case=USE_CASES[0], day=10**6)
        done = _run(settings, tmp_path)
        record_property("done", dict(done))
        for what in ("opened", "refused", "settled", "void", "left", "died", "set", "cleared"):
            assert done[what] > 0, done
        asyncio.run(_bury_all(settings))
        (row,) = audit.rows("SELECT count(*) AS n FROM attempts WHERE state = 'corrected'")
        assert row.n > 0, "no answer came late"
        (row,) = audit.rows(
            "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
        )
        assert row.deadlocks == 0
        # Somebody's copies may be under way no more: the last ones died with their processes.
        audit.reconcile()
        audit.check_rest()
        assert _strays(audit) == []


def _strays(audit: Audit) -> list[Any]:
    """Return budgets that go by another clock than their account."""
    return audit.rows(
        "SELECT a.name, a.time_zone, b.time_zone AS stray FROM budgets b"
        " JOIN accounts a ON a.id = b.account_id WHERE a.time_zone <> b.time_zone"
    )
