"""What the gates cost, how much of a limit they let through, and how long voice waits at them."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import orjson

from sluicegate.producers.client import Sluice
from sluicegate.shared.jobs import Lane
from sluicegate.shared.queues import queue_name
from tests.benchmarks.cases import MODEL, USE_CASE
from tests.benchmarks.measuring import BenchError
from tests.benchmarks.stage import Stage, wait_until

#: Named figures of a round.
Figures = dict[str, float]

_START_S = 60.0
_MINUTE_S = 60.0
#: Never reached: everything that a limit costs, and no refusal.
_BOUNDLESS = 1_000_000_000


@dataclass(frozen=True, kw_only=True)
class GateCase:
    """A case that gives figures of its own instead of a rate."""

    name: str
    what: str
    #: How many rounds it takes at most.
    rounds: int | None = None

    def measure(self, stage: Stage, seconds: float, *, tiny: bool) -> Figures:
        """Measure; raise `BenchError`."""
        raise NotImplementedError


class Admission(GateCase):
    """CPU of asking and reporting, 25 jobs at a time: the worker's and the server's."""

    def measure(self, stage: Stage, seconds: float, *, tiny: bool) -> Figures:
        """Run the script on the measured core."""
        stage.clear(latency_ms=0)
        stage.limit(
            MODEL,
            enforce=False,
            requests_per_minute=_BOUNDLESS,
            tokens_per_minute=_BOUNDLESS,
            max_concurrent=_BOUNDLESS,
        )
        before_s = stage.redis_cpu_s()
        command = ["-m", "tests.benchmarks.admission", "--seconds", str(seconds)]
        with stage.process(self.name, command, measured=True) as process:
            wait_until(lambda: process.poll() is not None, seconds + _START_S, "it does not end")
        if process.returncode:
            raise BenchError(f"{self.name} failed\n{stage.last_words()}")
        found = orjson.loads(stage.said(self.name))
        added_s = found["with_s"] - found["without_s"]
        return {
            "cpu_ms_per_job": 1000 * added_s / found["jobs"],
            "redis_cpu_ms_per_job": 1000 * (stage.redis_cpu_s() - before_s) / found["jobs"],
        }


#: Jobs from which a fleet learns how long answers are.
_LEARNED_FROM = 40


class Limits(GateCase):
    """Four workers share a limit; then voice jobs come while bulk work is at one."""

    requests_per_minute = 600
    tokens_per_minute = 100_000

    def measure(self, stage: Stage, seconds: float, *, tiny: bool) -> Figures:
        """Watch a minute, or as little as `seconds` when all is tiny; then some voice jobs."""
        shared = (
            self._shared(stage, seconds, workers=1)
            if tiny
            else self._shared(stage, max(seconds, _MINUTE_S), workers=4)
        )
        return shared | self._voice(stage, seconds)

    def _shared(self, stage: Stage, window_s: float, *, workers: int) -> Figures:
        stage.clear(latency_ms=300)
        stage.limit(
            MODEL,
            requests_per_minute=self.requests_per_minute,
            tokens_per_minute=self.tokens_per_minute,
        )
        jobs = round(self.requests_per_minute * (window_s / _MINUTE_S) * 1.2) + 50
        with (
            _fleet(stage, [Lane.INTERACTIVE] * workers),
            Sluice(settings=stage.settings) as sluice,
        ):
            learned = self._learn(stage, sluice, window_s) if workers > 1 else 0
            sluice.submit_many(USE_CASE, map(_short, range(jobs)), deadline=3600)
            wait_until(
                lambda: stage.sandbox.bill()["calls"] > learned, _START_S, "it makes no calls"
            )
            began_at = min(call["started_at"] for call in stage.sandbox.calls()[learned:])
            wait_until(
                lambda: time.time() >= began_at + window_s, window_s + 1, "time stands still"
            )
            calls = [
                call
                for call in stage.sandbox.calls()[learned:]
                if call["started_at"] < began_at + window_s
            ]
        minutes = window_s / _MINUTE_S
        let_in = [call for call in calls if call["status"] != 429]
        return {
            "limit_used": max(
                len(let_in) / (minutes * self.requests_per_minute),
                sum(map(_tokens, let_in)) / (minutes * self.tokens_per_minute),
            ),
            "throttled": 1 - len(let_in) / len(calls),
        }

    def _learn(self, stage: Stage, sluice: Sluice, window_s: float) -> int:
        """Have the fleet see how long answers are, and its minute pass; return the calls made."""
        sluice.submit_many(USE_CASE, map(_short, range(_LEARNED_FROM)), deadline=3600)
        wait_until(
            lambda: (
                stage.query("SELECT count(*) FROM jobs WHERE state = 'succeeded'") == _LEARNED_FROM
            ),
            _START_S,
            "the first jobs are not answered",
        )
        until = time.monotonic() + window_s
        wait_until(lambda: time.monotonic() >= until, window_s + 1, "time stands still")
        return len(stage.sandbox.calls())

    def _voice(self, stage: Stage, seconds: float) -> Figures:
        stage.clear(latency_ms=300)
        # A hundred a second, of which bulk work takes eighty.
        stage.limit(MODEL, requests_per_minute=6_000)
        with (
            _fleet(stage, [Lane.BULK, Lane.INTERACTIVE]),
            Sluice(settings=stage.settings) as sluice,
        ):
            bulk = round(100 * (seconds + 10))
            sluice.submit_many(USE_CASE, map(_short, range(bulk)), lane="bulk")
            wait_until(
                lambda: stage.query("SELECT count(*) FROM jobs WHERE held_back IS NOT NULL") > 0,
                _START_S,
                "the bulk work does not come to the limit",
            )
            until = time.monotonic() + seconds
            voice = 0
            while time.monotonic() < until or not voice:
                sluice.submit("voice", _short(voice))
                voice += 1
                time.sleep(0.1)
            wait_until(
                lambda: (
                    stage.query(
                        "SELECT count(*) FROM jobs WHERE use_case = 'voice' AND state = 'succeeded'"
                    )
                    == voice
                ),
                _START_S,
                "the voice jobs are not answered",
            )
            if not stage.query("SELECT count(*) FROM jobs WHERE state IN ('parked', 'queued')"):
                raise BenchError("the bulk work was over before the voice jobs were")
            waited_s = stage.query(_WAITED)
        return {"voice_wait_p95_ms": 1000 * waited_s}


# From the moment it was accepted until its first call was let go.
_WAITED = """
SELECT percentile_cont(0.95) WITHIN GROUP (ORDER BY waited)::float8 FROM (
    SELECT extract(epoch FROM min(a.dispatched_at) - j.created_at) AS waited
    FROM jobs j JOIN attempts a ON a.job_id = j.id WHERE j.use_case = 'voice' GROUP BY j.id) w
