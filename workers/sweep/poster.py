"""The poster: posts alerts to the URLs of their accounts, signed, until they take them.

What is to be tried, when, and how often it was, stands in the alert's row. A try claims the row for
a little longer than it may take, so one sweep at a time has it, and another sweep gets it if this
one dies. At least once, then: the id in the header is what tells a repetition.

Each try is a task of its own, one at a time for each account: whoever is slow keeps only his own
alerts waiting.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final
from uuid import UUID

from sluicegate.shared.alerts import FACTS, NAMES, payload
from sluicegate.shared.database import CONNECTION_ERRORS
from sluicegate.shared.secrets import Keyring, Secret, SecretUnreadable
from sluicegate.shared.settings import Settings
from sluicegate.shared.statements import Database, through_disconnects
from sluicegate.shared.webhooks import (
    ID_HEADER,
    SIGNATURE_HEADER,
    TIMESTAMP_HEADER,
    signature,
)
from sluicegate.workers.failpoints import failpoint
from sluicegate.workers.webhook import PostFailed, WebhookClient

log = logging.getLogger(__name__)

#: Posts of one sweep that run at the same time.
SIZE: Final = 16
#: How much longer than a post may take its alert stays claimed: time to note how it went.
_MARGIN_S: Final = 20
#: The longest wait between two tries.
_LONGEST_WAIT_S: Final = 3600

_KEYS_NOT_HERE: Final = (
    "its secret cannot be decrypted: give the sweep the SLUICE_ENCRYPTION_KEYS it was set with"
)

# The first due alert of each account that has none under way here. Whoever has no URL is told on
# the channel alone; a URL that is set later gets what is raised later.
_CLAIM = f"""
WITH nowhere AS (
    SELECT a.id FROM alerts a
    WHERE a.posted_at IS NULL AND a.post_due_at <= now() AND NOT EXISTS (
        SELECT FROM accounts c WHERE c.id = a.account_id AND c.alert_url IS NOT NULL)
    ORDER BY a.id FOR NO KEY UPDATE OF a SKIP LOCKED
), settled AS (
    UPDATE alerts a SET post_due_at = NULL FROM nowhere WHERE a.id = nowhere.id
), first AS (
    SELECT DISTINCT ON (a.account_id) a.id, a.post_due_at
    FROM alerts a JOIN accounts c ON c.id = a.account_id AND c.alert_url IS NOT NULL
    WHERE a.posted_at IS NULL AND a.post_due_at <= now()
      AND a.account_id <> ALL(%(busy)s::uuid[])
    ORDER BY a.account_id, a.post_due_at, a.id
), locked AS (
    SELECT id FROM alerts
    WHERE id IN (SELECT id FROM first ORDER BY post_due_at, id LIMIT %(free)s)
      AND posted_at IS NULL AND post_due_at <= now()
    ORDER BY id FOR NO KEY UPDATE SKIP LOCKED
), claimed AS (
    UPDATE alerts a
    SET post_tries = a.post_tries + 1,
        post_due_at = now() + %(lease_s)s * interval '1 second'
    FROM locked WHERE a.id = locked.id
    RETURNING a.*
)
SELECT {FACTS}, a.post_tries, c.alert_url, c.alert_secret_encrypted FROM claimed a {NAMES}
"""

_POSTED = """
UPDATE alerts SET posted_at = now(), post_due_at = NULL, post_error = NULL
WHERE id = %(id)s AND posted_at IS NULL
"""

# A try that took too long, and was followed by another one, has nothing to say. Waits differ by a
# quarter, so that alerts of one minute do not come back in one second.
_FAILED = f"""
WITH next AS (
    SELECT now() + least(%(retry_s)s * power(2, least(%(tries)s - 1, 20)), {_LONGEST_WAIT_S})
                   * (0.75 + 0.5 * random()) * interval '1 second' AS due_at
)
UPDATE alerts a
SET post_error = %(problem)s,
    post_due_at = CASE
        WHEN next.due_at <= a.created_at + %(give_up_s)s * interval '1 second' THEN next.due_at
    END
