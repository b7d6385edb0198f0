"""A summary of every note in a CSV file, as one batch, written to another CSV file.

    pip install sluicegate
    python bulk_from_csv.py notes.csv summaries.csv

Columns that the template does not use come back as metadata. The file's content is the batch's
idempotency key: started again, because somebody pressed Ctrl-C, it goes on with the same batch. The
command line does the same: `sluice bulk submit notes.csv --use-case summary --template ...`.
"""

from __future__ import annotations

import csv
import hashlib
import sys
from pathlib import Path

from sluicegate import Sluice

TEMPLATE = "Summarise this call note in one sentence: {note}"


def main(source: Path, target: Path) -> None:
    """Submit the rows, wait for all of them, and write what came out."""
    data = source.read_bytes()
    rows = csv.DictReader(data.decode().splitlines(keepends=True))
    with Sluice() as sluice, target.open("w", newline="") as file:
        batch = sluice.submit_batch(
            "summary",
            rows,
            name=source.name,
            template=TEMPLATE,
            idempotency_key=hashlib.sha256(data).hexdigest(),
        )
        print(f"batch {batch.id}: {'submitted' if batch.is_new else 'goes on'}")
        done = batch.wait(timeout=3600)
        writer = csv.writer(file)
        writer.writerow(["lead", "state", "summary"])
        for one in batch.results():
            text = one.result.text if one.result else ""
            writer.writerow([one.metadata.get("lead"), one.state, text])
        print(f"{done.succeeded} of {done.total} succeeded for ${done.cost:.6f}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python bulk_from_csv.py NOTES.csv SUMMARIES.csv")
    main(Path(sys.argv[1]), Path(sys.argv[2]))
