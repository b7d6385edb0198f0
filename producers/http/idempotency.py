"""Idempotency keys: a caller's own word for a request, so that a repeat of it is no second job.

A key counts within an account. What users send counts within their own requests: the answer to a
key that two of them happen to choose must not go from one to the other.
"""

from __future__ import annotations

import hashlib
import re
from functools import lru_cache
from typing import Final

from sluicegate.producers.http.callers import Caller, Role
from sluicegate.producers.http.problems import wrong

HEADER: Final = "Idempotency-Key"
_MOST: Final = 200
#: Visible ASCII.
PATTERN: Final = rf"^[!-~]{{1,{_MOST}}}$"


def check_key(given: str) -> str:
    """Return the value of the header; raise `Problem` if it is none that a header can have."""
    if not re.fullmatch(PATTERN, given) or given.endswith("\n"):
        raise wrong(HEADER, f"must be 1 to {_MOST} letters, digits or signs, without spaces")
    return given


def stored_key(given: str, caller: Caller) -> str:
    """Return the key that the job is stored with."""
    return given + _mark(caller.subject) if given and caller.role is Role.USER else given


def given_key(stored: str | None, submitted_by: str | None) -> str | None:
    """Return the key as its caller gave it."""
    if stored is None or submitted_by is None:
        return stored
    return stored.removesuffix(_mark(submitted_by))


@lru_cache(maxsize=1024)
def _mark(subject: str) -> str:
    return "@" + hashlib.sha256(subject.encode()).hexdigest()[:16]
