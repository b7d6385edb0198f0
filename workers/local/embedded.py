"""A server as a child process, with a folder of its own: what PostgreSQL and Valkey share."""

import errno
import fcntl
import os
import random
import re
import secrets
import signal
import socket
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, ClassVar, Self

import psutil

from sluicegate.workers.local.binaries import ServerError
from sluicegate.workers.local.processes import end, kill_group

# Below the ports that kernels give to outgoing connections (32768 and up on Linux, 49152 on macOS):
# otherwise a client that keeps calling a stopped server can be given the server's port, connect to
# itself, and keep the server from coming back.
_PORTS = range(20000, 32000)
_PORT_ATTEMPTS = 5
_POLL_S = 0.02
# Date, process and so on before a line of PostgreSQL's log, and of Valkey's.
_LINE_PREFIX = re.compile(r"\d+-\d+-\d+ \S+ \w+ \[\d+\] |\d+:\w \d+ \w+ \d+ \S+ [-.*#] ")


class EmbeddedServer(ABC):
    """A server in a folder of its own, which holds its lock, pid file, password, log and data.

    data_dir: made when missing; only one process may use it at a time.
    port: on 127.0.0.1; None picks a free one at the first start and keeps it until the object goes.
    password: None makes one and keeps it in the folder.
    start_timeout_s: how long a start may take, recovery after a crash included.
    """

    title: ClassVar[str]
    program: ClassVar[str]
    #: Signals of an orderly stop, each with the seconds it is given before the next.
    stop_steps: ClassVar[Sequence[tuple[signal.Signals, float]]]

    def __init__(
        self,
        *,
        data_dir: Path,
        port: int | None = None,
        password: str | None = None,
        start_timeout_s: float = 60.0,
    ) -> None:
        self.data_dir = data_dir.absolute()
        self.log_path = self.data_dir / f"{self.program}.log"
        self._port = port
        self._port_is_known = port is not None  # once somebody knows the URL it must not change
        self._password = password
        self._start_timeout_s = start_timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._lock: IO[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """The server's process id while it runs."""
        running = self._process is not None and self._process.poll() is None
        return self._process.pid if self._process and running else None

    @property
    def port(self) -> int:
        """The port on 127.0.0.1. Raises ServerError before the first start."""
        if self._port is None:
            raise ServerError(f"{self.title} has no port yet: start it first.")
        return self._port

    @property
    def password(self) -> str:
        """The password of the server's only user. Raises ServerError before the first start."""
        if self._password is None:
            raise ServerError(f"{self.title} has no password yet: start it first.")
        return self._password

    def start(self) -> None:
        """Start the server and wait until it answers. Main thread only; raises ServerError."""
        self.launch()
        self.wait_ready()

    def launch(self) -> None:
        """Start the process without waiting for it; `wait_ready` must follow."""
        if self.pid is not None:
            raise ServerError(f"{self.title} is already running with pid {self.pid}.")
        with self._cleaned_up_on_error():
            self._lock = self._lock or self._lock_folder()
            self._keep_password()
            self._end_leftovers()
            self._turn_log_over()
            self._prepare()
            self._launch_process()

    def wait_ready(self) -> None:
        """Wait until the launched server answers. Raises ServerError when it does not."""
        deadline = time.monotonic() + self._start_timeout_s
        attempt = 1
        with self._cleaned_up_on_error():
            while not self._is_ready():
                if self.pid is None:
                    if not self._can_move(attempt):
                        raise ServerError(f"{self.title} did not start: {self._last_words()}")
                    attempt += 1
                    self._port = None
                    self._launch_process()
                elif time.monotonic() > deadline:
                    raise ServerError(
                        f"{self.title} was not ready after {self._start_timeout_s:g} s: "
                        f"{self._last_words()}"
                    )
                time.sleep(_POLL_S)
        self._port_is_known = True

    def stop(self) -> None:
        """Stop the server in order, by force if it takes too long, and free the data folder."""
        process, self._process = self._process, None
        try:
            if process is not None and process.poll() is None:
                process.send_signal(signal.SIGCONT)  # a frozen server would not hear the next ones
                end(process, *self.stop_steps)
            if process is not None and process.returncode == 0:
                self._pid_path.unlink(missing_ok=True)
        finally:
            if self._lock is not None:
                self._lock.close()
                self._lock = None

    def kill(self, signum: signal.Signals) -> None:
        """Send the server a signal, and wait for its death if that is SIGKILL.

        The data folder stays locked, so `start` can follow.
        """
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signum)
            if signum == signal.SIGKILL:
                self._process.wait()

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

    @property
    @abstractmethod
    def url(self) -> str:
        """Where and how to connect. Raises ServerError before the first start."""

    @abstractmethod
    def _prepare(self) -> None:
        """Make the data on the first start."""

    @abstractmethod
    def _spawn(self, log: IO[bytes]) -> subprocess.Popen[bytes]:
        """Start the process."""

    @abstractmethod
    def _is_ready(self) -> bool:
        """Whether our own process, and not another on its port, answers."""

    @property
    def _work_dir(self) -> Path:
        """The server's working folder: nobody else's is there, so it tells whose process it is."""
        return self.data_dir

    @property
    def _pid_path(self) -> Path:
        return self.data_dir / "server.pid"

    @contextmanager
    def _cleaned_up_on_error(self) -> Iterator[None]:
        """Leave no process and no lock behind a failed start, and say failures in a sentence."""
        try:
            yield
        except BaseException as problem:
            if self._process is not None:
                kill_group(self._process)
            self.stop()
            if isinstance(problem, OSError):
                raise ServerError(
                    f"{self.title} cannot use the data folder {self.data_dir} "
                    f"({problem.strerror or problem}): make room or choose another folder."
                ) from problem
            raise

    def _lock_folder(self) -> IO[bytes]:
        # Root's servers run as another user, who must be able to walk through to the data.
        self.data_dir.mkdir(parents=True, exist_ok=True)
        self.data_dir.chmod(0o711 if os.geteuid() == 0 else 0o700)
        lock = (self.data_dir / "lock").open("ab")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as taken:
            lock.close()
            raise ServerError(
                f"The data folder {self.data_dir} is in use by another process: "
                "stop that one or choose another folder."
            ) from taken
        return lock

    def _keep_password(self) -> None:
        path = self.data_dir / "password"
        if self._password is None:
            self._password = path.read_text() if path.exists() else secrets.token_urlsafe(24)
        path.touch(mode=0o600)
        path.write_text(self._password)

    def _end_leftovers(self) -> None:
        """End what a killed launcher left running; ours by program and working folder."""
        if not self._pid_path.exists():
            return
        leftovers = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):  # gone meanwhile, or another user's
                if process.name() == self.program and process.cwd() == str(self._work_dir):
                    process.resume()
                    process.send_signal(self.stop_steps[-1][0])
                    leftovers.append(process)
        _, stuck = psutil.wait_procs(leftovers, timeout=5)
        for process in stuck:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        _, stuck = psutil.wait_procs(stuck, timeout=5)
        if stuck:
            raise ServerError(f"An old {self.title} (pid {stuck[0].pid}) does not end: end it.")
        self._pid_path.unlink()

    def _turn_log_over(self) -> None:
        """Keep one older log, so that a log never holds more than one run."""
        with suppress(FileNotFoundError):
            self.log_path.replace(self.log_path.with_suffix(".log.1"))
        self.log_path.touch(mode=0o600)  # statements in it may hold personal data

    def _launch_process(self) -> None:
        if self._port is None:
            self._port = _free_port()
        with self.log_path.open("ab") as log:
            self._process = self._spawn(log)
        self._pid_path.write_text(f"{self._process.pid}\n")

    def _can_move(self, attempt: int) -> bool:
        """Whether the port was taken between our choice and the server's bind, and is not known."""
        taken = "Address already in use" in self.log_path.read_text(errors="replace")
        return taken and not self._port_is_known and attempt < _PORT_ATTEMPTS

    def _last_words(self) -> str:
        text = self.log_path.read_text(errors="replace")
        if os.strerror(errno.ENOSPC) in text:
            return f"the disk of {self.data_dir} is full: make room or choose another folder."
        lines = text.splitlines()
        words = [line for line in (_LINE_PREFIX.sub("", line).strip() for line in lines) if line]
        last = " | ".join(words[-5:])
        return f"{last or 'it said nothing'} (log: {self.log_path})."


def _free_port() -> int:
    for port in random.sample(_PORTS, 100):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise ServerError(f"No free port found between {_PORTS.start} and {_PORTS.stop - 1}.")
