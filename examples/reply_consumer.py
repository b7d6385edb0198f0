"""A consumer of a shared reply channel: answers arrive here, whoever submitted the jobs.

    pip install sluicegate
    python reply_consumer.py crm-eu

Submit with `reply_to="crm-eu"` and do not wait. Start as many consumers as you like: they share the
work. One that is killed before its `ack` loses nothing, the reply goes to another; so what is done
with a reply must be safe to do twice, as an upsert by job id is.
"""

from __future__ import annotations

import signal
import sqlite3
import sys

from sluicegate import Reply, Sluice

SAVE = "INSERT OR REPLACE INTO answers (job_id, lead, state, text, cost) VALUES (?, ?, ?, ?, ?)"


def save(database: sqlite3.Connection, reply: Reply) -> None:
    """Keep a result with what the submitter said it is about."""
    result = reply.result
    text = result.text if result.error is None else result.error.message
    row = (str(reply.job_id), reply.metadata.get("lead"), result.state, text, str(result.cost))
    with database:  # commits
        database.execute(SAVE, row)


def main(channel: str) -> None:
    """Save replies until SIGTERM or Ctrl-C."""
    database = sqlite3.connect("answers.sqlite")
    database.execute(
        "CREATE TABLE IF NOT EXISTS answers (job_id PRIMARY KEY, lead, state, text, cost)"
    )
    with Sluice() as sluice, sluice.replies(channel, group="crm") as replies:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: replies.close())
        for reply in replies:
            save(database, reply)
            reply.ack()  # only now: what is not acknowledged comes again
            print(f"{reply.job_id} {reply.result.state}", flush=True)
    database.close()
    print("stopped; what was not acknowledged comes again")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "crm-eu")
