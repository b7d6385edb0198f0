"""What a command did, as somebody at a terminal or a script sees it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple
from uuid import UUID


class Outcome(NamedTuple):
    """Its exit code, and what it said on stdout and stderr."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """What it printed with --json."""
        assert self.code == 0, self
        return json.loads(self.out)

    @property
    def id(self) -> UUID:
        """The id that it printed."""
        return UUID(self.out.strip())


#: Runs `sluice` with these words, and a text on its standard input as `stdin=`.
Command = Callable[..., Outcome]
