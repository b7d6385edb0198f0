"""The schema of the first release: every table of `shared/tables.py` as it was then.

Written out, not taken from `tables.py`: what a database was given must not change with the code.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

_NOW = sa.text("now()")
_TIME = postgresql.TIMESTAMP(timezone=True)


def upgrade() -> None:
    """Make all tables and their indexes."""
    op.create_table(
        "accounts",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("time_zone", sa.Text(), server_default="UTC", nullable=False),
        sa.Column("is_active", sa.Boolean(), server_default=sa.text("true"), nullable=False),
        sa.Column("created_at", _TIME, server_default=_NOW, nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("accounts_pkey")),
        sa.UniqueConstraint("name", name=op.f("accounts_name_key")),
    )

    op.create_table(
        "use_cases",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("description", sa.Text(), server_default="", nullable=False),
        sa.Column("prefer", sa.Text(), server_default="priority", nullable=False),
        sa.Column("max_tokens", sa.Integer(), server_default="1024", nullable=False),
        sa.Column("unknown_policy", sa.Text(), server_default="retry_once", nullable=False),
        sa.Column("is_active", sa.Boolean(), server_default=sa.text("true"), nullable=False),
        sa.CheckConstraint(
            "prefer IN ('priority', 'cheapest', 'fastest')", name=op.f("use_cases_prefer_check")
        ),
        sa.CheckConstraint(
            "unknown_policy IN ('retry_once', 'fail')", name=op.f("use_cases_unknown_policy_check")
        ),
        sa.CheckConstraint("max_tokens >= 1", name=op.f("use_cases_max_tokens_check")),
        sa.PrimaryKeyConstraint("name", name=op.f("use_cases_pkey")),
    )

    op.create_table(
        "llm_providers",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("provider", sa.Text(), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("base_url", sa.Text()),
        sa.Column("api_key_encrypted", sa.Text()),
        sa.Column("is_default", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column(
            "use_case",
            postgresql.ARRAY(sa.Text()),
            server_default=sa.text("'{}'::text[]"),
            nullable=False,
        ),
        sa.Column(
            "failover",
            postgresql.ARRAY(sa.Text()),
            server_default=sa.text("'{}'::text[]"),
            nullable=False,
        ),
        sa.Column("max_tokens", sa.Integer(), nullable=False),
        sa.Column("context_tokens", sa.Integer(), nullable=False),
        sa.Column(
            "capabilities",
            postgresql.ARRAY(sa.Text()),
            server_default=sa.text("'{}'::text[]"),
            nullable=False,
        ),
        sa.Column("is_active", sa.Boolean(), server_default=sa.text("true"), nullable=False),
        sa.Column("account_id", sa.Uuid()),
        sa.Column("catalogue", sa.Text()),
        sa.Column("priority", sa.Integer(), server_default="100", nullable=False),
        sa.Column("requests_per_minute", sa.Integer()),
        sa.Column("input_tokens_per_minute", sa.BigInteger()),
        sa.Column("output_tokens_per_minute", sa.BigInteger()),
        sa.Column("max_concurrent", sa.Integer()),
        sa.Column("retires_at", _TIME),
        sa.Column("successor", sa.Text()),
        sa.Column("price_override", postgresql.JSON()),
        sa.Column("created_at", _TIME, server_default=_NOW, nullable=False),
        sa.Column("updated_at", _TIME, server_default=_NOW, nullable=False),
        sa.CheckConstraint(
            "catalogue IN ('current', 'original')", name=op.f("llm_providers_catalogue_check")
        ),
        sa.CheckConstraint(
            "provider IN ('openai', 'anthropic')", name=op.f("llm_providers_provider_check")
        ),
        sa.CheckConstraint("max_tokens >= 1", name=op.f("llm_providers_max_tokens_check")),
        sa.ForeignKeyConstraint(
            ["account_id"],
            ["accounts.id"],
            name=op.f("llm_providers_account_id_fkey"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("llm_providers_pkey")),
    )
    op.create_index(
        "llm_providers_name_key",
        "llm_providers",
        ["account_id", "name"],
        unique=True,
        postgresql_nulls_not_distinct=True,
    )

    op.create_table(
        "workers",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("pool", sa.Text(), nullable=False),
        sa.Column("lane", sa.Text(), nullable=False),
        sa.Column("queues", postgresql.ARRAY(sa.Text()), nullable=False),
        sa.Column("beat", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("running_jobs", sa.Integer(), server_default="0", nullable=False),
        sa.Column("oldest_unclaimed_at", _TIME),
        sa.Column("draining", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("started_at", _TIME, server_default=_NOW, nullable=False),
        sa.Column("seen_at", _TIME, server_default=_NOW, nullable=False),
        sa.CheckConstraint("lane IN ('interactive', 'bulk')", name=op.f("workers_lane_check")),
        sa.PrimaryKeyConstraint("id", name=op.f("workers_pkey")),
        postgresql_with={"fillfactor": "50"},
    )

    op.create_table(
        "jobs",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("account_id", sa.Uuid(), nullable=False),
        sa.Column("use_case", sa.Text(), nullable=False),
        sa.Column("lane", sa.Text(), nullable=False),
        sa.Column("queue", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("fence", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("worker_id", sa.Uuid()),
        sa.Column("claim_id", sa.Uuid()),
        sa.Column("attempts_used", sa.SmallInteger(), server_default="0", nullable=False),
        sa.Column("unknown_attempts", sa.SmallInteger(), server_default="0", nullable=False),
        sa.Column("max_attempts", sa.SmallInteger(), nullable=False),
        sa.Column(
            "refused",
            postgresql.ARRAY(sa.Uuid()),
            server_default=sa.text("'{}'::uuid[]"),
            nullable=False,
        ),
        sa.Column("cost_nano_usd", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("run_at", _TIME, server_default=_NOW, nullable=False),
        sa.Column("deadline_at", _TIME, nullable=False),
        sa.Column("published_at", _TIME),
        sa.Column("created_at", _TIME, server_default=_NOW, nullable=False),
        sa.Column("finished_at", _TIME),
        sa.Column("idempotency_key", sa.Text()),
        sa.Column("request_hash", sa.LargeBinary(), nullable=False),
        sa.Column("submitted_by", sa.Text()),
        sa.Column("submitted_from", sa.Text()),
        sa.Column("request_id", sa.Text()),
        sa.CheckConstraint(
            "(state = 'running') = (worker_id IS NOT NULL)", name=op.f("jobs_holder_check")
        ),
        sa.CheckConstraint("lane IN ('interactive', 'bulk')", name=op.f("jobs_lane_check")),
        sa.CheckConstraint(
            "state IN ('queued', 'running', 'parked', 'succeeded', 'failed', "
            "'cancelled', 'expired')",
            name=op.f("jobs_state_check"),
        ),
        sa.ForeignKeyConstraint(["account_id"], ["accounts.id"], name=op.f("jobs_account_id_fkey")),
        sa.PrimaryKeyConstraint("id", name=op.f("jobs_pkey")),
    )
    op.create_index("jobs_account_idx", "jobs", ["account_id", "id"])
    op.create_index(
        "jobs_deadline_idx",
        "jobs",
        ["deadline_at"],
        postgresql_where=sa.text("state IN ('queued', 'parked')"),
    )
    op.create_index(
        "jobs_idempotency_key",
        "jobs",
        ["account_id", "idempotency_key"],
        unique=True,
        postgresql_where=sa.text("idempotency_key IS NOT NULL"),
    )
    op.create_index(
        "jobs_parked_idx",
        "jobs",
        ["queue", "run_at", "id"],
        postgresql_where=sa.text("state = 'parked'"),
    )
    op.create_index(
        "jobs_queued_idx",
        "jobs",
        ["queue", sa.literal_column("greatest(published_at, run_at)")],
        postgresql_where=sa.text("state = 'queued'"),
    )
    op.create_index(
        "jobs_running_idx", "jobs", ["worker_id"], postgresql_where=sa.text("state = 'running'")
    )

    op.create_table(
        "job_bodies",
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column("request", postgresql.JSON(), nullable=False),
        sa.ForeignKeyConstraint(
            ["job_id"], ["jobs.id"], name=op.f("job_bodies_job_id_fkey"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("job_id", name=op.f("job_bodies_pkey")),
    )

    op.create_table(
        "attempts",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column("fence", sa.BigInteger(), nullable=False),
        sa.Column("number", sa.SmallInteger(), nullable=False),
        sa.Column("worker_id", sa.Uuid(), nullable=False),
        sa.Column("account_id", sa.Uuid(), nullable=False),
        sa.Column("use_case", sa.Text(), nullable=False),
        sa.Column("provider_id", sa.Uuid(), nullable=False),
        sa.Column("provider", sa.Text(), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("reserved_nano_usd", sa.BigInteger(), nullable=False),
        sa.Column("baseline_reserved_nano_usd", sa.BigInteger(), nullable=False),
        sa.Column("dispatched_at", _TIME, server_default=_NOW, nullable=False),
        sa.Column("ended_at", _TIME),
        sa.Column("first_token_ms", sa.Integer()),
        sa.Column("duration_ms", sa.Integer()),
        sa.Column("error_class", sa.Text()),
        sa.Column("error_message", sa.Text()),
        sa.Column("status", sa.SmallInteger()),
        sa.Column("request_id", sa.Text()),
        sa.CheckConstraint(
            "state IN ('dispatching', 'succeeded', 'failed', "
            "'cancelled', 'void', 'unknown', 'corrected')",
            name=op.f("attempts_state_check"),
        ),
        sa.CheckConstraint("reserved_nano_usd >= 0", name=op.f("attempts_reserved_check")),
        sa.ForeignKeyConstraint(
            ["job_id"], ["jobs.id"], name=op.f("attempts_job_id_fkey"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("attempts_pkey")),
    )
    op.create_index(
        "attempts_dispatching_idx",
        "attempts",
        ["worker_id"],
        postgresql_where=sa.text("state = 'dispatching'"),
    )
    op.create_index("attempts_job_idx", "attempts", ["job_id"])

    op.create_table(
        "cost_entries",
        sa.Column("id", sa.Uuid(), server_default=sa.text("gen_random_uuid()"), nullable=False),
        sa.Column("attempt_id", sa.Uuid(), nullable=False),
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column("account_id", sa.Uuid(), nullable=False),
        sa.Column("use_case", sa.Text(), nullable=False),
        sa.Column("provider_id", sa.Uuid(), nullable=False),
        sa.Column("provider", sa.Text(), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("amount_nano_usd", sa.BigInteger(), nullable=False),
        sa.Column("baseline_nano_usd", sa.BigInteger(), nullable=False),
        sa.Column("input_tokens", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("cache_read_tokens", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("cache_write_5m_tokens", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("cache_write_1h_tokens", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("output_tokens", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("reasoning_tokens", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("raw_usage", postgresql.JSON()),
        sa.Column("price_version", sa.Text(), nullable=False),
        sa.Column("created_at", _TIME, server_default=_NOW, nullable=False),
        sa.CheckConstraint(
            "kind IN ('actual', 'estimate', 'correction')", name=op.f("cost_entries_kind_check")
        ),
        sa.ForeignKeyConstraint(
            ["account_id"], ["accounts.id"], name=op.f("cost_entries_account_id_fkey")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("cost_entries_pkey")),
    )
    op.create_index("cost_entries_account_idx", "cost_entries", ["account_id", "created_at"])
    op.create_index(
        "cost_entries_correction_key",
        "cost_entries",
        ["attempt_id"],
        unique=True,
        postgresql_where=sa.text("kind = 'correction'"),
    )
    op.create_index(
        "cost_entries_first_key",
        "cost_entries",
        ["attempt_id"],
        unique=True,
        postgresql_where=sa.text("kind <> 'correction'"),
    )

    op.create_table(
        "results",
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column("attempt_id", sa.Uuid()),
        sa.Column("fence", sa.BigInteger(), nullable=False),
        sa.Column("body", postgresql.JSON(), nullable=False),
        sa.ForeignKeyConstraint(
            ["job_id"], ["jobs.id"], name=op.f("results_job_id_fkey"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("job_id", name=op.f("results_pkey")),
    )


def downgrade() -> None:
    """Drop all tables, with everything in them."""
    op.drop_table("results")
    op.drop_table("cost_entries")
    op.drop_table("attempts")
    op.drop_table("job_bodies")
    op.drop_table("jobs")
    op.drop_table("workers")
    op.drop_table("llm_providers")
    op.drop_table("use_cases")
    op.drop_table("accounts")
