"""A fleet that a test takes apart: real worker processes, to be killed, frozen and stopped.

A `Rig` stands on servers that somebody else runs. What it starts it ends. Prompts carry a marker,
so that the sandbox's log of calls, which knows nothing of jobs, can be read by job.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from uuid import UUID, uuid4

import orjson
import redis
from pydantic import SecretStr
from sqlalchemy import Row, create_engine

from sluicegate.producers.client import Sluice
from sluicegate.shared.celery_app import JobMessage, make_celery, publish
from sluicegate.shared.events import reply_key
from sluicegate.shared.jobs import Lane
from sluicegate.shared.queues import pool_queues, queue_name
from sluicegate.shared.settings import Settings
from sluicegate.workers.cli import worker_argv
from sluicegate.workers.journal import KEY as JOURNAL_KEY
from sluicegate.workers.local.processes import end
from sluicegate.workers.local.sandbox_control import SandboxControl
from tests import prefork
from tests.polling import eventually

#: The sizes that the issues state, or small ones that prove the same.
FULL = bool(os.environ.get("SLUICE_TEST_FULL"))

#: Shorter than in production, but for how long a worker may be silent: busy machines have hiccups.
SHORT: dict[str, Any] = {
    "beat_interval_s": 0.3,
    "lost_after_s": 3.0,
    "sweep_interval_s": 0.2,
    "retry_base_s": 0.2,
    "reply_recheck_s": 1.0,
    "grace_s": 15.0,
    "jobs_in_flight": 200,
}

_OVER = ("succeeded", "failed", "cancelled", "expired")


def environment_of(settings: Settings, **more: str) -> dict[str, str]:
    """Return a child process's environment for these settings."""
    variables = dict(os.environ)
    for name, field in Settings.model_fields.items():
        value = getattr(settings, name)
        if value is not None:
            plain = value.get_secret_value() if isinstance(value, SecretStr) else value
            variables[str(field.validation_alias or f"SLUICE_{name.upper()}")] = str(plain)
    return variables | more


def with_sandbox(settings: Settings, sandbox: SandboxControl, **changes: Any) -> Settings:
    """Return short-lived settings with the sandbox as both providers."""
    return settings.model_copy(
        update={
            "openai_api_key": SecretStr("sandbox"),
            "openai_base_url": sandbox.openai_base_url,
            "anthropic_api_key": SecretStr("sandbox"),
            "anthropic_base_url": sandbox.anthropic_base_url,
            **SHORT,
            **changes,
        }
    )


