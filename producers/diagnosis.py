"""What is wrong with a fleet, and what to do about it. Pure: judges what somebody else has read."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Final

from sluicegate.shared.catalogue import Catalogue, Provider
from sluicegate.shared.catalogue_changes import NOBODY, serving
from sluicegate.shared.errors import InvalidJob, UnknownPrice
from sluicegate.shared.gate_changes import Alert, Pause
from sluicegate.shared.pricing import baseline_provider, price_card
from sluicegate.shared.provider_keys import GIVE_KEY, Readers
from sluicegate.shared.queues import POOLS
from sluicegate.shared.settings import Settings

#: How long before a model's end it is spoken of.
RETIRES_SOON: Final = timedelta(days=60)

#: After which what somebody has stopped or forced looks forgotten.
FORGOTTEN_AFTER: Final = timedelta(days=1)
#: Alerts that are shown one by one.
ALERTS_SHOWN: Final = 10

_POSTGRES_NEEDED = 150_000
_REDIS_NEEDED = (7, 0)
_DRIFT_COUNTS = ("missing", "behind", "wrong", "orphaned")
_CLOCK_WARNING_S = 0.5
#: Messages may be claimed this much early (workers' claim statement): beyond it clocks hurt.
_CLOCK_PROBLEM_S = 2.0


class Level(StrEnum):
    """How bad it is. A problem keeps jobs from being run."""

    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at."""

    level: Level
    #: What was looked at, in a word or two.
    subject: str
    #: What was found.
    found: str
    #: What to do about it; empty where all is well.
    advice: str = ""


def ok(subject: str, found: str) -> Finding:
    """Make a finding of something that is well."""
    return Finding(level=Level.OK, subject=subject, found=found)


def warning(subject: str, found: str, advice: str) -> Finding:
    """Make a finding of something that will hurt one day."""
    return Finding(level=Level.WARNING, subject=subject, found=found, advice=advice)


def problem(subject: str, found: str, advice: str) -> Finding:
    """Make a finding of something that keeps jobs from being run."""
    return Finding(level=Level.PROBLEM, subject=subject, found=found, advice=advice)


def judge_settings(settings: Settings) -> list[Finding]:
    """Find settings that do not fit together."""
    found = [
        *_longer_than(settings, "total_deadline_s", "connect_deadline_s"),
        *_longer_than(settings, "total_deadline_s", "first_token_deadline_s"),
        *_longer_than(settings, "total_deadline_s", "idle_deadline_s"),
        *_longer_than(settings, "total_deadline_s", "response_deadline_s"),
        *_longer_than(settings, "breaker_open_max_s", "breaker_open_s"),
        *_longer_than(settings, "cooldown_max_s", "cooldown_s"),
        *_longer_than(settings, "gate_lease_s", "beat_valid_s"),
        *_longer_than(settings, "interactive_deadline_s", "first_token_deadline_s"),
        *_longer_than(settings, "bulk_deadline_s", "total_deadline_s"),
        *_longer_than(settings, "reply_ttl_s", "interactive_deadline_s"),
        *_longer_than(settings, "lost_after_s", "sweep_interval_s"),
        *_longer_than(settings, "retry_max_s", "retry_base_s"),
        *_longer_than(settings, "jobs_in_flight", "chunk_size"),
        *_longer_than(settings, "stage_ahead_jobs", "chunk_size"),
    ]
    try:
        price_card(baseline_provider(settings.baseline_model), settings.baseline_model)
    except UnknownPrice:
        found.append(
            problem(
                "settings",
                f"SLUICE_BASELINE_MODEL: the price of {settings.baseline_model!r} is not known",
                "name a model that the price list has, such as gpt-4o",
            )
        )
    return found or [ok("settings", "fit together")]


def _longer_than(settings: Settings, longer: str, shorter: str) -> Iterator[Finding]:
    above, below = getattr(settings, longer), getattr(settings, shorter)
    if above < below:
        yield warning(
            "settings",
            f"SLUICE_{longer.upper()} ({above:g}) is below SLUICE_{shorter.upper()} ({below:g})",
            f"raise SLUICE_{longer.upper()} or lower SLUICE_{shorter.upper()}",
        )


