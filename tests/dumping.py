"""Everything that the servers hold, as text: what a stolen backup would show."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psycopg
import redis
from psycopg import sql


def dump(conninfo: str) -> str:
    """Return all tables of all schemas, the server's own not among them, as `pg_dump` has them."""
    text = []
    with psycopg.connect(conninfo.replace("+psycopg", "", 1)) as connection:
        tables = connection.execute(
            "SELECT table_schema, table_name FROM information_schema.tables"
            " WHERE table_type = 'BASE TABLE'"
            " AND table_schema NOT IN ('pg_catalog', 'information_schema')"
        ).fetchall()
        for schema, name in tables:
            copy = sql.SQL("COPY {} TO STDOUT").format(sql.Identifier(schema, name))
            with connection.cursor().copy(copy) as rows:
                text.append(f"{schema}.{name}\n" + b"".join(rows).decode())
    return "\n".join(text)


def dump_redis(client: redis.Redis, prefix: str) -> str:
    """Return all that Redis holds under this prefix, as text."""
    readers: dict[bytes, Callable[[bytes], Any]] = {
        b"string": client.get,
        b"list": lambda key: client.lrange(key, 0, -1),
        b"set": client.smembers,
        b"zset": lambda key: client.zrange(key, 0, -1, withscores=True),
        b"hash": client.hgetall,
        b"stream": client.xrange,
    }
    found = []
    for key in client.scan_iter(match=f"{prefix}*", count=1000):
        kind: Any = client.type(key)
        # What is gone meanwhile is of no kind.
        found.append(f"{key!r} {readers[kind](key) if kind in readers else kind!r}")
    return "\n".join(found)
