"""Money: budgets, what is told about them, and which windows an entry belongs to."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

_NOW = sa.text("now()")
_TIME = postgresql.TIMESTAMP(timezone=True)
_MOST_NANO_USD = 2**53

# What is added up in reports: a row for each cost entry, one for each attempt that failed, and one
# for each estimate that nothing has corrected. A correction is no request of its own, and an
# attempt that has no entry is one all the same. All parts have the very same types, or Postgres
# would neither look into them for a time nor share them among processes.
_SPEND = """
CREATE VIEW spend AS
SELECT e.dispatched_at, e.account_id, e.use_case, e.provider_id, e.provider, e.model,
       CASE e.kind WHEN 'correction' THEN 0 ELSE 1 END AS requests, 0 AS failures,
       e.amount_nano_usd AS cost_nano_usd, e.baseline_nano_usd,
       0 AS estimates, 0::bigint AS estimated_nano_usd,
       e.input_tokens, e.cache_read_tokens, e.cache_write_5m_tokens, e.cache_write_1h_tokens,
       e.output_tokens, e.reasoning_tokens, e.first_token_ms, e.duration_ms
FROM cost_entries e
UNION ALL
SELECT a.dispatched_at, a.account_id, a.use_case, a.provider_id, a.provider, a.model,
       CASE WHEN e.attempt_id IS NULL THEN 1 ELSE 0 END, 1, 0::bigint, 0::bigint, 0, 0::bigint,
       0::bigint, 0::bigint, 0::bigint, 0::bigint, 0::bigint, 0::bigint, NULL::int, NULL::int
FROM attempts a LEFT JOIN cost_entries e ON e.attempt_id = a.id AND e.kind <> 'correction'
WHERE a.state IN ('failed', 'unknown', 'corrected') AND a.error_class IS NOT NULL
UNION ALL
SELECT e.dispatched_at, e.account_id, e.use_case, e.provider_id, e.provider, e.model,
       0, 0, 0::bigint, 0::bigint, 1, e.amount_nano_usd,
       0::bigint, 0::bigint, 0::bigint, 0::bigint, 0::bigint, 0::bigint, NULL::int, NULL::int
FROM cost_entries e
WHERE e.kind = 'estimate'
  AND NOT EXISTS (SELECT FROM cost_entries c
                  WHERE c.attempt_id = e.attempt_id AND c.kind = 'correction')
"""

_SPEND_DAYS = """
CREATE VIEW spend_days AS
SELECT a.name AS account, (s.dispatched_at AT TIME ZONE a.time_zone)::date AS day,
       s.use_case, s.provider, s.model,
       sum(s.requests) AS requests, sum(s.failures) AS failures,
       sum(s.cost_nano_usd) / 1e9 AS cost_usd,
       sum(s.baseline_nano_usd) / 1e9 AS baseline_usd,
       sum(s.baseline_nano_usd - s.cost_nano_usd) / 1e9 AS saving_usd,
       sum(s.estimates) AS estimates, sum(s.estimated_nano_usd) / 1e9 AS estimated_usd,
       sum(s.input_tokens) AS input_tokens, sum(s.cache_read_tokens) AS cache_read_tokens,
       sum(s.cache_write_5m_tokens) AS cache_write_5m_tokens,
       sum(s.cache_write_1h_tokens) AS cache_write_1h_tokens,
       sum(s.output_tokens) AS output_tokens, sum(s.reasoning_tokens) AS reasoning_tokens,
       percentile_disc(0.5) WITHIN GROUP (ORDER BY s.first_token_ms) AS first_token_p50_ms,
       percentile_disc(0.95) WITHIN GROUP (ORDER BY s.first_token_ms) AS first_token_p95_ms,
       percentile_disc(0.99) WITHIN GROUP (ORDER BY s.first_token_ms) AS first_token_p99_ms,
       percentile_disc(0.5) WITHIN GROUP (ORDER BY s.duration_ms) AS duration_p50_ms,
       percentile_disc(0.95) WITHIN GROUP (ORDER BY s.duration_ms) AS duration_p95_ms,
       percentile_disc(0.99) WITHIN GROUP (ORDER BY s.duration_ms) AS duration_p99_ms