def judge_postgres(values: Mapping[str, str], version: int, *, processes: int) -> list[Finding]:
    """Judge a server by its settings and its version number (as 150004 for 15.4).

    `processes` is how many of ours are connected, each with a pool.
    """
    found = []
    if version < _POSTGRES_NEEDED:
        found.append(
            problem("postgres", f"is version {version // 10_000}", "use PostgreSQL 15 or newer")
        )
    if values["fsync"] == "off":
        found.append(
            problem(
                "postgres",
                "runs with fsync off: a crash of its machine loses accepted jobs",
                "set fsync = on",
            )
        )
    if values["synchronous_commit"] == "off":
        found.append(
            warning(
                "postgres",
                "commits before the disk has it: a crash loses the last moments",
                "set synchronous_commit = on",
            )
        )
    limit, pool = int(values["max_connections"]), int(values["pool_size"])
    if processes * pool > 0.8 * limit:
        found.append(
            warning(
                "postgres",
                f"{processes} processes may take {pool} connections each, of {limit} in all",
                "raise max_connections, or lower SLUICE_DATABASE_POOL_SIZE",
            )
        )
    return found or [ok("postgres", f"version {values['server_version'].split()[0]}")]


def judge_redis(info: Mapping[str, object]) -> list[Finding]:
    """Judge a server by its INFO."""
    name = "Valkey" if "valkey_version" in info else "Redis"
    version = str(info.get("valkey_version") or info.get("redis_version") or "0")
    found = []
    if tuple(int(part) for part in version.split(".")[:2]) < _REDIS_NEEDED:
        found.append(problem("redis", f"is version {version}", "use Redis 7 or Valkey, or newer"))
    if info.get("role") not in (None, "master"):
        found.append(
            problem(
                "redis",
                "is a replica: it takes no messages",
                "point SLUICE_REDIS_URL at the primary",
            )
        )
    policy = info.get("maxmemory_policy")
    if info.get("maxmemory") and policy != "noeviction":
        found.append(
            problem(
                "redis",
                f"throws keys away when memory is full (maxmemory-policy {policy})",
                "set maxmemory-policy noeviction",
            )
        )
    if not info.get("aof_enabled"):
        found.append(
            warning(
                "redis",
                "keeps nothing over a restart: jobs run again from Postgres, but the journal of "
                "paid answers is lost",
                "set appendonly yes",
            )
        )
    used, limit = int(str(info.get("used_memory", 0))), int(str(info.get("maxmemory", 0)))
    if limit and used > 0.8 * limit:
        found.append(
            warning("redis", f"uses {used / limit:.0%} of its memory", "give it more memory")
        )
    return found or [ok("redis", f"{name} {version}")]


def judge_drift(counts: Mapping[str, int]) -> list[Finding]:
    """Tell what the reconciler has repaired of the copies of budgets since Redis began to count.

    `counts` is what it keeps there; empty where no sweep has run. A few are no problem: a copy only
    delays.
    """
    if not counts.get("budgets"):
        return []
    found = ", ".join(f"{counts[name]} {name}" for name in _DRIFT_COUNTS if counts.get(name))
    said = f"{counts['budgets']} budgets; their copies in Redis in {counts['rounds']} rounds: "
    return [ok("budgets", said + (found or "all as they should be"))]


def judge_clocks(differences_s: Mapping[str, float]) -> list[Finding]:
    """Judge how far each server's clock is from ours."""
    found = []
    for server, difference_s in differences_s.items():
        if abs(difference_s) < _CLOCK_WARNING_S:
            continue
        make = problem if abs(difference_s) >= _CLOCK_PROBLEM_S else warning
        ahead = "ahead of" if difference_s > 0 else "behind"
        found.append(
            make(
                "clocks",
                f"the clock of {server} is {abs(difference_s):.1f} s {ahead} this machine's",
                "synchronise both with NTP",
            )
        )
    return found or [ok("clocks", "agree")]


def judge_catalogue(catalogue: Catalogue, settings: Settings, now: datetime) -> list[Finding]:
    """Find models that retire soon, use cases without a provider, and models without a price."""
    found = []
    used: set[str] = set()
    for name in sorted(one.name for one in catalogue.use_cases.values() if one.is_active):
        try:
            rows = serving(catalogue, name, account_id=NOBODY, mode=settings.catalogue, now=now)
        except (InvalidJob, UnknownPrice) as refusal:
            advice = f"give it one: `sluice provider set NAME --use-case {name}`"
            found.append(problem("catalogue", f"use case {name}: {refusal}", advice))
            continue
        used |= {row.name for row in rows}
    for row in catalogue.providers:
        found += _judge_row(row, settings, now, in_use=row.name in used)
    return found or [
        ok("catalogue", f"{len(used)} models serve {len(catalogue.use_cases)} use cases")
    ]


