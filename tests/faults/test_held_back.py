"""What is held back waits in Postgres, costs no worker anything, and comes back in its turn."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest

from sluicegate.shared.jobs import Lane
from sluicegate.workers.local.sandbox_control import SandboxControl
from tests.command_line import Command
from tests.harness import FULL, Rig, Service
from tests.polling import eventually

PRIMARY, MODEL = "openai-gpt-6-luna", "gpt-6-luna"
PARKED = 100_000 if FULL else 3_000
#: Longer than it takes to park them.
OPEN_S = 850.0 if FULL else 200.0
#: What a worker may grow by, however many there are; to hold all of these takes several times that.
GROWN_KIB = 16 * 1024
#: How many turns one second has at most. A line ends where it is a quarter of an hour long: those
#: behind that come as they went.
TURNS_PER_S = 1000 if FULL else 60

pytestmark = pytest.mark.timeout(2400 if FULL else 120)


@pytest.fixture(scope="module")
def rig_settings() -> dict[str, Any]:
    # Once it is open it stays so, as far as these tests are concerned.
    return {"breaker_open_s": OPEN_S, "breaker_open_max_s": OPEN_S, "retry_base_s": 2.0}


@pytest.fixture(scope="module")
def _workers(module_rig: Rig) -> None:
    module_rig.start_sweep()
    workers = [module_rig.begin_worker("openai", ["general"]) for _ in range(2)]
    workers.append(module_rig.begin_worker("openai", ["general"], Lane.BULK))
    for worker in workers:
        module_rig.await_worker(worker)


@pytest.fixture
def rig(module_rig: Rig, sandbox: SandboxControl, _workers: None) -> Iterator[Rig]:
    assert module_rig.sandbox is sandbox
    yield module_rig
    sandbox.clear_limits()
    # The gates remember a minute.
    for key in module_rig.redis.scan_iter(match=f"{module_rig.settings.redis_prefix}gate:*"):
        module_rig.redis.delete(key)


@pytest.fixture
def sluice(rig: Rig, command_line: Callable[[Any], Command]) -> Iterator[Command]:
    """Return the fleet's command line."""
    command = command_line(rig.settings)
    yield command
    for what in (("--provider", PRIMARY), ("--account", "default"), ("--use-case", "general")):
        assert command("resume", *what).code == 0
    assert command("breaker", "reset", PRIMARY).code == 0
    assert command("provider", "set", PRIMARY, "--clear", "requests-per-minute").code == 0


@pytest.mark.parametrize(
    ("kind", "name", "lane"),
    [
        ("provider", PRIMARY, "interactive"),
        # These stand at the gate for longer.
        ("provider", PRIMARY, "bulk"),
        ("account", "default", "interactive"),
        ("use-case", "general", "interactive"),
    ],
)
def test_a_pause_stops_new_calls_within_two_seconds(
    rig: Rig, sluice: Command, kind: str, name: str, lane: str
) -> None:
    assert sluice("provider", "set", PRIMARY, "--requests-per-minute=900").code == 0
    # More than it takes in these seconds: at any moment some stand at the gate.
    ids = rig.submit("general", 120, lane=lane)

    def go_on(until: float) -> None:
        while time.time() < until:
            ids.extend(rig.submit("general", 3, lane=lane))
            time.sleep(0.1)

    eventually(lambda: rig.calls(ids))
    go_on(time.time() + 1)
    assert sluice("pause", f"--{kind}", name).code == 0
    paused_at = time.time()
    go_on(paused_at + 3)
    eventually(lambda: set(rig.states(ids)) == {"parked", "succeeded"})
    calls = [call["started_at"] for found in rig.calls(ids).values() for call in found]
    assert min(calls) < paused_at
    assert max(calls) < paused_at + 2
    # Those that had been given a turn before say so when it comes.
    eventually(lambda: _reasons(rig) == {True}, 60)
    assert sluice("provider", "set", PRIMARY, "--clear", "requests-per-minute").code == 0
    assert sluice("resume", f"--{kind}", name).code == 0
    rig.await_over(ids)
    assert rig.states(ids) == {"succeeded": len(ids)}
    rig.check_once(ids)


def _reasons(rig: Rig) -> set[bool]:
    """Whether jobs are said to be parked for a pause."""
    rows = rig.rows(
        "SELECT DISTINCT held_back LIKE '%%paused%%' AS so FROM jobs WHERE state = 'parked'"
    )
    return {row.so for row in rows}


def _rss_kib(worker: Service) -> int:
    return int(psutil.Process(worker.pid).memory_info().rss) // 1024


def _running_jobs(rig: Rig) -> int:
    """How many jobs all workers hold, as their rows say."""
    (row,) = rig.rows("SELECT sum(running_jobs)::int AS n FROM workers")
    return int(row.n)


def test_parked_jobs_cost_workers_no_memory_and_come_back_in_turn(
    rig: Rig, sluice: Command, record_property: Callable[[str, object], None]
) -> None:
    workers = [service for service in rig.services if service.name.startswith("w")]
    # They have seen some work, and what it takes to park.
    warm = rig.submit("general", 300)
    rig.await_over(warm)
    rule = rig.sandbox.down(MODEL)
    warm = rig.submit("general", 300, model=PRIMARY, deadline=7200)
    eventually(lambda: rig.states(warm) == {"parked": len(warm)})
    before = {worker.name: _rss_kib(worker) for worker in workers}

    ids = warm + rig.submit("general", PARKED, model=PRIMARY, deadline=7200)
    calls = len(rig.sandbox.calls())
    eventually(lambda: rig.waiting("general", "openai") == 0, 600 if FULL else 60)
    eventually(lambda: _running_jobs(rig) == 0)
    eventually(lambda: rig.states(ids) == {"parked": len(ids)})
    grown = {worker.name: _rss_kib(worker) - before[worker.name] for worker in workers}
    record_property("grown_kib", grown)
    assert max(grown.values()) < GROWN_KIB, grown
    assert len(rig.sandbox.calls()) == calls, "a job was called for while the breaker was open"
    # One after the other, and none before the breaker lets a probe through.
    turns = rig.rows(
        "SELECT floor(extract(epoch FROM run_at - now()))::int AS second, count(*) AS n"
        " FROM jobs WHERE id = ANY(%(ids)s) GROUP BY 1 ORDER BY 1",
        ids=ids,
    )
    by_second = Counter({row.second: row.n for row in turns})
    record_property("turns", f"{turns[0].second} s to {turns[-1].second} s")
    assert turns[0].second > 60
    line = [by_second[row.second] for row in turns[:-1]]
    assert max(line) <= TURNS_PER_S, by_second

    rig.sandbox.remove_fault(rule)
    # Its limit spreads them, too, when all are let go at once.
    per_minute = 30_000 if FULL else 12_000
    assert sluice("provider", "set", PRIMARY, f"--requests-per-minute={per_minute}").code == 0
    # What it means to the sandbox in five seconds, and a few for what arrives late.
    rig.sandbox.limit(MODEL, requests_per_minute=per_minute // 60 * 8, limit_window_s=5)
    assert sluice("breaker", "reset", PRIMARY).code == 0
    rig.sandbox.wait_for_calls(calls + len(ids), 1200 if FULL else 90, finished=True)
    rig.await_over(ids)
    (shown,) = rig.sandbox.limits()
    record_property("at_most_in_5_s", shown["peak"]["requests"])
    assert shown["refused"] == {}
    assert rig.states(ids) == {"succeeded": len(ids)}