FROM spend s JOIN accounts a ON a.id = s.account_id
GROUP BY 1, 2, 3, 4, 5
"""


def upgrade() -> None:
    """Add the columns and tables."""
    _add_budgets()
    _extend_alerts()
    _tell_alerts()
    _date_entries()
    _add_purging()
    _add_reports()
    _add_price_lists()


def downgrade() -> None:
    """Drop them, with what they hold."""
    op.drop_table("price_lists")
    _drop_reports()
    _drop_purging()
    op.drop_index("cost_entries_account_idx", "cost_entries")
    op.drop_column("cost_entries", "dispatched_at")
    op.create_index("cost_entries_account_idx", "cost_entries", ["account_id", "created_at"])
    _stop_telling_alerts()
    op.execute('DELETE FROM alerts WHERE "window" IS NOT NULL')
    for index in ("open_key", "budget_key", "untold_idx", "unposted_idx"):
        op.drop_index(f"alerts_{index}", "alerts")
    for column in (
        *("use_case", "window", "window_started_at", "threshold", "acked_at"),
        *("told_at", "posted_at", "post_tries", "post_due_at", "post_error"),
    ):
        op.drop_column("alerts", column)
    op.create_index(
        "alerts_open_key",
        "alerts",
        ["kind", "account_id", "provider_id"],
        unique=True,
        postgresql_nulls_not_distinct=True,
        postgresql_where=sa.text("resolved_at IS NULL"),
    )
    op.drop_index("attempts_held_idx", "attempts")
    op.execute("DELETE FROM gate_changes WHERE kind = 'budget'")
    _change_kinds("breaker", "suspension", "pause", "lever")
    op.drop_table("budgets")
    op.drop_column("accounts", "alert_secret_encrypted")
    op.drop_column("accounts", "alert_url")


def _add_budgets() -> None:
    op.add_column("accounts", sa.Column("alert_url", sa.Text()))
    op.add_column("accounts", sa.Column("alert_secret_encrypted", sa.Text()))
    op.create_table(
        "budgets",
        sa.Column("id", sa.Uuid(), primary_key=True),
        sa.Column(
            "account_id",
            sa.Uuid(),
            sa.ForeignKey("accounts.id", ondelete="CASCADE"),
            nullable=False,
        ),
        sa.Column("use_case", sa.Text()),
        sa.Column("time_zone", sa.Text(), nullable=False),
        sa.Column("day_limit_nano_usd", sa.BigInteger()),
        sa.Column("month_limit_nano_usd", sa.BigInteger()),
        sa.Column(
            "thresholds",
            postgresql.ARRAY(sa.SmallInteger()),
            nullable=False,
            server_default=sa.text("'{80,100}'"),
        ),
        *_window("day"),
        *_window("month"),
        sa.Column("version", sa.BigInteger(), nullable=False, server_default="0"),
        sa.Column("created_at", _TIME, nullable=False, server_default=_NOW),
        sa.CheckConstraint(
            "day_limit_nano_usd IS NOT NULL OR month_limit_nano_usd IS NOT NULL",
            name=op.f("budgets_limit_check"),
        ),
        *(
            sa.CheckConstraint(
                f"{window}_limit_nano_usd BETWEEN 0 AND {_MOST_NANO_USD}",
                name=op.f(f"budgets_{window}_limit_check"),
            )
            for window in ("day", "month")
        ),
        postgresql_with={"fillfactor": "50"},
    )
    op.create_index(
        "budgets_key",
        "budgets",
        ["account_id", "use_case"],
        unique=True,
        postgresql_nulls_not_distinct=True,
    )
    _change_kinds("breaker", "suspension", "pause", "lever", "budget")
    op.create_index(
        "attempts_held_idx",
        "attempts",
        ["account_id"],
        postgresql_where=sa.text("state = 'dispatching'"),
    )


def _change_kinds(*kinds: str) -> None:
    op.drop_constraint(op.f("gate_changes_kind_check"), "gate_changes")
    listed = ", ".join(f"'{kind}'" for kind in kinds)
    op.create_check_constraint(
        op.f("gate_changes_kind_check"), "gate_changes", f"kind IN ({listed})"
    )


def _window(name: str) -> tuple[sa.Column[object], ...]:
    return (
        sa.Column(f"{name}_started_at", _TIME, nullable=False),
        sa.Column(f"{name}_resets_at", _TIME, nullable=False),
        sa.Column(f"{name}_spent_nano_usd", sa.BigInteger(), nullable=False, server_default="0"),
        sa.Column(f"{name}_held_nano_usd", sa.BigInteger(), nullable=False, server_default="0"),
    )


def _extend_alerts() -> None:
    for column in (
        sa.Column("use_case", sa.Text()),
        sa.Column("window", sa.Text()),
        sa.Column("window_started_at", _TIME),
        sa.Column("threshold", sa.SmallInteger()),
        sa.Column("acked_at", _TIME),
        sa.Column("told_at", _TIME),
        sa.Column("posted_at", _TIME),
        sa.Column("post_tries", sa.SmallInteger(), nullable=False, server_default="0"),
        sa.Column("post_due_at", _TIME, server_default=_NOW),
        sa.Column("post_error", sa.Text()),
    ):
        op.add_column("alerts", column)
    op.create_check_constraint(
        op.f("alerts_window_check"), "alerts", "\"window\" IN ('day', 'month')"
    )
    op.drop_index("alerts_open_key", "alerts")
    op.create_index(
        "alerts_open_key",
        "alerts",
        ["kind", "account_id", "provider_id"],
        unique=True,
        postgresql_nulls_not_distinct=True,
        postgresql_where=sa.text('resolved_at IS NULL AND "window" IS NULL'),
    )
    op.create_index(
        "alerts_budget_key",
        "alerts",
        ["account_id", "use_case", "window", "window_started_at", "threshold"],
        unique=True,
        postgresql_nulls_not_distinct=True,
        postgresql_where=sa.text('"window" IS NOT NULL'),
    )
    op.create_index(
        "alerts_untold_idx", "alerts", ["id"], postgresql_where=sa.text("told_at IS NULL")
    )
    op.create_index(
        "alerts_unposted_idx",
        "alerts",
        ["post_due_at"],
        postgresql_where=sa.text("posted_at IS NULL AND post_due_at IS NOT NULL"),
    )


def _date_entries() -> None:
    op.add_column("cost_entries", sa.Column("dispatched_at", _TIME))
    op.execute(
        "UPDATE cost_entries e SET dispatched_at = coalesce("
        "(SELECT a.dispatched_at FROM attempts a WHERE a.id = e.attempt_id), e.created_at)"
    )
    op.alter_column("cost_entries", "dispatched_at", nullable=False)
    op.drop_index("cost_entries_account_idx", "cost_entries")
    op.create_index("cost_entries_account_idx", "cost_entries", ["account_id", "dispatched_at"])


def _add_purging() -> None:
    op.add_column("accounts", sa.Column("erased_at", _TIME))
    op.add_column("jobs", sa.Column("purged_at", _TIME))
    op.create_index(
        "jobs_unpurged_idx",
        "jobs",
        ["finished_at", "id"],
        postgresql_where=sa.text("finished_at IS NOT NULL AND purged_at IS NULL"),
    )
    op.create_index("outbox_job_idx", "outbox", ["job_id"])


def _drop_purging() -> None:
    op.drop_index("outbox_job_idx", "outbox")
    op.drop_index("jobs_unpurged_idx", "jobs")
    op.drop_column("jobs", "purged_at")
    op.drop_column("accounts", "erased_at")


# A trigger for each row: settlements insert alerts too, and hardly ever one. A statement that adds
# none pays nothing, least of all the lock that every notice takes.
_RAISED = """
CREATE FUNCTION note_alert() RETURNS trigger LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
BEGIN
    PERFORM pg_notify('sluice_alerts', '');
    RETURN NULL;
