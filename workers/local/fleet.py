"""The whole fleet on one machine: what `sluice up`, the demo and the acceptance tests run."""

from __future__ import annotations

import fcntl
import json
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

import redis
from sqlalchemy import or_, select, text, union
from sqlalchemy.exc import SQLAlchemyError

from sluicegate.shared.database import make_engine
from sluicegate.shared.errors import SettingsError, SluiceError
from sluicegate.shared.jobs import Lane
from sluicegate.shared.migrations import upgrade
from sluicegate.shared.queues import POOLS, pool_queues
from sluicegate.shared.redis_client import make_redis
from sluicegate.shared.settings import Settings, load_settings
from sluicegate.shared.tables import llm_providers, provider_keys
from sluicegate.workers.cli import known_use_cases, worker_argv
from sluicegate.workers.local.embedded import EmbeddedServer
from sluicegate.workers.local.flower import Flower
from sluicegate.workers.local.http_door import HttpDoor
from sluicegate.workers.local.servers import EmbeddedPostgres, EmbeddedValkey
from sluicegate.workers.local.supervisor import Child, Supervisor

#: How long `sluice up` waits for its processes after SIGTERM, beyond the workers' own grace.
_STOP_MARGIN_S = 10.0
#: Five Python processes that import an SDK each, on a machine that may be busy.
_READY_TIMEOUT_S = 180.0
#: Flower asks once, at its start, which workers there are: they come before it. So they do before
#: who brings them work.
_LAST_STAGE = 1
#: What Celery writes past its logs when it is asked to stop.
_CELERY_SAYS = ("worker: Warm shutdown", "worker: Hitting Ctrl+C again")

#: Pools for which the database holds a key, or an endpoint that may do without.
_READY_IN_DATABASE = union(
    select(provider_keys.c.provider),
    select(llm_providers.c.provider).where(
        llm_providers.c.is_active,
        or_(llm_providers.c.api_key_encrypted.is_not(None), llm_providers.c.base_url.is_not(None)),
    ),
)


