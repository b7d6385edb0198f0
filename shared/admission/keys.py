"""Names and scripts of the gates in Redis. The 1 in a name is the version of what is there."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from uuid import UUID

_HERE = Path(__file__).parent
_DAY_S = 86_400


@dataclass(frozen=True, slots=True)
class Script:
    """A Lua script and the name under which a server that has seen it runs it."""

    source: str
    sha: str


def _script(*names: str) -> Script:
    source = "\n".join((_HERE / f"{name}.lua").read_text("utf-8") for name in names)
    return Script(source, hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest())


ADMIT: Final = _script("row", "admit")
REPORT: Final = _script("row", "report")
RENEW: Final = _script("renew")
RESET: Final = _script("reset")
LIFT: Final = _script("lift")
COPY: Final = _script("copy")


def row_key(prefix: str, provider_id: UUID) -> str:
    """Return the hash of a provider row's gate."""
    return f"{prefix}gate:1:{provider_id}"


def flight_key(prefix: str, provider_id: UUID) -> str:
    """Return the interactive calls in flight: attempt ids by the end of their lease, in µs."""
    return row_key(prefix, provider_id) + ":flight"


def bulk_key(prefix: str, provider_id: UUID) -> str:
    """Return the bulk calls in flight, as `flight_key`."""
    return row_key(prefix, provider_id) + ":bulk"


def probes_key(prefix: str, provider_id: UUID) -> str:
    """Return the probes under way, as `flight_key`."""
    return row_key(prefix, provider_id) + ":probes"


def suspended_key(prefix: str, provider_id: UUID) -> str:
    """Return the accounts that do not use the row, by the end of that, in µs."""
    return row_key(prefix, provider_id) + ":suspended"


def budgets_key(prefix: str, account_id: UUID | str) -> str:
    """Return the hash of an account's budgets, as Postgres had them lately."""
    return f"{prefix}budget:1:{account_id}"


def changes_key(prefix: str) -> str:
    """Return the stream of state changes of all rows, to be written down in Postgres."""
    return f"{prefix}gate:1:changes"


def ttl_ms(*durations_us: int) -> int:
    """Return how long a key outlives its last use: a day longer than anything it says."""
    return _DAY_S * 1000 + max(durations_us) // 1000
