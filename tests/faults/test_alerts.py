"""Sweeps that die between telling an alert and noting that they did."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from sqlalchemy import Engine

from sluicegate.shared.secrets import Keyring, Secret, new_key
from sluicegate.shared.settings import Settings
from sluicegate.shared.webhooks import Webhook, set_webhook
from tests.alert_books import Books
from tests.harness import Service, environment_of
from tests.https_server import Certificate, Receiver, receiving
from tests.polling import eventually


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(
        update={
            "encryption_keys": new_key(),
            "alert_private_urls": True,
            "sweep_interval_s": 0.2,
        }
    )


@pytest.fixture
def books(settings: Settings, engine: Engine, redis_client: redis.Redis) -> Books:
    return Books(settings, engine, redis_client)


@pytest.fixture
def receiver(certificate: Certificate) -> Iterator[Receiver]:
    with receiving(certificate) as running:
        yield running


Start = Callable[..., Service]


@pytest.fixture
def start(settings: Settings, certificate: Certificate, tmp_path: Path) -> Iterator[Start]:
    """Return a function that starts a sweep, with these failpoints."""
    started: list[Service] = []

    def sweep(failpoints: str = "") -> Service:
        env = environment_of(
            settings, SLUICE_FAILPOINTS=failpoints, SSL_CERT_FILE=str(certificate.authority)
        )
        argv = [sys.executable, "-m", "sluicegate.cli", "sweep"]
        log = tmp_path / f"sweep{len(started)}.log"
        started.append(Service("sweep", argv, env, log))
        return started[-1]

    yield sweep
    for service in started:
        service.end()


def _row(books: Books) -> Any:
    (row,) = books.rows("SELECT * FROM alerts")
    return row


def test_killed_between_the_channel_and_the_commit(books: Books, start: Start) -> None:
    dying = start("told=kill")
    alert_id = books.add()
    assert dying.wait(60) == -signal.SIGKILL
    assert books.told() == [alert_id]
    assert _row(books).told_at is None
    # Two take over at once.
    start(), start()
    eventually(lambda: _row(books).told_at is not None, 60)
    assert books.told() == [alert_id]
    later = books.add(threshold=100)
    eventually(lambda: books.told() == [alert_id, later])


def test_killed_between_the_post_and_the_commit(
    books: Books, start: Start, settings: Settings, receiver: Receiver
) -> None:
    token = Keyring.of(settings).encrypt(Secret("what only acme and we know"))
    with books.engine.connect() as connection:
        set_webhook(
            connection,
            books.ids["acme"],
            Webhook(url=receiver.url(), secret_encrypted=token),
        )
    dying = start("posted=kill")
    alert_id = books.add()
    assert dying.wait(60) == -signal.SIGKILL
    assert len(receiver.posts) == 1
    assert _row(books).posted_at is None
    # Nobody waits half a minute here until the claim has ended.
    books.rows("UPDATE alerts SET post_due_at = now()")
    start(), start()
    eventually(lambda: _row(books).posted_at is not None, 60)
    assert [post.headers["Sluice-Alert-Id"] for post in receiver.posts] == [str(alert_id)] * 2
    assert books.told() == [alert_id]
    assert _row(books).post_tries == 2


def test_a_sweep_that_stood_still_tells_nothing_twice(books: Books, start: Start) -> None:
    stopped = start("told=stop")
    alert_id = books.add()
    eventually(lambda: books.told() == [alert_id], 60)
    start()
    eventually(lambda: _row(books).told_at is not None, 60)
    told_at = _row(books).told_at
    second = books.add(threshold=100)
    eventually(lambda: books.told() == [alert_id, second])
    stopped.signal(signal.SIGCONT)
    third = books.add("zeta")
    eventually(lambda: books.told("zeta") == [third])
    stopped.signal(signal.SIGTERM)
    assert stopped.wait(30) == 0, stopped.log
    assert books.told() == [alert_id, second]
    (row,) = books.rows(
        "SELECT told_at FROM alerts WHERE threshold = 80 AND account_id = %(id)s",
        id=books.ids["acme"],
    )
    assert row.told_at == told_at
