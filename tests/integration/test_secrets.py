"""Keys in the database: the commands, a rotation beside other changes, and what never shows."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import pty
import subprocess
import sys
import termios
import traceback
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
import redis
from sqlalchemy import Engine

from sluicegate.shared.accounts import add_account
from sluicegate.shared.catalogue import VERSION_KEY, read
from sluicegate.shared.jobs import build_spec
from sluicegate.shared.provider_keys import Rotation, list_keys, rotate, set_key
from sluicegate.shared.secrets import Keyring, Secret, new_key
from sluicegate.shared.settings import Settings
from sluicegate.workers.providers.access import adapter_for
from sluicegate.workers.providers.base import (
    Adapters,
    Call,
    Deadlines,
    ProviderError,
    ProviderKind,
)
from tests.command_line import Command, Outcome
from tests.dumping import dump
from tests.polling import eventually

PLAIN = "sk-recognisable-4711"
OLD, NEW = new_key(), new_key()


@pytest.fixture
def sluice(settings: Settings, command_line: Callable[[Settings], Command]) -> Command:
    """Run a command; the keys of the keyring are OLD unless said."""

    def call(*arguments: str, stdin: str = "", **changes: Any) -> Outcome:
        given = settings.model_copy(update={"encryption_keys": OLD} | changes)
        return command_line(given)(*arguments, stdin=stdin)

    return call


def joined(*keys: Secret) -> Secret:
    return Secret(",".join(key.get_secret_value() for key in keys))


def add_row(engine: Engine, name: str, token: str | None) -> None:
    with engine.connect() as connection:
        connection.exec_driver_sql(
            "INSERT INTO llm_providers (id, name, provider, model, base_url, api_key_encrypted,"
            " max_tokens, context_tokens, is_active) VALUES (gen_random_uuid(), %(name)s,"
            " 'openai', 'llama', 'https://llm.example.com/v1', %(token)s, 100, 1000, false)",
            {"name": name, "token": token},
        )


def stored(engine: Engine) -> dict[str, str]:
    """Return what the database holds, by the name of its owner."""
    with engine.connect() as connection:
        return {str(key): key.token for key in list_keys(connection)}


def opened(engine: Engine, *keys: Secret) -> dict[str, str]:
    keyring = Keyring(keys)
    return {
        owner: keyring.decrypt(token).get_secret_value() for owner, token in stored(engine).items()
    }


# Commands


def test_a_new_key_goes_to_stdout_and_the_advice_does_not(sluice: Command) -> None:
    outcome = sluice("secrets", "new-key", encryption_keys=None)
    assert outcome.code == 0
    key = Secret(outcome.out.strip())
    assert Keyring([key]).decrypt(Keyring([key]).encrypt(PLAIN)) == Secret(PLAIN)
    assert "SLUICE_ENCRYPTION_KEYS=" in outcome.err
    assert key.get_secret_value() not in outcome.err


def test_set_replaces_and_remove_removes(
    sluice: Command, engine: Engine, settings: Settings, redis_client: redis.Redis
) -> None:
    with engine.connect() as connection:
        add_account(connection, "acme")
    token: list[Any] = []

    def announced() -> bool:
        token.append(redis_client.get(settings.redis_prefix + VERSION_KEY))
        return token[-1] is not None and token[-1] not in token[:-1]

    everybody = ("secrets", "set", "openai")
    for arguments, key in (
        (everybody, "first"),
        (everybody, PLAIN),
        ((*everybody, "--account", "acme"), "of acme"),
        (("secrets", "set", "anthropic"), "claude"),
    ):
        outcome = sluice(*arguments, stdin=f" {key}\n")
        assert (outcome.code, outcome.out) == (0, ""), outcome
        assert key not in outcome.err
        assert announced()
    assert opened(engine, OLD) == {
        "openai": PLAIN,
        "openai of account acme": "of acme",
        "anthropic": "claude",
    }
    assert sluice("secrets", "remove", "openai", "--account", "acme").code == 0
    assert announced()
    assert sluice("secrets", "remove", "openai").code == 0
    assert opened(engine, OLD) == {"anthropic": "claude"}
    outcome = sluice("secrets", "remove", "openai")
    assert outcome.code == 1
    assert outcome.err == (
        "sluice: there is no openai key for every account; `sluice secrets list` shows those "
        "that are\n"
    )


def add_worker(engine: Engine, name: str, pool: str, *keys: Secret) -> None:
    with engine.connect() as connection:
        connection.exec_driver_sql(
            "INSERT INTO workers (id, name, pool, lane, queues, keyring)"
            " VALUES (gen_random_uuid(), %(name)s, %(pool)s, 'bulk', '{}', %(keyring)s)",
            {"name": name, "pool": pool, "keyring": list(Keyring(keys).fingerprints)},
        )


def test_set_and_rotate_name_the_workers_that_cannot_decrypt(
    sluice: Command, engine: Engine
) -> None:
    first, *_ = sluice("secrets", "set", "openai", stdin=PLAIN).err.splitlines()
    assert first == (
        "sluice: the openai key is stored for every account; "
        "workers that have this SLUICE_ENCRYPTION_KEYS use it from now on"
    )
    add_worker(engine, "has both", "openai", NEW, OLD)
    add_worker(engine, "has none", "anthropic")
    outcome = sluice("secrets", "set", "openai", stdin=PLAIN)
    assert outcome.err == (
        "sluice: the openai key is stored for every account; workers use it from now on\n"
    )
    add_worker(engine, "has old", "openai", OLD)
    changes = {"encryption_keys": joined(NEW, OLD)}
    first, second = sluice("secrets", "set", "openai", stdin=PLAIN, **changes).err.splitlines()
    assert "workers that have this SLUICE_ENCRYPTION_KEYS use it" in first
    assert second == (
        "sluice: has old cannot decrypt what the newest key encrypts, so jobs that need it fail "
        "there: give these workers this SLUICE_ENCRYPTION_KEYS, and restart them"
    )
    rotated = sluice("secrets", "rotate", **changes)
    assert rotated.code == 0
    assert rotated.err.startswith("sluice: has none, has old cannot decrypt")
    with engine.connect() as connection:
        connection.exec_driver_sql(
            "UPDATE workers SET draining = name = 'has none', seen_at = CASE name"
            " WHEN 'has old' THEN now() - interval '1 min' ELSE now() END"
        )
    assert sluice("secrets", "rotate", **changes).err == ""


def test_the_environment_is_said_to_come_first(sluice: Command) -> None:
    outcome = sluice("secrets", "set", "openai", stdin=PLAIN, openai_api_key=Secret("other"))
    assert "OPENAI_API_KEY is set here" in outcome.err
    assert "other" not in outcome.err.replace("every", "")


def test_the_catalogue_has_what_was_set(sluice: Command, engine: Engine) -> None:
    with engine.connect() as connection:
        acme = add_account(connection, "acme")
    add_row(engine, "ours", "ROW")
    sluice("secrets", "set", "openai", "--account", "acme", stdin=PLAIN)
    with engine.connect() as connection:
        connection.exec_driver_sql("UPDATE llm_providers SET is_active = true")
        catalogue = read(connection)
    assert list(catalogue.keys) == [("openai", acme.id)]
    tokens = {one.name: one.api_key_encrypted for one in catalogue.providers}
    assert tokens.pop("ours") == "ROW"
    assert set(tokens.values()) == {None}


def test_a_worker_says_whose_key_it_cannot_decrypt(
    sluice: Command, engine: Engine, settings: Settings
) -> None:
    with engine.connect() as connection:
        acme = add_account(connection, "acme")
        other = add_account(connection, "other")
    sluice("secrets", "set", "openai", "--account", "acme", stdin=PLAIN)
    sluice("secrets", "set", "openai", stdin=PLAIN)
    add_row(engine, "ours", Keyring([OLD]).encrypt(PLAIN))
    with engine.connect() as connection:
        connection.exec_driver_sql("UPDATE llm_providers SET is_active = true")
        catalogue = read(connection)
    rows = {row.name: row for row in catalogue.providers}
    luna, ours = rows["openai-gpt-6-luna"], rows["ours"]
    own = replace(ours, account_id=acme.id)

    for provider, account_id, says in (
        (luna, acme.id, "acme's openai key"),
        (luna, other.id, "the openai key for every account"),
        (ours, acme.id, "the key of provider ours"),
        (own, acme.id, "the account's own key of provider ours"),
    ):
        with pytest.raises(ProviderError) as caught:
            adapter_for(
                provider,
                account_id,
                adapters=Adapters(max_connections=1),
                settings=settings,
                keyring=Keyring([NEW]),
                catalogue=catalogue,
            )
        assert str(caught.value).startswith(f"The worker cannot decrypt {says}: put what it was")
        assert "run `sluice job retry`" in str(caught.value)
        assert not caught.value.sent


@pytest.mark.parametrize(
    "case",
    [
        (("set", "openai"), PLAIN, {"encryption_keys": None}, 2, "run `sluice secrets new-key`"),
        (("rotate",), "", {"encryption_keys": None}, 2, "run `sluice secrets new-key`"),
        (("list",), "", {"encryption_keys": Secret("x")}, 2, "key 1 of 1 is not a Fernet key"),
        (("set", "openai"), "", {}, 2, "no key was given"),
        (("set", "openai"), " \n", {}, 2, "no key was given"),
        (("set", "openai"), f"{PLAIN}\nmore", {}, 2, "must be one line"),
        (("set", "openai"), "schlüssel", {}, 2, "must be one line"),
        (("set", "openai"), "k" * 5000, {}, 2, "must be one line"),
        (("set", "mistral"), PLAIN, {}, 2, "'openai', 'anthropic'"),
        (
            ("set", "openai", "--account", "nobody"),
            PLAIN,
            {},
            2,
            "account: there is no account 'nobody'",
        ),
        (
            ("remove", "openai", "--account", "nobody"),
            "",
            {},
            2,
            "account: there is no account 'nobody'",
        ),
    ],
)
def test_refusals_are_one_line(
    sluice: Command, engine: Engine, case: tuple[tuple[str, ...], str, dict[str, Any], int, str]
) -> None:
    arguments, stdin, changes, code, says = case
    outcome = sluice("secrets", *arguments, stdin=stdin, **changes)
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (code, "", 1), outcome
    assert says in outcome.err
    assert PLAIN not in outcome.err
    assert stored(engine) == {}


def test_at_a_terminal_the_key_is_typed_unseen(
    settings: Settings, engine: Engine, environment: Callable[[Settings], dict[str, str]]
) -> None:
    variables = environment(settings.model_copy(update={"encryption_keys": OLD}))
    here, there = pty.openpty()
    command = [sys.executable, "-m", "sluicegate.cli", "secrets", "set", "openai"]
    process = subprocess.Popen(
        command, stdin=there, stdout=there, stderr=there, env=variables, start_new_session=True
    )
    try:
        eventually(lambda: not termios.tcgetattr(here)[3] & termios.ECHO)
        os.write(here, f"{PLAIN}\n".encode())
        assert process.wait(30) == 0
        seen = os.read(here, 10_000)
    finally:
        process.kill()
        process.wait(10)
        os.close(there)
    os.close(here)
    assert b"Key of openai" in seen
    assert b"is stored for every account" in seen
    assert PLAIN.encode() not in seen
    assert opened(engine, OLD) == {"openai": PLAIN}


def test_list_shows_where_keys_are_and_none_of_them(sluice: Command, engine: Engine) -> None:
    with engine.connect() as connection:
        acme = add_account(connection, "acme")
        set_key(connection, "openai", None, Keyring([OLD]).encrypt(PLAIN))
        set_key(connection, "openai", acme.id, Keyring([NEW]).encrypt(PLAIN))
        set_key(connection, "anthropic", None, Keyring([new_key()]).encrypt(PLAIN))
    add_row(engine, "ours", Keyring([OLD]).encrypt(PLAIN))
    changes = {"encryption_keys": joined(NEW, OLD), "openai_api_key": Secret(PLAIN)}
    outcome = sluice("secrets", "list", **changes)
    assert (outcome.code, outcome.err) == (0, "")
    lines = [line.split("\t")[:5] for line in outcome.out.splitlines()]
    assert lines == [
        ["pool", "provider", "account", "kept in", "encrypted with"],
        ["openai", "", "", "OPENAI_API_KEY", ""],
        ["anthropic", "", "", "the database", "a key that is not here"],
        ["openai", "ours", "", "the database", "an older key"],
        ["openai", "", "acme", "the database", "the newest key"],
        ["openai", "", "", "the database", "an older key"],
    ]
    as_json = sluice("secrets", "list", "--json", **changes)
    found = [
        (one["pool"], one["kept_in"], one.get("provider"), one.get("account"), one.get("state"))
        for one in json.loads(as_json.out)["keys"]
    ]
    assert found == [
        ("openai", "environment", None, None, None),
        ("anthropic", "database", None, None, "unreadable"),
        ("openai", "database", "ours", None, "older"),
        ("openai", "database", None, "acme", "current"),
        ("openai", "database", None, None, "older"),
    ]
    for shown in (outcome.out, as_json.out):
        assert "4711" not in shown
        assert "gAAAA" not in shown


# Rotation


def test_rotate_moves_everything_to_the_newest_key(
    sluice: Command, engine: Engine, settings: Settings, redis_client: redis.Redis
) -> None:
    keyring = Keyring([OLD])
    with engine.connect() as connection:
        for number in range(620):  # more than a batch
            account = add_account(connection, f"account-{number:03}")
            set_key(connection, "openai", account.id, keyring.encrypt(f"key {number}"))
        set_key(connection, "anthropic", None, Keyring([NEW]).encrypt("new already"))
    add_row(engine, "ours", keyring.encrypt("of ours"))
    add_row(engine, "keyless", None)
    before = opened(engine, OLD, NEW)
    changes = {"encryption_keys": joined(NEW, OLD)}
    outcome = sluice("secrets", "rotate", **changes)
    assert outcome.code == 0, outcome.err
    assert outcome.out == "621 encrypted anew, 1 with the newest key already, 0 unreadable\n"
    assert redis_client.get(settings.redis_prefix + VERSION_KEY) is not None
    assert opened(engine, NEW) == before
    renewed = stored(engine)
    outcome = sluice("secrets", "rotate", **changes)
    assert outcome.out == "0 encrypted anew, 622 with the newest key already, 0 unreadable\n"
    assert stored(engine) == renewed


def test_rotate_names_what_it_cannot_read_and_does_the_rest(
    sluice: Command, engine: Engine
) -> None:
    with engine.connect() as connection:
        acme = add_account(connection, "acme")
        set_key(connection, "openai", acme.id, Keyring([new_key()]).encrypt(PLAIN))
        set_key(connection, "openai", None, Keyring([OLD]).encrypt(PLAIN))
    add_row(engine, "ours", "no token at all")
    before = stored(engine)
    outcome = sluice("secrets", "rotate", encryption_keys=joined(NEW, OLD))
    assert outcome.code == 1
    assert outcome.out == "1 encrypted anew, 0 with the newest key already, 2 unreadable\n"
    assert outcome.err == (
        "sluice: SLUICE_ENCRYPTION_KEYS does not hold what these are encrypted with, so set them "
        "anew or add it: provider ours, openai of account acme\n"
    )
    after = stored(engine)
    assert Keyring([NEW]).decrypt(after.pop("openai")) == Secret(PLAIN)
    before.pop("openai")
    assert after == before


def test_rotate_says_how_long_the_old_key_is_needed_when_redis_is_away(sluice: Command) -> None:
    outcome = sluice("secrets", "rotate", redis_url=Secret("redis://127.0.0.1:1/0"))
    assert outcome.code == 0
    assert "within 30 s (SLUICE_CATALOGUE_TTL_S), so keep the old key as long" in outcome.err


class _Interrupted(Keyring):
    """Lets somebody else change the database between reading and writing."""

    def __init__(self, *keys: Secret, change: Callable[[], None], times: int = 1) -> None:
        super().__init__(keys)
        self._change = change
        self._times = times

    def rotate(self, token: str) -> str:
        renewed = super().rotate(token)
        if self._times:
            self._times -= 1
            self._change()
        return renewed


def rotated(engine: Engine, keyring: Keyring) -> Rotation:
    with engine.connect() as connection:
        return rotate(connection, keyring, progress=lambda _: None)


@pytest.mark.parametrize(
    ("with_key", "expected"),
    [(NEW, Rotation(current=1)), (OLD, Rotation(renewed=1)), (new_key(), Rotation(unreadable=1))],
)
def test_a_key_that_is_set_meanwhile_is_not_overwritten(
    engine: Engine, with_key: Secret, expected: Rotation
) -> None:
    fresh = Keyring([with_key]).encrypt("set meanwhile")

    def change() -> None:
        with engine.connect() as connection:
            set_key(connection, "openai", None, fresh)

    with engine.connect() as connection:
        set_key(connection, "openai", None, Keyring([OLD]).encrypt("before"))
    assert rotated(engine, _Interrupted(NEW, OLD, change=change)) == expected
    assert opened(engine, NEW, with_key) == {"openai": "set meanwhile"}


def test_a_key_that_is_removed_meanwhile_stays_away(engine: Engine) -> None:
    def change() -> None:
        with engine.connect() as connection:
            connection.exec_driver_sql("UPDATE llm_providers SET api_key_encrypted = NULL")

    add_row(engine, "ours", Keyring([OLD]).encrypt("before"))
    assert rotated(engine, _Interrupted(NEW, OLD, change=change)) == Rotation()
    assert stored(engine) == {}


def test_two_rotations_at_once_do_it_once(engine: Engine) -> None:
    inner: list[Rotation] = []

    def change() -> None:
        inner.append(rotated(engine, Keyring([NEW, OLD])))

    with engine.connect() as connection:
        set_key(connection, "openai", None, Keyring([OLD]).encrypt(PLAIN))
        set_key(connection, "anthropic", None, Keyring([OLD]).encrypt(PLAIN))
    assert rotated(engine, _Interrupted(NEW, OLD, change=change)) == Rotation(current=2)
    assert inner == [Rotation(renewed=2)]


# What never shows


def test_a_dump_shows_no_key(sluice: Command, engine: Engine, settings: Settings) -> None:
    with engine.connect() as connection:
        add_account(connection, "acme")
    for arguments in (("openai",), ("anthropic",), ("openai", "--account", "acme")):
        assert sluice("secrets", "set", *arguments, stdin=PLAIN).code == 0
    add_row(engine, "ours", Keyring([OLD]).encrypt(PLAIN))
    assert sluice("secrets", "rotate", encryption_keys=joined(NEW, OLD)).code == 0
    text = dump(settings.database_dsn)
    for name, count in (("provider_keys", 3), ("llm_providers", 1)):
        table = text.partition(f"{name}\n")[2].partition("sluicegate.")[0]
        assert table.count("gAAAA") == count, name
    for secret in (PLAIN, *(key.get_secret_value() for key in (OLD, NEW))):
        assert secret not in text


@asynccontextmanager
async def refusing_server(answer: bytes) -> AsyncIterator[tuple[str, list[bytes]]]:
    """Answer every request with these bytes, KEY in them being its own key."""
    heads: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        heads.append(head)
        body = answer.replace(b"KEY", PLAIN.encode())
        writer.write(b"HTTP/1.1 %b" % body)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", heads


def refusal(status: bytes, body: bytes) -> bytes:
    return b"%b\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (
        status,
        len(body.replace(b"KEY", PLAIN.encode())),
        body,
    )


@pytest.mark.parametrize("kind", ["openai", "anthropic"])
@pytest.mark.parametrize(
    "answer",
    [
        refusal(b"401 Unauthorized", b'{"error": {"message": "Incorrect API key: KEY"}}'),
        refusal(b"500 Oops", b"Traceback: KEY"),
        refusal(b"200 OK", b'{"error": {"message": "bad KEY"}}'),
        refusal(b"302 Found\r\nlocation: /elsewhere", b"KEY"),
        b"",
    ],
    ids=["401", "500", "error in a 200", "redirect", "nothing"],
)
async def test_a_failing_call_shows_no_key(
    kind: ProviderKind,
    answer: bytes,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    for name in ("", "openai", "anthropic", "httpx2", "httpcore2", "aiohttp", "asyncio"):
        caplog.set_level(logging.DEBUG, logger=name)
    call = Call(
        spec=build_spec("draft", "Hello"),
        model="a-model",
        max_tokens=5,
        stream=False,
        deadlines=Deadlines(connect_s=5, first_token_s=5, response_s=5, idle_s=5, total_s=10),
    )
    adapters = Adapters(max_connections=2)
    async with refusing_server(answer) as (url, heads):
        adapter = adapters.get(kind, url, Secret(PLAIN))
        with pytest.raises(ProviderError) as caught:
            await adapter.call(call)
        held = [*map(repr, (*vars(adapters).values(), *vars(adapter).values()))]
        await adapters.close()
    assert any(f"{kind!r}, {url!r}, ***" in text for text in held)
    assert len(heads) == 1
    assert PLAIN.encode() in heads[0]  # it was there to be leaked
    error = caught.value
    assert error.__traceback__ is not None
    error.__traceback__ = error.__traceback__.tb_next  # this test itself knows the key
    shown = [
        str(error),
        repr(error),
        repr(vars(error)),
        *traceback.TracebackException.from_exception(error, capture_locals=True).format(),
        *held,
        caplog.text,
        *map(repr, (vars(record) for record in caplog.records)),
        *capfd.readouterr(),
    ]
    for text in shown:
        assert "recognisable" not in text