class Fleet:
    """Servers whose URL is not set, migrations, a worker for each pool and lane, and the sweep.

    data_dir: where embedded servers keep their data and children their logs; a second fleet on
    the same folder is refused. sandbox: run the sandbox provider and send both pools to it.
    flower, http: also run Flower, and the HTTP producer, there. overrides: variables for all
    processes. Start it in the main thread.
    """

    def __init__(
        self,
        *,
        data_dir: Path,
        sandbox: bool,
        bulk: bool = True,
        flower: Flower | None = None,
        http: HttpDoor | None = None,
        echo: bool = False,
        fsync: bool = True,
        pools: tuple[str, ...] = POOLS,
        sandbox_options: tuple[str, ...] = (),
        overrides: dict[str, str] | None = None,
    ) -> None:
        self._data_dir = data_dir
        self._sandbox = sandbox
        self._bulk = bulk
        self._flower = flower
        self._http = http
        self._echo = echo
        self._fsync = fsync
        self._pools = pools
        self._sandbox_options = sandbox_options
        self._overrides = overrides or {}
        self._stack = ExitStack()
        self._environment: dict[str, str] = {}
        self.sandbox_url = ""
        #: Pools that run although there is no key for them.
        self.keyless_pools: tuple[str, ...] = ()
        self.settings: Settings
        self.supervisor: Supervisor

    @property
    def where(self) -> str:
        """Whose servers are used."""
        servers = {"Postgres": "SLUICE_DATABASE_URL", "Redis": "SLUICE_REDIS_URL"}
        return ", ".join(
            f"{name}: {'embedded' if variable in self._environment else 'your own'}"
            for name, variable in servers.items()
        )

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

    def run_until_stopped(self, ready: Callable[[], None]) -> int:
        """Watch the processes until SIGINT or SIGTERM; return the exit code.

        ready: called once those signals are waited for.
        """
        return self.supervisor.run_until_stopped(ready)

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
        self._take_folder()
        self._start_servers(given)
        if self._sandbox:
            self._start_sandbox()
        self.settings = load_settings(**self._as_fields())
        _check_redis(self.settings)
        upgrade(self.settings)
        self._engine = make_engine(self.settings, application_name="sluice up", pool_size=1)
        self._stack.callback(self._engine.dispose)
        self.keyless_pools = self._check_keys()
        self.supervisor = Supervisor(
            self._children(),
            grace_s=self.settings.grace_s + _STOP_MARGIN_S,
            log_dir=self._log_dir,
            echo=self._echo,
            ready_timeout_s=_READY_TIMEOUT_S,
        )
        self._run(self.supervisor)

    @property
    def _log_dir(self) -> Path:
        return self._data_dir / "logs"

    def _run(self, supervisor: Supervisor) -> None:
        """Start children; how to stop them is known before there is one."""
        self._stack.callback(supervisor.stop)
        supervisor.start()

    def _take_folder(self) -> None:
        """Make the data folder, and lock it as long as we run."""
        try:
            self._log_dir.mkdir(parents=True, exist_ok=True)
            lock = self._stack.enter_context((self._data_dir / "lock").open("ab"))
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SluiceError(
                f"another fleet runs on the data folder {self._data_dir}; "
                "stop that one, or choose another with --data-dir"
            ) from None
        except OSError as problem:
            raise SettingsError(
                f"the data folder {self._data_dir} cannot be used ({problem.strerror}); "
                "choose another with --data-dir"
            ) from None

    def _start_servers(self, given: Settings) -> None:
        """Start the servers that nobody has given the URL of, side by side."""
        folder = self._data_dir.absolute()
        servers: dict[str, EmbeddedServer] = {}
        if "redis_url" not in given.model_fields_set:
            servers["SLUICE_REDIS_URL"] = EmbeddedValkey(data_dir=folder / "valkey")
        if "database_url" not in given.model_fields_set:
            servers["SLUICE_DATABASE_URL"] = EmbeddedPostgres(
                data_dir=folder / "postgres", fsync=self._fsync
            )
        for server in servers.values():
            self._stack.callback(server.stop)
            server.launch()
        for variable, server in servers.items():
            server.wait_ready()
            self._environment[variable] = server.url

    def _as_fields(self) -> dict[str, str]:
        return {
            name.lower().removeprefix("sluice_"): value
            for name, value in (self._environment | self._overrides).items()
        }

    def _start_sandbox(self) -> None:
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
        self._run(Supervisor([provider], grace_s=2, log_dir=self._log_dir, echo=False))
        self.sandbox_url = f"http://127.0.0.1:{_read_port(port_file)}"
        self._environment |= {
            "OPENAI_BASE_URL": f"{self.sandbox_url}/v1",
            "OPENAI_API_KEY": "sandbox",
            "ANTHROPIC_BASE_URL": self.sandbox_url,
            "ANTHROPIC_API_KEY": "sandbox",
        }

    def _check_keys(self) -> tuple[str, ...]:
        """Return the pools without a key; raise `SettingsError` if that is all of them.

        A server of one's own, which a base URL names, need not have a key.
        """
        ready = {
            pool
            for pool in POOLS
            if getattr(self.settings, f"{pool}_api_key")
            or getattr(self.settings, f"{pool}_base_url")
        }
        with self._engine.connect() as connection:
            ready |= set(connection.scalars(_READY_IN_DATABASE))
        keyless = tuple(pool for pool in self._pools if pool not in ready)
        if keyless == self._pools:
            variables = " or ".join(f"{pool.upper()}_API_KEY" for pool in keyless)
            raise SettingsError(
                f"there is no provider's key; set {variables} in the environment or in .env, "
                "or use --sandbox"
            )
        return keyless

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
                argv=worker_argv(pool, lane, pool_queues(names, pool, lane), follow=True),
                env=environment,
                ready=partial(self._serves, pool, lane),
                not_echoed=_CELERY_SAYS,
            )
            for pool in self._pools
            for lane in lanes
        ]
        if self._flower is not None:
            children.append(self._flower.child(environment, stage=_LAST_STAGE))
        if self._http is not None:
            children.append(self._http.child(environment, stage=_LAST_STAGE))
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


def _check_redis(settings: Settings) -> None:
    """Raise a clear error if Redis does not answer: workers would wait for it without end."""
    client = make_redis(settings)
    try:
        client.ping()
    except redis.RedisError as problem:
        raise SluiceError(
            f"Redis cannot be used: {problem}; check SLUICE_REDIS_URL and that Redis is running"
        ) from None
    finally:
        client.close()


def _read_port(port_file: Path) -> int:
    text_ = port_file.read_text().strip()
    return int(json.loads(text_)["port"] if text_.startswith("{") else text_)
