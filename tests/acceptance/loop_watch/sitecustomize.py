"""Put on a worker's PYTHONPATH, this says on stderr what held up its event loop, and how.

asyncio's debug mode goes by the clock on the wall, and on a busy machine that accuses whoever was
waiting for a CPU. Linux counts that wait for each thread, so here it is taken off. What never
belongs on the loop is named whatever it took: imports, sleeping, and blocking look-ups.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from pathlib import Path
from typing import Any

_LOOP_THREAD = "sluice-loop"
_SLOW_S = 0.05
_NEVER = ("import", "time.sleep", "socket.getaddrinfo", "subprocess.Popen")

_run = asyncio.Handle._run
_said = threading.local()


def _waited_s() -> float:
    """How long this thread has been ready and without a CPU, ever."""
    try:
        fields = Path("/proc/thread-self/schedstat").read_text().split()
    except OSError:
        return 0.0
    return int(fields[1]) / 1e9


def _say(line: str) -> None:
    sys.stderr.write(f"LOOP {line}\n")


def _watched_run(handle: asyncio.Handle) -> None:
    waited_s, started_s = _waited_s(), time.perf_counter()
    _run(handle)
    took_s = time.perf_counter() - started_s
    if took_s >= _SLOW_S and (held_s := took_s - (_waited_s() - waited_s)) >= _SLOW_S:
        _say(f"was held for {held_s:.3f} s by {handle!r}")


def _heard(event: str, args: tuple[Any, ...]) -> None:
    if event not in _NEVER or threading.current_thread().name != _LOOP_THREAD:
        return
    if getattr(_said, "now", False):
        return
    _said.now = True
    try:
        _say(f"met {event} {args[0]!r:.100}")
    finally:
        _said.now = False


asyncio.Handle._run = _watched_run  # type: ignore[method-assign,assignment]
sys.addaudithook(_heard)
