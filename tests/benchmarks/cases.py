"""The cases: what is measured, and how it gets its work."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import ClassVar

from celery import Celery

from sluicegate.producers.client import Sluice
from sluicegate.shared.jobs import Lane
from sluicegate.shared.queues import queue_name
from tests.benchmarks.measuring import BenchError
from tests.benchmarks.prompts import prompt
from tests.benchmarks.stage import Stage, wait_until

#: What routing gives the use case `general` today; the comparisons name it themselves.
MODEL = "gpt-6-luna"
USE_CASE = "general"

#: Far more than any window needs: all bulk jobs wait in the broker before the worker starts.
_STAGE_AHEAD_JOBS = 1_000_000
_STAGING_S = 120.0


@dataclass(frozen=True, kw_only=True)
class Case:
    """One case. Subclasses say which program is measured and how it is supplied."""

    name: str
    what: str
    #: Calls that run at the same time.
    in_flight: int
    #: More than it does on today's machines: so much work is made ready. A faster one is measured
    #: over a shorter window.
    at_most_per_s: float
    latency_ms: float = 300
    #: From the first answer to the window at least: caches, connections and waves settle.
    warm_up_s: float = 2

    @property
    def warm_up_jobs(self) -> int:
        """How many answers come before the window, for the same reason."""
        return 2 * self.in_flight

    def backlog(self, seconds: float) -> int | None:
        """How many jobs a round needs; None if they are submitted as others end."""
        return round(self.at_most_per_s * (self.warm_up_s + seconds)) + 2 * self.warm_up_jobs

    def command(self, jobs: int | None) -> Sequence[str]:
        """The measured program: arguments for Python."""
        raise NotImplementedError

    def environment(self, stage: Stage) -> Mapping[str, str]:
        """Return the measured program's environment."""
        return stage.environment()

    @contextmanager
    def supplied(self, stage: Stage, jobs: int | None) -> Iterator[None]:
        """Make the work ready; what feeds it while the program runs ends with the `with`."""
        yield

    def succeeded(self, stage: Stage, since: float, until: float) -> int | None:
        """How many jobs ended well between two times; None: count the provider's answers."""
        return None


class Script(Case):
    """A script around the SDK."""

    def command(self, jobs: int | None) -> Sequence[str]:
        """Run the script until it is ended."""
        ceiling = ["--ceiling"] if self.name.startswith("ceiling") else []
        sizes = ["--jobs", str(jobs), "--in-flight", str(self.in_flight)]
        return ["-m", "tests.benchmarks.asyncio_script", "--model", MODEL, *sizes, *ceiling]


@dataclass(frozen=True, kw_only=True)
class PlainCelery(Case):
    """A plain Celery worker, its messages published beforehand."""

    pool: str

    def command(self, jobs: int | None) -> Sequence[str]:
        """Run the worker."""
        pool = ["-P", self.pool, "-c", str(self.in_flight)]
        return ["-m", "celery", "-A", "tests.benchmarks.celery_plain", "worker", *_QUIET, *pool]

    @contextmanager
    def supplied(self, stage: Stage, jobs: int | None) -> Iterator[None]:
        """Publish every message."""
        app = Celery("plain", broker=stage.settings.redis_dsn, set_as_current=False)
        with app.producer_pool.acquire(block=True) as producer:
            for start in range(0, jobs or 0, 500):
                with producer.batch():  # type: ignore[attr-defined]  # newer than the stubs
                    for n in range(start, min(start + 500, jobs or 0)):
                        app.send_task("plain.ask", args=(MODEL, prompt(n)), producer=producer)
        app.close()
        yield


