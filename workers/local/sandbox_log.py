"""The sandbox provider's own record of every call and of what it billed."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import orjson

from sluicegate.workers.local.sandbox_prices import Usage, WireName, bill_nano_usd

PROMPT_TAIL_CHARS = 200
#: Totals name this many models; sandbox models beyond it are added up as OTHER_MODELS.
MAX_MODELS = 1_000
OTHER_MODELS = "others"


@dataclass(slots=True, kw_only=True, eq=False)
class Call:
    """One call as the provider saw it. Unfinished while `finished_at` is None."""

    seq: int
    wire: WireName
    model: str
    stream: bool
    fault: str | None
    digest: bytes
    prompt_tail: str
    request_id: str
    #: Tells calls with one key from those with another, and is none itself.
    key_sha256: str
    started_at: float
    #: HTTP status sent; None if none was.
    status: int | None = None
    billed_nano_usd: int | None = None
    usage: Usage | None = None
    #: Which limit turned it away.
    limited_by: str | None = None
    finished_at: float | None = None
    client_gone: bool = False

    def as_dict(self) -> dict[str, object]:
        """Return the call as the control endpoint shows it."""
        return {
            "seq": self.seq,
            "at": datetime.fromtimestamp(self.started_at, UTC).isoformat(),
            "wire": self.wire,
            "model": self.model,
            "status": self.status,
            "billed_nano_usd": self.billed_nano_usd or 0,
            "usage": self.usage,
            "stream": self.stream,
            "fault": self.fault,
            "limited_by": self.limited_by,
            "prompt_sha256": self.digest.hex(),
            "prompt_tail": self.prompt_tail,
            "request_id": self.request_id,
            "key_sha256": self.key_sha256,
            "started_at": self.started_at,
            "finished_at": self.finished_at,
            "client_gone": self.client_gone,
        }


class CallLog:
    """The latest calls, and exact totals of all; `path` also gets a JSON line a finished call.

    A call enters when it arrives, is billed at most once, and is finished once.
    """

    def __init__(self, *, keep_calls: int = 200_000, path: Path | None = None) -> None:
        self._kept: deque[Call] = deque(maxlen=keep_calls)
        self._file: BinaryIO | None = path.open("ab", buffering=0) if path else None
        self._open: set[Call] = set()
        self._last_seq = 0
        self.reset()

    def reset(self) -> None:
        """Forget every call and set the totals to zero; running calls are forgotten too."""
        self._kept.clear()
        self._open.clear()
        self._calls = self._billed_calls = self._billed_nano_usd = self._limited_calls = 0
        self._by_model: dict[str, dict[str, int]] = {}

    def begin(
        self,
        *,
        wire: WireName,
        model: str,
        request_id: str,
        stream: bool = False,
        fault: str | None = None,
        digest: bytes = b"",
        last_user: str = "",
        key: bytes = b"",
    ) -> Call:
        """Enter a call that has arrived; `seq` grows by one a call and never starts again."""
        self._last_seq += 1
        call = Call(
            seq=self._last_seq,
            wire=wire,
            model=model,
            stream=stream,
            fault=fault,
            digest=digest,
            prompt_tail=_printable(last_user[-PROMPT_TAIL_CHARS:]),
            request_id=request_id,
            key_sha256=sha256(key).hexdigest(),
            started_at=time.time(),
        )
        self._kept.append(call)
        self._open.add(call)
        self._calls += 1
        self._model(model)["calls"] += 1
        return call

    def bill(self, call: Call, usage: Usage) -> None:
        """Book what the call costs, once."""
        if call not in self._open or call.billed_nano_usd is not None:
            return
        cost = bill_nano_usd(call.model, usage)
        call.usage, call.billed_nano_usd = usage, cost
        self._billed_calls += 1
        self._billed_nano_usd += cost
        of_model = self._model(call.model)
        of_model["billed_calls"] += 1
        of_model["billed_nano_usd"] += cost

    def limit(self, call: Call, dimension: str) -> None:
        """Note that a limit turned the call away: no fault struck it."""
        call.limited_by, call.fault = dimension, None
        self._limited_calls += 1

    def finish(self, call: Call) -> None:
        """Close a call, once; what was not billed by now is free."""
        if call not in self._open:
            return
        self._open.discard(call)
        call.finished_at = time.time()
        if self._file is not None:
            self._file.write(orjson.dumps(call.as_dict()) + b"\n")

    def calls(self, *, after: int, limit: int) -> list[dict[str, object]]:
        """Return up to `limit` calls with a `seq` above `after`, oldest first."""
        if not self._kept:
            return []
        skip = max(0, after + 1 - self._kept[0].seq)
        return [call.as_dict() for call in islice(self._kept, skip, skip + limit)]

    def totals(self) -> dict[str, object]:
        """Return the bill: exact, also for calls no longer kept."""
        return {
            "calls": self._calls,
            "in_flight": len(self._open),
            "billed_calls": self._billed_calls,
            "billed_nano_usd": self._billed_nano_usd,
            "limited_calls": self._limited_calls,
            "by_model": self._by_model,
        }

    def close(self) -> None:
        """Close the calls still open, then the file."""
        for call in sorted(self._open, key=lambda call: call.seq):
            self.finish(call)
        if self._file is not None:
            self._file.close()

    def _model(self, model: str) -> dict[str, int]:
        if model not in self._by_model and len(self._by_model) >= MAX_MODELS:
            model = OTHER_MODELS
        empty = {"calls": 0, "billed_calls": 0, "billed_nano_usd": 0}
        return self._by_model.setdefault(model, empty)


def _printable(text: str) -> str:
    """Replace lone surrogates, which no JSON file can carry."""
    return text.encode("utf-8", "replace").decode()