def _judge_row(
    row: Provider, settings: Settings, now: datetime, *, in_use: bool
) -> Iterator[Finding]:
    try:
        _ = row.card
    except UnknownPrice:
        yield problem(
            "catalogue",
            f"{row.name}: the price of {row.model} is not known, so its jobs fail",
            f"set one: `sluice provider set {row.name} --input-price ... --output-price ...`",
        )
    if not in_use or row.retires_at is None or row.retires_at > now + RETIRES_SOON:
        return
    left = (row.retires_at - now).days
    instead = f"move to {row.successor}" if row.successor else "choose another model"
    when = f"in {left} days" if left else "within a day"
    yield warning("catalogue", f"{row.name} retires {when}, on {row.retires_at:%Y-%m-%d}", instead)


def judge_keys(
    rows: Iterable[Provider], sources: Mapping[str, str], unreadable: Sequence[str]
) -> list[Finding]:
    """Judge which pools have a key. `sources` says where each pool's comes from.

    `unreadable` names what is encrypted with a key that is not among SLUICE_ENCRYPTION_KEYS.
    """
    needed = {row.provider for row in rows if row.base_url is None}
    found = []
    for pool in POOLS:
        if pool not in needed:
            continue
        source = sources.get(pool)
        if source is None:
            found.append(
                problem(
                    "keys",
                    f"there is no key for {pool}: its jobs fail",
                    f"set {pool.upper()}_API_KEY for the workers, or `sluice secrets set {pool}`",
                )
            )
        else:
            found.append(ok("keys", f"{pool}: {source}"))
    found += [
        problem(
            "keys",
            f"the key of {name} cannot be decrypted",
            "add the key it was encrypted with to SLUICE_ENCRYPTION_KEYS, or set it anew",
        )
        for name in unreadable
    ]
    return found


def judge_keyrings(readers: Readers) -> list[Finding]:
    """Find workers that cannot decrypt a key that is set from now on."""
    return [warning("keys", readers.problem, GIVE_KEY)] if readers.problem else []


def judge_processes(
    served: Collection[str], wanted: Iterable[str], *, sweeps: int
) -> list[Finding]:
    """Judge which queues have workers, and whether a sweep runs."""
    found = []
    idle = sorted(set(wanted) - set(served))
    if not served:
        found.append(
            warning("workers", "none runs", "start `sluice up`, or `sluice worker` for each pool")
        )
    elif idle:
        listed = ", ".join(idle[:6]) + (" ..." if len(idle) > 6 else "")
        found.append(
            warning(
                "workers",
                f"nobody serves {len(idle)} of the queues: {listed}",
                "start `sluice worker POOL`, and one with --lane bulk",
            )
        )
    else:
        found.append(ok("workers", f"serve all {len(served)} queues"))
    if sweeps:
        found.append(ok("sweep", f"{sweeps} running"))
    else:
        found.append(
            warning(
                "sweep", "none runs: bulk jobs wait, nothing is repaired", "start `sluice sweep`"
            )
        )
    return found


def judge_alert_urls(not_taken: Iterable[tuple[str, str]]) -> list[Finding]:
    """Find accounts whose URL does not take their alerts: their names, and why."""
    return [
        warning(
            "alerts",
            f"the alert URL of account {name} did not take an alert: {problem}",
            f"see `sluice alerts list --account {name}`, and `sluice alerts test` once it is well",
        )
        for name, problem in not_taken
    ]


def judge_gates(
    alerts: Sequence[Alert],
    pauses: Iterable[Pause],
    levers: Iterable[tuple[str, str, datetime]],
    now: datetime,
) -> list[Finding]:
    """Find suspended accounts, and what an operator has stopped or forced and left so.

    A lever is the provider's name, its position, and since when it has been there.
    """
    found = [
        warning(
            "gates",
            alert.message,
            "see to its key or quota, then `sluice breaker reset PROVIDER --account ACCOUNT`",
        )
        for alert in alerts[:ALERTS_SHOWN]
    ]
    if len(alerts) > ALERTS_SHOWN:
        found.append(warning("gates", "more accounts are suspended", "see `sluice breaker list`"))
    found += [
        warning(
            "gates",
            f"{pause.kind.replace('_', ' ')} {pause.name} has been paused since {pause.since:%F}",
            "let it go on with `sluice resume`, or disable it",
        )
        for pause in pauses
        if pause.since <= now - FORGOTTEN_AFTER
    ]
    found += [
        warning(
            "gates",
            f"the breaker of {name} has been {lever.replace('_', ' ')} since {since:%F}",
            f"leave it to itself: `sluice breaker reset {name}`",
        )
        for name, lever, since in levers
        if since <= now - FORGOTTEN_AFTER
    ]
    return found or [ok("gates", "nobody is suspended, nothing is left paused or forced")]
