"""One round of one case: start it, let it settle, watch it between two instants, end it."""

from __future__ import annotations

import subprocess
import time
from dataclasses import dataclass
from typing import Any

from tests.benchmarks.cases import Case
from tests.benchmarks.measuring import BenchError, Measured, Processes
from tests.benchmarks.stage import Stage, wait_until

_START_S = 60.0
_SAMPLE_S = 0.25
_SHORTEST_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class _Instant:
    """What had happened by a moment."""

    at_s: float
    #: The same moment on the calendar, for rows.
    time: float
    answered: int
    cpu_s: float


def measure(stage: Stage, case: Case, seconds: float) -> Measured:
    """Measure a case over `seconds`, or less if its work ends before; raise `BenchError`."""
    stage.clear(latency_ms=case.latency_ms)
    jobs = case.backlog(seconds)
    with (
        case.supplied(stage, jobs),
        stage.process(
            case.name, case.command(jobs), case.environment(stage), measured=True
        ) as process,
    ):
        try:
            return _watch(stage, case, process, jobs, seconds)
        except BenchError as problem:
            raise BenchError(f"{case.name}: {problem}\n{stage.last_words()}") from problem


def _watch(
    stage: Stage, case: Case, process: subprocess.Popen[bytes], jobs: int | None, seconds: float
) -> Measured:
    processes = Processes(process.pid)
    peak = 0

    def bill() -> dict[str, Any]:
        nonlocal peak
        found = stage.sandbox.bill()
        peak = max(peak, found["in_flight"])
        return found

    def answered() -> int:
        found = bill()
        return int(found["calls"] - found["in_flight"])

    def instant() -> _Instant:
        return _Instant(
            answered=answered(), at_s=time.monotonic(), time=time.time(), cpu_s=processes.cpu_s()
        )

    wait_until(lambda: answered() > 0, _START_S, "it makes no calls", alive=process)
    begin_at = time.monotonic() + case.warm_up_s
    wait_until(
        lambda: answered() >= case.warm_up_jobs and time.monotonic() >= begin_at,
        _START_S + case.warm_up_s,
        "it does not warm up",
        alive=process,
        poll_s=_SAMPLE_S,
    )
    begin = instant()
    rss_mib = processes.rss_mib()

    def over() -> bool:
        nonlocal rss_mib
        rss_mib = max(rss_mib, processes.rss_mib())
        found = bill()
        # Its last jobs run with fewer and fewer beside them: the window ends before.
        runs_dry = jobs is not None and found["calls"] >= jobs - case.in_flight // 2
        # The jobs of a window end in waves: it is as long as a few, however slow the machine.
        enough = found["calls"] - found["in_flight"] - begin.answered >= case.in_flight
        return runs_dry or (enough and time.monotonic() - begin.at_s >= seconds)

    wait_until(over, seconds + _START_S, "its window does not end", alive=process, poll_s=_SAMPLE_S)
    end = instant()
    window_s = end.at_s - begin.at_s
    if window_s < min(_SHORTEST_S, seconds):
        raise BenchError("its work was done before it could be measured: raise its `at_most_per_s`")
    settled = case.succeeded(stage, begin.time, end.time)
    done = end.answered - begin.answered if settled is None else settled
    if not done:
        raise BenchError(f"it did nothing for {window_s:.1f} s")
    cpu_s = end.cpu_s - begin.cpu_s
    return Measured(
        jobs_per_s=done / window_s,
        cpu_ms_per_job=1000 * cpu_s / done,
        rss_mib=rss_mib,
        peak_in_flight=peak,
        busy=cpu_s / window_s,
    )
