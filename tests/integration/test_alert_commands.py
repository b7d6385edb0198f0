"""`sluice alerts`, and the alert URL of `sluice account set`: what a terminal shows."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable

import pytest
import redis
from pydantic import SecretStr
from sqlalchemy import Engine

from sluicegate.shared.secrets import Keyring, Secret, new_key
from sluicegate.shared.settings import Settings
from sluicegate.workers.sweep.loops import Sweep
from tests.alert_books import Books
from tests.command_line import Command, Outcome
from tests.https_server import make_certificate, receiving

URL = "https://hooks.acme.example/alerts"


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"encryption_keys": new_key()})


@pytest.fixture
def books(settings: Settings, engine: Engine, redis_client: redis.Redis) -> Books:
    return Books(settings, engine, redis_client)


@pytest.fixture
def sluice(settings: Settings, command_line: Callable[[Settings], Command]) -> Command:
    return command_line(settings)


def stored(books: Books) -> tuple[str | None, Secret | None]:
    """What the database has of acme: the URL and the secret in the clear."""
    (row,) = books.rows(
        "SELECT alert_url, alert_secret_encrypted AS token FROM accounts WHERE name = 'acme'"
    )
    keyring = Keyring.of(books.settings)
    return row.alert_url, row.token and keyring.decrypt(row.token)


# The URL


def test_a_url_is_set_and_its_secret_shown_once(books: Books, sluice: Command) -> None:
    outcome = sluice("account", "set", "acme", "--alert-url", URL)
    assert outcome.code == 0, outcome
    account, secret = outcome.out.splitlines()
    assert account.startswith("acme\t")
    shown = secret.removeprefix("alert secret\t")
    url, kept = stored(books)
    assert (url, kept and kept.get_secret_value()) == (URL, shown)
    assert "not shown again" in outcome.err
    (row,) = books.rows("SELECT alert_secret_encrypted FROM accounts WHERE name = 'acme'")
    assert shown not in row.alert_secret_encrypted

    found = sluice("account", "show", "acme")
    assert URL in found.out
    assert shown not in found.out
    assert sluice("account", "show", "acme", "--json").json["alert_url"] == URL
    assert sluice("account", "show", "zeta", "--json").json["alert_url"] is None

    # A new URL is somebody else's, perhaps.
    other = sluice("account", "set", "acme", "--alert-url", URL + "2", "--json").json
    assert other["alert_secret"] != shown
    url, kept = stored(books)
    assert (url, kept and kept.get_secret_value()) == (URL + "2", other["alert_secret"])


def test_a_secret_of_ones_own(books: Books, sluice: Command) -> None:
    given = "0123456789 abcdef"
    outcome = sluice(
        *("account", "set", "acme", "--alert-url", URL, "--alert-secret-stdin"), stdin=f"{given}\n"
    )
    assert outcome.code == 0
    assert given not in outcome.out + outcome.err
    assert stored(books) == (URL, Secret(given))
    # Another one for the same URL.
    outcome = sluice("account", "set", "acme", "--alert-secret-stdin", stdin=given[::-1])
    assert outcome.code == 0
    assert stored(books) == (URL, Secret(given[::-1]))


def test_the_url_is_taken_away(books: Books, sluice: Command) -> None:
    sluice("account", "set", "acme", "--alert-url", URL)
    outcome = sluice("account", "set", "acme", "--clear", "alert-url")
    assert (outcome.code, stored(books)) == (0, (None, None))


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("--alert-url", "http://hooks.acme.example/"), "must begin with https://"),
        (("--alert-url", "https://169.254.169.254/"), "no public address"),
        (("--alert-url", URL, "--clear", "alert-url"), "either set or taken away"),
        (("--clear", "name"), "there is alert-url"),
        (("--alert-secret-stdin",), "must be one line of 16 to 256"),
        ((), "nothing to change"),
    ],
)
def test_what_cannot_be_set(
    books: Books, sluice: Command, options: tuple[str, ...], problem: str
) -> None:
    outcome = sluice("account", "set", "acme", *options, stdin="short")
    assert outcome.code == 2
    assert problem in outcome.err
    assert outcome.err.count("\n") == 1
    assert stored(books) == (None, None)


def test_a_secret_needs_a_url(books: Books, sluice: Command) -> None:
    outcome = sluice("account", "set", "acme", "--alert-secret-stdin", stdin="x" * 20)
    assert (outcome.code, stored(books)) == (2, (None, None))
    assert "acme has no alert URL" in outcome.err


def test_nothing_is_kept_in_the_clear(
    books: Books, settings: Settings, command_line: Callable[[Settings], Command]
) -> None:
    keyless = command_line(settings.model_copy(update={"encryption_keys": None}))
    outcome = keyless("account", "set", "acme", "--alert-url", URL)
    assert outcome.code == 2
    assert "never stored in the clear" in outcome.err
    assert stored(books) == (None, None)


def test_all_or_nothing_is_changed(books: Books, sluice: Command) -> None:
    outcome = sluice("account", "set", "acme", "--alert-url", URL, "--time-zone", "Mars/Olympus")
    assert (outcome.code, stored(books)) == (2, (None, None))


def test_secrets_rotate_with_the_keys(
    books: Books, settings: Settings, command_line: Callable[[Settings], Command]
) -> None:
    sluice = command_line(settings)
    sluice("account", "set", "acme", "--alert-url", URL)
    _, before = stored(books)
    assert settings.encryption_keys is not None
    old, new = settings.encryption_keys.get_secret_value(), new_key().get_secret_value()
    both = command_line(settings.model_copy(update={"encryption_keys": SecretStr(f"{new},{old}")}))
    assert "1 encrypted anew" in both("secrets", "rotate").out
    alone = settings.model_copy(update={"encryption_keys": SecretStr(new)})
    (row,) = books.rows("SELECT alert_secret_encrypted AS token FROM accounts WHERE name = 'acme'")
    assert Keyring.of(alone).decrypt(row.token) == before
    # Somebody who has neither key hears whose secret it is.
    stranger = command_line(settings.model_copy(update={"encryption_keys": new_key()}))
    outcome = stranger("secrets", "rotate")
    assert outcome.code == 1
    assert "the alert secret of account acme" in outcome.err
    assert "alerts of account acme cannot be decrypted" in stranger("doctor").out


# Reading and acknowledging


def test_alerts_are_listed_and_acknowledged(books: Books, sluice: Command) -> None:
    (day,) = books.rows(
        "SELECT date_trunc('day', now(), 'America/New_York') AS acme,"
        " date_trunc('day', now(), 'Asia/Kolkata') AS zeta"
    )
    first, second = (books.add(started_at=day.acme, threshold=n) for n in (80, 100))
    third = books.add("zeta", started_at=day.zeta)
    over = books.add("zeta", started_at="2026-01-01T00:00:00Z")
    found = sluice("alerts", "list", "--json").json["alerts"]
    assert [alert["id"] for alert in found] == [third, second, first]
    assert {alert["posting"] for alert in found} == {"waiting"}
    assert (found[0]["account"], found[0]["threshold_percent"]) == ("zeta", 80)
    lines = sluice("alerts", "list", "--all", "--account", "zeta").out.splitlines()
    assert [line.split("\t")[0] for line in lines] == ["id", str(over), str(third)]
    assert "zeta has spent 80%\tover\tnot yet\tnot yet" in lines[1]
    assert "\topen\t" in lines[2]

    assert sluice("alerts", "ack", first, third).out == "2 acknowledged\n"
    assert sluice("alerts", "ack", first, "--json").json == {"acknowledged": []}
    found = sluice("alerts", "list", "--json").json["alerts"]
    assert [alert["id"] for alert in found] == [second]
    assert sluice("alerts", "ack", "--all", "--account", "zeta").out == "1 acknowledged\n"
    assert sluice("alerts", "ack", "--all", "--json").json == {"acknowledged": [second]}
    assert sluice("alerts", "list", "--json").json == {"alerts": []}


@pytest.mark.parametrize(
    ("words", "code", "problem"),
    [
        (("ack",), 2, "name the ids of alerts, or --all"),
        (("ack", "1", "--all"), 2, "name the ids of alerts, or --all"),
        (("ack", "4711"), 1, "there is no alert 4711"),
        (("ack", "x"), 2, "should be a valid integer"),
        (("list", "--account", "nobody"), 1, "there is no account 'nobody'"),
        (("test", "--account", "nobody"), 1, "there is no account 'nobody'"),
    ],
)
def test_slips(
    books: Books, sluice: Command, words: tuple[str, ...], code: int, problem: str
) -> None:
    outcome = sluice("alerts", *words)
    assert (outcome.code, problem in outcome.err) == (code, True), outcome


def test_the_doctor_names_a_url_that_does_not_take_alerts(books: Books, sluice: Command) -> None:
    books.add()
    assert "alert URL" not in sluice("doctor").out
    sluice("account", "set", "acme", "--alert-url", URL)
    books.rows("UPDATE alerts SET post_error = 'answered 500'")
    said = " ".join(sluice("doctor").out.split())
    assert "the alert URL of account acme did not take an alert: answered 500" in said
    sluice("alerts", "ack", "--all")
    assert "alert URL" not in sluice("doctor").out


# Trying it out


@pytest.fixture
async def sweep(settings: Settings) -> AsyncIterator[Settings]:
    """Run a sweep that may post to this machine; return its settings."""
    given = settings.model_copy(update={"alert_private_urls": True, "sweep_interval_s": 0.2})
    running = asyncio.create_task(Sweep(given).run())
    yield given
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_a_test_alert_goes_both_ways(
    books: Books,
    sweep: Settings,
    command_line: Callable[[Settings], Command],
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sluice = command_line(sweep)

    async def run(*words: object) -> Outcome:
        return await asyncio.to_thread(sluice, *words)

    outcome = await run("alerts", "test", "--account", "acme")
    assert outcome.code == 0, outcome
    assert f"told on\t{books.key()}" in outcome.out
    assert "posted\tthe account has no alert URL" in outcome.out

    certificate = make_certificate(tmp_path_factory.mktemp("certificate"))
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate.authority))
    with receiving(certificate) as receiver:
        assert (await run("account", "set", "acme", "--alert-url", receiver.url())).code == 0
        tested = (await run("alerts", "test", "--account", "acme", "--json")).json
        assert (tested["posting"], tested["channel"]) == ("posted", books.key())
        (post,) = receiver.posts
        assert json.loads(post.body)["message"] == "this is a test of the alerts of account acme"
    # Nobody listens there any more.
    outcome = await run("alerts", "test", "--account", "acme")
    assert outcome.code == 1
    assert "posted\tnot yet: no answer: " in outcome.out
    assert len(books.told()) == 3
    # It is no news.
    assert (await run("alerts", "list", "--json")).json == {"alerts": []}


def test_a_test_alert_without_a_sweep(books: Books, sluice: Command) -> None:
    outcome = sluice("alerts", "test", "--account", "acme", "--wait", "0")
    assert outcome.code == 1
    assert "told on\tnot yet" in outcome.out
    assert "is a sweep running?" in outcome.err
