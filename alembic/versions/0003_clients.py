"""What clients add: batches, shared reply channels, cancelling, and keys in the database.

Whoever ends a job inserts its result: worker, sweep or client. One trigger there does what follows
from it, so that none of them can forget it: it counts the job in its batch, and puts its result
into the outbox. Taking a result away, as `job retry` does, moves the count back.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

_NOW = sa.text("now()")
_TIME = postgresql.TIMESTAMP(timezone=True)

# The first look is all that most jobs cost: they have neither a batch nor a channel. Batches are
# locked in the order of their keys, last of all: see "Coalescing" in the architecture.
_COUNT = """
    PERFORM FROM batches WHERE id IN (
        SELECT j.batch_id FROM {rows} r JOIN jobs j ON j.id = r.job_id)
    ORDER BY id FOR NO KEY UPDATE;
    UPDATE batches b SET
        succeeded = b.succeeded {sign} n.succeeded,
        failed = b.failed {sign} n.failed,
        cancelled = b.cancelled {sign} n.cancelled,
        expired = b.expired {sign} n.expired,
        finished_at = CASE WHEN b.succeeded + b.failed + b.cancelled + b.expired {sign} n.ended
                                >= b.total THEN now() END{also}
    FROM (
        SELECT j.batch_id AS id, count(*) AS ended,
               count(*) FILTER (WHERE {state} = 'succeeded') AS succeeded,
               count(*) FILTER (WHERE {state} = 'failed') AS failed,
               count(*) FILTER (WHERE {state} = 'cancelled') AS cancelled,
               count(*) FILTER (WHERE {state} = 'expired') AS expired
        FROM {rows} r JOIN jobs j ON j.id = r.job_id
        WHERE j.batch_id IS NOT NULL GROUP BY j.batch_id
    ) n
    WHERE b.id = n.id;
"""

# Each connection keeps the plans that it made first: one made for small tables would read large
# tables from end to end.
_FUNCTION = """RETURNS trigger LANGUAGE plpgsql SET search_path FROM CURRENT
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off AS $$"""

_ENDED = f"""
CREATE FUNCTION note_ended() {_FUNCTION}
BEGIN
    PERFORM FROM ended r JOIN jobs j ON j.id = r.job_id
    WHERE j.reply_to IS NOT NULL OR j.batch_id IS NOT NULL LIMIT 1;
    IF NOT FOUND THEN
        RETURN NULL;
    END IF;
    {_COUNT.format(rows="ended", sign="+", state="j.state", also="")}
    INSERT INTO outbox (channel, job_id, fence)
    SELECT j.reply_to, j.id, r.fence FROM ended r JOIN jobs j ON j.id = r.job_id
    WHERE j.reply_to IS NOT NULL;
    IF FOUND THEN
        PERFORM pg_notify('sluice_outbox', '');
    END IF;
    RETURN NULL;
END $$
"""

# A job that is tried again in a batch which was cancelled and is over must not be cancelled again.
_RESUMED = """,
        cancelled_at = CASE WHEN b.finished_at IS NULL THEN b.cancelled_at END"""

_REOPENED = f"""
CREATE FUNCTION note_reopened() {_FUNCTION}
BEGIN
    {_COUNT.format(rows="reopened", sign="-", state="r.body->>'state'", also=_RESUMED)}
    RETURN NULL;
