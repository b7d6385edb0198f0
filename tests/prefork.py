"""Python processes for tests that begin with their imports done: real processes, forked from one.

A worker spends two seconds of CPU on importing SDKs, and a whole run starts some 250 processes. So
each process of pytest has a template beside it, which has imported what they need and has no
threads. It forks for each of them a process that becomes a child of pytest's own, with the
environment, the folder, the output and the arguments that it was asked for, and runs its module as
`python -m` does.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import IO, Any, Final, cast

from sluicegate.workers.local.processes import end, spawn

#: What workers, sweeps and HTTP servers import; nothing of it looks at the environment by then.
_MODULES: Final = (
    *("celery.apps.worker", "celery.bin.celery", "celery.bin.worker", "kombu.transport.redis"),
    *("celery.worker.consumer", "celery.worker.components", "celery.concurrency"),
    *("sluicegate.workers.providers.openai", "sluicegate.workers.providers.anthropic"),
    *("sluicegate.workers.lifecycle", "sluicegate.workers.pool", "sluicegate.workers.tasks"),
    *("sluicegate.workers.sweep.loops", "sluicegate.producers.http.server"),
)
#: Who starts these; `sluice up`, and all that it starts, begin as they do for everybody.
_FORKED: Final = (["celery"], ["sluicegate.cli", "sweep"], ["sluicegate.cli", "http"])
#: Who has one of these looks at it while it is imported.
_READ_AT_IMPORT: Final = ("PYTHON", "SLUICE_FAILPOINTS", "OPENAI_LOG", "ANTHROPIC_LOG")
_PR_SET_PDEATHSIG: Final = 1  # prctl(2)
_PR_SET_CHILD_SUBREAPER: Final = 36
_MAX_BYTES: Final = 1_000_000
_START_S: Final = 60.0


class Forked:
    """A child of ours that `subprocess` did not start, with what tests need of its `Popen`."""

    stdin = stdout = None

    def __init__(self, pid: int, args: Sequence[str]) -> None:
        self.pid = pid
        self.args = args
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.poll() is None:
            descriptor = os.pidfd_open(self.pid)
            try:
                select.select([descriptor], [], [], timeout)
            finally:
                os.close(descriptor)
        code = self.poll()
        if code is None:
            raise subprocess.TimeoutExpired(list(self.args), timeout or 0.0)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def start(
    argv: Sequence[str], *, env: Mapping[str, str], cwd: Path, output: IO[bytes]
) -> subprocess.Popen[bytes]:
    """Start `python -m MODULE ...` as `spawn` does: a group of its own, and it dies with us."""
    if not _is_forked(argv) or _reads(env):
        return spawn(argv, death_signal=signal.SIGKILL, env=env, cwd=cwd, output=output)
    asked = {"argv": list(argv), "env": dict(env), "cwd": str(cwd), "parent": os.getpid()}
    _, template = _template()
    # Ours is who has lost its parent, but for this moment: others' orphans are not for us to reap.
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    try:
        socket.send_fds(template, [json.dumps(asked).encode()], [output.fileno()])
        answer = template.recv(_MAX_BYTES)
    except BaseException:
        # A test's time was up: its answer is not to be taken for the next one's.
        _template.cache_clear()
        raise
    finally:
        _prctl(_PR_SET_CHILD_SUBREAPER, 0)
    if not answer:
        raise RuntimeError("the template of processes has died: look for its words on stderr")
    return cast("subprocess.Popen[bytes]", Forked(int(answer), argv))


def _is_forked(argv: Sequence[str]) -> bool:
    if sys.platform != "linux" or list(argv[:2]) != [sys.executable, "-m"]:
        return False
    return any(list(argv[2 : 2 + len(words)]) == words for words in _FORKED)


def _reads(env: Mapping[str, str]) -> bool:
    """Whether imports have to be done anew, because they would not find what they found."""
    return any(
        os.environ.get(name) != env.get(name)
        for name in {*os.environ, *env}
        if name.startswith(_READ_AT_IMPORT)
    )


@cache
def _template() -> tuple[subprocess.Popen[bytes], socket.socket]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for one in (ours, theirs):
        one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _MAX_BYTES)
    with theirs:
        process = spawn(
            [sys.executable, "-m", "tests.prefork"],
            death_signal=signal.SIGKILL,
            cwd=Path(__file__).resolve().parents[1],
            stdin=theirs.fileno(),
            output=sys.__stderr__.fileno() if sys.__stderr__ else subprocess.DEVNULL,
        )
    ours.settimeout(_START_S)

    def stop() -> None:
        ours.close()
        end(process)

    atexit.register(stop)
    return process, ours


# The template's side.


def _serve() -> dict[str, Any]:
    """Fork for whoever asks; return, in the child, what it was asked to be."""
    with socket.socket(fileno=os.dup(0)) as asking:
        while True:
            data, descriptors, _, _ = socket.recv_fds(asking, _MAX_BYTES, 1)
            if not data:
                sys.exit()
            asked: dict[str, Any] = json.loads(data)
            (output,) = descriptors
            between = os.fork()
            if not between:
                pid = os.fork()
                if not pid:
                    break
                os._exit(0)
            os.close(output)
            # What was forked answers once it is pytest's child.
            os.waitpid(between, 0)
        _await_parent(asked["parent"])
        os.setpgid(0, 0)
        os.chdir(asked["cwd"])
        nothing = os.open(os.devnull, os.O_RDONLY)
        for descriptor, place in ((nothing, 0), (output, 1), (output, 2)):
            os.dup2(descriptor, place)
        os.close(nothing)
        os.close(output)
        asking.send(str(os.getpid()).encode())
    return asked


def _await_parent(pid: int) -> None:
    """Wait until this process has been given to its parent, and die when that dies."""
    deadline_s = time.monotonic() + _START_S
    while os.getppid() != pid:
        if time.monotonic() > deadline_s:
            os._exit(1)
        time.sleep(0.0005)
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != pid:
        os._exit(1)


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None).prctl(option, int(value), 0, 0, 0):
        raise OSError(f"prctl({option}) failed")


def _main() -> None:
    for name in _MODULES:
        importlib.import_module(name)
    if len([*Path("/proc/self/task").iterdir()]) != 1:
        raise RuntimeError("an import has started a thread: nothing can be forked from this")
    gc.freeze()
    asked = _serve()
    os.environ.clear()
    os.environ.update(asked["env"])
    sys.orig_argv = asked["argv"]
    sys.argv = asked["argv"][2:]
    sys.path[0] = asked["cwd"]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _main()