FROM next
WHERE a.id = %(id)s AND a.post_tries = %(tries)s AND a.posted_at IS NULL
RETURNING a.post_due_at IS NULL AS is_given_up
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """How long the poster tries. All in seconds."""

    #: One post.
    deadline_s: float
    #: The first wait; it doubles, up to an hour.
    retry_s: float
    #: From when the alert was raised: no try begins later, but for the first.
    give_up_s: float

    @classmethod
    def of(cls, settings: Settings) -> Terms:
        """Take them from the settings."""
        return cls(
            deadline_s=settings.alert_deadline_s,
            retry_s=settings.alert_retry_s,
            give_up_s=settings.alert_give_up_s,
        )


class Poster:
    """One round begins what is due and there is room for; safe to run twice at once.

    free: called when a post has ended, and another of its account may begin.
    """

    def __init__(
        self,
        *,
        db: Database,
        client: WebhookClient,
        keyring: Keyring,
        terms: Terms,
        free: Callable[[], None],
    ) -> None:
        self._db = db
        self._client = client
        self._keyring = keyring
        self._terms = terms
        self._free = free
        # Who claims must know who is busy.
        self._turn = asyncio.Lock()
        #: By account.
        self._running: dict[UUID, asyncio.Task[None]] = {}

    async def round(self) -> int:
        """Begin posts and return how many; raises if Postgres is away."""
        async with self._turn:
            room = SIZE - len(self._running)
            if room <= 0:
                return 0
            rows = await self._db.execute(
                _CLAIM,
                busy=list(self._running),
                free=room,
                lease_s=self._terms.deadline_s + _MARGIN_S,
            )
            for row in rows:
                task = asyncio.create_task(self._post(row))
                self._running[row.account_id] = task
                task.add_done_callback(partial(self._ended, row.account_id))
            return len(rows)

    async def close(self) -> None:
        """Cut off what is under way: it is tried again."""
        running = list(self._running.values())
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        self._client.close()

    def _ended(self, account_id: UUID, task: asyncio.Task[None]) -> None:
        del self._running[account_id]
        self._free()
        if not task.cancelled() and (problem := task.exception()) is not None:
            # Its claim ends by itself, and then it is tried again.
            log.error("an alert's post met a defect", exc_info=problem)

    async def _post(self, row: Any) -> None:
        try:
            await self._client.post(row.alert_url, *self._signed(row))
        except (PostFailed, SecretUnreadable) as error:
            problem = _KEYS_NOT_HERE if isinstance(error, SecretUnreadable) else str(error)
            terms = self._terms
            values = {"retry_s": terms.retry_s, "give_up_s": terms.give_up_s, "problem": problem}
            ended = await self._note(_FAILED, id=row.id, tries=row.post_tries, **values)
            for after in ended:
                word = "given up" if after.is_given_up else "tried again"
                log.warning("alert %d of account %s is %s: %s", row.id, row.account, word, problem)
        else:
            failpoint("posted")
            await self._note(_POSTED, id=row.id)

    def _signed(self, row: Any) -> tuple[dict[str, str], bytes]:
        body = payload(row)
        timestamp = str(int(time.time()))
        secret: Secret = self._keyring.decrypt(row.alert_secret_encrypted)
        return {
            "Content-Type": "application/json",
            "User-Agent": "sluicegate",
            ID_HEADER: str(row.id),
            TIMESTAMP_HEADER: timestamp,
            SIGNATURE_HEADER: signature(secret, timestamp, body),
        }, body

    async def _note(self, statement: str, **values: Any) -> list[Any]:
        try:
            return await through_disconnects(
                lambda: self._db.execute(statement, **values), give_up_after_s=_MARGIN_S / 2
            )
        except CONNECTION_ERRORS as error:
            # What was posted is posted once more: the claim ends, and the id says that it was.
            log.warning("how a post went could not be noted (%s)", type(error).__name__)
            return []