"""


def _short(n: int) -> str:
    """Return a prompt whose call takes about as much of one limit as of the other."""
    return f"Summarise call {n} in two sentences for the account team.\nTOKENS: 140"


def _tokens(call: dict[str, Any]) -> int:
    usage = call["usage"] or {}
    # Reasoning is a part of the output.
    return int(sum(usage.values()) - usage.get("reasoning", 0))


@contextmanager
def _fleet(stage: Stage, lanes: Sequence[Lane]) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Run a sweep and a worker for each of these lanes, all on the measured core."""
    with ExitStack() as undo:
        undo.enter_context(stage.process("sweep", ["-m", "sluicegate.cli", "sweep"]))
        workers = []
        for number, lane in enumerate(lanes):
            queues = [queue_name(name, "openai", lane) for name in (USE_CASE, "voice")]
            command = [
                *("-m", "celery", "-A", "sluicegate.workers.app", "worker"),
                *("--loglevel", "WARNING", "-n", f"w{number}@bench", "-Q", ",".join(queues)),
            ]
            workers.append(undo.enter_context(stage.process(f"w{number}", command, measured=True)))
        wait_until(
            lambda: stage.query("SELECT count(*) FROM workers") == len(lanes),
            _START_S,
            "the workers do not start",
        )
        yield workers


GATE_CASES: tuple[GateCase, ...] = (
    Admission(name="admission", what="asking and reporting at the gates, 25 jobs at a time"),
    Limits(
        name="gates",
        what="600 requests, 100,000 tokens a minute, 4 workers; voice beside bulk work",
        rounds=1,
    ),
)
