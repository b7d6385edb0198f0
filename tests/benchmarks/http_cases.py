"""What a request over HTTP costs and how much it is delayed: `./dev bench --http`.

One HTTP process and one worker share the measured core; the clients, in a process of their own, the
provider and the servers have the other one. The provider answers in exactly 300 ms, or sends its
first token after 100 ms: what a client waits beyond that is ours.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from urllib.parse import urlsplit

import httpx2
from rich.console import Console
from rich.table import Table

from sluicegate.producers.client import Sluice
from sluicegate.shared.jobs import Lane
from sluicegate.shared.queues import queue_name
from tests.benchmarks.cases import MODEL, USE_CASE
from tests.benchmarks.measuring import BenchError, Cores, Processes
from tests.benchmarks.stage import Stage, wait_until
from tests.http_servers import free_port, http_argv, make_key

Figures = dict[str, float]

LATENCY_MS, FIRST_TOKEN_MS = 300.0, 100.0
#: Nobody works on it, so that its readers have nothing to read.
_IDLE_USE_CASE = "complex"

_START_S = 60.0
_SETTLE_S = 3.0
_BOUNDLESS = 1_000_000_000


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """A server and a worker that run."""

    stage: Stage
    port: int
    api_key: str
    http: Processes
    worker: Processes

    def load(self, mode: str, **options: object) -> list[str]:
        """Return the arguments of Python for the clients; `port` and `model` of a provider's."""
        arguments = ["-m", "tests.benchmarks.http_load", mode]
        named = {"port": self.port, "api_key": self.api_key} | options
        for name, value in named.items():
            arguments += [f"--{name.replace('_', '-')}", str(value)]
        return arguments


@contextmanager
def fleet(stage: Stage) -> Iterator[Fleet]:
    """Run them on the measured core, and the sweep on the other one."""
    env = stage.environment(
        http_rate_per_s=_BOUNDLESS, http_rate_burst=_BOUNDLESS, jobs_in_flight=500
    )
    port = free_port()
    queue = queue_name(USE_CASE, "openai", Lane.INTERACTIVE)
    working = ["-m", "celery", "-A", "sluicegate.workers.app", "worker"]
    working += ["--loglevel", "WARNING", "-Q", queue]
    with ExitStack() as undo:
        undo.enter_context(stage.process("sweep", ["-m", "sluicegate.cli", "sweep"], env))
        worker = undo.enter_context(stage.process("worker", working, env, measured=True))
        http = undo.enter_context(stage.process("http", http_argv(port), env, measured=True))
        wait_until(lambda: _is_live(port), _START_S, "the server does not start", alive=http)
        wait_until(
            lambda: bool(stage.query("SELECT count(*) FROM workers WHERE name LIKE 'celery%'")),
            _START_S,
            "the worker does not start",
            alive=worker,
        )
        yield Fleet(
            stage=stage,
            port=port,
            api_key=make_key(stage.settings),
            http=Processes(http.pid),
            worker=Processes(worker.pid),
        )


def _is_live(port: int) -> bool:
    try:
        return httpx2.get(f"http://127.0.0.1:{port}/health/live").is_success
    except httpx2.TransportError:
        return False


def throughput(fleet: Fleet, seconds: float, *, tiny: bool) -> Figures:
    """CPU of both processes a request, at 200 clients that ask again and again."""
    clients = 20 if tiny else 200
    stage = fleet.stage
    with stage.process("clients", fleet.load("closed", clients=clients)) as load:
        before = stage.sandbox.bill()["calls"]
        wait_until(
            lambda: stage.sandbox.bill()["calls"] >= before + 3 * clients,
            _START_S,
            f"the clients get no answers\n{stage.last_words()}",
            alive=load,
        )
        begin = _instant(fleet)
        time.sleep(seconds)
        end = _instant(fleet)
        if load.poll() is not None:
            raise BenchError(f"the clients ended\n{stage.last_words()}")
    answered = end.answered - begin.answered
    http_ms = 1000 * (end.http_s - begin.http_s) / answered
    worker_ms = 1000 * (end.worker_s - begin.worker_s) / answered
    return {
        "cpu_ms": http_ms + worker_ms,
        "http_ms": http_ms,
        "worker_ms": worker_ms,
        "requests_per_s": answered / (end.at_s - begin.at_s),
    }


@dataclass(frozen=True, slots=True)
class _Instant:
    at_s: float
    answered: int
    http_s: float
    worker_s: float


def _instant(fleet: Fleet) -> _Instant:
    found = fleet.stage.sandbox.bill()
    return _Instant(
        time.monotonic(),
        int(found["calls"] - found["in_flight"]),
        fleet.http.cpu_s(),
        fleet.worker.cpu_s(),
    )