@dataclass(frozen=True, kw_only=True)
class Fleet(Case):
    """One worker process of ours, everything on; its jobs are submitted beforehand."""

    #: Jobs a bulk message carries; None is the interactive lane, one job a message.
    chunk_size: int | None = None
    app: ClassVar[str] = "sluicegate.workers.app"

    @property
    def lane(self) -> Lane:
        """The lane its jobs take."""
        return Lane.INTERACTIVE if self.chunk_size is None else Lane.BULK

    def command(self, jobs: int | None) -> Sequence[str]:
        """Run the worker."""
        queue = queue_name(USE_CASE, "openai", self.lane)
        return ["-m", "celery", "-A", self.app, "worker", *_QUIET, "-Q", queue]

    def environment(self, stage: Stage) -> Mapping[str, str]:
        """Set what the case varies and leave everything else at its default."""
        return stage.environment(
            jobs_in_flight=self.in_flight,
            chunk_size=self.chunk_size or 1,
            stage_ahead_jobs=_STAGE_AHEAD_JOBS,
        )

    @contextmanager
    def supplied(self, stage: Stage, jobs: int | None) -> Iterator[None]:
        """Submit every job through the client, and run the sweep, which stages bulk jobs."""
        with ExitStack() as undo:
            sweep = undo.enter_context(stage.process("sweep", _SWEEP, self.environment(stage)))
            with Sluice(settings=stage.settings) as sluice:
                sluice.submit_many(USE_CASE, map(prompt, range(jobs or 0)), lane=self.lane.value)
            wait_until(
                lambda: stage.query("SELECT count(*) FROM jobs WHERE state <> 'queued'") == 0,
                _STAGING_S,
                "the sweep did not stage all jobs",
                alive=sweep,
            )
            stage.settle_tables()
            yield

    def succeeded(self, stage: Stage, since: float, until: float) -> int | None:
        """Count the jobs that were settled; raise if one has failed."""
        failed = stage.query(
            "SELECT count(*) FROM jobs WHERE state IN ('failed', 'cancelled', 'expired')"
        )
        if failed:
            raise BenchError(f"{self.name}: {failed} jobs failed, so its rate would mean nothing")
        found = stage.query(
            "SELECT count(*) FROM jobs WHERE state = 'succeeded'"
            " AND finished_at >= to_timestamp(:since) AND finished_at < to_timestamp(:until)",
            since=since,
            until=until,
        )
        return int(found)


class Ungated(Fleet):
    """The same worker without gates: what is missing is what they cost."""

    app: ClassVar[str] = "tests.benchmarks.ungated"


class Streams(Fleet):
    """Streamed jobs; a client submits one as another ends, and reads the deltas of all."""

    def backlog(self, seconds: float) -> int | None:
        """Nothing waits."""
        return None

    @contextmanager
    def supplied(self, stage: Stage, jobs: int | None) -> Iterator[None]:
        """Run the sweep and the client."""
        with ExitStack() as undo:
            env = self.environment(stage)
            undo.enter_context(stage.process("sweep", _SWEEP, env))
            reading = ["-m", "tests.benchmarks.stream_client", "--streams", str(self.in_flight)]
            client = undo.enter_context(stage.process("stream_client", reading, env))
            yield
            if client.poll() is not None:
                raise BenchError(f"{self.name}: the client ended; see why in its log")


_SWEEP = ("-m", "sluicegate.cli", "sweep")
_QUIET = ("--loglevel", "WARNING")

#: Two that differ by the gates alone.
GATED, UNGATED = "fleet_chunk_25", "fleet_chunk_25_ungated"

CASES: tuple[Case, ...] = (
    Script(
        name="plain_asyncio",
        what="a script around AsyncOpenAI, 150 at a time",
        # Where it is fastest: the SDK's client keeps 100 idle connections, so that at 500 most
        # calls connect anew, and it makes half as many.
        in_flight=150,
        at_most_per_s=700,
    ),
    Script(
        name="ceiling_aiohttp_uvloop",
        what="the same, aiohttp client and uvloop, 500",
        in_flight=500,
        at_most_per_s=1_400,
    ),
    PlainCelery(
        name="celery_threads",
        what="plain Celery, 200 threads, no accounting",
        pool="threads",
        in_flight=200,
        at_most_per_s=600,
    ),
    PlainCelery(
        name="celery_prefork",
        what="plain Celery, 16 processes, no accounting",
        pool="prefork",
        in_flight=16,
        at_most_per_s=55,
    ),
    Fleet(
        name="fleet_chunk_1",
        what="Sluicegate, one job a message",
        in_flight=500,
        at_most_per_s=600,
    ),
    Fleet(
        name=GATED,
        what="Sluicegate, 25 jobs a message",
        in_flight=500,
        at_most_per_s=1_100,
        chunk_size=25,
    ),
    Ungated(
        name=UNGATED,
        what="the same without gates: what is missing they cost",
        in_flight=500,
        at_most_per_s=1_200,
        chunk_size=25,
    ),
    Fleet(
        name="fleet_chunk_50",
        what="Sluicegate, 50 jobs a message",
        in_flight=500,
        at_most_per_s=1_100,
        chunk_size=50,
    ),
    Fleet(
        name="fleet_in_flight_2000",
        what="Sluicegate, 2,000 jobs in flight, a 3 s provider",
        in_flight=2_000,
        at_most_per_s=667,
        chunk_size=25,
        latency_ms=3_000,
        warm_up_s=4,
    ),
    Streams(
        name="fleet_stream",
        what="Sluicegate, 200 streams of 120 tokens, deltas read",
        in_flight=200,
        at_most_per_s=200,
        warm_up_s=3,
    ),
)
