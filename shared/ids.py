"""Ids: UUIDs of version 7, which sort by the time they were made."""

from __future__ import annotations

from datetime import datetime
from uuid import UUID

import uuid6


def new_id() -> UUID:
    """Make an id: a plain `UUID`, because JSON encoders do not take subclasses."""
    return UUID(int=uuid6.uuid7().int)


def first_id(moment: datetime) -> UUID:
    """Return the smallest id that could have been made at this moment, by the maker's clock."""
    unix_ms = max(0, int(moment.timestamp() * 1000))
    return UUID(int=unix_ms << 80 | 7 << 76 | 2 << 62)
