"""What the gates keep in Postgres: levers, pauses, the trail of changes, alerts.

The state of breakers and limits itself lives in Redis and may be lost; what an operator has
ordered, and what happened, may not.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

_NOW = sa.text("now()")
_TIME = postgresql.TIMESTAMP(timezone=True)


def upgrade() -> None:
    """Add the columns and tables."""
    op.add_column("llm_providers", sa.Column("tokens_per_minute", sa.BigInteger()))
    op.add_column(
        "llm_providers", sa.Column("breaker", sa.Text(), nullable=False, server_default="auto")
    )
    op.create_check_constraint(
        op.f("llm_providers_breaker_check"),
        "llm_providers",
        "breaker IN ('auto', 'forced_open', 'disabled')",
    )
    op.add_column(
        "jobs",
        sa.Column(
            "ruled_out",
            postgresql.ARRAY(sa.Uuid()),
            nullable=False,
            server_default=sa.text("'{}'::uuid[]"),
        ),
    )
    op.add_column("jobs", sa.Column("held_back", sa.Text()))
    op.create_table(
        "pauses",
        sa.Column("kind", sa.Text(), primary_key=True),
        sa.Column("subject", sa.Text(), primary_key=True),
        sa.Column("created_at", _TIME, nullable=False, server_default=_NOW),
        sa.CheckConstraint(
            "kind IN ('provider', 'account', 'use_case')", name=op.f("pauses_kind_check")
        ),
    )
    op.create_table(
        "gate_changes",
        sa.Column("number", sa.BigInteger(), sa.Identity(always=True), primary_key=True),
        sa.Column("event_id", sa.Text(), unique=True),
        sa.Column("at", _TIME, nullable=False, server_default=_NOW),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("provider_id", sa.Uuid()),
        sa.Column("account_id", sa.Uuid()),
        sa.Column("use_case", sa.Text()),
        sa.Column("before", sa.Text(), nullable=False),
        sa.Column("after", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False, server_default=""),
        sa.CheckConstraint(
            "kind IN ('breaker', 'suspension', 'pause', 'lever')",
            name=op.f("gate_changes_kind_check"),
        ),
    )
    op.create_index("gate_changes_provider_idx", "gate_changes", ["provider_id", "number"])
    op.create_table(
        "alerts",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), primary_key=True),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("account_id", sa.Uuid()),
        sa.Column("provider_id", sa.Uuid()),
        sa.Column("message", sa.Text(), nullable=False),
        sa.Column("created_at", _TIME, nullable=False, server_default=_NOW),
        sa.Column("resolved_at", _TIME),
    )
    op.create_index(
        "alerts_open_key",
        "alerts",
        ["kind", "account_id", "provider_id"],
        unique=True,
        postgresql_nulls_not_distinct=True,
        postgresql_where=sa.text("resolved_at IS NULL"),
    )


def downgrade() -> None:
    """Drop them, with what they hold."""
    op.drop_table("alerts")
    op.drop_table("gate_changes")
    op.drop_table("pauses")
    op.drop_column("jobs", "held_back")
    op.drop_column("jobs", "ruled_out")
    op.drop_constraint(op.f("llm_providers_breaker_check"), "llm_providers")
    op.drop_column("llm_providers", "breaker")
    op.drop_column("llm_providers", "tokens_per_minute")
