"""What `sluice up` and the demo run: named child processes, watched, restarted and stopped."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, groupby
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from sluicegate.shared.errors import SluiceError
from sluicegate.workers.local.processes import caught_signals, kill_group, spawn

_POLL_S = 0.05
_LINE_BYTES = 65_536  # a longer line is cut into several
_LOG_BYTES = 20_000_000  # a log file is turned over above this
_LAST_WORDS = 3
_MOST_DOUBLINGS = 20  # of the wait before a restart; a child that is not vital may fail for ever
_COLOURS = (36, 33, 35, 32, 34, 31)  # ANSI foregrounds


class ChildFailedError(SluiceError, RuntimeError):
    """A child process could not be kept running.

    `exit_code` is the child's own, or 128 + the signal that ended it, as a shell would say.
    """

    def __init__(self, message: str, *, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True, kw_only=True)
class Child:
    """One process to run."""

    #: Prefixes its lines and names its log file.
    name: str
    argv: Sequence[str]
    #: Added to our own environment.
    env: Mapping[str, str] | None = None
    cwd: Path | None = None
    #: Whether it serves yet; called every 50 ms at start. None: as soon as it runs.
    ready: Callable[[], bool] | None = None
    #: Lower stages are started, and ready, before higher ones, and stopped after them.
    stage: int = 0
    #: What it has between SIGTERM and SIGKILL, where that is less than the supervisor's grace.
    grace_s: float = float("inf")
    #: Whether the others end when it cannot be kept running.
    vital: bool = True
    #: Lines that begin with one of these go to its log only.
    not_echoed: tuple[str, ...] = ()


class Supervisor:
    """Runs children, restarts those that end, and leaves none behind.

    children: in the order of their log colours; see Child.stage for start and stop.
    grace_s: what a stage has between SIGTERM and SIGKILL.
    log_dir: gets a `<name>.log` for each child. echo: also write lines to our stderr.
    ready_timeout_s: how long a stage may take until all its children are ready.
    restart_base_s, restart_cap_s: wait before a restart, doubled at each quick failure.
    stable_s: a child that ran this long has not failed quickly.
    max_quick_failures: quick failures in a row before `poll` gives up.

    Linux kills the children when this process dies, however it dies (not what they started
    themselves). Use it in the main thread only: see processes.spawn.
    """

    def __init__(
        self,
        children: Sequence[Child],
        *,
        grace_s: float,
        log_dir: Path | None = None,
        echo: bool = False,
        ready_timeout_s: float = 60.0,
        restart_base_s: float = 0.5,
        restart_cap_s: float = 10.0,
        stable_s: float = 10.0,
        max_quick_failures: int = 5,
    ) -> None:
        if log_dir is not None:
            log_dir.mkdir(parents=True, exist_ok=True)
        width = max((len(child.name) for child in children), default=0)
        runs = [
            _Run(child, _Output(child, width, colour, log_dir, echo=echo))
            for child, colour in zip(children, cycle(_COLOURS), strict=False)
        ]
        runs.sort(key=lambda run: run.child.stage)
        self._stages = [list(stage) for _, stage in groupby(runs, lambda run: run.child.stage)]
        self._grace_s = grace_s
        self._ready_timeout_s = ready_timeout_s
        self._restart_base_s = restart_base_s
        self._restart_cap_s = restart_cap_s
        self._stable_s = stable_s
        self._max_quick_failures = max_quick_failures

    @property
    def pids(self) -> dict[str, int]:
        """The process ids of the children that run, by name."""
        return {
            run.child.name: run.process.pid
            for run in self._runs()
            if run.process is not None and run.process.poll() is None
        }

    def start(self) -> None:
        """Start every child, stage by stage, and wait until each is ready.

        Raises ChildFailedError, with all children stopped, when one ends or is not ready in time.
        """
        try:
            for stage in self._stages:
                for run in stage:
                    run.start()
                self._wait_ready(stage)
        except BaseException:
            self.stop()
            raise

    def poll(self) -> None:
        """Restart what has ended and is due; call it a few times a second.

        Raises ChildFailedError when a vital child keeps failing; the others still run.
        """
        now = time.monotonic()
        for run in self._runs():
            if run.process is not None and run.process.poll() is not None:
                quick = now - run.started_at < self._stable_s
                run.failures = run.failures + 1 if quick else 1
                if run.child.vital and run.failures >= self._max_quick_failures:
                    raise run.failure(f"failed {run.failures} times in a row")
                doublings = min(run.failures - 1, _MOST_DOUBLINGS)
                wait_s = min(self._restart_cap_s, self._restart_base_s * 2**doublings)
                how = f"{run.how_it_ended()}{run.output.where}"
                run.output.note(f"{how}; starting again in {wait_s:g} s")
                run.process, run.restart_at = None, now + wait_s
            elif run.process is None and now >= run.restart_at:
                run.start()

    def run_until_stopped(self, ready: Callable[[], None] | None = None) -> int:
        """Watch the children until SIGINT or SIGTERM, then stop them; return our exit code.

        ready: called once those signals are waited for: who is told then may send one at once.
        0 after an orderly stop. A second signal kills them at once: 128 + that signal.
        Raises ChildFailedError, with all children stopped, when one keeps failing.
        """
        with caught_signals((signal.SIGINT, signal.SIGTERM)) as caught:
            try:
                if ready is not None:
                    ready()
                while not caught:
                    self.poll()
                    time.sleep(_POLL_S)
            finally:
                self._stop(hurry=lambda: len(caught) > 1)
            return 128 + caught[1] if len(caught) > 1 else 0

    def stop(self) -> None:
        """Stop the children, the highest stage first, and kill those that outlive their grace.

        An exception meanwhile, such as a Ctrl-C, kills all at once.
        """
        self._stop(hurry=lambda: False)

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

    def _runs(self) -> list["_Run"]:
        return [run for stage in self._stages for run in stage]

    def _wait_ready(self, stage: Sequence["_Run"]) -> None:
        deadline = time.monotonic() + self._ready_timeout_s
        waiting = [run for run in stage if run.child.ready is not None]
        while waiting:
            for run in waiting:
                if not run.runs():
                    raise run.failure("stopped while starting")
            waiting = [run for run in waiting if run.child.ready and not run.child.ready()]
            if waiting and time.monotonic() > deadline:
                raise waiting[0].failure(f"was not ready after {self._ready_timeout_s:g} s")
            if waiting:
                time.sleep(_POLL_S)

    def _stop(self, *, hurry: Callable[[], bool]) -> None:
        try:
            for stage in reversed(self._stages):
                for run in stage:
                    run.terminate()
                began = time.monotonic()
                while not hurry() and any(
                    run.runs() and time.monotonic() < began + min(run.child.grace_s, self._grace_s)
                    for run in stage
                ):
                    time.sleep(_POLL_S)
                for run in stage:
                    run.kill()
        finally:
            for run in self._runs():
                run.kill()
            for run in self._runs():
                run.bury()


class _Run:
    """A child and what became of it. Its restart_at matters only while it has no process."""

    def __init__(self, child: Child, output: "_Output") -> None:
        self.child = child
        self.output = output
        self.process: subprocess.Popen[bytes] | None = None
        self.started_at = 0.0
        self.restart_at = float("inf")  # not before `start`
        self.failures = 0

    def start(self) -> None:
        try:
            self.process = spawn(
                self.child.argv,
                death_signal=signal.SIGKILL,
                cwd=self.child.cwd,
                env={**os.environ, **(self.child.env or {})},
                output=subprocess.PIPE,
            )
        except OSError as problem:
            raise ChildFailedError(
                f"{self.child.name} cannot be started: {problem}.", exit_code=127
            ) from problem
        self.started_at = time.monotonic()
        assert self.process.stdout is not None
        self.output.read(self.process.stdout)

    def runs(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def terminate(self) -> None:
        if self.process is not None:
            self.process.terminate()

    def kill(self) -> None:
        if self.process is not None:
            kill_group(self.process)

    def bury(self) -> None:
        """Reap it after its death, and read what it said last."""
        if self.process is not None:
            self.process.wait(5.0)
        self.process, self.restart_at = None, float("inf")
        self.output.finish()

    def how_it_ended(self) -> str:
        code = self.process.returncode if self.process else None
        if code is None:
            return "still runs"
        return f"ended by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"

    def failure(self, what: str) -> ChildFailedError:
        code = self.process.poll() if self.process else None
        if code is not None:
            self.output.finish()
        return ChildFailedError(
            f"{self.child.name} {what} ({self.how_it_ended()}): "
            f"{self.output.last_words()}{self.output.where}.",
            exit_code=1 if not code else 128 - code if code < 0 else code,
        )


class _Output:
    """Where the lines of one child go. A thread reads them: a full pipe would stop the child."""

    def __init__(
        self, child: Child, width: int, colour: int, log_dir: Path | None, *, echo: bool
    ) -> None:
        name = child.name
        self._echo = echo
        self._not_echoed = child.not_echoed
        coloured = sys.stderr.isatty() and "NO_COLOR" not in os.environ
        label = f"{name:<{width}} | "
        self._prefix = f"\033[{colour}m{label}\033[0m" if coloured else label
        self._log_path = log_dir / f"{name}.log" if log_dir else None
        self._last: deque[str] = deque(maxlen=_LAST_WORDS)
        self._reader: threading.Thread | None = None

    def read(self, pipe: IO[bytes]) -> None:
        self.finish()
        self._reader = threading.Thread(target=self._read, args=(pipe,), daemon=True)
        self._reader.start()

    def finish(self) -> None:
        """Wait a moment for the last lines; a grandchild may hold the pipe open for ever."""
        if self._reader is not None:
            self._reader.join(1.0)
            self._reader = None

    def note(self, line: str) -> None:
        """Add a line of our own."""
        self._write(f"-- {line}")

    def last_words(self) -> str:
        return " | ".join(self._last) or "it said nothing"

    @property
    def where(self) -> str:
        """Where its log is, in brackets; empty without one."""
        return f" (log: {self._log_path})" if self._log_path else ""

    def _read(self, pipe: IO[bytes]) -> None:
        with pipe:
            while line := pipe.readline(_LINE_BYTES):
                text = line.decode(errors="replace").rstrip()
                if text:
                    self._last.append(text.strip())
                self._write(text)

    def _write(self, text: str) -> None:
        if self._echo and text and not text.startswith(self._not_echoed):
            try:
                sys.stderr.write(f"{self._prefix}{text}\n")
                sys.stderr.flush()
            except (OSError, ValueError):  # nobody listens any more; the child must go on
                self._echo = False
        if self._log_path is not None:
            try:
                self._log(self._log_path, text)
            except OSError as problem:
                self._log_path = None
                self._last.append(f"the log could not be written: {problem}")

    def _log(self, path: Path, text: str) -> None:
        with path.open("a") as log:
            log.write(f"{text}\n")
            full = log.tell() > _LOG_BYTES
        if full:
            path.replace(path.with_suffix(".log.1"))
