"""Starting a child: it dies with us, and a signal in that very moment loses nobody."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import psutil
import pytest

from sluicegate.workers.local.processes import end, spawn

SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]
# What a child finds of signals: those that are blocked, and those that are ignored.
TELLS_SIGNALS = """
import signal
names = signal.SIGINT, signal.SIGTERM
print(sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])))
print([name.name for name in names if signal.getsignal(name) is signal.SIG_IGN])
"""


class Stopped(Exception):
    """What the handler of this module's tests raises."""


@pytest.fixture(params=[signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def number(request: pytest.FixtureRequest) -> Iterator[signal.Signals]:
    """Return a signal whose handler raises `Stopped`."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise Stopped

    number: signal.Signals = request.param
    before = signal.signal(number, stop)
    yield number
    assert signal.getsignal(number) is stop
    signal.signal(number, before)


@pytest.fixture
def after_the_fork() -> Iterator[Callable[[Callable[[], None]], None]]:
    """Return a function that has something done once Popen has made a process, inside of it."""
    before = sys.getprofile()

    def arm(act: Callable[[], None]) -> None:
        def watch(_frame: FrameType, event: str, what: Any) -> None:
            if event == "c_return" and what.__name__ == "fork_exec":
                sys.setprofile(before)
                act()

        sys.setprofile(watch)

    yield arm
    sys.setprofile(before)


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children()}


def test_a_signal_in_the_moment_of_the_start_waits_and_ends_the_child(
    number: signal.Signals, after_the_fork: Callable[[Callable[[], None]], None]
) -> None:
    before = children()
    made: list[set[int]] = []

    def interrupt() -> None:
        made.append(children() - before)
        os.kill(os.getpid(), number)

    after_the_fork(interrupt)
    with pytest.raises(Stopped):
        spawn(SLEEP, death_signal=signal.SIGKILL, output=subprocess.DEVNULL)
    assert len(made[0]) == 1
    assert children() == before


def test_a_signal_that_is_only_noted_ends_nobody(
    after_the_fork: Callable[[Callable[[], None]], None],
) -> None:
    noted: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _frame: noted.append(number))
    try:
        after_the_fork(lambda: os.kill(os.getpid(), signal.SIGTERM))
        process = spawn(SLEEP, death_signal=signal.SIGKILL, output=subprocess.DEVNULL)
    finally:
        signal.signal(signal.SIGTERM, before)
    try:
        assert noted == [signal.SIGTERM]
        assert process.poll() is None
    finally:
        end(process)


@pytest.mark.usefixtures("number")
def test_a_child_hears_signals_as_usual() -> None:
    process = spawn(
        [sys.executable, "-c", TELLS_SIGNALS],
        death_signal=signal.SIGKILL,
        output=subprocess.PIPE,
    )
    said, _ = process.communicate(timeout=30)
    assert said.decode().split("\n") == ["[]", "[]", ""]
