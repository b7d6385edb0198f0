"""Embedded PostgreSQL and Valkey: data survives, leftovers do not, failures are one sentence."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import psycopg
import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from sluicegate.shared.errors import SluiceError
from sluicegate.workers.local.binaries import postgres_bin
from sluicegate.workers.local.servers import (
    EmbeddedPostgres,
    EmbeddedValkey,
    LocalServers,
    ServerError,
)
from tests.polling import eventually

# What a program that embeds the servers does; it says its children's pids and then just waits.
LAUNCHER = """
import sys, time
from pathlib import Path
from sluicegate.workers.local.servers import LocalServers
servers = LocalServers(Path(sys.argv[1]), fsync=False)
servers.start()
print(servers.postgres.pid, servers.valkey.pid, flush=True)
time.sleep(60)
"""


NEVER = Retry(NoBackoff(), 0)


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServers]:
    with LocalServers(tmp_path_factory.mktemp("servers"), fsync=False) as running:
        yield running


def sql(servers: LocalServers, statement: str) -> list[tuple[object, ...]]:
    dsn = servers.database_url.replace("+psycopg", "")
    with psycopg.connect(dsn, autocommit=True) as connection:
        cursor = connection.execute(statement.encode())
        return cursor.fetchall() if cursor.description else []


def valkey(servers: LocalServers) -> "redis.Redis":
    return redis.Redis.from_url(servers.redis_url, decode_responses=True)


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_servers_are_configured_to_lose_nothing(servers: LocalServers) -> None:
    with valkey(servers) as client:
        assert client.config_get("appendonly") == {"appendonly": "yes"}
        assert client.config_get("appendfsync") == {"appendfsync": "everysec"}
        assert client.config_get("save") == {"save": ""}
        assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
    [[version, connections, password_encryption]] = sql(
        servers,
        "SELECT current_setting('server_version_num')::int / 10000,"
        " current_setting('max_connections')::int, current_setting('password_encryption')",
    )
    assert (version, connections, password_encryption) == (18, 200, "scram-sha-256")


def test_fsync_is_on_unless_switched_off(tmp_path: Path, servers: LocalServers) -> None:
    assert sql(servers, "SHOW fsync") == [("off",)]
    with LocalServers(tmp_path) as durable:
        assert sql(durable, "SHOW fsync") == [("on",)]


def test_strangers_are_refused(servers: LocalServers) -> None:
    stranger = servers.database_url.replace("+psycopg", "").replace("sluice:", "sluice:not-")
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        psycopg.connect(stranger)
    with (
        redis.Redis(host="127.0.0.1", port=servers.valkey.port, retry=NEVER) as client,
        pytest.raises(redis.AuthenticationError),
    ):
        client.ping()


def test_only_loopback_listens(servers: LocalServers) -> None:
    for pid in (servers.postgres.pid, servers.valkey.pid):
        listening = [
            c.laddr.ip
            for c in psutil.Process(pid).net_connections("all")
            if c.status == psutil.CONN_LISTEN
        ]
        assert listening == ["127.0.0.1"]


def test_data_survives_stop_and_sigkill(tmp_path: Path) -> None:
    servers = LocalServers(tmp_path, fsync=False)
    try:
        servers.start()
        urls = servers.database_url, servers.redis_url
        sql(servers, "CREATE TABLE kept (n int)")
        with valkey(servers) as client:
            client.set("kept", "0")

        def sigkill() -> None:
            servers.postgres.kill(signal.SIGKILL)
            servers.valkey.kill(signal.SIGKILL)

        for n, stop in enumerate((servers.stop, sigkill), start=1):
            sql(servers, f"INSERT INTO kept VALUES ({n})")
            with valkey(servers) as client:
                client.incr("kept")
            stop()
            assert (servers.postgres.pid, servers.valkey.pid) == (None, None)
            servers.start()
            assert (servers.database_url, servers.redis_url) == urls
            assert sql(servers, "SELECT max(n) FROM kept") == [(n,)]
            with valkey(servers) as client:
                assert client.get("kept") == str(n)
    finally:
        servers.stop()
    with LocalServers(tmp_path, fsync=False) as another:  # as another process would
        assert sql(another, "SELECT count(*) FROM kept") == [(2,)]


def test_second_user_of_a_data_folder_is_told(servers: LocalServers) -> None:
    second = EmbeddedPostgres(data_dir=servers.postgres.data_dir)
    with pytest.raises(ServerError, match="is in use by another process") as told:
        second.start()
    assert isinstance(told.value, SluiceError)
    assert "\n" not in str(told.value)
    assert sql(servers, "SELECT 1") == [(1,)]


def test_sigkill_of_the_launcher_leaves_no_server_and_no_lock(tmp_path: Path) -> None:
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert launcher.stdout is not None
    with launcher.stdout as says:
        pids = [int(pid) for pid in says.readline().split()]
    assert len(pids) == 2
    launcher.kill()
    launcher.wait()
    if sys.platform == "linux":
        eventually(lambda: all(gone(pid) for pid in pids))
    # Elsewhere the next start ends them.
    with LocalServers(tmp_path, fsync=False) as servers:
        assert all(gone(pid) for pid in pids)
        assert sql(servers, "SELECT 1") == [(1,)]


def test_leftover_server_is_ended_and_a_stranger_with_its_pid_is_not(tmp_path: Path) -> None:
    server = EmbeddedValkey(data_dir=tmp_path)
    server.start()
    server.stop()
    binary = postgres_bin().parent  # any folder that is not the server's own
    program = psutil.Process().exe()
    stranger = subprocess.Popen([program, "-c", "input()"], stdin=subprocess.PIPE, cwd=binary)
    leftover = subprocess.Popen(
        ["valkey-server", "-c", "input()"],  # by name and working folder what a dead launcher left
        executable=_as_valkey(tmp_path),
        stdin=subprocess.PIPE,
        cwd=tmp_path,
    )
    try:
        (tmp_path / "server.pid").write_text(f"{stranger.pid}\n")
        with server:
            leftover.wait(10)
            assert stranger.poll() is None
    finally:
        for process in (stranger, leftover):
            process.kill()
            process.communicate()


def _as_valkey(folder: Path) -> Path:
    """Make a Python that the kernel calls valkey-server."""
    program = folder / "bin" / "valkey-server"
    program.parent.mkdir()
    program.symlink_to(Path(sys.executable).resolve())
    return program


def test_stale_postmaster_pid_of_a_living_stranger_does_not_block(tmp_path: Path) -> None:
    server = EmbeddedPostgres(data_dir=tmp_path, fsync=False)
    server.start()
    server.kill(signal.SIGKILL)
    lock = tmp_path / "cluster" / "postmaster.pid"
    lines = lock.read_text().splitlines()
    eventually(lambda: not _backends_of(tmp_path))
    lock.write_text("\n".join([str(os.getppid()), *lines[1:]]) + "\n")
    try:
        server.start()
    finally:
        server.stop()


def _backends_of(folder: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.cwd() == str(folder / "cluster"):
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_first_start_that_was_interrupted_is_repeated(tmp_path: Path) -> None:
    (tmp_path / "cluster.new" / "base").mkdir(parents=True)
    (tmp_path / "cluster.new" / "PG_VERSION").write_text("18\n")
    with EmbeddedPostgres(data_dir=tmp_path, fsync=False) as server:
        assert server.pid is not None


def test_taken_port_is_one_clear_sentence(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for server in (
            EmbeddedPostgres(data_dir=tmp_path / "postgres", port=port, fsync=False),
            EmbeddedValkey(data_dir=tmp_path / "valkey", port=port),
        ):
            with pytest.raises(ServerError, match="Address already in use") as told:
                server.start()
            assert "\n" not in str(told.value)
            assert server.pid is None


def test_another_port_is_taken_when_ours_was_snatched(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        snatched = taken.getsockname()[1]
        server = EmbeddedValkey(data_dir=tmp_path)
        server._port = snatched  # as if it had been free when it was chosen
        with server, redis.Redis.from_url(server.url) as client:
            assert server.port != snatched
            assert client.ping()


def test_given_password_is_used_and_must_stay(tmp_path: Path) -> None:
    odd = "a b/c@d:e\"f'g%h"
    with (
        EmbeddedValkey(data_dir=tmp_path / "valkey", password=odd) as server,
        redis.Redis.from_url(server.url) as client,
    ):
        assert client.ping()
    with EmbeddedPostgres(data_dir=tmp_path / "pg", password=odd, fsync=False) as postgres:
        psycopg.connect(postgres.url.replace("+psycopg", "")).close()
    with pytest.raises(ServerError, match="password authentication failed") as told:
        EmbeddedPostgres(data_dir=tmp_path / "pg", password="another", fsync=False).start()
    assert "\n" not in str(told.value)


def test_folder_that_cannot_be_written_is_one_clear_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for kind in (EmbeddedPostgres, EmbeddedValkey):
        with pytest.raises(ServerError, match="make room or choose another folder") as told:
            kind(data_dir=tmp_path / "file" / "data").start()
        assert "\n" not in str(told.value)


def test_damaged_data_is_said_with_the_servers_last_words(tmp_path: Path) -> None:
    server = EmbeddedPostgres(data_dir=tmp_path, fsync=False)
    server.start()
    server.stop()
    (tmp_path / "cluster" / "global" / "pg_control").unlink()
    with pytest.raises(ServerError, match="could not find the database system") as told:
        server.start()
    assert "\n" not in str(told.value)
    assert str(server.log_path) in str(told.value)


def test_frozen_server_is_stopped_all_the_same(tmp_path: Path) -> None:
    with EmbeddedValkey(data_dir=tmp_path) as server:
        pid = server.pid
        assert pid is not None
        server.kill(signal.SIGSTOP)
        eventually(lambda: psutil.Process(pid).status() == psutil.STATUS_STOPPED)
    assert gone(pid)


def test_url_before_the_first_start_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ServerError, match="start it first"):
        _ = EmbeddedPostgres(data_dir=tmp_path).url
