"""Narrow cost entries, for reports: raw usage moves to its attempt, latencies come in buckets."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Move and add the columns. Adding the buckets writes the table anew, without the usage."""
    op.add_column("attempts", sa.Column("raw_usage", postgresql.JSON()))
    # A correction knows better than what it corrects.
    op.execute(
        "UPDATE attempts a SET raw_usage = e.raw_usage"
        " FROM (SELECT DISTINCT ON (attempt_id) attempt_id, raw_usage FROM cost_entries"
        "       WHERE raw_usage IS NOT NULL"
        "       ORDER BY attempt_id, kind = 'correction' DESC) e"
        " WHERE a.id = e.attempt_id"
    )
    op.drop_column("cost_entries", "raw_usage")
    for latency in ("duration", "first_token"):
        op.add_column(
            "cost_entries",
            sa.Column(
                f"{latency}_bucket",
                sa.SmallInteger(),
                sa.Computed(
                    f"CASE WHEN {latency}_ms > 0"
                    f" THEN floor(ln({latency}_ms::float8) * 25)::smallint"
                    f" WHEN {latency}_ms <= 0 THEN 0 END",
                    persisted=True,
                ),
            ),
        )


def downgrade() -> None:
    """Move the usage back, to the entry that was made with it."""
    for latency in ("duration", "first_token"):
        op.drop_column("cost_entries", f"{latency}_bucket")
    op.add_column("cost_entries", sa.Column("raw_usage", postgresql.JSON()))
    op.execute(
        "UPDATE cost_entries e SET raw_usage = a.raw_usage FROM attempts a"
        " WHERE a.id = e.attempt_id AND (e.kind = 'correction' OR a.state <> 'corrected')"
    )
    op.drop_column("attempts", "raw_usage")
