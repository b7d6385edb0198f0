"""A use case, or a provider, that is added while workers run: jobs of it are done, no restart."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from functools import partial
from typing import Any
from uuid import UUID

import psutil
import pytest

from sluicegate.cli import run
from sluicegate.shared.errors import InvalidJob, JobFailed
from sluicegate.shared.jobs import Lane
from sluicegate.shared.queues import queue_name
from tests.harness import Rig, Service, environment_of
from tests.polling import eventually

Sluice = Callable[..., Any]

USE_CASES = ["draft", "summary", "complex", "vision", "voice", "general"]
LANES = (Lane.INTERACTIVE, Lane.BULK)


@pytest.fixture(scope="module", autouse=True)
def workers(module_rig: Rig) -> dict[Lane, Service]:
    started = {
        lane: module_rig.begin_worker("openai", USE_CASES, lane, follow=True) for lane in LANES
    }
    module_rig.start_sweep()
    for worker in started.values():
        module_rig.await_worker(worker)
    return started


@pytest.fixture
def sluice(rig: Rig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Sluice:
    """Run a command that prints JSON, as an operator does beside the fleet; return what it said."""
    for name, value in environment_of(rig.settings).items():
        monkeypatch.setenv(name, value)

    def call(*arguments: str) -> Any:
        code = run([*arguments, "--json"])
        said = capsys.readouterr()
        assert code == 0, said.err
        return json.loads(said.out)

    return call


def submit(rig: Rig, use_case: str, jobs: int, **options: Any) -> list[UUID]:
    """Submit as soon as our client, which looks twice a second, knows the use case."""

    def accepted() -> list[UUID]:
        try:
            return rig.submit(use_case, jobs, **options)
        except InvalidJob as refusal:
            raise AssertionError(str(refusal)) from None

    return eventually(accepted, 10)


def served(rig: Rig, worker: Service) -> list[str]:
    (row,) = rig.rows(
        "SELECT queues FROM workers WHERE name = %(name)s", name=f"{worker.name}@test"
    )
    return list(row.queues)


def test_running_workers_take_a_new_use_case(
    rig: Rig,
    workers: dict[Lane, Service],
    sluice: Sluice,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pids = {lane: worker.pid for lane, worker in workers.items()}
    for name in ("sort", "rate"):
        began_at = time.monotonic()
        sluice("usecase", "add", name, "--provider", "openai-gpt-6-luna")
        ids = {lane: submit(rig, name, 2, lane=lane) for lane in LANES}
        for lane in LANES:
            rig.await_over(ids[lane], 30)
            took_s = time.monotonic() - began_at
            with capsys.disabled():
                print(f"\n{name}, {lane.value}: done {took_s:.1f} s after the command began")
            rig.check_once(ids[lane])
            queue = queue_name(name, "openai", lane)
            eventually(partial(_names, rig, workers[lane], queue), 10)
    assert {lane: worker.pid for lane, worker in workers.items()} == pids
    assert all(worker.ended() is None for worker in workers.values())


def _names(rig: Rig, worker: Service, queue: str) -> bool:
    assert served(rig, worker)[-1] == queue
    return True


def test_a_worker_with_queues_of_its_own_keeps_to_them(
    rig: Rig, workers: dict[Lane, Service], sluice: Sluice
) -> None:
    own = rig.start_worker("openai", ["draft"])
    sluice("usecase", "add", "keep", "--provider", "openai-gpt-6-luna")
    ids = submit(rig, "keep", 20)
    rig.await_over(ids, 30)
    eventually(lambda: "keep.openai" in served(rig, workers[Lane.INTERACTIVE]), 10)
    assert served(rig, own) == ["draft.openai"]
    rows = rig.rows(
        "SELECT DISTINCT w.name FROM attempts a JOIN workers w ON w.id = a.worker_id"
        " WHERE a.job_id = ANY(%(ids)s)",
        ids=ids,
    )
    assert [row.name for row in rows] == [f"{workers[Lane.INTERACTIVE].name}@test"]
    own.end()


def cut_off(rig: Rig, worker: Service) -> None:
    """Have Redis close all connections of this worker."""
    ours = {one.laddr.port for one in psutil.Process(worker.pid).net_connections("tcp")}
    clients = [client["addr"] for client in rig.redis.client_list()]
    killed = [addr for addr in clients if int(addr.rpartition(":")[2]) in ours]
    for addr in killed:
        rig.redis.client_kill_filter(addr=addr)
    assert len(killed) > 1


def test_a_new_use_case_outlives_the_connection_to_the_broker(
    rig: Rig, workers: dict[Lane, Service], sluice: Sluice
) -> None:
    sluice("usecase", "add", "known", "--provider", "openai-gpt-6-luna")
    rig.await_over(submit(rig, "known", 1), 30)
    sluice("usecase", "add", "early", "--provider", "openai-gpt-6-luna")
    cut_off(rig, workers[Lane.INTERACTIVE])
    for name in ("known", "early"):
        ids = submit(rig, name, 3)
        rig.await_over(ids, 60)
        rig.check_once(ids)


def test_jobs_of_a_disabled_use_case_that_wait_are_done(rig: Rig, sluice: Sluice) -> None:
    ids = rig.submit("draft", 2)  # of the other pool, which has no worker yet
    off = sluice("usecase", "disable", "draft")
    assert off["is_active"] is False

    def refusal() -> str:
        try:
            ids.extend(rig.submit("draft", 1))
        except InvalidJob as refused:
            return str(refused)
        return ""

    assert "'draft' is disabled" in eventually(refusal, 10)
    worker = rig.start_worker("anthropic", USE_CASES, follow=True)
    rig.await_over(ids, 30)
    rig.check_once(ids)
    worker.end()
    assert sluice("usecase", "enable", "draft")["is_active"] is True


def test_a_provider_of_ones_own_gets_the_jobs(rig: Rig, sluice: Sluice) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        closed = probe.getsockname()[1]
    sluice("usecase", "add", "local")
    row = ("--pool", "openai", "--model", "gpt-4o-mini", "--use-case", "local")
    price = ("--input-price", "0.1", "--output-price", "0.4", "--max-tokens", "300")
    custom = ("provider", "add", "vllm", *row, *price, "--base-url", rig.sandbox.openai_base_url)
    added = sluice(*custom)
    assert (added["use_cases"], added["key"]) == (["local"], None)
    tried = sluice("provider", "test", "vllm", "--stream")
    rig.sandbox.reset()

    (job_id,) = submit(rig, "local", 1)
    result = rig.client.handle(job_id).result(timeout=30)
    usage = result.usage
    assert (result.provider, result.model) == ("vllm", tried["model"])
    # At the row's own price, whatever the list says.
    assert result.cost_nano_usd == 100 * usage.input + 400 * usage.output
    (call,) = rig.calls([job_id])[job_id]
    assert call["model"] == "gpt-4o-mini"

    # A change of the row is soon in force: jobs then meet a closed port.
    sluice("provider", "set", "vllm", "--base-url", f"http://127.0.0.1:{closed}/v1")

    def failure() -> str:
        try:
            rig.client.submit("local", "hello", max_attempts=1).result(timeout=30)
        except JobFailed as failed:
            return str(failed)
        return ""

    assert "no connection" in eventually(failure, 20).lower()