class Service:
    """One process of a fleet, with a log."""

    def __init__(self, name: str, argv: list[str], env: dict[str, str], log_path: Path) -> None:
        self.name = name
        self._log_path = log_path
        with log_path.open("ab") as log:
            self._process = prefork.start(argv, env=env, cwd=log_path.parent, output=log)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def log(self) -> str:
        """All it said so far."""
        return self._log_path.read_text(errors="replace")

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def kill(self) -> None:
        """Kill -9, and wait until it is gone."""
        self._process.kill()
        self._process.wait(10)

    def wait(self, timeout_s: float) -> int:
        """Wait for its end; return the exit code, negative for a signal."""
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(
                f"{self.name} still runs after {timeout_s} s:\n{self.log}"
            ) from None

    def ended(self) -> int | None:
        return self._process.poll()

    def end(self) -> None:
        """End it if it runs, whatever state it is in."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGCONT)
            end(self._process, (signal.SIGTERM, 20.0))


class Rig:
    """A fleet in pieces. Main thread only, as processes die with the thread that starts them."""

    def __init__(self, *, settings: Settings, sandbox: SandboxControl, folder: Path) -> None:
        self.settings = settings
        self.sandbox = sandbox
        self.folder = folder
        self.client = Sluice(settings)
        self._app = make_celery(settings)
        self.redis = redis.Redis.from_url(settings.redis_dsn)
        # Tests ask all the time, and restart the server under it.
        self._engine = create_engine(
            settings.database_dsn, pool_pre_ping=True, isolation_level="AUTOCOMMIT"
        )
        self._services: list[Service] = []
        self._numbers = count(1)
        self._markers: dict[str, UUID] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for service in self._services:
            if service.ended() is None:
                service.signal(signal.SIGCONT)
                service.signal(signal.SIGTERM)
        for service in self._services:
            service.end()
        self.client.close()
        self._app.close()
        self.redis.close()
        self._engine.dispose()

    # Processes

    @property
    def services(self) -> list[Service]:
        """The processes that run."""
        return [service for service in self._services if service.ended() is None]

    def begin_worker(
        self,
        pool: str,
        use_cases: Sequence[str],
        lane: Lane = Lane.INTERACTIVE,
        *,
        follow: bool = False,
        variables: dict[str, str] | None = None,
        **changes: Any,
    ) -> Service:
        """Start a worker; `changes` are settings of its own. `await_worker` waits for it."""
        name = f"w{next(self._numbers)}"
        argv = worker_argv(pool, lane, pool_queues(list(use_cases), pool, lane), follow=follow)
        argv[argv.index("-n") + 1] = f"{name}@test"
        settings = self.settings.model_copy(update=changes)
        return self._start(name, argv, environment_of(settings, **(variables or {})))

    def await_worker(self, worker: Service) -> Service:
        """Wait until it has entered its row."""

        def entered() -> bool:
            assert worker.ended() is None, worker.log
            return bool(self.worker_ids(worker))

        eventually(entered, 60)
        return worker

    def start_worker(self, pool: str, use_cases: Sequence[str], *args: Any, **more: Any) -> Service:
        """Start a worker and wait until it serves."""
        return self.await_worker(self.begin_worker(pool, use_cases, *args, **more))

    def start_sweep(self, **changes: Any) -> Service:
        argv = [sys.executable, "-m", "sluicegate.cli", "sweep"]
        settings = self.settings.model_copy(update=changes)
        return self._start(f"sweep{next(self._numbers)}", argv, environment_of(settings))

    def tell(self, worker: Service, command: str, **arguments: Any) -> None:
        """Send a remote control command, as `celery control` does, and check that it was done."""
        replies = self._app.control.broadcast(
            command,
            destination=[f"{worker.name}@test"],
            arguments=arguments,
            reply=True,
            timeout=10,
            limit=1,
        )
        assert replies, f"{worker.name} did not answer {command}"
        assert "ok" in replies[0][f"{worker.name}@test"], replies

    def worker_ids(self, worker: Service) -> list[UUID]:
        """Ids under which this worker has a row now."""
        rows = self.rows("SELECT id FROM workers WHERE name = %(name)s", name=f"{worker.name}@test")
        return [row.id for row in rows]

    def _start(self, name: str, argv: list[str], env: dict[str, str]) -> Service:
        service = Service(name, argv, env, self.folder / f"{name}.log")
        self._services.append(service)
        return service

    # Jobs

    def submit(
        self, use_case: str, jobs: int, *, text: str = "Summarise the call.", **options: Any
    ) -> list[UUID]:
        """Submit jobs; each prompt ends in a marker of its own, `marker` returns it."""
        markers = [f"[{uuid4().hex}]" for _ in range(jobs)]
        handles = self.client.submit_many(
            use_case, [{"prompt": f"{text}\n{marker}"} for marker in markers], **options
        )
        ids = [handle.id for handle in handles]
        self._markers |= dict(zip(markers, ids, strict=True))
        return ids

    def marker(self, job_id: UUID) -> str:
        """Text that occurs in this job's prompt alone."""
        return next(marker for marker, job in self._markers.items() if job == job_id)

    def publish(self, queue: str, job_ids: Sequence[UUID], *, times: int = 1) -> None:
        """Publish a message for these jobs, as a broker that repeats itself would."""
        (row,) = self.rows("SELECT now() AS now")
        message = JobMessage(queue=queue, job_ids=tuple(job_ids), published_at=row.now)
        publish(self._app, [message] * times)

    def await_over(self, job_ids: Sequence[UUID], timeout_s: float = 60) -> None:
        """Wait until all of these jobs have ended."""

        def over() -> bool:
            counts = self.states(job_ids)
            return sum(counts.get(state, 0) for state in _OVER) == len(job_ids)

        try:
            eventually(over, timeout_s)
        except AssertionError as late:
            raise AssertionError(
                f"{late}: {self.states(job_ids)}, {self._held_back(job_ids)}"
            ) from None

    def _held_back(self, job_ids: Sequence[UUID]) -> list[Any]:
        return self.rows(
            "SELECT held_back, run_at - now() AS due, count(*) FROM jobs"
            " WHERE id = ANY(%(ids)s) AND state = 'parked' GROUP BY 1, 2 LIMIT 5",
            ids=list(job_ids),
        )

    def states(self, job_ids: Sequence[UUID]) -> dict[str, int]:
        """How many of these jobs are in which state."""
        rows = self.rows(
            "SELECT state, count(*) AS n FROM jobs WHERE id = ANY(%(ids)s) GROUP BY state",
            ids=list(job_ids),
        )
        return {row.state: row.n for row in rows}

    def in_flight(self, worker: Service) -> list[UUID]:
        """Jobs with a call that this worker has dispatched and not yet settled."""
        rows = self.rows(
            "SELECT job_id FROM attempts a JOIN workers w ON w.id = a.worker_id"
            " WHERE a.state = 'dispatching' AND w.name = %(name)s",
            name=f"{worker.name}@test",
        )
        return [row.job_id for row in rows]

    def rows(self, statement: str, **values: Any) -> list[Row[Any]]:
        with self._engine.connect() as connection:
            return list(connection.exec_driver_sql(statement, values).all())

    # Redis

    def waiting(self, use_case: str, pool: str, lane: Lane = Lane.INTERACTIVE) -> int:
        """How many messages wait in a queue."""
        name = self.settings.redis_prefix + queue_name(use_case, pool, lane)
        found: Any = self.redis.llen(name)
        return int(found)

    def journaled(self) -> set[UUID]:
        """Jobs of which the journal keeps a settlement."""
        found: Any = self.redis.xrange(self.settings.redis_prefix + JOURNAL_KEY)
        return {UUID(orjson.loads(fields[b"s"])["job_id"]) for _, fields in found}

    def channel(self, job_id: UUID) -> list[tuple[str, dict[bytes, bytes]]]:
        """Read the raw entries of a job's reply channel."""
        found: Any = self.redis.xrange(self.settings.redis_prefix + reply_key(job_id))
        return [(entry_id.decode(), fields) for entry_id, fields in found]

    # Books

    def calls(self, job_ids: Iterable[UUID]) -> dict[UUID, list[dict[str, Any]]]:
        """Calls that the sandbox has seen, by job, in the order in which they came."""
        wanted = set(job_ids)
        found: dict[UUID, list[dict[str, Any]]] = defaultdict(list)
        for call in self.sandbox.calls():
            tail = call["prompt_tail"]
            job_id = self._markers.get(tail[tail.rfind("[") :])
            if job_id in wanted:
                found[job_id].append(call)
        return found

    def attempts(self, job_ids: Iterable[UUID]) -> dict[UUID, list[Row[Any]]]:
        """Attempts of jobs in order, each with its `first` entry, `correction` and `booked`."""
        found: dict[UUID, list[Row[Any]]] = defaultdict(list)
        statement = """
            SELECT a.*, e.kind, e.entries, e.corrections, coalesce(e.booked, 0) AS booked
            FROM attempts a LEFT JOIN (
                SELECT attempt_id, min(kind) FILTER (WHERE kind <> 'correction') AS kind,
                       count(*) FILTER (WHERE kind <> 'correction') AS entries,
                       count(*) FILTER (WHERE kind = 'correction') AS corrections,
                       sum(amount_nano_usd)::bigint AS booked
                FROM cost_entries GROUP BY attempt_id) e ON e.attempt_id = a.id
            WHERE a.job_id = ANY(%(ids)s) ORDER BY a.job_id, a.fence, a.id
        """
        for row in self.rows(statement, ids=list(job_ids)):
            found[row.job_id].append(row)
        return found

    def booked_nano_usd(self, job_ids: Iterable[UUID]) -> int:
        (row,) = self.rows(
            "SELECT coalesce(sum(amount_nano_usd), 0)::bigint AS booked FROM cost_entries"
            " WHERE job_id = ANY(%(ids)s)",
            ids=list(job_ids),
        )
        return int(row.booked)

    def check_once(self, job_ids: Sequence[UUID]) -> None:
        """Every job succeeded, once, with one attempt and one call, and the books agree."""
        calls, attempts = self.calls(job_ids), self.attempts(job_ids)
        assert self.states(job_ids) == {"succeeded": len(job_ids)}
        for job_id in job_ids:
            found = calls[job_id], attempts[job_id]
            assert [len(one) for one in found] == [1, 1], found
            (call,), (attempt,) = found
            assert (attempt.state, attempt.entries, attempt.kind) == ("succeeded", 1, "actual")
            assert (attempt.request_id, attempt.booked) == (
                call["request_id"],
                call["billed_nano_usd"],
            )
        billed = sum(call["billed_nano_usd"] for (call,) in calls.values())
        assert self.booked_nano_usd(job_ids) == billed > 0
        self.check_books(job_ids)

    def check_books(self, job_ids: Sequence[UUID]) -> None:
        """Hold every ended job against its attempts, its money, and the provider's own log.

        One result a job; one first entry for every attempt that may have cost money, and at most
        one correction; no call without an attempt; what was answered costs what was billed, and
        what is unknown is booked at least at that.
        """
        calls, attempts = self.calls(job_ids), self.attempts(job_ids)
        rows = self.rows(
            "SELECT j.id, j.state, j.attempts_used, j.cost_nano_usd, r.body,"
            " (SELECT coalesce(sum(amount_nano_usd), 0)::bigint FROM cost_entries c"
            "  WHERE c.job_id = j.id) AS booked"
            " FROM jobs j JOIN results r ON r.job_id = j.id WHERE j.id = ANY(%(ids)s)",
            ids=list(job_ids),
        )
        assert len(rows) == len(job_ids)
        for job in rows:
            assert job.state == job.body["state"]
            assert job.cost_nano_usd == job.booked
            paid = [attempt for attempt in attempts[job.id] if attempt.state != "void"]
            assert len(calls[job.id]) <= len(paid), (job, paid)
            assert len([a for a in paid if a.state == "succeeded"]) == (job.state == "succeeded")
            billed = {call["request_id"]: call["billed_nano_usd"] for call in calls[job.id]}
            for attempt in paid:
                assert attempt.state != "dispatching"
                if attempt.state != "failed":
                    assert attempt.entries == 1, attempt
                assert (attempt.corrections or 0) == (attempt.state == "corrected")
                if attempt.state == "corrected" or attempt.kind == "actual":
                    assert attempt.booked == billed[attempt.request_id]
            assert job.booked >= sum(billed.values())


@contextmanager
def open_rig(
    *, database_url: str, redis_url: str, sandbox: SandboxControl, folder: Path, **changes: Any
) -> Iterator[Rig]:
    """Open a rig on a migrated database, with a Redis prefix of its own.

    `changes` are settings for all its processes.
    """
    prefix = f"test-{uuid4().hex}:"
    given = Settings(
        _env_file=None,
        database_url=database_url,
        redis_url=redis_url,
        redis_prefix=prefix,
    )
    settings = with_sandbox(given, sandbox, **changes)
    with Rig(settings=settings, sandbox=sandbox, folder=folder) as rig:
        yield rig
        for key in rig.redis.scan_iter(match=f"{prefix}*", count=1000):
            rig.redis.delete(key)
