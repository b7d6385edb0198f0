"""What the HTTP producer adds: API keys, and the audit of all that operators change.

The audit is written by triggers, so that nothing can be changed past it: not by a route, a command
or a hand at psql. Who it was says `sluicegate.actor`, which routes and commands set; otherwise the
database's user. It can be added to, and nothing else: only what an erased account left there may be
emptied.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

_NOW = sa.text("now()")
_TIME = postgresql.TIMESTAMP(timezone=True)

# Arguments: what is left out, what is masked, the kind of thing, and the column of its name.
_NOTE = """
CREATE FUNCTION note_change() RETURNS trigger LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
DECLARE
    left_out text[] := TG_ARGV[0];
    masked text[] := TG_ARGV[1];
    was jsonb;
    is_now jsonb;
    line jsonb;
    secret text;
BEGIN
    IF TG_OP <> 'INSERT' THEN
        was := to_jsonb(OLD) - left_out;
    END IF;
    IF TG_OP <> 'DELETE' THEN
        is_now := to_jsonb(NEW) - left_out;
    END IF;
    line := coalesce(is_now, was);
    IF TG_OP = 'UPDATE' THEN
        SELECT jsonb_object_agg(o.key, o.value), jsonb_object_agg(o.key, is_now -> o.key)
        INTO was, is_now
        FROM jsonb_each(was) o WHERE o.value IS DISTINCT FROM is_now -> o.key;
        IF was IS NULL THEN
            RETURN NULL;
        END IF;
    END IF;
    FOREACH secret IN ARRAY masked LOOP
        IF was ->> secret IS NOT NULL THEN
            was := was || jsonb_build_object(secret, '***');
        END IF;
        IF is_now ->> secret IS NOT NULL THEN
            is_now := is_now || jsonb_build_object(secret, '***');
        END IF;
    END LOOP;
    INSERT INTO audit_entries
        (actor, request_id, action, kind, subject, subject_id, account_id, before, after)
    VALUES (
        coalesce(nullif(current_setting('sluicegate.actor', true), ''), 'db:' || session_user),
        nullif(current_setting('sluicegate.request_id', true), ''),
        CASE TG_OP WHEN 'INSERT' THEN 'add' WHEN 'UPDATE' THEN 'change' ELSE 'remove' END,
        TG_ARGV[2],
        coalesce(line ->> TG_ARGV[3], ''),
        line ->> 'id',
        CASE WHEN TG_ARGV[2] = 'account' THEN line ->> 'id'
             WHEN TG_ARGV[2] <> 'pause' THEN line ->> 'account_id'
             WHEN line ->> 'kind' = 'account' THEN line ->> 'subject' END::uuid,
        was,
        is_now);
    RETURN NULL;
END $$
"""

# What an account was called, and what it was told, goes when the account is erased; that something
# was changed, and when, stays.
_KEEP = """
CREATE FUNCTION keep_audit() RETURNS trigger LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
BEGIN
    IF TG_OP = 'UPDATE' AND TG_LEVEL = 'ROW' THEN
        IF NEW.before IS NULL AND NEW.after IS NULL AND NEW.subject = 'erased'
           AND NEW.actor IN (OLD.actor, 'erased')
           AND (NEW.number, NEW.at, NEW.action, NEW.kind, NEW.account_id)
               = (OLD.number, OLD.at, OLD.action, OLD.kind, OLD.account_id)
           AND NEW.subject_id IS NOT DISTINCT FROM OLD.subject_id
           AND NEW.request_id IS NOT DISTINCT FROM OLD.request_id
           AND EXISTS (SELECT FROM accounts WHERE id = OLD.account_id AND erased_at IS NOT NULL)
        THEN
            RETURN NEW;
        END IF;
    END IF;
    RAISE EXCEPTION 'the audit can be added to, and nothing else'
        USING ERRCODE = 'insufficient_privilege';
