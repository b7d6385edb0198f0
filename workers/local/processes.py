"""Child processes that die with the process that started them."""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

_PR_SET_PDEATHSIG = 1  # prctl(2)
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
    OSError when the program cannot be started.
    """
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("start child processes from the main thread: they die with their thread")
    with warnings.catch_warnings():
        # Python 3.12 and newer warn of any fork beside threads; the hook below only makes syscalls.
        warnings.simplefilter("ignore", DeprecationWarning)
        return subprocess.Popen(  # noqa: S603 - our own argument lists, and no shell
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


def end(
    process: subprocess.Popen[bytes], *steps: tuple[signal.Signals, float], reap_s: float = 5.0
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
