"""Bodies encrypted at rest, on real workers: what the servers hold, who reads it, and new keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx2
import orjson
import psycopg
import pytest

from sluicegate import JobFailed, Sluice
from sluicegate.shared.bodies import Bodies
from sluicegate.shared.database import BY_KEY
from sluicegate.shared.errors import SettingsError
from sluicegate.shared.ids import new_id
from sluicegate.shared.jobs import Lane
from sluicegate.shared.messages import LARGE_BYTES
from sluicegate.shared.secrets import Keyring, Secret, SecretUnreadable, new_key
from sluicegate.shared.settings import Settings
from sluicegate.shared.statements import Database
from sluicegate.workers.settlement import Settlement, Settler
from tests.books import untold
from tests.command_line import Command
from tests.dumping import dump, dump_redis
from tests.harness import Rig
from tests.http_servers import start_http
from tests.polling import eventually

CANARY = "canary-4711"
#: A piece of an image, as base64 is written.
PICTURE = "CanaryPicture471"
OLD, NEW = new_key(), new_key()


def joined(*keys: Secret) -> Secret:
    return Secret(",".join(key.get_secret_value() for key in keys))


@pytest.fixture(scope="module")
def rig_settings() -> dict[str, Any]:
    return {"encrypt_bodies": True, "encryption_keys": OLD}


@pytest.fixture(scope="module")
def rig(module_rig: Rig) -> Rig:
    module_rig.start_sweep()
    for lane in Lane:
        module_rig.start_worker("anthropic", ["draft", "summary"], lane)
    return module_rig


@pytest.fixture
def sluice(rig: Rig, command_line: Callable[[Settings], Command]) -> Callable[..., Any]:
    """Run a command with some settings changed."""

    def call(*arguments: object, **changes: Any) -> Any:
        return command_line(rig.settings.model_copy(update=changes))(*arguments)

    return call


def test_a_job_goes_round_and_the_database_holds_no_word_of_it(rig: Rig) -> None:
    client = rig.client
    options: Any = {"metadata": {"lead": CANARY}, "stream": True, "system": CANARY}
    handle = client.submit("draft", CANARY, idempotency_key="k-1", **options)
    (terminal,) = [event for event in handle.events(timeout=60) if event.terminal]
    result = handle.result(timeout=10)
    assert result.text
    assert getattr(terminal.payload, "result").text == result.text  # noqa: B009 - of either kind
    rig.redis.delete(*rig.redis.keys(f"{rig.settings.redis_prefix}reply:*"))
    assert handle.result(timeout=10).text == result.text  # from Postgres
    view = client.get(handle.id)
    assert (view.metadata, view.result) == ({"lead": CANARY}, result)
    held = dump(rig.settings.database_dsn)
    assert CANARY not in held
    assert result.text not in held
    # What SQL asks for is there.
    (row,) = rig.rows(
        "SELECT body->>'state' AS state, (body->>'cost_nano_usd')::bigint AS cost FROM results"
        " WHERE job_id = %(id)s",
        id=handle.id,
    )
    assert (row.state, row.cost) == ("succeeded", result.cost_nano_usd)
    assert client.submit("draft", CANARY, idempotency_key="k-1", **options).id == handle.id


def test_a_large_request_over_http_too(rig: Rig) -> None:
    """One that is encoded, sealed and opened beside the event loop."""
    server = start_http(rig)
    image = PICTURE * (LARGE_BYTES // len(PICTURE) + 1)
    body = {
        "prompt": f"ECHO: seen by {CANARY}",
        "images": [image],
        "useCase": "draft",
        "metadata": {"lead": CANARY},
    }
    with httpx2.Client(base_url=server.url, headers=server.headers, timeout=60) as client:
        answer = client.post("/api/llm", json=body)
        assert answer.status_code == 200, answer.text
        assert answer.json()["text"] == f"seen by {CANARY}"
        job_id = answer.json()["id"]
        (stored,) = rig.rows(
            "SELECT request::text AS request FROM job_bodies WHERE job_id = %(id)s", id=job_id
        )
        assert stored.request.startswith('{"sealed":')
        assert len(stored.request) > LARGE_BYTES
        rig.redis.delete(*rig.redis.keys(f"{rig.settings.redis_prefix}reply:*"))
        view = client.get(f"/api/llm/jobs/{job_id}").json()  # from Postgres
    assert view["answer"]["text"] == f"seen by {CANARY}"
    assert view["metadata"] == {"lead": CANARY}
    request = orjson.loads(Bodies.of(rig.settings).open_request(stored.request))
    assert [part.get("data") for part in request["messages"][0]["content"]] == [image, None]
    held = dump(rig.settings.database_dsn)
    assert CANARY not in held
    assert PICTURE not in held + dump_redis(rig.redis, rig.settings.redis_prefix)


def test_batches_and_joined_jobs_too(rig: Rig) -> None:
    client = rig.client
    rows = [{"note": f"{CANARY} {n}", "lead": f"{CANARY}-{n}"} for n in range(3)]
    batch = client.submit_batch("summary", rows, template="Summarise: {note}")
    url = rig.settings.database_dsn.replace("+psycopg", "")
    with psycopg.connect(url) as connection:
        own = client.submit("draft", CANARY, connection=connection)
    assert own.result(timeout=60).text
    assert batch.wait(timeout=60).succeeded == 3
    found = list(batch.results())
    assert [one.metadata for one in found] == [{"lead": f"{CANARY}-{n}"} for n in range(3)]
    assert all(one.result is not None and one.result.text for one in found)
    assert CANARY not in dump(rig.settings.database_dsn)


def test_a_shared_channel_carries_what_is_sealed(rig: Rig) -> None:
    handle = rig.client.submit("draft", "hi", reply_to="crm", metadata={"lead": CANARY})
    text = handle.result(timeout=60).text
    channel = rig.settings.redis_prefix + "channel:crm"
    eventually(lambda: rig.redis.xlen(channel))
    held = dump_redis(rig.redis, channel)
    assert CANARY not in held
    assert text not in held
    with (
        Sluice(rig.settings, encrypt_bodies=False, encryption_keys=None) as stranger,
        stranger.replies("crm", "group", consumer="one", timeout=5) as replies,
        pytest.raises(SecretUnreadable),
    ):
        next(replies)
    # It was not lost with that.
    with rig.client.replies("crm", "group", consumer="one", timeout=5) as replies:
        reply = next(replies)
        reply.ack()
    assert (reply.result.text, reply.metadata) == (text, {"lead": CANARY})


def test_an_error_can_be_read_in_lists(rig: Rig) -> None:
    handle = rig.client.submit("draft", CANARY)
    handle.result(timeout=60)
    stored = Bodies.of(rig.settings).seal_result(
        {
            "version": 1,
            "state": "failed",
            "use_case": "draft",
            "error": {"error_class": "server", "message": f"{CANARY} broke it"},
        }
    )
    rig.rows(
        "WITH job AS (UPDATE jobs SET state = 'failed' WHERE id = %(id)s)"
        " UPDATE results SET body = %(body)s::json WHERE job_id = %(id)s RETURNING 1",
        id=handle.id,
        body=orjson.dumps(stored).decode(),
    )
    rig.redis.delete(*rig.redis.keys(f"{rig.settings.redis_prefix}reply:*"))
    with pytest.raises(JobFailed, match=f"{CANARY} broke it"):
        handle.result(timeout=10)
    (listed,) = rig.client.list_jobs(state="failed")
    assert (listed.error_class, listed.error) == ("server", f"{CANARY} broke it")
    with Sluice(rig.settings, encrypt_bodies=False, encryption_keys=None) as stranger:
        (listed,) = stranger.list_jobs(state="failed")
        assert listed.error is not None
        assert listed.error.startswith("(SLUICE_ENCRYPTION_KEYS does not hold")
    rig.rows("UPDATE jobs SET state = 'succeeded' WHERE id = %(id)s RETURNING 1", id=handle.id)


def test_what_was_stored_before_is_answered_and_read(rig: Rig) -> None:
    with Sluice(rig.settings, encrypt_bodies=False) as plain:
        handle = plain.submit("draft", "in the clear", metadata={"lead": "clear"})
        assert handle.result(timeout=60).text
        assert plain.get(handle.id).metadata == {"lead": "clear"}
    rig.redis.delete(*rig.redis.keys(f"{rig.settings.redis_prefix}reply:*"))
    assert rig.client.handle(handle.id).result(timeout=10).text
    held = dump(rig.settings.database_dsn)
    assert "in the clear" in held


def test_without_the_key_nothing_is_lost(rig: Rig, sluice: Callable[..., Any]) -> None:
    lacking = rig.start_worker("openai", ["general"], encryption_keys=NEW)
    handle = rig.client.submit("general", CANARY, deadline=600)
    why = "a worker's SLUICE_ENCRYPTION_KEYS lacks the key of its request"
    eventually(lambda: rig.client.get(handle.id).held_back == why)
    assert rig.client.get(handle.id).state == "parked"
    lacking.end()
    rig.start_worker("openai", ["general"])
    rig.rows("UPDATE jobs SET run_at = now() WHERE id = %(id)s RETURNING 1", id=handle.id)
    assert handle.result(timeout=60).text

    refused = sluice("job", "show", handle.id, encryption_keys=NEW)
    assert (refused.code, refused.out) == (1, "")
    assert refused.err.startswith("sluice: SLUICE_ENCRYPTION_KEYS does not hold the key that this")
    with pytest.raises(SettingsError, match=r"^SLUICE_ENCRYPT_BODIES is set and SLUICE_ENCRYPTION"):
        Sluice(rig.settings, encryption_keys=None).submit("draft", "hi")


def test_a_new_key_comes_and_the_old_one_goes(rig: Rig, sluice: Callable[..., Any]) -> None:
    handle = rig.client.submit("draft", CANARY, metadata={"lead": CANARY})
    text = handle.result(timeout=60).text
    with Sluice(rig.settings, encryption_keys=joined(NEW, OLD)) as both:
        newer = both.submit("vision", CANARY)
    outcome = sluice("secrets", "rotate", encryption_keys=NEW)
    assert outcome.code == 1
    assert "requests and answers are encrypted with; add that key" in outcome.err
    outcome = sluice("secrets", "rotate", encryption_keys=joined(NEW, OLD))
    assert outcome.code == 0
    assert "1 with the newest key already, 0 unreadable" in outcome.out.splitlines()[1]
    again = sluice("secrets", "rotate", encryption_keys=NEW)
    assert again.code == 0
    assert again.out.splitlines()[1].startswith("requests and answers: 0 encrypted anew, ")
    rig.redis.delete(*rig.redis.keys(f"{rig.settings.redis_prefix}reply:*"))
    with Sluice(rig.settings, encryption_keys=NEW) as client:
        assert client.handle(handle.id).result(timeout=10).text == text
        assert client.get(handle.id).metadata == {"lead": CANARY}
        assert client.get(newer.id).metadata == {}
        exported = sluice("account", "export", "default", encryption_keys=NEW)
        lines = {one.get("id"): one for one in map(orjson.loads, exported.out.splitlines())}
        one = lines[str(handle.id)]
        assert one["result"]["text"] == text
        assert one["request"]["metadata"] == {"lead": CANARY}
        assert "sealed" not in exported.out
    # The module's processes have the old key: what waits is put back for them.
    assert sluice("secrets", "rotate", encryption_keys=joined(OLD, NEW)).code == 0


async def test_what_the_journal_keeps_is_sealed(settings: Settings) -> None:
    bodies = Bodies(Keyring([OLD]), seals=True)
    db = Database(settings, application_name="test", size=1, planner=BY_KEY)
    kept: list[Settlement] = []

    async def journal(settlements: Any) -> None:
        kept.extend(settlements)

    settler = Settler(
        db=db,
        max_items=1,
        spacing_s=0,
        journal=journal,
        forget=journal,
        told=untold,
        bodies=bodies,
    )
    settler._is_away = True  # as a statement that met no server leaves it
    body = {"state": "succeeded", "text": CANARY}
    settlement = {"job_id": new_id(), "fence": 1, "job_state": "succeeded", "body": body}
    assert not (await settler.settle(settlement)).moved
    await settler.finish()
    await db.close()
    assert settlement["body"] is body  # what the readers are told
    assert CANARY not in str(kept)
    assert bodies.open_result(kept[0]["body"]) == body