END $$
"""


def _tell_alerts() -> None:
    op.add_column("alerts", sa.Column("number", sa.BigInteger()))
    # What is over needs nobody any more.
    op.execute("UPDATE alerts SET told_at = resolved_at WHERE resolved_at IS NOT NULL")
    op.execute("UPDATE alerts SET post_due_at = NULL WHERE resolved_at IS NOT NULL")
    op.execute(_RAISED)
    op.execute(
        "CREATE TRIGGER alerts_raised AFTER INSERT ON alerts "
        "FOR EACH ROW EXECUTE FUNCTION note_alert()"
    )


def _stop_telling_alerts() -> None:
    op.execute("DROP TRIGGER alerts_raised ON alerts")
    op.execute("DROP FUNCTION note_alert()")
    op.drop_column("alerts", "number")


def _add_reports() -> None:
    for name in ("first_token_ms", "duration_ms"):
        op.add_column("cost_entries", sa.Column(name, sa.Integer()))
    # An attempt has one answer, which its correction tells of where there is one.
    op.execute(
        "UPDATE cost_entries e"
        " SET first_token_ms = a.first_token_ms, duration_ms = a.duration_ms"
        " FROM attempts a WHERE a.id = e.attempt_id AND a.duration_ms IS NOT NULL"
        " AND (e.kind = 'correction' OR a.state <> 'corrected')"
    )
    op.create_index(
        "cost_entries_dispatched_idx", "cost_entries", ["dispatched_at"], postgresql_using="brin"
    )
    op.create_index(
        "cost_entries_estimate_idx",
        "cost_entries",
        ["dispatched_at"],
        postgresql_where=sa.text("kind = 'estimate'"),
    )
    op.create_index(
        "attempts_failed_idx",
        "attempts",
        ["dispatched_at"],
        postgresql_where=sa.text("state IN ('failed', 'unknown', 'corrected')"),
    )
    op.execute(_SPEND)
    op.execute(_SPEND_DAYS)


def _drop_reports() -> None:
    op.execute("DROP VIEW spend_days")
    op.execute("DROP VIEW spend")
    op.drop_index("attempts_failed_idx", "attempts")
    op.drop_index("cost_entries_estimate_idx", "cost_entries")
    op.drop_index("cost_entries_dispatched_idx", "cost_entries")
    for name in ("first_token_ms", "duration_ms"):
        op.drop_column("cost_entries", name)


def _add_price_lists() -> None:
    op.create_table(
        "price_lists",
        sa.Column("version", sa.Text(), primary_key=True),
        sa.Column("data", postgresql.JSON(), nullable=False),
        sa.Column("adopted_at", _TIME, nullable=False, server_default=_NOW),
    )
