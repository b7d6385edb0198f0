"""The whole fleet on one machine: what `sluice up`, the demo and the acceptance tests run."""

from __future__ import annotations

import json
import os
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from sluicegate.shared.database import make_engine
from sluicegate.shared.jobs import Lane
from sluicegate.shared.migrations import upgrade
from sluicegate.shared.queues import POOLS, pool_queues
from sluicegate.shared.settings import Settings, load_settings
from sluicegate.workers.cli import known_use_cases, worker_argv
from sluicegate.workers.local.servers import LocalServers
from sluicegate.workers.local.supervisor import Child, Supervisor

#: How long `sluice up` waits for its processes after SIGTERM, beyond the workers' own grace.
_STOP_MARGIN_S = 10.0
#: Five Python processes that import an SDK each, on a machine that may be busy.
_READY_TIMEOUT_S = 180.0


class Fleet:
    """Servers unless URLs are set, migrations, a worker for each pool and lane, and the sweep.

    data_dir: where embedded servers keep their data and children their logs; a second fleet on
    the same folder is refused. sandbox: run the sandbox provider and send both pools to it.
    settings: overrides for all processes, by field name. Start it in the main thread.
    """

    def __init__(
        self,
        *,
        data_dir: Path,
        sandbox: bool,
        bulk: bool = True,
        echo: bool = False,
        fsync: bool = True,
        pools: tuple[str, ...] = POOLS,
        sandbox_options: tuple[str, ...] = (),
        overrides: dict[str, str] | None = None,
    ) -> None:
        self._data_dir = data_dir
        self._sandbox = sandbox
        self._bulk = bulk
        self._echo = echo
        self._fsync = fsync
        self._pools = pools
        self._sandbox_options = sandbox_options
        self._overrides = overrides or {}
        self._stack = ExitStack()
        self._environment: dict[str, str] = {}
        self.sandbox_url = ""
        self.settings: Settings
        self.supervisor: Supervisor

    @property
    def where(self) -> str:
        """Whose servers are used."""
        return "your own" if "SLUICE_DATABASE_URL" not in self._environment else "embedded"

    @property
    def client_environment(self) -> dict[str, str]:
        """The variables that a producer needs to reach this fleet."""
        return dict(self._environment)

    def start(self) -> None:
        """Start everything and return when jobs can be run; raises a clear error."""
        try:
            self._start()
        except BaseException:
            self._stack.close()
            raise

    def stop(self) -> None:
        """Stop everything: workers drain first, servers go last."""
        self._stack.close()

    def run_until_stopped(self) -> int:
        """Watch the processes until SIGINT or SIGTERM; return the exit code."""
        return self.supervisor.run_until_stopped()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def _start(self) -> None:
        given = load_settings()
        self._data_dir.mkdir(parents=True, exist_ok=True)
        if not {"database_url", "redis_url"} <= given.model_fields_set:
            servers = self._stack.enter_context(
                LocalServers(self._data_dir.absolute(), fsync=self._fsync)
            )
            self._environment |= {
                "SLUICE_DATABASE_URL": servers.database_url,
                "SLUICE_REDIS_URL": servers.redis_url,
            }
        log_dir = self._data_dir / "logs"
        if self._sandbox:
            self._start_sandbox(log_dir)
        self.settings = load_settings(**self._as_fields())
        upgrade(self.settings)
        self._engine = make_engine(self.settings, application_name="sluice up", pool_size=1)
        self._stack.callback(self._engine.dispose)
        self.supervisor = Supervisor(
            self._children(),
            grace_s=self.settings.grace_s + _STOP_MARGIN_S,
            log_dir=log_dir,
            echo=self._echo,
            ready_timeout_s=_READY_TIMEOUT_S,
        )
        self._stack.enter_context(self.supervisor)

    def _as_fields(self) -> dict[str, str]:
        return {
            name.lower().removeprefix("sluice_"): value
            for name, value in (self._environment | self._overrides).items()
        }

    def _start_sandbox(self, log_dir: Path) -> None:
        port_file = self._data_dir.absolute() / "sandbox.port"
        port_file.unlink(missing_ok=True)
        provider = Child(
            name="sandbox",
            argv=[
                *(sys.executable, "-m", "sluicegate.workers.local.sandbox"),
                *("--port", "0", "--port-file", str(port_file)),
                *self._sandbox_options,
            ],
            ready=lambda: port_file.exists() and bool(port_file.read_text().strip()),
        )
        self._stack.enter_context(Supervisor([provider], grace_s=2, log_dir=log_dir, echo=False))
        self.sandbox_url = f"http://127.0.0.1:{_read_port(port_file)}"
        self._environment |= {
            "OPENAI_BASE_URL": f"{self.sandbox_url}/v1",
            "OPENAI_API_KEY": "sandbox",
            "ANTHROPIC_BASE_URL": self.sandbox_url,
            "ANTHROPIC_API_KEY": "sandbox",
        }

    def _children(self) -> list[Child]:
        names = known_use_cases(self.settings)
        # On a developer's machine root is often whom one runs as: no warning from each worker.
        environment = (
            os.environ
            | self._environment
            | self._overrides
            | {"PYTHONWARNINGS": "ignore:::celery.platforms"}
        )
        lanes = [Lane.INTERACTIVE, Lane.BULK] if self._bulk else [Lane.INTERACTIVE]
        children = [
            Child(
                name="sweep",
                argv=[sys.executable, "-m", "sluicegate.cli", "sweep"],
                env=environment,
            )
        ]
        children += [
            Child(
                name=f"{pool}-{lane.value}",
                argv=worker_argv(pool, lane, pool_queues(names, pool, lane)),
                env=environment,
                ready=partial(self._serves, pool, lane),
            )
            for pool in self._pools
            for lane in lanes
        ]
        return children

    def _serves(self, pool: str, lane: Lane) -> bool:
        """Whether a worker of this pool and lane has entered its row in the last seconds."""
        try:
            with self._engine.connect() as connection:
                found = connection.scalar(
                    text(
                        "SELECT true FROM workers WHERE pool = :pool AND lane = :lane"
                        " AND seen_at > now() - interval '5 seconds' LIMIT 1"
                    ),
                    {"pool": pool, "lane": lane.value},
                )
        except SQLAlchemyError:
            return False
        return bool(found)


def _read_port(port_file: Path) -> int:
    text_ = port_file.read_text().strip()
    return int(json.loads(text_)["port"] if text_.startswith("{") else text_)
