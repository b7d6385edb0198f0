"""Ids of tool calls: a conversation may have begun at another provider than goes on with it."""

from __future__ import annotations

import hashlib
import re
from typing import Final

#: What both providers take; compatible servers make up others.
_WIRE_ID: Final = re.compile(r"[a-zA-Z0-9_-]{1,40}")


def wire_id(call_id: str) -> str:
    """Return the id of a tool call as any provider takes it, the same for call and result."""
    if _WIRE_ID.fullmatch(call_id):
        return call_id
    return f"call_{hashlib.sha256(call_id.encode()).hexdigest()[:24]}"
