"""Settings: read once from the environment and `.env`, checked, with units in the names."""

from __future__ import annotations

from functools import cache
from typing import Annotated, Literal
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

from pydantic import Field, ValidationError, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from sluicegate.shared.errors import SettingsError
from sluicegate.shared.secrets import Secret

Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
#: A claim of a token: names with dots between, from the outside in.
Claim = Annotated[str, Field(pattern=r"^[^\s.]+(\.[^\s.]+)*$")]

_LOOPBACK = ("127.0.0.1", "localhost", "::1")

#: The SDKs' own variables, without our prefix, so that one `.env` serves both.
_SDK_VARIABLES = {
    "openai_api_key": "OPENAI_API_KEY",
    "openai_base_url": "OPENAI_BASE_URL",
    "anthropic_api_key": "ANTHROPIC_API_KEY",
    "anthropic_base_url": "ANTHROPIC_BASE_URL",
}


def _is_url(value: str, *schemes: str) -> bool:
    try:
        urlsplit(value).port  # noqa: B018 - raises ValueError unless it is a port number
    except ValueError:
        return False
    return value.startswith(tuple(f"{scheme}://" for scheme in schemes))


class Settings(BaseSettings):
    """Every setting of the fleet; `.env.example` documents each for operators."""

    model_config = SettingsConfigDict(
        env_prefix="SLUICE_",
        env_file=".env",
        env_file_encoding="utf-8",
        env_ignore_empty=True,
        extra="ignore",
        frozen=True,
        populate_by_name=True,
        hide_input_in_errors=True,
    )

    # Where the truth lives
    #: PostgreSQL, as a SQLAlchemy URL; `postgres://` and `postgresql://` are taken too.
    database_url: Secret = Secret("postgresql+psycopg://sluice@127.0.0.1:5432/sluice")
    #: The Postgres schema that holds all our tables, apart from those of a back end beside us.
    database_schema: Annotated[str, Field(pattern=r"^[a-z_][a-z0-9_]{0,62}$")] = "sluicegate"
    #: Redis or Valkey: broker, reply channels and journal.
    redis_url: Secret = Secret("redis://127.0.0.1:6379/0")
    #: In front of every key and queue in Redis.
    redis_prefix: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:-]{0,64}$")] = "sluice:"
    #: Connections to Postgres a process may hold; an asyncio client takes two at least.
    database_pool_size: Count = 8
    #: Connections to Redis a process may hold, the broker's own not counted.
    redis_pool_size: Count = 16
    #: Longest wait for a connection to Postgres or Redis.
    connect_timeout_s: Seconds = 5
    #: Longest wait for one answer from Postgres or Redis.
    command_timeout_s: Seconds = 15

    # Providers
    openai_api_key: Secret | None = Field(default=None, validation_alias="OPENAI_API_KEY")
    openai_base_url: str | None = Field(default=None, validation_alias="OPENAI_BASE_URL")
    anthropic_api_key: Secret | None = Field(default=None, validation_alias="ANTHROPIC_API_KEY")
    anthropic_base_url: str | None = Field(default=None, validation_alias="ANTHROPIC_BASE_URL")
    #: Which defaults route a use case: today's models, or the original system's while they live.
    catalogue: Literal["current", "original"] = "current"
    #: The model that savings are measured against.
    baseline_model: Annotated[str, Field(min_length=1)] = "gpt-4o"
    #: Age at which a process reads the catalogue again, even if nobody said that it changed.
    catalogue_ttl_s: Seconds = 30

    # Deadlines of one call
    connect_deadline_s: Seconds = 10
    first_token_deadline_s: Seconds = 30
    idle_deadline_s: Seconds = 20
    total_deadline_s: Seconds = 300
    #: To the whole answer of a call that is not streamed; then another provider is asked.
    response_deadline_s: Seconds = 120

    # Gates, one set for each provider row, shared by the fleet
    #: A breaker opens after this many failures in a row,
    breaker_streak: Count = 5
    #: or when this share of at least so many calls in its window failed.
    breaker_failure_share: Annotated[float, Field(gt=0, le=1)] = 0.5
    breaker_min_calls: Count = 20
    #: The window is twelve of these.
    breaker_bucket_s: Seconds = 10
    #: How long it stays open at first, and at most, doubling in between.
    breaker_open_s: Seconds = 5
    breaker_open_max_s: Seconds = 20
    #: Calls that a half-open breaker lets through at a time.
    breaker_probes: Count = 2
    #: A slot or probe that its worker has not confirmed for this long is free again.
    gate_lease_s: Seconds = 15
    #: The share of a provider's limits that bulk jobs may use.
    bulk_share: Annotated[float, Field(gt=0, le=1)] = 0.8
    #: How long a provider rests after a 429 that does not say it, doubling up to a minute.
    cooldown_s: Seconds = 1
    #: The longest rest that a provider's headers can ask for.
    cooldown_max_s: Seconds = 3600
    #: How long an account does not use a provider that refused its key or has no quota left.
    suspension_s: Seconds = 900
    #: How long a job waits in its worker for a provider that is at its limit.
    gate_patience_s: Seconds = 1
    #: Second tries at a provider, as a share of its first ones.
    retry_share: Annotated[float, Field(gt=0, le=1)] = 0.2

    #: What keys of providers in the database are encrypted with: Fernet keys with commas between,
    #: the newest first. All can be read, the first one writes.
    encryption_keys: Secret | None = None
    #: Requests and answers are encrypted with them too, from then on.
    encrypt_bodies: bool = False

    # Jobs
    #: Seconds from submit to the deadline, when the caller names none.
    interactive_deadline_s: Seconds = 300
    bulk_deadline_s: Seconds = 86_400
    #: Paid calls a job may take, over all providers.
    max_attempts: Annotated[int, Field(ge=1, le=20)] = 5
    #: First and longest wait between attempts (full jitter).
    retry_base_s: Seconds = 2
    retry_max_s: Seconds = 300
    #: A longer wait than this parks the job in Postgres instead of a worker's memory.
    retry_park_above_s: Seconds = 30
    #: Life of a reply channel after its last event.
    reply_ttl_s: Seconds = 3600
    #: Results that a shared reply channel holds at most; the rest wait in Postgres meanwhile.
    reply_channel_max: Count = 100_000
    #: How often a waiting reader looks at the row itself, so that a lost event cannot hang it.
    reply_recheck_s: Seconds = 5
    #: Deltas of one stream are collected this long before they are sent on; the first is not.
    delta_interval_s: Seconds = 0.025
    #: How long a job's request and answer are kept after its end; at most a hundred years.
    body_retention_s: Annotated[float, Field(gt=0, le=3_155_760_000)] = 2_592_000

    # Workers
    #: Jobs one worker process runs at the same time.
    jobs_in_flight: Count = 500
    #: Jobs one bulk message carries.
    chunk_size: Annotated[int, Field(ge=1, le=500)] = 25
    #: How long SIGTERM lets running calls finish.
    grace_s: Seconds = 30
    #: A worker writes its beat this often.
    beat_interval_s: Seconds = 2
    #: No call leaves unless a beat sent less than this ago was confirmed.
    beat_valid_s: Seconds = 10
    #: A beat that stands still this long, under unbroken watch, means a dead worker.
    dead_after_s: Seconds = 15
    #: Statements of a kind start up to this far apart, so that under load each serves many jobs.
    spacing_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.01
    #: The most jobs one statement carries.
    coalesce_max: Count = 100

    # Sweep
    #: How often the sweep looks, when nothing wakes it.
    sweep_interval_s: Seconds = 1
    #: How often the copies of budgets in Redis are compared with Postgres.
    reconcile_interval_s: Seconds = 10
    #: A queued row is lost when it is this much older than the oldest message of its queue.
    lost_after_s: Seconds = 30
    #: Bulk jobs that wait in the broker, per queue; the rest wait in Postgres.
    stage_ahead_jobs: Count = 2000
    #: Whether alerts may be posted to addresses that are not public.
    alert_private_urls: bool = False
    #: Longest time that posting an alert may take, once.
    alert_deadline_s: Seconds = 10
    #: First wait before it is tried again, doubling up to an hour,
    alert_retry_s: Seconds = 30
    #: and how long after an alert was raised it is still tried.
    alert_give_up_s: Seconds = 86_400

    # The HTTP producer
    #: The longest body of a request, in bytes; attachments come in base64.
    http_max_body_bytes: Count = 24_000_000
    #: Bytes of bodies that one process reads at the same time.
    http_bodies_bytes: Count = 256_000_000
    #: How long a connection may take to send the head of a request, and a body.
    http_head_timeout_s: Seconds = 10
    http_body_timeout_s: Seconds = 60
    #: How long a client may take nothing of an answer before it is cut off.
    http_stall_timeout_s: Seconds = 30
    #: The longest that a request may ask to wait for its job.
    http_max_wait_s: Seconds = 300
    #: A stream that has nothing to say says so this often.
    http_keep_alive_s: Seconds = 15
    #: Connections, and streams and requests that wait for a job among them, that one process holds.
    http_max_connections: Count = 5000
    http_max_streams: Count = 2500
    #: How old a stream gets, before its reader has to say again who it is.
    http_stream_max_s: Seconds = 3600
    #: Requests a second that a key or a token's subject may make, and how many at once.
    http_rate_per_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 100
    http_rate_burst: Count = 200
    #: Work for a use case is refused while an interactive job of it has waited for longer.
    http_queue_age_s: Seconds = 60
    #: Web pages that may call from a browser: origins with commas between, or `*`; none if empty.
    http_cors_origins: Annotated[
        str, Field(pattern=r"^(\*|https?://[^\s,/]+(\s*,\s*https?://[^\s,/]+)*)?$")
    ] = ""
    #: How long a stop waits for requests that are under way.
    http_grace_s: Seconds = 10

    # Who may use it
    #: After its revocation a key opens a process that has just used it for this long at most.
    api_key_ttl_s: Seconds = 2
    #: What tokens are signed with: the secret of HS256, and the keys of RS256 and ES256, a file or
    #: an https URL.
    jwt_secret: Secret | None = None
    jwt_jwks: str | None = None
    #: Age at which these keys are read again; a key that is not known is looked for sooner.
    jwt_jwks_ttl_s: Seconds = 600
    #: What a token has to name, if these are set.
    jwt_issuer: str | None = None
    jwt_audience: str | None = None
    #: By how much clocks may differ.
    jwt_leeway_s: Annotated[float, Field(ge=0, le=300)] = 30
    #: Where a token says for which account, in which role, and how its holder has proved who he is.
    jwt_account_claim: Claim = "account"
    jwt_role_claim: Claim = "role"
    jwt_mfa_claim: Claim = "aal"
    #: What of the last means two factors, and the roles that need them, with commas between.
    jwt_mfa_values: Annotated[str, Field(min_length=1)] = "aal2"
    jwt_mfa_roles: Annotated[
        str, Field(pattern=r"^((user|owner|admin)(\s*,\s*(user|owner|admin))*)?$")
    ] = ""

    @field_validator("jwt_secret")
    @classmethod
    def _long(cls, value: Secret | None) -> Secret | None:
        # As RFC 7518 has it: a shorter one can be guessed from a single token.
        if value is not None and len(value.get_secret_value().encode()) < 32:
            raise ValueError("must be 32 bytes or longer")
        return value

    @field_validator("jwt_jwks")
    @classmethod
    def _trusted(cls, value: str | None) -> str | None:
        if value is None or "://" not in value:
            return value
        is_url = _is_url(value, "https", "http")
        host = urlsplit(value).hostname if is_url else None
        # Whoever can change keys on their way can make tokens.
        if not host or (value.startswith("http:") and host not in _LOOPBACK):
            raise ValueError("must be the path of a file, or look like https://host/jwks.json")
        return value

    @field_validator("database_url")
    @classmethod
    def _psycopg_url(cls, value: Secret) -> Secret:
        url = value.get_secret_value()
        for scheme in ("postgres://", "postgresql://"):
            if url.startswith(scheme):
                url = "postgresql+psycopg://" + url.removeprefix(scheme)
        if not _is_url(url, "postgresql+psycopg"):
            raise ValueError("must look like postgresql://user:password@host:5432/database")
        return Secret(url)

    @field_validator("redis_url")
    @classmethod
    def _redis_url(cls, value: Secret) -> Secret:
        if not _is_url(value.get_secret_value(), "redis", "rediss"):
            raise ValueError("must look like redis://:password@host:6379/0")
        return value

    @field_validator("beat_valid_s", "dead_after_s")
    @classmethod
    def _longer(cls, value: float, info: ValidationInfo) -> float:
        # A worker must have stopped calling before it can be declared dead.
        shorter = "beat_interval_s" if info.field_name == "beat_valid_s" else "beat_valid_s"
        if value <= info.data.get(shorter, 0.0):
            raise ValueError(f"must be above SLUICE_{shorter.upper()} ({info.data[shorter]:g})")
        return value

    @property
    def database_dsn(self) -> str:
        """The database URL with its password, for opening connections only.

        Its `options` make the server look for tables in our schema alone.
        """
        url, _, query = self.database_url.get_secret_value().partition("?")
        values = dict(parse_qsl(query))
        path = f"-csearch_path={self.database_schema}"
        given = values.get("options", "")
        if path not in given:
            values["options"] = f"{given} {path}".strip()
        return f"{url}?{urlencode(values, quote_via=quote)}"

    @property
    def redis_dsn(self) -> str:
        """The Redis URL with its password, for opening connections only."""
        return self.redis_url.get_secret_value()


def load_settings(**overrides: object) -> Settings:
    """Read the settings; raise `SettingsError` with one sentence for the first bad value."""
    try:
        return Settings(**overrides)  # type: ignore[arg-type]  # overrides are validated here
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        name = str(first["loc"][0])
        variable = _SDK_VARIABLES.get(name, name if name.isupper() else f"SLUICE_{name.upper()}")
        problem = first["msg"].removeprefix("Value error, ")
        raise SettingsError(f"{variable}: {problem[0].lower()}{problem[1:]}") from None


@cache
def get_settings() -> Settings:
    """Return the process-wide settings, read at first use."""
    return load_settings()