END $$
"""


def upgrade() -> None:
    """Create the tables, columns and triggers."""
    op.create_table(
        "provider_keys",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("provider", sa.Text(), nullable=False),
        sa.Column("account_id", sa.Uuid()),
        sa.Column("api_key_encrypted", sa.Text(), nullable=False),
        sa.Column("created_at", _TIME, server_default=_NOW, nullable=False),
        sa.Column("updated_at", _TIME, server_default=_NOW, nullable=False),
        sa.CheckConstraint(
            "provider IN ('openai', 'anthropic')", name=op.f("provider_keys_provider_check")
        ),
        sa.ForeignKeyConstraint(
            ["account_id"],
            ["accounts.id"],
            name=op.f("provider_keys_account_id_fkey"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("provider_keys_pkey")),
    )
    op.create_index(
        "provider_keys_key",
        "provider_keys",
        ["provider", "account_id"],
        unique=True,
        postgresql_nulls_not_distinct=True,
    )
    op.create_table(
        "batches",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("account_id", sa.Uuid(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("use_case", sa.Text(), nullable=False),
        sa.Column("total", sa.Integer(), nullable=False),
        sa.Column("succeeded", sa.Integer(), server_default="0", nullable=False),
        sa.Column("failed", sa.Integer(), server_default="0", nullable=False),
        sa.Column("cancelled", sa.Integer(), server_default="0", nullable=False),
        sa.Column("expired", sa.Integer(), server_default="0", nullable=False),
        sa.Column("rejected", sa.Integer(), server_default="0", nullable=False),
        sa.Column("submitted_by", sa.Text()),
        sa.Column("idempotency_key", sa.Text()),
        sa.Column("created_at", _TIME, server_default=_NOW, nullable=False),
        sa.Column("cancelled_at", _TIME),
        sa.Column("finished_at", _TIME),
        sa.CheckConstraint("total >= 1", name=op.f("batches_total_check")),
        sa.ForeignKeyConstraint(
            ["account_id"], ["accounts.id"], name=op.f("batches_account_id_fkey")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("batches_pkey")),
    )
    op.create_index(
        "batches_idempotency_key",
        "batches",
        ["account_id", "idempotency_key"],
        unique=True,
        postgresql_where=sa.text("idempotency_key IS NOT NULL"),
    )
    op.create_index(
        "batches_cancelling_idx",
        "batches",
        ["id"],
        postgresql_where=sa.text("cancelled_at IS NOT NULL AND finished_at IS NULL"),
    )
    op.create_table(
        "outbox",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("channel", sa.Text(), nullable=False),
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column("fence", sa.BigInteger(), nullable=False),
        sa.Column("number", sa.BigInteger()),
        sa.Column("created_at", _TIME, server_default=_NOW, nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("outbox_pkey")),
    )
    op.create_index("outbox_channel_idx", "outbox", ["channel", "number", "id"])
    op.create_table(
        "reply_channels",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("last_number", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("reply_channels_pkey")),
    )
    op.create_table(
        "reply_groups",
        sa.Column("channel", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("place", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("channel", "name", name=op.f("reply_groups_pkey")),
    )
    op.add_column("jobs", sa.Column("reply_to", sa.Text()))
    op.add_column("jobs", sa.Column("batch_id", sa.Uuid()))
    op.add_column("jobs", sa.Column("batch_line", sa.Integer()))
    op.add_column("jobs", sa.Column("cancel_requested_at", _TIME))
    op.add_column(
        "workers",
        sa.Column("keyring", postgresql.ARRAY(sa.Text()), server_default="{}", nullable=False),
    )
    op.create_foreign_key(op.f("jobs_batch_id_fkey"), "jobs", "batches", ["batch_id"], ["id"])
    op.create_index(
        "jobs_batch_idx",
        "jobs",
        ["batch_id", "batch_line"],
        postgresql_where=sa.text("batch_id IS NOT NULL"),
    )
    op.create_index(
        "jobs_cancelling_idx",
        "jobs",
        ["worker_id"],
        postgresql_where=sa.text("state = 'running' AND cancel_requested_at IS NOT NULL"),
    )
    op.create_index(
        "jobs_ended_idx",
        "jobs",
        ["id"],
        postgresql_where=sa.text("state IN ('failed', 'cancelled', 'expired')"),
    )
    op.execute(_ENDED)
    op.execute(_REOPENED)
    op.execute(
        "CREATE TRIGGER results_ended AFTER INSERT ON results "
        "REFERENCING NEW TABLE AS ended FOR EACH STATEMENT EXECUTE FUNCTION note_ended()"
    )
    op.execute(
        "CREATE TRIGGER results_reopened AFTER DELETE ON results "
        "REFERENCING OLD TABLE AS reopened FOR EACH STATEMENT EXECUTE FUNCTION note_reopened()"
    )


def downgrade() -> None:
    """Drop them, with what they hold."""
    op.execute("DROP TRIGGER results_reopened ON results")
    op.execute("DROP TRIGGER results_ended ON results")
    op.execute("DROP FUNCTION note_reopened()")
    op.execute("DROP FUNCTION note_ended()")
    op.drop_index("jobs_ended_idx", "jobs")
    for column in ("cancel_requested_at", "batch_line", "batch_id", "reply_to"):
        op.drop_column("jobs", column)
    op.drop_column("workers", "keyring")
    op.drop_table("reply_groups")
    op.drop_table("reply_channels")
    op.drop_table("outbox")
    op.drop_table("batches")
    op.drop_table("provider_keys")
