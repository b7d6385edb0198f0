"""Resealing: encrypting stored bodies anew with the newest key, so that an older one may go."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final
from uuid import UUID

import orjson
from sqlalchemy import Connection

from sluicegate.shared.provider_keys import Rotation
from sluicegate.shared.secrets import Keyring, SecretUnreadable

#: Rows of one statement: each may hold images.
_PAGE: Final = 50

# All rows are gone through by their key; of those in the clear nothing is sent.
_PAGES: Final = {
    "request": f"""
SELECT job_id, CASE WHEN request->>'sealed' IS NOT NULL THEN request END AS stored
FROM (SELECT * FROM job_bodies WHERE job_id > %(after)s ORDER BY job_id LIMIT {_PAGE}) page
ORDER BY job_id
""",
    "body": f"""
SELECT job_id, json_build_object('sealed', body->'sealed') AS stored
FROM (SELECT * FROM results WHERE job_id > %(after)s ORDER BY job_id LIMIT {_PAGE}) page
ORDER BY job_id
""",
}

# A request never changes. A result may have been purged meanwhile, or be another one by now.
_STORE: Final = {
    "request": """
UPDATE job_bodies b SET request = new.stored::json
FROM unnest(%(ids)s::uuid[], %(stored)s::text[], %(tokens)s::text[]) AS new(id, stored, token)
WHERE b.job_id = new.id
""",
    "body": """
UPDATE results r
SET body = (r.body::jsonb || new.stored::jsonb)::json
FROM unnest(%(ids)s::uuid[], %(stored)s::text[], %(tokens)s::text[]) AS new(id, stored, token)
WHERE r.job_id = new.id AND r.body->>'sealed' = new.token
""",
}


def reseal(
    connection: Connection, keyring: Keyring, *, progress: Callable[[Rotation], None]
) -> Rotation:
    """Encrypt all sealed bodies with the newest key, while others read and write them.

    The connection is in autocommit: what is cut off has done what it has done. What no key fits
    stays as it is. `progress` is told after each page.
    """
    done = Rotation()
    for kind, statement in _PAGES.items():
        after = UUID(int=0)
        while page := connection.exec_driver_sql(statement, {"after": after}).all():
            after = page[-1].job_id
            renewed = [
                (row.job_id, *new)
                for row in page
                if row.stored is not None and (new := _renewed(row.stored, keyring, done))
            ]
            if renewed:
                ids, stored, tokens = zip(*renewed, strict=True)
                values = {"ids": list(ids), "stored": list(stored), "tokens": list(tokens)}
                connection.exec_driver_sql(_STORE[kind], values)
            progress(done)
    return done


def _renewed(stored: dict[str, Any], keyring: Keyring, done: Rotation) -> tuple[str, str] | None:
    """Return what is to be stored in place of these tokens, and the first of them as it was."""
    tokens = {name: token for name, token in stored.items() if token is not None}
    if not tokens:
        return None
    try:
        new = {name: keyring.rotate(token) for name, token in tokens.items()}
    except SecretUnreadable:
        done.unreadable += 1
        return None
    if new == tokens:
        done.current += 1
        return None
    done.renewed += 1
    return orjson.dumps(new).decode(), tokens["sealed"]
