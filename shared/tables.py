"""All tables, in one place for Alembic. Hot statements are SQL beside the module that owns them.

Times are `timestamptz` on Postgres' clock. Money is nano-USD in `bigint`. Requests, answers and
raw usage are `json` (kept as written), apart from the narrow rows that queues and sweeps read.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Computed,
    ForeignKey,
    Identity,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    SmallInteger,
    Table,
    Text,
    Uuid,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSON, JSONB, TIMESTAMP

metadata = MetaData(
    naming_convention={
        "ix": "%(table_name)s_%(column_0_N_name)s_idx",
        "uq": "%(table_name)s_%(column_0_N_name)s_key",
        "ck": "%(table_name)s_%(constraint_name)s_check",
        "fk": "%(table_name)s_%(column_0_N_name)s_fkey",
        "pk": "%(table_name)s_pkey",
    }
)

_NOW = text("now()")
_TIME = TIMESTAMP(timezone=True)


def _one_of(column: str, *values: str) -> CheckConstraint:
    listed = ", ".join(f"'{value}'" for value in values)
    return CheckConstraint(f"{column} IN ({listed})", name=column)


accounts = Table(
    "accounts",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("name", Text, nullable=False, unique=True),
    Column("time_zone", Text, nullable=False, server_default="UTC"),
    Column("is_active", Boolean, nullable=False, server_default=text("true")),
    #: Where its alerts are posted to, and what they are signed with.
    Column("alert_url", Text),
    Column("alert_secret_encrypted", Text),
    #: When all that was personal of it was removed; its costs stay.
    Column("erased_at", _TIME),
    Column("created_at", _TIME, nullable=False, server_default=_NOW),
)

#: What an account may spend in a day and in a month, in all or for one use case. Both windows stand
#: in one row, so that one lock decides on both. Who has turned a window that is over keeps it so.
budgets = Table(
    "budgets",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("account_id", Uuid, ForeignKey("accounts.id", ondelete="CASCADE"), nullable=False),
    #: Null: all of them together.
    Column("use_case", Text),
    #: The account's: its windows are days and months there.
    Column("time_zone", Text, nullable=False),
    #: Null: no limit.
    Column("day_limit_nano_usd", BigInteger),
    Column("month_limit_nano_usd", BigInteger),
    #: Percents of a limit; an alert is raised when spending reaches one.
    Column("thresholds", ARRAY(SmallInteger), nullable=False, server_default=text("'{80,100}'")),
    #: The windows: attempts dispatched from their start on, before they reset. `spent` is what was
    #: booked for them, `held` the reservations of those whose outcome is open.
    Column("day_started_at", _TIME, nullable=False),
    Column("day_resets_at", _TIME, nullable=False),
    Column("day_spent_nano_usd", BigInteger, nullable=False, server_default="0"),
    Column("day_held_nano_usd", BigInteger, nullable=False, server_default="0"),
    Column("month_started_at", _TIME, nullable=False),
    Column("month_resets_at", _TIME, nullable=False),
    Column("month_spent_nano_usd", BigInteger, nullable=False, server_default="0"),
    Column("month_held_nano_usd", BigInteger, nullable=False, server_default="0"),
    #: Grows with every change: the copy in Redis is only ever replaced by a later one.
    Column("version", BigInteger, nullable=False, server_default="0"),
    Column("created_at", _TIME, nullable=False, server_default=_NOW),
    CheckConstraint(
        "day_limit_nano_usd IS NOT NULL OR month_limit_nano_usd IS NOT NULL", name="limit"
    ),
    CheckConstraint("day_limit_nano_usd BETWEEN 0 AND 9007199254740992", name="day_limit"),
    CheckConstraint("month_limit_nano_usd BETWEEN 0 AND 9007199254740992", name="month_limit"),
    Index("budgets_key", "account_id", "use_case", unique=True, postgresql_nulls_not_distinct=True),
    # Every paid call of the account updates it: leave room to do that in place.
    postgresql_with={"fillfactor": "50"},
)

use_cases = Table(
    "use_cases",
    metadata,
    Column("name", Text, primary_key=True),
    Column("description", Text, nullable=False, server_default=""),
    #: What routing orders by once capabilities fit.
    Column("prefer", Text, nullable=False, server_default="priority"),
    Column("max_tokens", Integer, nullable=False, server_default="1024"),
    #: What happens to a job whose paid call has an unknown outcome.
    Column("unknown_policy", Text, nullable=False, server_default="retry_once"),
    Column("is_active", Boolean, nullable=False, server_default=text("true")),
    _one_of("prefer", "priority", "cheapest", "fastest"),
    _one_of("unknown_policy", "retry_once", "fail"),
    CheckConstraint("max_tokens >= 1", name="max_tokens"),
)

llm_providers = Table(
    "llm_providers",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("name", Text, nullable=False),
    #: The pool that serves it: its wire format.
    Column("provider", Text, nullable=False),
    Column("model", Text, nullable=False),
    Column("base_url", Text),
    Column("api_key_encrypted", Text),
    #: Serves any use case that no other row claims.
    Column("is_default", Boolean, nullable=False, server_default=text("false")),
    Column("use_case", ARRAY(Text), nullable=False, server_default=text("'{}'::text[]")),
    #: Use cases it takes over when the rows meant for them have said no.
    Column("failover", ARRAY(Text), nullable=False, server_default=text("'{}'::text[]")),
    #: Longest answer the model gives.
    Column("max_tokens", Integer, nullable=False),
    Column("context_tokens", Integer, nullable=False),
    Column("capabilities", ARRAY(Text), nullable=False, server_default=text("'{}'::text[]")),
    Column("is_active", Boolean, nullable=False, server_default=text("true")),
    #: Null: every account's.
    Column("account_id", Uuid, ForeignKey("accounts.id", ondelete="CASCADE")),
    #: Which default catalogue the row belongs to; null: an operator's own row, always in use.
    Column("catalogue", Text),
    #: Lower is tried first.
    Column("priority", Integer, nullable=False, server_default="100"),
    #: The provider's limits for our key; null: not known, so only its own refusals are heard.
    Column("requests_per_minute", Integer),
    Column("tokens_per_minute", BigInteger),
    Column("input_tokens_per_minute", BigInteger),
    Column("output_tokens_per_minute", BigInteger),
    Column("max_concurrent", Integer),
    #: The operator's lever; `auto` leaves it to the breaker's own state in Redis.
    Column("breaker", Text, nullable=False, server_default="auto"),
    Column("retires_at", _TIME),
    Column("successor", Text),
    #: Nano-USD a token by class; null: the price list knows.
    Column("price_override", JSON(none_as_null=True)),
    Column("created_at", _TIME, nullable=False, server_default=_NOW),
    Column("updated_at", _TIME, nullable=False, server_default=_NOW),
    _one_of("provider", "openai", "anthropic"),
    _one_of("breaker", "auto", "forced_open", "disabled"),
    CheckConstraint("max_tokens >= 1", name="max_tokens"),
    CheckConstraint("catalogue IN ('current', 'original')", name="catalogue"),
    Index(
        "llm_providers_name_key",
        "account_id",
        "name",
        unique=True,
        postgresql_nulls_not_distinct=True,
    ),
)

#: A provider's keys for its own API, where they are not in the environment.
provider_keys = Table(
    "provider_keys",
    metadata,
    Column("id", Uuid, primary_key=True),
    #: The pool whose providers it opens.
    Column("provider", Text, nullable=False),
    #: Null: every account's.
    Column("account_id", Uuid, ForeignKey("accounts.id", ondelete="CASCADE")),
    Column("api_key_encrypted", Text, nullable=False),
    Column("created_at", _TIME, nullable=False, server_default=_NOW),
    Column("updated_at", _TIME, nullable=False, server_default=_NOW),
    _one_of("provider", "openai", "anthropic"),
    Index(
        "provider_keys_key",
        "provider",
        "account_id",
        unique=True,
        postgresql_nulls_not_distinct=True,
    ),
)

#: Price lists that the fleet has booked by; the newest is in use. Without one, each process books
#: by the list that its `genai-prices` brought.
price_lists = Table(
    "price_lists",
    metadata,
    #: What cost entries say they were booked by.
    Column("version", Text, primary_key=True),
    #: In the format of `genai-prices`.
    Column("data", JSON, nullable=False),
    Column("adopted_at", _TIME, nullable=False, server_default=_NOW),
)

#: What an operator has stopped: no new call until it is resumed.
pauses = Table(
    "pauses",
    metadata,
    Column("kind", Text, primary_key=True),
    #: The provider's or account's id, or the use case's name.
    Column("subject", Text, primary_key=True),
    Column("created_at", _TIME, nullable=False, server_default=_NOW),
    _one_of("kind", "provider", "account", "use_case"),
)

#: The audit trail of the gates: what opened, closed, was suspended, paused or forced, and why.
gate_changes = Table(
    "gate_changes",
    metadata,
    Column("number", BigInteger, Identity(always=True), primary_key=True),
    #: Of the event in Redis, so that it is recorded once; null: an operator's own change.
    Column("event_id", Text, unique=True),
    Column("at", _TIME, nullable=False, server_default=_NOW),
    Column("kind", Text, nullable=False),
    Column("provider_id", Uuid),
    Column("account_id", Uuid),
    Column("use_case", Text),
    Column("before", Text, nullable=False),
    Column("after", Text, nullable=False),
    Column("reason", Text, nullable=False, server_default=""),
    _one_of("kind", "breaker", "suspension", "pause", "lever", "budget"),
    Index("gate_changes_provider_idx", "provider_id", "number"),
)

#: What somebody has to look at.
alerts = Table(
    "alerts",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    Column("kind", Text, nullable=False),
    Column("account_id", Uuid),
    Column("provider_id", Uuid),
    #: Of a budget: whose limit, which window, and the percents of it that were spent.
    Column("use_case", Text),
    Column("window", Text),
    Column("window_started_at", _TIME),
    Column("threshold", SmallInteger),
    Column("message", Text, nullable=False),
    Column("created_at", _TIME, nullable=False, server_default=_NOW),
    #: When what it is about was over; until then there is one row for it.
    Column("resolved_at", _TIME),
    #: When somebody said that he has seen it.
    Column("acked_at", _TIME),
    #: Its place in the account's alert channel, and the id of its entry in Redis.
    Column("number", BigInteger),
    #: When it went to the account's alert channel, and to its URL.
    Column("told_at", _TIME),
    Column("posted_at", _TIME),
    #: While its URL does not take it: tries so far, when to try next (null: no more), and why.
    Column("post_tries", SmallInteger, nullable=False, server_default="0"),
    Column("post_due_at", _TIME, server_default=_NOW),
    Column("post_error", Text),
    # A word of SQL's own.
    CheckConstraint("\"window\" IN ('day', 'month')", name="window"),
    Index(
        "alerts_open_key",
        "kind",
        "account_id",
        "provider_id",
        unique=True,
        postgresql_nulls_not_distinct=True,
        postgresql_where=text('resolved_at IS NULL AND "window" IS NULL'),
    ),
    # One for each account, window and threshold, however often it is reached.
    Index(
        "alerts_budget_key",
        "account_id",
        "use_case",
        "window",
        "window_started_at",
        "threshold",
        unique=True,
        postgresql_nulls_not_distinct=True,
        postgresql_where=text('"window" IS NOT NULL'),
    ),
    # What the sweep looks at.
    Index("alerts_untold_idx", "id", postgresql_where=text("told_at IS NULL")),
    Index(
        "alerts_unposted_idx",
        "post_due_at",
        postgresql_where=text("posted_at IS NULL AND post_due_at IS NOT NULL"),
    ),
)

workers = Table(
    "workers",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("name", Text, nullable=False),
    Column("pool", Text, nullable=False),
    Column("lane", Text, nullable=False),
    Column("queues", ARRAY(Text), nullable=False),
    #: Counts up; a reader judges by whether it moves, never by clocks.
    Column("beat", BigInteger, nullable=False, server_default="0"),
    Column("running_jobs", Integer, nullable=False, server_default="0"),
    #: `published_at` of the oldest message that is delivered and not yet claimed.
    Column("oldest_unclaimed_at", _TIME),
    Column("draining", Boolean, nullable=False, server_default=text("false")),
    Column("started_at", _TIME, nullable=False, server_default=_NOW),
    Column("seen_at", _TIME, nullable=False, server_default=_NOW),
    #: Fingerprints of its SLUICE_ENCRYPTION_KEYS, see `secrets.Keyring.fingerprints`.
    Column("keyring", ARRAY(Text), nullable=False, server_default="{}"),
    _one_of("lane", "interactive", "bulk"),
    # Beats are the most frequent update there is: leave room to do them in place.
    postgresql_with={"fillfactor": "50"},
)

batches = Table(
    "batches",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("account_id", Uuid, ForeignKey("accounts.id"), nullable=False),
    #: What it was made from, such as the name of a file.
    Column("name", Text, nullable=False),
    Column("use_case", Text, nullable=False),
    #: Its jobs, and how many of them have ended, in which state. A trigger counts.
    Column("total", Integer, nullable=False),
    Column("succeeded", Integer, nullable=False, server_default="0"),
    Column("failed", Integer, nullable=False, server_default="0"),
    Column("cancelled", Integer, nullable=False, server_default="0"),
    Column("expired", Integer, nullable=False, server_default="0"),
    #: Lines of the file that were no jobs.
    Column("rejected", Integer, nullable=False, server_default="0"),
    Column("submitted_by", Text),
    #: Of its rows and options: the same file is not taken twice.
    Column("idempotency_key", Text),
    Column("created_at", _TIME, nullable=False, server_default=_NOW),
    #: Whoever of its jobs waits from then on is cancelled by the sweep.
    Column("cancelled_at", _TIME),
    #: When the last of its jobs ended.
    Column("finished_at", _TIME),
    CheckConstraint("total >= 1", name="total"),
    Index(
        "batches_idempotency_key",
        "account_id",
        "idempotency_key",
        unique=True,
        postgresql_where=text("idempotency_key IS NOT NULL"),
    ),
    # What the sweep looks at: hardly ever anything.
    Index(
        "batches_cancelling_idx",
        "id",
        postgresql_where=text("cancelled_at IS NOT NULL AND finished_at IS NULL"),
    ),
)

jobs = Table(
    "jobs",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("account_id", Uuid, ForeignKey("accounts.id"), nullable=False),
    Column("use_case", Text, nullable=False),
    Column("lane", Text, nullable=False),
    Column("queue", Text, nullable=False),
    Column("state", Text, nullable=False),
    #: Grows with every claim and with every transition by someone who does not hold the job.
    Column("fence", BigInteger, nullable=False, server_default="0"),
    Column("worker_id", Uuid),
    Column("claim_id", Uuid),
    Column("attempts_used", SmallInteger, nullable=False, server_default="0"),
    Column("unknown_attempts", SmallInteger, nullable=False, server_default="0"),
    Column("max_attempts", SmallInteger, nullable=False),
    #: Provider rows that said no since the job last parked.
    Column("refused", ARRAY(Uuid), nullable=False, server_default=text("'{}'::uuid[]")),
    #: Provider rows that are never to get this job again: it is too long for their model.
    Column("ruled_out", ARRAY(Uuid), nullable=False, server_default=text("'{}'::uuid[]")),
    #: While it is parked by the gates: what each candidate said, for people.
    Column("held_back", Text),
    Column("cost_nano_usd", BigInteger, nullable=False, server_default="0"),
    Column("run_at", _TIME, nullable=False, server_default=_NOW),
    Column("deadline_at", _TIME, nullable=False),
    #: When a message for this row was last published; null until then.
    Column("published_at", _TIME),
    Column("created_at", _TIME, nullable=False, server_default=_NOW),
    Column("finished_at", _TIME),
    Column("idempotency_key", Text),
    Column("request_hash", LargeBinary, nullable=False),
    Column("submitted_by", Text),
    Column("submitted_from", Text),
    Column("request_id", Text),
    #: The shared channel that its terminal result goes to.
    Column("reply_to", Text),
    #: The batch it came with, and its place there, from 1.
    Column("batch_id", Uuid, ForeignKey("batches.id")),
    Column("batch_line", Integer),
    #: Somebody wants it to end; until its worker has heard of that it goes on.
    Column("cancel_requested_at", _TIME),
    #: When its request and its answer were removed.
    Column("purged_at", _TIME),
    _one_of("lane", "interactive", "bulk"),
    _one_of("state", "queued", "running", "parked", "succeeded", "failed", "cancelled", "expired"),
    CheckConstraint("(state = 'running') = (worker_id IS NOT NULL)", name="holder"),
    Index(
        "jobs_idempotency_key",
        "account_id",
        "idempotency_key",
        unique=True,
        postgresql_where=text("idempotency_key IS NOT NULL"),
    ),
    Index("jobs_account_idx", "account_id", "id"),
    Index(
        "jobs_batch_idx",
        "batch_id",
        "batch_line",
        postgresql_where=text("batch_id IS NOT NULL"),
    ),
    Index(
        "jobs_cancelling_idx",
        "worker_id",
        postgresql_where=text("state = 'running' AND cancel_requested_at IS NOT NULL"),
    ),
    # What an operator asks for: what went wrong lately.
    Index(
        "jobs_ended_idx",
        "id",
        postgresql_where=text("state IN ('failed', 'cancelled', 'expired')"),
    ),
    # Lost messages: per queue, the rows whose message should have been seen longest ago.
    Index(
        "jobs_queued_idx",
        "queue",
        text("greatest(published_at, run_at)"),
        postgresql_where=text("state = 'queued'"),
    ),
    Index("jobs_parked_idx", "queue", "run_at", "id", postgresql_where=text("state = 'parked'")),
    Index("jobs_running_idx", "worker_id", postgresql_where=text("state = 'running'")),
    Index(
        "jobs_deadline_idx",
        "deadline_at",
        postgresql_where=text("state IN ('queued', 'parked')"),
    ),
    # What the purger takes next: who ended first.
    Index(
        "jobs_unpurged_idx",
        "finished_at",
        "id",
        postgresql_where=text("finished_at IS NOT NULL AND purged_at IS NULL"),
    ),
)

job_bodies = Table(
    "job_bodies",
    metadata,
    Column("job_id", Uuid, ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    Column("request", JSON, nullable=False),
)

attempts = Table(
    "attempts",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("job_id", Uuid, ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False),
    Column("fence", BigInteger, nullable=False),
    Column("number", SmallInteger, nullable=False),
    #: No foreign key: the row of a dead worker goes, its attempts stay.
    Column("worker_id", Uuid, nullable=False),
    Column("account_id", Uuid, nullable=False),
    Column("use_case", Text, nullable=False),
    Column("provider_id", Uuid, nullable=False),
    Column("provider", Text, nullable=False),
    Column("model", Text, nullable=False),
    Column("state", Text, nullable=False),
    #: Worst-case cost, held while the outcome is open.
    Column("reserved_nano_usd", BigInteger, nullable=False),
    #: The worst case at the baseline model's price.
    Column("baseline_reserved_nano_usd", BigInteger, nullable=False),
    Column("dispatched_at", _TIME, nullable=False, server_default=_NOW),
    Column("ended_at", _TIME),
    Column("first_token_ms", Integer),
    Column("duration_ms", Integer),
    Column("error_class", Text),
    Column("error_message", Text),
    Column("status", SmallInteger),
    Column("request_id", Text),
    #: What the provider said of its tokens, as it said it.
    Column("raw_usage", JSON),
    _one_of(
        "state",
        "dispatching",
        "succeeded",
        "failed",
        "cancelled",
        "void",
        "unknown",
        "corrected",
    ),
    CheckConstraint("reserved_nano_usd >= 0", name="reserved"),
    Index("attempts_job_idx", "job_id"),
    Index(
        "attempts_dispatching_idx",
        "worker_id",
        postgresql_where=text("state = 'dispatching'"),
    ),
    # What a budget that begins holds from its first moment on.
    Index(
        "attempts_held_idx",
        "account_id",
        postgresql_where=text("state = 'dispatching'"),
    ),
    # Failures, for reports: some have no cost entry.
    Index(
        "attempts_failed_idx",
        "dispatched_at",
        postgresql_where=text("state IN ('failed', 'unknown', 'corrected')"),
    ),
)

#: Latencies are counted in buckets this many of which are a factor of e: each is 4 % wide.
LATENCY_BUCKETS = 25
_BUCKET = (
    f"CASE WHEN {{0}} > 0 THEN floor(ln({{0}}::float8) * {LATENCY_BUCKETS})::smallint"
    " WHEN {0} <= 0 THEN 0 END"
)

cost_entries = Table(
    "cost_entries",
    metadata,
    Column("id", Uuid, primary_key=True, server_default=text("gen_random_uuid()")),
    Column("attempt_id", Uuid, nullable=False),
    Column("job_id", Uuid, nullable=False),
    Column("account_id", Uuid, ForeignKey("accounts.id"), nullable=False),
    Column("use_case", Text, nullable=False),
    Column("provider_id", Uuid, nullable=False),
    Column("provider", Text, nullable=False),
    Column("model", Text, nullable=False),
    Column("kind", Text, nullable=False),
    Column("amount_nano_usd", BigInteger, nullable=False),
    Column("baseline_nano_usd", BigInteger, nullable=False),
    Column("input_tokens", BigInteger, nullable=False, server_default="0"),
    Column("cache_read_tokens", BigInteger, nullable=False, server_default="0"),
    Column("cache_write_5m_tokens", BigInteger, nullable=False, server_default="0"),
    Column("cache_write_1h_tokens", BigInteger, nullable=False, server_default="0"),
    Column("output_tokens", BigInteger, nullable=False, server_default="0"),
    Column("reasoning_tokens", BigInteger, nullable=False, server_default="0"),
    Column("price_version", Text, nullable=False),
    #: Of the answer, where there was one: reports read them for every entry.
    Column("first_token_ms", Integer),
    Column("duration_ms", Integer),
    #: Of the attempt: whenever an entry is made, it belongs to the windows of its call.
    Column("dispatched_at", _TIME, nullable=False),
    Column("created_at", _TIME, nullable=False, server_default=_NOW),
    *(
        Column(f"{latency}_bucket", SmallInteger, Computed(_BUCKET.format(f"{latency}_ms"), True))
        for latency in ("duration", "first_token")
    ),
    _one_of("kind", "actual", "estimate", "correction"),
    # At most one first entry an attempt, and at most one correction.
    Index(
        "cost_entries_first_key",
        "attempt_id",
        unique=True,
        postgresql_where=text("kind <> 'correction'"),
    ),
    Index(
        "cost_entries_correction_key",
        "attempt_id",
        unique=True,
        postgresql_where=text("kind = 'correction'"),
    ),
    Index("cost_entries_account_idx", "account_id", "dispatched_at"),
    # The days of a report. Entries come in about the order of their calls, which is all that such
    # an index needs: it is tiny, and an insert hardly notices it.
    Index("cost_entries_dispatched_idx", "dispatched_at", postgresql_using="brin"),
    # What reports ask of apart: few of all.
    Index(
        "cost_entries_estimate_idx",
        "dispatched_at",
        postgresql_where=text("kind = 'estimate'"),
    ),
)

results = Table(
    "results",
    metadata,
    # The key is what makes a second result impossible.
    Column("job_id", Uuid, ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    Column("attempt_id", Uuid),
    Column("fence", BigInteger, nullable=False),
    Column("body", JSON, nullable=False),
)

#: Terminal results for shared reply channels, until all consumer groups have acknowledged them; a
#: trigger on `results` writes it.
outbox = Table(
    "outbox",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    Column("channel", Text, nullable=False),
    Column("job_id", Uuid, nullable=False),
    #: Of the result; a job that was tried again has another one by now.
    Column("fence", BigInteger, nullable=False),
    #: Its place in the channel, and the id of its entry in Redis; null while it waits for room.
    Column("number", BigInteger),
    Column("created_at", _TIME, nullable=False, server_default=_NOW),
    Index("outbox_channel_idx", "channel", "number", "id"),
    # Whether a job's result is still to be delivered.
    Index("outbox_job_idx", "job_id"),
)

#: What gives out the numbers of a channel: its row is locked meanwhile. Alert channels are here,
#: too, under names that no reply channel can have.
reply_channels = Table(
    "reply_channels",
    metadata,
    Column("name", Text, primary_key=True),
    Column("last_number", BigInteger, nullable=False),
)

#: The consumer groups of each channel: Redis may lose them.
reply_groups = Table(
    "reply_groups",
    metadata,
    Column("channel", Text, primary_key=True),
    Column("name", Text, primary_key=True),
    #: The first number that it has not acknowledged.
    Column("place", BigInteger, nullable=False),
)

#: What opens the HTTP producer. The key itself is nowhere: it was shown once.
api_keys = Table(
    "api_keys",
    metadata,
    Column("id", Uuid, primary_key=True),
    #: What people call it.
    Column("name", Text, nullable=False),
    Column("role", Text, nullable=False),
    #: Null: a service key; each of its requests names the account that it acts for.
    Column("account_id", Uuid, ForeignKey("accounts.id", ondelete="CASCADE")),
    #: See `api_keys.hash_of`.
    Column("token_hash", LargeBinary, nullable=False, unique=True),
    #: How it begins, to tell it from others.
    Column("hint", Text, nullable=False),
    Column("created_at", _TIME, nullable=False, server_default=_NOW),
    #: Who made it, as the audit names him.
    Column("created_by", Text, nullable=False),
    #: Null: never.
    Column("expires_at", _TIME),
    Column("revoked_at", _TIME),
    #: To about a minute.
    Column("last_used_at", _TIME),
    _one_of("role", "user", "owner", "admin"),
    Index("api_keys_account_idx", "account_id"),
)

#: What operators have changed. Triggers on the tables write it, and one on it refuses all else.
audit_entries = Table(
    "audit_entries",
    metadata,
    Column("number", BigInteger, Identity(always=True), primary_key=True),
    Column("at", _TIME, nullable=False, server_default=_NOW),
    #: Who it was: `key:<id>`, `jwt:<subject>`, `cli:<user>`, or `db:<user>` of a hand at psql.
    Column("actor", Text, nullable=False),
    #: Of the HTTP request that did it.
    Column("request_id", Text),
    Column("action", Text, nullable=False),
    #: What it was done to: its kind, its name and its id.
    Column("kind", Text, nullable=False),
    Column("subject", Text, nullable=False),
    Column("subject_id", Text),
    #: Whose that is; null: everybody's.
    Column("account_id", Uuid),
    #: Columns of the row; of a change those that changed. Secrets are masked.
    Column("before", JSONB(none_as_null=True)),
    Column("after", JSONB(none_as_null=True)),
    _one_of("action", "add", "change", "remove"),
    Index("audit_entries_account_idx", "account_id", "number"),
)
