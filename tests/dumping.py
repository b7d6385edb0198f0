"""Everything that a database holds, as text: what a stolen backup would show."""

from __future__ import annotations

import psycopg
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
