"""Child processes that die with the process that started them."""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import IO

_PR_SET_PDEATHSIG = 1  # prctl(2)
#: How long SIGKILL may take to show an effect.
_REAP_S = 5.0
_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def spawn(
    argv: Sequence[str],
    *,
    death_signal: signal.Signals,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    owner: tuple[int, int] | None = None,
    stdin: int | IO[bytes] = subprocess.DEVNULL,
    output: int | IO[bytes],
) -> subprocess.Popen[bytes]:
    """Start a child in a process group of its own; Linux sends it death_signal when we die.

    A group of its own, because Ctrl-C in a terminal goes to the whole foreground group and would
    end the servers before the workers that still need them. `owner` is the user and group id to
    run as. `output` takes both stdout and stderr.

    The kernel sends death_signal when the *thread* that started the child ends (prctl(2)), so only
    the main thread may start one: RuntimeError elsewhere, instead of a death nobody can explain.
    OSError when the program cannot be started. An exception of a signal's handler, such as Ctrl-C's
    KeyboardInterrupt, waits until the child is known, and then ends it.
    """
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("start child processes from the main thread: they die with their thread")
    process = None
    try:
        # Raised in the middle of Popen, after its fork, it would leave a child that nobody knows.
        # To block signals in this thread would not do: the others would take them, and Python runs
        # the handler here all the same. And a child would inherit what is blocked.
        with caught_signals(_handled_signals()) as caught, warnings.catch_warnings():
            # Python 3.12 and newer warn of any fork beside threads; the hook only makes syscalls.
            warnings.simplefilter("ignore", DeprecationWarning)
            process = subprocess.Popen(  # noqa: S603 - our own argument lists, and no shell
                argv,
                cwd=cwd,
                env=env,
                stdin=stdin,
                stdout=output,
                stderr=subprocess.STDOUT,
                process_group=0,
                user=owner[0] if owner else None,
                group=owner[1] if owner else None,
                extra_groups=[] if owner else None,
                preexec_fn=_death_hook(death_signal),  # noqa: PLW1509 - see the warning above
            )
        for number in dict.fromkeys(caught):
            signal.raise_signal(number)
    except BaseException:
        if process is not None:
            _discard(process)
        raise
    return process


@contextmanager
def caught_signals(numbers: Iterable[int]) -> Iterator[list[int]]:
    """Collect these signals instead of dying of them. Main thread only."""
    caught: list[int] = []

    def catch(number: int, _frame: FrameType | None) -> None:
        caught.append(number)

    before = {number: signal.getsignal(number) for number in numbers}
    try:
        for number in before:
            signal.signal(number, catch)
        yield caught
    finally:
        for number, handler in before.items():
            with suppress(TypeError):  # None: a handler that was not set from Python
                signal.signal(number, handler)


def end(
    process: subprocess.Popen[bytes], *steps: tuple[signal.Signals, float], reap_s: float = _REAP_S
) -> None:
    """End a child: send each signal and wait its seconds, then SIGKILL its whole group.

    Raises subprocess.TimeoutExpired when even SIGKILL shows no effect within reap_s (a process
    stuck in the kernel). An exception during the wait, such as a second Ctrl-C, kills at once.
    """
    try:
        for signum, wait_s in steps:
            process.send_signal(signum)
            with suppress(subprocess.TimeoutExpired):
                process.wait(wait_s)
                return
    except BaseException:
        kill_group(process)
        raise
    kill_group(process)
    process.wait(reap_s)


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """Send SIGKILL to a child that has not been reaped, and to whatever it started itself."""
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _handled_signals() -> list[int]:
    """Return the signals whose handler is a function of Python's, which may raise."""
    return [number for number in signal.valid_signals() if callable(signal.getsignal(number))]


def _discard(process: subprocess.Popen[bytes]) -> None:
    kill_group(process)
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
    process.wait(_REAP_S)


def _death_hook(death_signal: signal.Signals) -> Callable[[], None] | None:
    """Make what the child runs between setuid and exec; a change of user would reset it."""
    if _LIBC is None:
        return None
    libc, parent_pid = _LIBC, os.getpid()

    def hook() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, int(death_signal), 0, 0, 0)
        if os.getppid() != parent_pid:  # the parent died before the kernel knew whom to tell
            os._exit(1)

    return hook
