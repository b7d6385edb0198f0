"""Alerts posted to the URLs of their accounts: signed, tried again, and nobody waits for others."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import redis
from sqlalchemy import Engine

from sluicegate.shared.alerts import Alert, Posting, find_alert
from sluicegate.shared.database import BY_SIZE
from sluicegate.shared.secrets import Keyring, Secret, new_key
from sluicegate.shared.settings import Settings
from sluicegate.shared.statements import Database
from sluicegate.shared.webhooks import Webhook, set_webhook
from sluicegate.workers.sweep.poster import Poster, Terms
from sluicegate.workers.webhook import WebhookClient
from tests.alert_books import Books
from tests.harness import FULL
from tests.https_server import Receiver, status
from tests.polling import eventually_async

SECRET = Secret("what only acme and we know")
KEYRING = Keyring([new_key()])
#: Quick, and not given up while a test runs.
QUICK = Terms(deadline_s=20, retry_s=0.01, give_up_s=3600)


class Desk(Books):
    """Accounts whose alerts are posted to one receiver, each to a path of its own."""

    def __init__(
        self, settings: Settings, engine: Engine, client: redis.Redis, receiver: Receiver
    ) -> None:
        super().__init__(settings, engine, client)
        self.receiver = receiver
        for name in ("acme", "zeta"):
            self.set_url(name, receiver.url(f"/{name}"))

    def set_url(self, account: str, url: str | None) -> None:
        webhook = url and Webhook(url=url, secret_encrypted=KEYRING.encrypt(SECRET))
        with self.engine.connect() as connection:
            set_webhook(connection, self.ids[account], webhook or None)

    def alert(self, alert_id: int | None) -> Alert:
        assert alert_id is not None
        with self.engine.connect() as connection:
            found = find_alert(connection, alert_id)
        assert found is not None
        return found

    def posted(self, account: str) -> list[int]:
        """Ids of what was posted for an account, in order."""
        return [
            int(post.headers["Sluice-Alert-Id"])
            for post in self.receiver.posts
            if post.path == f"/{account}"
        ]

    def due(self) -> None:
        """Let all that waits for another try be due."""
        self.rows("UPDATE alerts SET post_due_at = now() WHERE post_due_at IS NOT NULL")


@pytest.fixture
def desk(settings: Settings, engine: Engine, redis_client: redis.Redis, receiver: Receiver) -> Desk:
    return Desk(settings, engine, redis_client, receiver)


Make = Callable[..., Poster]


@pytest.fixture
async def make(settings: Settings) -> AsyncIterator[Make]:
    """Return a function that makes a poster, as each sweep has one."""
    async with contextlib.AsyncExitStack() as stack:

        def poster(
            terms: Terms = QUICK, *, private_urls: bool = True, keyring: Keyring = KEYRING
        ) -> Poster:
            db = Database(settings, application_name="test", size=4, planner=BY_SIZE)
            client = WebhookClient(deadline_s=terms.deadline_s, private_urls=private_urls, size=4)
            made = Poster(db=db, client=client, keyring=keyring, terms=terms, free=lambda: None)
            stack.push_async_callback(db.close)
            stack.push_async_callback(made.close)
            return made

        yield poster


async def until(desk: Desk, alert_id: int | None, posting: Posting, *posters: Poster) -> Alert:
    """Let posters go round until an alert is there; return it."""

    async def there() -> Alert:
        for poster in posters:
            await poster.round()
        alert = await asyncio.to_thread(desk.alert, alert_id)
        assert alert.posting is posting, alert
        return alert

    return await eventually_async(there)


async def test_what_is_posted(desk: Desk, make: Make) -> None:
    alert_id = desk.add(use_case="draft")
    alert = await until(desk, alert_id, Posting.POSTED, make())
    assert (alert.post_tries, alert.post_error, alert.post_due_at) == (1, None, None)
    (post,) = desk.receiver.posts
    assert post.headers["Content-Type"] == "application/json"
    assert post.headers["Sluice-Alert-Id"] == str(alert_id)
    told = json.loads(post.body)
    assert (told["id"], told["account"], told["use_case"]) == (alert_id, "acme", "draft")
    assert (told["window"], told["threshold_percent"]) == ("day", 80)
    # As a receiver verifies it.
    timestamp = post.headers["Sluice-Timestamp"]
    assert abs(int(timestamp) - time.time()) < 60
    signed = f"{timestamp}.".encode() + post.body
    digest = hmac.new(SECRET.get_secret_value().encode(), signed, hashlib.sha256).hexdigest()
    assert post.headers["Sluice-Signature"] == f"v1={digest}"


async def test_the_channel_and_the_url_are_told_the_same(desk: Desk, make: Make) -> None:
    from sluicegate.workers.sweep.loops import Sweep

    alert_id = desk.add()
    sweep = Sweep(desk.settings)
    await sweep.tell()
    await sweep.close()
    await until(desk, alert_id, Posting.POSTED, make())
    (post,) = desk.receiver.posts
    ((_, told),) = desk.entries()
    assert json.loads(post.body) == told


async def test_a_server_that_breaks_is_asked_again(desk: Desk, make: Make) -> None:
    desk.receiver.answers.extend([status(500), status(302, Location="/"), status(200)])
    alert_id = desk.add()
    alert = await until(desk, alert_id, Posting.POSTED, make())
    assert (alert.post_tries, alert.post_error) == (3, None)
    assert desk.posted("acme") == [alert_id] * 3


async def test_waits_grow_and_end(desk: Desk, make: Make) -> None:
    desk.receiver.by_path["/acme"] = status(503)
    alert_id = desk.add()
    terms = Terms(deadline_s=20, retry_s=30, give_up_s=86_400)
    poster = make(terms)
    waits = []
    for tries in range(1, 12):
        desk.due()

        async def tried(tries: int = tries) -> float:
            await poster.round()
            alert = await asyncio.to_thread(desk.alert, alert_id)
            assert (alert.post_tries, alert.post_error) == (tries, "answered 503")
            found = desk.rows("SELECT extract(epoch FROM post_due_at - now()) AS s FROM alerts")
            # Not the claim of a try that goes on.
            assert not poster._running
            return float(found[0].s)

        waits.append(await eventually_async(tried))
    expected = [min(30 * 2**n, 3600) for n in range(11)]
    for wait_s, expected_s in zip(waits, expected, strict=True):
        assert 0.7 * expected_s <= wait_s <= 1.25 * expected_s
    # A day later the next try would come too late.
    desk.rows("UPDATE alerts SET created_at = created_at - interval '1 day'")
    desk.due()
    alert = await until(desk, alert_id, Posting.GIVEN_UP, poster)
    assert (alert.post_tries, alert.post_error) == (12, "answered 503")
    await poster.round()
    assert len(desk.posted("acme")) == 12


async def test_however_old_an_alert_is_it_is_tried_once(desk: Desk, make: Make) -> None:
    """No sweep ran for two days."""
    first, second = desk.add(threshold=50), desk.add(threshold=60)
    desk.rows("UPDATE alerts SET created_at = created_at - interval '2 days'")
    desk.receiver.answers.append(status(500))
    poster = make()
    await until(desk, first, Posting.GIVEN_UP, poster)
    await until(desk, second, Posting.POSTED, poster)


async def test_two_sweeps_post_each_alert_once(desk: Desk, make: Make) -> None:
    number = 100 if FULL else 15
    alerts = [desk.add(name, threshold=n) for name in ("acme", "zeta") for n in range(number)]
    posters = [make(), make()]

    async def all_posted() -> bool:
        await asyncio.gather(*(poster.round() for poster in posters for _ in range(2)))
        left = await asyncio.to_thread(desk.rows, "SELECT 1 FROM alerts WHERE posted_at IS NULL")
        return not left

    await eventually_async(all_posted)
    assert Counter(desk.posted("acme") + desk.posted("zeta")) == Counter(alerts)


async def test_a_try_that_died_is_repeated_with_the_same_id(desk: Desk, make: Make) -> None:
    desk.receiver.answers.append(desk.receiver.hang)
    alert_id = desk.add()
    dying, other = make(), make()
    await dying.round()

    async def arrived() -> bool:
        return len(desk.receiver.posts) == 1

    await eventually_async(arrived)
    # While it is claimed nobody else has it.
    await other.round()
    await dying.close()
    await other.round()
    assert len(desk.receiver.posts) == 1
    claimed = desk.rows("SELECT post_due_at - now() > interval '30 s' AS is_far FROM alerts")
    assert claimed == [(True,)]
    desk.due()
    await until(desk, alert_id, Posting.POSTED, other)
    assert desk.posted("acme") == [alert_id] * 2
    one, two = desk.receiver.posts
    assert one.body == two.body


async def test_a_try_that_was_overtaken_changes_nothing(desk: Desk, make: Make) -> None:
    alert_id = desk.add()
    desk.receiver.answers.append(desk.receiver.hang)
    slow, quick = make(Terms(deadline_s=1.0, retry_s=0.01, give_up_s=0.001)), make()
    await slow.round()
    desk.due()
    await until(desk, alert_id, Posting.POSTED, quick)

    async def ended() -> bool:
        return not slow._running

    await eventually_async(ended)
    alert = desk.alert(alert_id)
    assert (alert.posting, alert.post_tries, alert.post_error) == (Posting.POSTED, 2, None)


async def test_a_slow_url_holds_up_no_other_account(desk: Desk, make: Make) -> None:
    desk.receiver.by_path["/acme"] = desk.receiver.hang
    slow = [desk.add("acme", threshold=n) for n in (50, 60)]
    quick = [desk.add("zeta", threshold=n) for n in range(5)]
    poster = make()
    for alert_id in quick:
        await until(desk, alert_id, Posting.POSTED, poster)
    # One at a time.
    assert desk.posted("acme") == slow[:1]
    desk.receiver.released.set()
    for alert_id in slow:
        await until(desk, alert_id, Posting.POSTED, poster)
    assert desk.posted("acme") == slow


async def test_private_addresses_are_refused_unless_they_are_allowed(
    desk: Desk, make: Make
) -> None:
    alert_id = desk.add()
    wary = make(private_urls=False)

    async def refused() -> str:
        await wary.round()
        return (await asyncio.to_thread(desk.alert, alert_id)).post_error or ""

    problem = await eventually_async(refused)
    assert problem.startswith("localhost is at ")
    assert problem.endswith("is no public address; SLUICE_ALERT_PRIVATE_URLS=true allows such")
    assert desk.receiver.connections == 0
    await until(desk, alert_id, Posting.POSTED, make())


async def test_a_secret_that_cannot_be_decrypted_waits_for_its_key(desk: Desk, make: Make) -> None:
    alert_id = desk.add()
    for keyring in (Keyring([new_key()]), Keyring(())):
        stranger = make(keyring=keyring)

        async def refused(poster: Poster = stranger) -> str:
            await poster.round()
            return (await asyncio.to_thread(desk.alert, alert_id)).post_error or ""

        assert "SLUICE_ENCRYPTION_KEYS" in await eventually_async(refused)
    assert desk.receiver.connections == 0
    await until(desk, alert_id, Posting.POSTED, make())


async def test_who_has_no_url_is_not_posted_to_and_gets_later_alerts_only(
    desk: Desk, make: Make
) -> None:
    poster = make()
    before = [desk.add("default"), desk.add("acme")]
    desk.set_url("acme", None)
    for alert_id in before:
        await until(desk, alert_id, Posting.NONE, poster)
    desk.set_url("acme", desk.receiver.url("/acme"))
    after = desk.add("acme", threshold=90)
    await until(desk, after, Posting.POSTED, poster)
    assert desk.posted("acme") == [after]
    assert len(desk.receiver.posts) == 1


async def test_a_changed_url_gets_the_next_try(desk: Desk, make: Make) -> None:
    desk.receiver.by_path["/acme"] = status(404)
    alert_id = desk.add()
    poster = make(Terms(deadline_s=20, retry_s=600, give_up_s=86_400))

    async def refused() -> bool:
        await poster.round()
        return (await asyncio.to_thread(desk.alert, alert_id)).post_error == "answered 404"

    await eventually_async(refused)
    desk.set_url("acme", desk.receiver.url("/moved"))
    desk.due()
    await until(desk, alert_id, Posting.POSTED, poster)
    assert [post.path for post in desk.receiver.posts] == ["/acme", "/moved"]


async def test_an_outcome_that_cannot_be_noted_is_no_outcome(
    desk: Desk, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    """The trail of a post that was taken is lost: it is posted again, with its id."""
    alert_id = desk.add()
    poster = make()

    def hide(handler: Any) -> None:
        desk.rows("ALTER TABLE alerts RENAME COLUMN posted_at TO away")
        status(200)(handler)

    desk.receiver.answers.append(hide)
    await poster.round()

    async def ended() -> bool:
        return not poster._running

    await eventually_async(ended)
    assert "met a defect" in caplog.text
    desk.rows("ALTER TABLE alerts RENAME COLUMN away TO posted_at")
    desk.due()
    await until(desk, alert_id, Posting.POSTED, poster)
    assert desk.posted("acme") == [alert_id] * 2