def overhead(fleet: Fleet, seconds: float, *, tiny: bool) -> Figures:
    """What an answer takes beyond the provider's own time, at 50 requests a second."""
    return _late(fleet, "rate", seconds, tiny=tiny)


def first_token(fleet: Fleet, seconds: float, *, tiny: bool) -> Figures:
    """What a first token takes beyond the provider's own time, at 20 streams a second."""
    return _late(fleet, "stream", seconds, tiny=tiny)


def _late(fleet: Fleet, mode: str, seconds: float, *, tiny: bool) -> Figures:
    """Ask at a rate, first the provider itself, then us; return what we take longer."""
    per_s = {"rate": 50, "stream": 20}[mode] / (5 if tiny else 1)
    provider = urlsplit(fleet.stage.sandbox.openai_base_url).port
    own_ms = median(_times(fleet, mode, per_s, seconds, port=provider, model=MODEL))
    late_ms = [took - own_ms for took in _times(fleet, mode, per_s, seconds)]
    percents = quantiles(late_ms, n=100, method="inclusive")
    return {
        "p50_ms": percents[49],
        "p99_ms": percents[98],
        "worst_ms": max(late_ms),
        "provider_ms": own_ms,
    }


def _times(
    fleet: Fleet, mode: str, per_s: float, seconds: float, **options: object
) -> Sequence[float]:
    stage = fleet.stage
    load = fleet.load(mode, per_s=per_s, seconds=seconds, **options)
    with stage.process("clients", load) as clients:
        wait_until(lambda: clients.poll() is not None, seconds + _START_S, "the clients do not end")
    if clients.returncode:
        raise BenchError(f"the clients failed\n{stage.last_words()}")
    times: list[float] = json.loads(stage.said("clients"))["ms"]
    return times


def idle_readers(fleet: Fleet, seconds: float, *, tiny: bool) -> Figures:
    """Memory of the HTTP process for 1,000 readers of events that do not come."""
    readers = 100 if tiny else 1000
    stage = fleet.stage
    ids = Path("readers.ids").absolute()
    with Sluice(stage.settings) as sluice:
        prompts = [f"Nobody answers {n}." for n in range(readers)]
        jobs = sluice.submit_many(_IDLE_USE_CASE, prompts)
        ids.write_text("\n".join(str(job.id) for job in jobs))
        before = fleet.http.rss_mib()
        with stage.process("readers", fleet.load("readers", jobs=ids)) as load:
            wait_until(
                lambda: "readers" in stage.said("readers"),
                _START_S,
                f"the readers do not come\n{stage.last_words()}",
                alive=load,
            )
            cpu_s, since = fleet.http.cpu_s(), time.monotonic()
            time.sleep(_SETTLE_S + seconds)
            busy = (fleet.http.cpu_s() - cpu_s) / (time.monotonic() - since)
            after = fleet.http.rss_mib()
    return {"mib": after - before, "busy": busy}


CASES: dict[str, Callable[..., Figures]] = {
    "http_200_clients": throughput,
    "http_50_per_s": overhead,
    "http_first_token": first_token,
    "http_idle_readers": idle_readers,
}


def main(
    console: Console, *, rounds: int, seconds: float, tiny: bool, only: Sequence[str] = ()
) -> None:
    """Print a JSON line for each case on stdout, and a table for people."""
    found: dict[str, list[Figures]] = defaultdict(list)
    with tempfile.TemporaryDirectory(prefix="sluice-bench-") as folder:
        Path(folder).chmod(0o711)  # the servers' own user walks through it
        with Stage(Path(folder), Cores.choose()) as stage:
            for number in range(1, rounds + 1):
                for name, case in CASES.items():
                    if only and name not in only:
                        continue
                    stage.clear(latency_ms=LATENCY_MS)
                    stage.sandbox.settings(first_token_ms=FIRST_TOKEN_MS)
                    with fleet(stage) as running:
                        figures = case(running, seconds, tiny=tiny)
                    found[name].append(figures)
                    console.print(f"round {number}  {name:<20} {_shown(figures)}", highlight=False)
    table = Table(title=f"The HTTP door: medians of {rounds} rounds of {seconds:g} s")
    for heading in ("case", "what", "figures"):
        table.add_column(heading)
    for name, figures_of in found.items():
        middle = {key: median(one[key] for one in figures_of) for key in figures_of[0]}
        rounded = {key: round(value, 2) for key, value in middle.items()}
        sys.stdout.write(json.dumps({"case": name} | rounded) + "\n")
        what = (CASES[name].__doc__ or "").strip()
        table.add_row(name, what, _shown(middle).replace("  ", "\n"))
    console.print(table)


def _shown(figures: Figures) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
