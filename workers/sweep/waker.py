"""The waker: brings back jobs that were held back as soon as what held them back has passed.

It goes by the trail of changes, where the recorder and the commands write what has opened: a
breaker that closed, a suspension that ended, a lever or a pause that was taken away, a budget that
was set or cleared. Such jobs
would come back by themselves later: this makes it soon.

A worker may park a job a moment after it should have: it went by what it knew. So each opening
wakes twice, at once, and again when every worker has seen it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any, Final
from uuid import UUID

from sluicegate.shared.admission.gate import Reason
from sluicegate.shared.gate_changes import SUSPENDED
from sluicegate.shared.statements import Database
from sluicegate.workers.held_back import BUDGET, PAUSED, WORDS, by

_BATCH: Final = 1000
_CHANGES: Final = 500
#: Until every worker has seen a change, in seconds.
_SEEN_AFTER_S: Final = 3
#: What opened longer ago was seen to, or no sweep ran; its jobs come back by themselves.
_REMEMBERED_S: Final = 600

# By key, from the newest: however long the trail is. Names are looked up, as `held_back` has them.
_OPENINGS = f"""
SELECT c.number, c.kind, c.at < now() - interval '{_SEEN_AFTER_S} seconds' AS is_seen,
       p.name AS provider, c.account_id, c.use_case
FROM (SELECT * FROM gate_changes WHERE number > %(after)s ORDER BY number DESC LIMIT {_CHANGES}) c
LEFT JOIN llm_providers p ON p.id = c.provider_id
WHERE c.at > now() - interval '{_REMEMBERED_S} seconds' AND CASE c.kind
    WHEN 'breaker' THEN c.after = 'closed'
    WHEN 'suspension' THEN c.after <> '{SUSPENDED}'
    WHEN 'pause' THEN c.after = 'running'
    ELSE c.after <> 'forced_open' END
ORDER BY c.number
"""

# In the order of their turns, along the stager's index; the place of the last one read is where the
# next statement begins. A woken job counts as a fresh one, due since it was made: if it is refused
# again it gets a new turn, and so do all, instead of coming back all at once.
_WAKE = f"""
WITH held AS (
    SELECT id, run_at FROM jobs
    WHERE queue = %(queue)s AND state = 'parked' AND run_at > now()
      AND (run_at, id) > (%(run_at)s::timestamptz, %(id)s::uuid)
      AND held_back IS NOT NULL
      AND strpos(held_back, %(words)s) > 0
      AND (%(account_id)s::uuid IS NULL OR account_id = %(account_id)s)
      AND (%(use_case)s::text IS NULL OR use_case = %(use_case)s)
    ORDER BY run_at, id LIMIT {_BATCH}
    FOR NO KEY UPDATE SKIP LOCKED
)
UPDATE jobs j SET run_at = j.created_at
FROM held WHERE j.id = held.id
RETURNING held.run_at, held.id
"""

#: Before all places, and how many statements one opening takes in a queue at most.
_FIRST: Final = {"run_at": "-infinity", "id": "00000000-0000-0000-0000-000000000000"}
_BATCHES: Final = 1000


class Waker:
    """One round wakes for what has opened; safe to run twice at once."""

    def __init__(self, *, db: Database) -> None:
        self._db = db
        #: Numbers of the trail: woken for until here, and woken for again until here.
        self._woken = 0
        self._done = 0

    async def round(self, queues: Sequence[str]) -> int:
        """Make jobs of these queues due that nothing holds back any more; return how many.

        Raises if Postgres is away; the next round does it.
        """
        openings = await self._db.execute(_OPENINGS, after=self._done)
        due = [
            one
            for one in openings
            if (one.is_seen or one.number > self._woken)
            # A row that is gone has no name, and holds back nobody.
            and (one.provider or one.account_id or one.use_case)
        ]
        woken = 0
        for words, account_id, use_case in dict.fromkeys(map(_scope, due)):
            for queue in queues:
                woken += await self._wake(queue, words, account_id, use_case)
        self._woken = max([self._woken, *(one.number for one in openings)])
        seen = takewhile(lambda one: one.is_seen, openings)
        self._done = max([self._done, *(one.number for one in seen)])
        return woken

    async def _wake(
        self, queue: str, words: str, account_id: UUID | None, use_case: str | None
    ) -> int:
        place: dict[str, Any] = _FIRST
        woken = 0
        for _ in range(_BATCHES):
            rows = await self._db.execute(
                _WAKE,
                queue=queue,
                words=words,
                account_id=account_id,
                use_case=use_case,
                **place,
            )
            woken += len(rows)
            if len(rows) < _BATCH:
                break
            last = max(rows, key=lambda row: (row.run_at, row.id))
            place = {"run_at": last.run_at, "id": last.id}
        return woken


def _scope(opening: Any) -> tuple[str, UUID | None, str | None]:
    """Return what the jobs that this opening lets go say, and whose they are.

    Only those: whoever stands in line for a limit keeps his turn there.
    """
    account_id = opening.account_id
    match opening.kind:
        case "breaker":
            return by(opening.provider, WORDS[Reason.BREAKER]), None, None
        case "suspension":
            return by(opening.provider, WORDS[Reason.SUSPENDED]), account_id, None
        case "pause" if opening.provider:
            return by(opening.provider, PAUSED), None, None
        case "pause":
            return "is paused", account_id, opening.use_case
        case "budget":
            return BUDGET, account_id, opening.use_case
        case _:
            # A lever: after a reset nothing of what the row had said is left.
            return by(opening.provider, ""), None, None