END $$
"""

_STAMPS = ("created_at", "updated_at")
_OF_KEYS = ("name", "role", "account_id", "token_hash", "expires_at", "revoked_at")
_LIMITS = ("day_limit_nano_usd", "month_limit_nano_usd", "thresholds")
_OF_BUDGETS = ("account_id", "use_case", *_LIMITS)

#: By table: the kind, the column of its name, what is masked, and (None: all of it) the columns
#: whose change is noted. Budgets change with every paid call, and keys with their use.
_NOTED: dict[str, tuple[str, str, tuple[str, ...], tuple[str, ...] | None]] = {
    "accounts": ("account", "name", ("alert_secret_encrypted", "alert_url"), None),
    "api_keys": ("api_key", "name", ("token_hash",), _OF_KEYS),
    "budgets": ("budget", "use_case", (), _OF_BUDGETS),
    "llm_providers": ("provider", "name", ("api_key_encrypted",), None),
    "pauses": ("pause", "subject", (), None),
    "price_lists": ("price_list", "version", (), None),
    "provider_keys": ("provider_key", "provider", ("api_key_encrypted",), None),
    "use_cases": ("use_case", "name", (), None),
}
_LEFT_OUT = {
    "api_keys": ("last_used_at",),
    "budgets": (
        *("time_zone", "version"),
        *(
            f"{window}_{column}"
            for window in ("day", "month")
            for column in ("started_at", "resets_at", "spent_nano_usd", "held_nano_usd")
        ),
    ),
    "price_lists": ("data",),
}


def upgrade() -> None:
    """Create the tables and triggers."""
    op.create_table(
        "api_keys",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("role", sa.Text(), nullable=False),
        sa.Column("account_id", sa.Uuid()),
        sa.Column("token_hash", sa.LargeBinary(), nullable=False),
        sa.Column("hint", sa.Text(), nullable=False),
        sa.Column("created_at", _TIME, server_default=_NOW, nullable=False),
        sa.Column("created_by", sa.Text(), nullable=False),
        sa.Column("expires_at", _TIME),
        sa.Column("revoked_at", _TIME),
        sa.Column("last_used_at", _TIME),
        sa.CheckConstraint("role IN ('user', 'owner', 'admin')", name=op.f("api_keys_role_check")),
        sa.ForeignKeyConstraint(
            ["account_id"],
            ["accounts.id"],
            name=op.f("api_keys_account_id_fkey"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("api_keys_pkey")),
        sa.UniqueConstraint("token_hash", name=op.f("api_keys_token_hash_key")),
    )
    op.create_index("api_keys_account_idx", "api_keys", ["account_id"])
    op.create_table(
        "audit_entries",
        sa.Column("number", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("at", _TIME, server_default=_NOW, nullable=False),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.Column("request_id", sa.Text()),
        sa.Column("action", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("subject", sa.Text(), nullable=False),
        sa.Column("subject_id", sa.Text()),
        sa.Column("account_id", sa.Uuid()),
        sa.Column("before", postgresql.JSONB()),
        sa.Column("after", postgresql.JSONB()),
        sa.CheckConstraint(
            "action IN ('add', 'change', 'remove')", name=op.f("audit_entries_action_check")
        ),
        sa.PrimaryKeyConstraint("number", name=op.f("audit_entries_pkey")),
    )
    op.create_index("audit_entries_account_idx", "audit_entries", ["account_id", "number"])
    op.execute(_NOTE)
    op.execute(_KEEP)
    for table, (kind, name, masked, columns) in _NOTED.items():
        noted = "" if columns is None else f" OF {', '.join(columns)}"
        arguments = (_array(_STAMPS + _LEFT_OUT.get(table, ())), _array(masked), kind, name)
        listed = ", ".join(f"'{argument}'" for argument in arguments)
        op.execute(
            f"CREATE TRIGGER {table}_audit AFTER INSERT OR DELETE OR UPDATE{noted} ON {table}"
            f" FOR EACH ROW EXECUTE FUNCTION note_change({listed})"
        )
    op.execute(
        "CREATE TRIGGER audit_entries_kept BEFORE UPDATE OR DELETE ON audit_entries"
        " FOR EACH ROW EXECUTE FUNCTION keep_audit()"
    )
    op.execute(
        "CREATE TRIGGER audit_entries_whole BEFORE TRUNCATE ON audit_entries"
        " FOR EACH STATEMENT EXECUTE FUNCTION keep_audit()"
    )


def downgrade() -> None:
    """Drop them, with what they hold."""
    for table in _NOTED:
        op.execute(f"DROP TRIGGER {table}_audit ON {table}")
    op.drop_table("audit_entries")
    op.drop_table("api_keys")
    op.execute("DROP FUNCTION note_change")
    op.execute("DROP FUNCTION keep_audit")


def _array(names: tuple[str, ...]) -> str:
    return "{" + ",".join(names) + "}"
