"""The recorder: takes what happened at the gates from Redis to Postgres.

The scripts in Redis append each change of a breaker, and each suspension, to one stream. Its ids
name the lines of the trail in Postgres, so an entry that is read twice is kept once; it is deleted
once it is there. A suspension also raises an alert, which its end resolves.
"""

from __future__ import annotations

import logging
from enum import StrEnum
from typing import Any, Final
from uuid import UUID

import redis.asyncio

from sluicegate.shared.admission.keys import changes_key
from sluicegate.shared.gate_changes import SUSPENDED
from sluicegate.shared.statements import Database

log = logging.getLogger(__name__)

_BATCH: Final = 500
#: Of batches in a round: more than the stream holds.
_BATCHES: Final = 40
#: Of a reason, in characters; it is shown on one line.
_LONGEST_REASON: Final = 500

# The last word on an account and a row within these entries decides on its alert. While one is open
# another suspension adds nothing.
_KEEP = f"""
WITH event AS (
    SELECT * FROM json_to_recordset(%(items)s::json) AS t(
        n int, event_id text, at_s float8, kind text, provider_id uuid, account_id uuid,
        before text, after text, reason text)
), kept AS (
    INSERT INTO gate_changes (event_id, at, kind, provider_id, account_id, before, after, reason)
    SELECT event_id, least(to_timestamp(at_s), now()), kind, provider_id, account_id, before, after,
           reason
    FROM event ORDER BY n
    ON CONFLICT (event_id) DO NOTHING
    RETURNING event_id
), last AS (
    SELECT DISTINCT ON (event.provider_id, event.account_id) event.*
    FROM event JOIN kept USING (event_id)
    WHERE event.kind = 'suspension'
    ORDER BY event.provider_id, event.account_id, event.n DESC
), raised AS (
    INSERT INTO alerts (kind, account_id, provider_id, message)
    SELECT '{SUSPENDED}', last.account_id, last.provider_id, format(
        'account %%s does without %%s: %%s', coalesce(a.name, last.account_id::text),
        coalesce(p.name, last.provider_id::text),
        coalesce(nullif(last.reason, ''), 'the provider refused its key'))
    FROM last LEFT JOIN accounts a ON a.id = last.account_id
    LEFT JOIN llm_providers p ON p.id = last.provider_id
    WHERE last.after = '{SUSPENDED}'
    ORDER BY last.provider_id, last.account_id
    ON CONFLICT (kind, account_id, provider_id)
        WHERE resolved_at IS NULL AND "window" IS NULL DO NOTHING
    RETURNING message
), over AS (
    SELECT a.id FROM alerts a
    JOIN last ON last.provider_id = a.provider_id AND last.account_id = a.account_id
    WHERE a.kind = '{SUSPENDED}' AND a.resolved_at IS NULL AND last.after <> '{SUSPENDED}'
    ORDER BY a.id FOR NO KEY UPDATE OF a
), resolved AS (
    UPDATE alerts a SET resolved_at = now() FROM over WHERE a.id = over.id
)
SELECT message FROM raised
"""


class Recorder:
    """One round takes all there is to Postgres; safe to run twice at once."""

    def __init__(self, *, db: Database, client: redis.asyncio.Redis, prefix: str) -> None:
        self._db = db
        self._client = client
        self._key = changes_key(prefix)

    async def round(self) -> bool:
        """Record what has happened; return whether there was anything.

        Raises if a server is away: what is not recorded yet stays in the stream.
        """
        found = False
        for _ in range(_BATCHES):
            entries: Any = await self._client.xrange(self._key, count=_BATCH)
            if not entries:
                break
            found = True
            await self._keep(entries)
            await self._client.xdel(self._key, *(entry_id for entry_id, _ in entries))
            if len(entries) < _BATCH:
                break
        return found

    async def _keep(self, entries: list[tuple[bytes, dict[bytes, bytes]]]) -> None:
        events = [event for entry in entries if (event := _read(*entry)) is not None]
        items = [event | {"n": n} for n, event in enumerate(events)]
        for row in await self._db.execute(_KEEP, items):
            log.warning("%s", row.message)


class _Kind(StrEnum):
    BREAKER = "breaker"
    SUSPENSION = "suspension"


def _read(entry_id: bytes, fields: dict[bytes, bytes]) -> dict[str, Any] | None:
    """Read an entry; None for one that is none of ours: it must not hold up the others."""
    # What a provider said may be anything; Postgres keeps no NUL.
    text = {
        name.decode(errors="replace"): value.decode(errors="replace").replace("\0", "\ufffd")
        for name, value in fields.items()
    }
    try:
        return {
            "event_id": entry_id.decode(),
            "at_s": int(entry_id.partition(b"-")[0]) / 1000,
            "kind": _Kind(text["kind"]),
            "provider_id": UUID(text["provider_id"]),
            "account_id": UUID(text["account_id"]) if text.get("account_id") else None,
            "before": text["before"],
            "after": text["after"],
            "reason": text.get("reason", "")[:_LONGEST_REASON],
        }
    except (KeyError, ValueError) as problem:
        log.error("a change of the gates cannot be read (%r): %s", problem, text)
        return None
