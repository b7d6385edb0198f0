"""Named places where a test can have a worker die or hang, as a crash or a stall would.

`SLUICE_FAILPOINTS="dispatched=kill,answered=stop"` arms them: `kill` is SIGKILL, `stop` is
SIGSTOP, both to this process, the first time the place is passed. Not set, a place costs one
comparison.
"""

from __future__ import annotations

import os
import signal

_SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}
NAMES = frozenset(
    {"claimed", "opened", "dispatched", "answered", "charged", "settled", "told", "posted"}
)


def _armed(text: str) -> dict[str, signal.Signals]:
    armed = {}
    for entry in filter(None, text.split(",")):
        name, _, action = entry.partition("=")
        if name not in NAMES or action not in _SIGNALS:
            raise SystemExit(
                f"SLUICE_FAILPOINTS: {entry!r} is not <place>=<kill or stop>; "
                f"the places are {', '.join(sorted(NAMES))}"
            )
        armed[name] = _SIGNALS[action]
    return armed


_ARMED = _armed(os.environ.get("SLUICE_FAILPOINTS", ""))


def failpoint(name: str) -> None:
    """Pass the place `name`."""
    if _ARMED and name in _ARMED:
        os.kill(os.getpid(), _ARMED.pop(name))
