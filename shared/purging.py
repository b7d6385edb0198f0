"""Purging: removing what a job was asked and what it answered. What it cost stays.

The sweep purges jobs some time after their end, `sluice account erase` those of an account at once.
Whatever is left says so: `jobs.purged_at`, and `purged_at` in the result.
"""

from __future__ import annotations

from typing import Final

#: Jobs that one statement looks at.
PURGE_BATCH: Final = 500

# What is left of a result `r` of a job `j`: how it ended, how many tokens that took, what it cost.
_LEFT = """json_strip_nulls(json_build_object(
    'version', 1, 'job_id', j.id, 'state', j.state, 'use_case', j.use_case,
    'cost_nano_usd', j.cost_nano_usd, 'baseline_nano_usd', r.body->'baseline_nano_usd',
    'attempts', r.body->'attempts', 'finish_reason', r.body->'finish_reason',
    'usage', r.body->'usage',{named}
    'error', CASE WHEN json_typeof(r.body->'error') = 'object' THEN json_build_object(
        'error_class', r.body->'error'->'error_class', 'status', r.body->'error'->'status',
        'message', 'what went wrong was purged') END,
    'purged_at', now()))"""
_PURGED_BODY = _LEFT.format(named=" 'provider', r.body->'provider', 'model', r.body->'model',")
#: A row of an account's own may bear any name.
_ERASED_BODY = _LEFT.format(named="")

# Whoever waits for a lock on the job, such as `job retry`, finds it purged. A result that a shared
# channel has yet to deliver, or somebody to acknowledge, is kept: it is looked at again in the next
# round, so that one takes no longer the more of them there are than their number.
#: Purges jobs that ended more than `%(retention_s)s` ago, of the batch behind the job
#: `%(after_id)s` that ended at `%(after)s`. Returns one row: how many it has looked at, the last of
#: them, and the ids of those that it has purged.
PURGE_DUE: Final = f"""
WITH seen AS (
    SELECT id, finished_at FROM jobs
    WHERE finished_at IS NOT NULL AND purged_at IS NULL
      AND finished_at < now() - make_interval(secs => %(retention_s)s)
      AND (finished_at, id) > (%(after)s, %(after_id)s)
    ORDER BY finished_at, id LIMIT {PURGE_BATCH}
), due AS (
    SELECT j.id FROM seen JOIN jobs j ON j.id = seen.id
    WHERE j.finished_at = seen.finished_at AND j.purged_at IS NULL
      AND NOT EXISTS (SELECT FROM outbox o WHERE o.job_id = seen.id)
    ORDER BY j.id
    FOR NO KEY UPDATE OF j SKIP LOCKED
), purged AS (
    UPDATE jobs j SET purged_at = now(), held_back = NULL
    FROM due WHERE j.id = due.id
    RETURNING j.*
), quiet AS (
    UPDATE attempts a SET error_message = NULL
    FROM purged WHERE a.job_id = purged.id AND a.error_message IS NOT NULL
), kept AS (
    UPDATE results r SET body = {_PURGED_BODY}
    FROM purged j WHERE r.job_id = j.id
), gone AS (
    DELETE FROM job_bodies b USING purged WHERE b.job_id = purged.id
), last AS (
    SELECT id, finished_at FROM seen ORDER BY finished_at DESC, id DESC LIMIT 1
)
SELECT (SELECT count(*) FROM seen) AS seen, last.id AS last_id, last.finished_at AS last_at,
       ARRAY(SELECT id FROM purged) AS purged
FROM (SELECT 1) one LEFT JOIN last ON true
"""

# Jobs that are not over are left alone. What was erased before is not written again, but for what
# an attempt has said since: one whose outcome was unknown may still be heard of.
#: Erases the jobs `%(job_ids)s` of an account whose own provider rows are `%(own)s`.
ERASE_JOBS: Final = f"""
WITH job AS (
    SELECT j.id, j.request_hash FROM jobs j
    WHERE j.id = ANY(%(job_ids)s::uuid[]) AND j.finished_at IS NOT NULL
    ORDER BY j.id
    FOR NO KEY UPDATE
), wiped AS (
    UPDATE jobs j
    SET purged_at = coalesce(j.purged_at, now()), held_back = NULL, idempotency_key = NULL,
        request_hash = '', submitted_by = NULL, submitted_from = NULL, request_id = NULL
    FROM job WHERE j.id = job.id AND job.request_hash <> ''
    RETURNING j.*
), quiet AS (
    UPDATE attempts a
    SET error_message = NULL, request_id = NULL,
        provider = CASE WHEN a.provider_id = ANY(%(own)s::uuid[]) THEN 'erased' ELSE a.provider END,
        model = CASE WHEN a.provider_id = ANY(%(own)s::uuid[]) THEN 'erased' ELSE a.model END
    FROM job
    WHERE a.job_id = job.id
      AND (a.error_message IS NOT NULL OR a.request_id IS NOT NULL
           OR a.provider_id = ANY(%(own)s::uuid[]))
    RETURNING a.id
), entries AS (
    UPDATE cost_entries c SET provider = 'erased', model = 'erased'
    FROM quiet WHERE c.attempt_id = quiet.id AND c.provider_id = ANY(%(own)s::uuid[])
), kept AS (
    UPDATE results r SET body = {_ERASED_BODY}
    FROM wiped j WHERE r.job_id = j.id
), gone AS (
    DELETE FROM job_bodies b USING wiped WHERE b.job_id = wiped.id
), undelivered AS (
    DELETE FROM outbox o USING job WHERE o.job_id = job.id
)
SELECT count(*) AS erased FROM wiped
"""
