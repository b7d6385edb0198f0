"""The stage of a run: servers, database and sandbox, started once, all on the other core."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import orjson
import redis
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.pool import NullPool

from sluicegate.shared import migrations
from sluicegate.shared.settings import Settings, load_settings
from sluicegate.workers.local.processes import end, spawn
from sluicegate.workers.local.sandbox_control import SandboxControl
from sluicegate.workers.local.servers import LocalServers
from tests.benchmarks.measuring import BenchError, Cores

ROOT = Path(__file__).resolve().parents[2]

_DEVELOPERS_OWN = ("SLUICE_", "OPENAI_", "ANTHROPIC_", "CELERY_")
_POLL_S = 0.05
#: Queues, rows and calls of an earlier case are given this long to go.
_SETTLE_S = 60.0

_ROWS = "jobs, job_bodies, attempts, cost_entries, results, workers"
_UNLIMITED = """
UPDATE llm_providers SET requests_per_minute = NULL, tokens_per_minute = NULL, max_concurrent = NULL
"""


class Stage:
    """Everything around the measured process; a context manager. Main thread only.

    folder: for data and logs; it is also the working folder, so that no `.env` is read.
    """

    def __init__(self, folder: Path, cores: Cores) -> None:
        self.cores = cores
        self._folder = folder
        self._exit = ExitStack()
        self._provider: dict[str, str] = {}

    def __enter__(self) -> Self:
        with ExitStack() as undo:
            self._start(undo)
            self._exit = undo.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._exit.close()

    def _start(self, undo: ExitStack) -> None:
        for name in list(os.environ):
            if name.startswith(_DEVELOPERS_OWN):
                del os.environ[name]
        os.chdir(self._folder)
        os.sched_setaffinity(0, {self.cores.others})
        servers = undo.enter_context(LocalServers(self._folder / "servers"))
        self.settings: Settings = load_settings(
            database_url=servers.database_url, redis_url=servers.redis_url
        )
        migrations.upgrade(self.settings)
        self._engine: Engine = create_engine(
            self.settings.database_dsn, poolclass=NullPool, isolation_level="AUTOCOMMIT"
        )
        self._redis = undo.enter_context(redis.Redis.from_url(self.settings.redis_dsn))
        self.sandbox = self._start_sandbox(undo)
        self._provider = {
            "OPENAI_API_KEY": "sandbox",
            "OPENAI_BASE_URL": self.sandbox.openai_base_url,
        }

    def _start_sandbox(self, undo: ExitStack) -> SandboxControl:
        port_file = self._folder / "sandbox.port"
        process = undo.enter_context(
            self.process(
                "sandbox",
                ["-m", "sluicegate.workers.local.sandbox", "--port-file", str(port_file)],
            )
        )
        wait_until(port_file.exists, 30, "the sandbox does not start", alive=process)
        port = orjson.loads(port_file.read_bytes())["port"]
        return SandboxControl(f"http://127.0.0.1:{port}", timeout_s=30)

    def environment(self, **settings: object) -> dict[str, str]:
        """Return the environment of a child; `settings` are ours, such as `chunk_size=25`."""
        return {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "PYTHONDONTWRITEBYTECODE": "1",
            **self._provider,
            "SLUICE_DATABASE_URL": self.settings.database_dsn,
            "SLUICE_REDIS_URL": self.settings.redis_dsn,
            "BENCH_BROKER_URL": self.settings.redis_dsn,
        } | {f"SLUICE_{name.upper()}": str(value) for name, value in settings.items()}

    @contextmanager
    def process(
        self,
        name: str,
        arguments: Sequence[str],
        env: Mapping[str, str] | None = None,
        *,
        measured: bool = False,
    ) -> Iterator[subprocess.Popen[bytes]]:
        """Run Python with these arguments, on the measured core or the other one."""

        def start() -> subprocess.Popen[bytes]:
            return spawn(
                [sys.executable, *arguments],
                death_signal=signal.SIGKILL,
                cwd=self._folder,
                env=env or self.environment(),
                output=log,
            )

        with (self._folder / f"{name}.log").open("wb") as log:
            if measured:
                with self.cores.on_measured():
                    process = start()
            else:
                process = start()
        try:
            yield process
        finally:
            # Nothing that it leaves behind is needed, so nobody waits for it to finish.
            end(process)

    def last_words(self) -> str:
        """Return the ends of all logs that say something."""
        logs = {path.stem: path.read_text(errors="replace") for path in self._folder.glob("*.log")}
        return "\n".join(
            f"--- {name}\n{said[-2000:].strip()}" for name, said in logs.items() if said
        )

    def clear(self, *, latency_ms: float) -> None:
        """Make ready for a case: no rows, no queues, an idle provider that answers after this."""
        wait_until(
            lambda: self.sandbox.bill()["in_flight"] == 0, _SETTLE_S, "the provider is not idle"
        )
        self.sandbox.reset()
        self.sandbox.clear_limits()
        self.sandbox.settings(latency_ms=latency_ms)
        self._redis.flushall()
        with self._engine.connect() as connection:
            # A killed worker's last statement may still run.
            connection.execute(text(f"TRUNCATE {_ROWS} CASCADE"))
            connection.execute(text(_UNLIMITED))

    def limit(self, model: str, *, enforce: bool = True, **limits: int) -> None:
        """Tell the fleet what a model's provider takes, and have it mean that if `enforce`."""
        if enforce:
            self.sandbox.limit(model, **limits)
        values = ", ".join(f"{name} = :{name}" for name in limits)
        with self._engine.connect() as connection:
            connection.execute(
                text(f"UPDATE llm_providers SET {values} WHERE model = :model"),
                {"model": model} | limits,
            )

    def redis_cpu_s(self) -> float:
        """Return what the Redis server has spent so far, user and system time."""
        spent: Any = self._redis.info("cpu")
        return float(spent["used_cpu_user"] + spent["used_cpu_sys"])

    def said(self, name: str) -> str:
        """Return all that a process has said."""
        return (self._folder / f"{name}.log").read_text(errors="replace")

    def settle_tables(self) -> None:
        """Have Postgres know what was inserted, and write it out, before anything is measured."""
        with self._engine.connect() as connection:
            connection.execute(text(f"ANALYZE {_ROWS}"))
            connection.execute(text("CHECKPOINT"))

    def query(self, statement: str, **values: Any) -> Any:
        """Return the one value that a statement gives."""
        with self._engine.connect() as connection:
            return connection.execute(text(statement), values).scalar_one()


def wait_until(
    reached: Callable[[], bool],
    timeout_s: float,
    otherwise: str,
    *,
    alive: subprocess.Popen[bytes] | None = None,
    poll_s: float = _POLL_S,
) -> None:
    """Poll; raise `BenchError` saying `otherwise` if time passes, or `alive` ends, before."""
    give_up_at = time.monotonic() + timeout_s
    while not reached():
        if alive is not None and alive.poll() is not None:
            raise BenchError(f"{otherwise}: it ended with exit code {alive.returncode}")
        if time.monotonic() > give_up_at:
            raise BenchError(f"{otherwise} within {timeout_s:g} s")
        time.sleep(poll_s)
