"""Clients in a forked process: the parent's connections stay the parent's.

gunicorn's pre-load and Celery's prefork make clients in the parent and use them in the children.
A child leaves everything it has inherited alone, for good: to close a socket, to roll back or even
to let go would speak on a line on which the parent is speaking.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Iterator
from typing import Any, Final, Protocol
from weakref import WeakSet

from kombu.utils.objects import cached_property


class Forkable(Protocol):
    """A client."""

    def forget_lines(self) -> object:
        """Let go of what is open, without closing it, and return it."""


_BROKER_LIBRARIES: Final = ("celery", "kombu")

#: Held while a client opens: a fork waits until nothing is half open.
opening = threading.Lock()

_clients: WeakSet[Forkable] = WeakSet()


def register(client: Forkable) -> None:
    """Have this client begin anew in every child process."""
    with opening:
        _clients.add(client)


def _in_child() -> None:
    # Celery and kombu take a lock of the class for every look at such a property. If another
    # thread had it at the fork, nobody would ever give it back here.
    for lazy in _lazy_properties():
        lazy.lock = threading.RLock()  # type: ignore[attr-defined]  # not in the stubs
    for client in _clients:
        _keep_for_ever(client.forget_lines())
    opening.release()


def _lazy_properties() -> Iterator[cached_property[Any]]:
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in _BROKER_LIBRARIES:
            # By `type`, as `isinstance` makes Celery's stand-ins do what they stand for.
            kinds = [one for one in vars(module).values() if issubclass(type(one), type)]
            for kind in kinds:
                properties = vars(kind).values()
                yield from (one for one in properties if type(one) is cached_property)


def _keep_for_ever(lines: object) -> None:
    # No reference of Python's own lasts to the very end of a process, and finalizers of
    # connections run when the last one goes.
    kept: Any = ctypes.py_object(lines)
    ctypes.pythonapi.Py_IncRef(kept)


os.register_at_fork(
    before=opening.acquire, after_in_parent=opening.release, after_in_child=_in_child
)
