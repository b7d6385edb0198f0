"""Ids: UUIDs of version 7, which sort by the time they were made."""

from __future__ import annotations

from uuid import UUID

import uuid6


def new_id() -> UUID:
    """Make an id: a plain `UUID`, because JSON encoders do not take subclasses."""
    return UUID(int=uuid6.uuid7().int)
