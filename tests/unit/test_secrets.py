"""Secrets: never shown, encrypted with the newest key, and the right one for each call."""

from __future__ import annotations

import copy
import json
import logging
import pickle
from typing import Any
from uuid import UUID

import orjson
import pytest
from cryptography.fernet import Fernet
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, SecretStr, ValidationError

from sluicegate.shared.catalogue import Catalogue, PoolName, Provider
from sluicegate.shared.errors import SettingsError
from sluicegate.shared.provider_keys import (
    KeySource,
    KeyState,
    ProviderKey,
    choose_key,
    environment_key,
    state_of,
)
from sluicegate.shared.secrets import Keyring, Secret, SecretUnreadable, new_key
from sluicegate.shared.settings import Settings

PLAIN = "sk-recognisable-4711"
MINE, THEIRS = UUID(int=1001), UUID(int=1002)


class Held(BaseModel):
    key: Secret
    anything: Any = None


# The type


def test_a_secret_shows_nowhere(caplog: pytest.LogCaptureFixture) -> None:
    secret = Secret(PLAIN)
    held = Held(key=secret, anything=Secret(PLAIN))
    logging.getLogger("test").warning("the key is %s, %r", secret, held)
    shown = [
        str(secret),
        repr(secret),
        f"{secret} {secret!r} {secret:>6}",
        "{:s}".format(secret),  # noqa: UP032 - one more way
        "%s" % secret,  # noqa: UP031 - one more way
        repr([secret]) + repr({"key": secret}),
        json.dumps(secret, default=str),
        orjson.dumps(secret, default=str).decode(),
        repr(held) + str(held) + repr(held.model_dump()),
        held.model_dump_json(),
        json.dumps(Held.model_json_schema()),
        caplog.text,
    ]
    for text in shown:
        assert "4711" not in text, text
    assert (str(secret), repr(secret), f"{secret:>5}") == ("***", "***", "  ***")
    assert held.model_dump_json() == '{"key":"***","anything":"***"}'
    assert secret.get_secret_value() == PLAIN


def test_a_secret_is_no_json_by_itself() -> None:
    with pytest.raises(TypeError, match="not JSON serializable"):
        json.dumps(Secret(PLAIN))
    with pytest.raises(TypeError):
        orjson.dumps(Secret(PLAIN))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_secret_is_not_pickled(protocol: int) -> None:
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps({"key": Secret(PLAIN)}, protocol)


def test_a_copy_is_the_same_secret() -> None:
    held = Held(key=Secret(PLAIN))
    for twin in (copy.copy(held), copy.deepcopy(held), held.model_copy(deep=True)):
        assert twin.key.get_secret_value() == PLAIN
        assert isinstance(twin.key, Secret)


@pytest.mark.parametrize("value", [PLAIN, SecretStr(PLAIN), Secret(PLAIN)])
def test_models_take_any_kind_of_secret(value: object) -> None:
    held = Held.model_validate({"key": value})
    assert type(held.key) is Secret
    assert held.key == Secret(PLAIN)
    assert Held.model_validate_json(f'{{"key": "{PLAIN}"}}') == held


def test_an_empty_secret_is_false() -> None:
    assert not Secret("")
    assert Secret(PLAIN)


def test_settings_hide_all_they_hold() -> None:
    settings = Settings(
        _env_file=None,
        database_url="postgresql://u:sk-recognisable-1@h/d",
        redis_url="redis://:sk-recognisable-2@h:1/0",
        openai_api_key="sk-recognisable-3",
        anthropic_api_key="sk-recognisable-4",
        encryption_keys="sk-recognisable-5",
    )
    shown = f"{settings} {settings!r} {settings.model_dump()} {settings.model_dump_json()}"
    assert "recognisable" not in shown
    assert "**********" not in shown
    assert "openai_api_key=***" in repr(settings)
    with pytest.raises(ValidationError) as caught:
        Settings(_env_file=None, database_url="mysql://u:sk-recognisable-6@h/d")
    assert "recognisable" not in str(caught.value)


# The keyring


def ring(*keys: Secret) -> Keyring:
    return Keyring(keys)


@given(st.text(st.characters(codec="utf-8")))
def test_what_is_encrypted_is_read_again(text: str) -> None:
    old, new = new_key(), new_key()
    token = ring(old).encrypt(text)
    assert token.isascii()
    for key in (old.get_secret_value(), new.get_secret_value()):
        assert key not in token
    assert ring(new, old).decrypt(token).get_secret_value() == text
    renewed = ring(new, old).rotate(token)
    assert renewed != token
    assert ring(new).decrypt(renewed).get_secret_value() == text
    assert ring(new, old).rotate(renewed) == renewed
    with pytest.raises(SecretUnreadable):
        ring(old).decrypt(renewed)


def test_the_same_text_is_encrypted_differently_each_time() -> None:
    keyring = ring(new_key())
    assert keyring.encrypt(PLAIN) != keyring.encrypt(Secret(PLAIN))


@pytest.mark.parametrize("token", ["", "x", "gAAAA", "schlüssel", "\x00", "=" * 100])
def test_what_is_no_token_is_unreadable(token: str) -> None:
    keyring = ring(new_key())
    for read in (keyring.decrypt, keyring.rotate):
        with pytest.raises(SecretUnreadable, match="SLUICE_ENCRYPTION_KEYS") as caught:
            read(token)
        assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_what_was_changed_on_the_way_is_unreadable() -> None:
    keyring = ring(new_key())
    token = keyring.encrypt(PLAIN)
    middle = len(token) // 2
    other = "A" if token[middle] != "A" else "B"
    with pytest.raises(SecretUnreadable):
        keyring.decrypt(token[:middle] + other + token[middle + 1 :])


def test_states_of_a_key() -> None:
    old, new = new_key(), new_key()
    token = ring(old).encrypt(PLAIN)
    assert state_of(token, ring(old, new)) is KeyState.CURRENT
    assert state_of(token, ring(new, old)) is KeyState.OLDER
    assert state_of(token, ring(new)) is KeyState.UNREADABLE


def test_without_keys_there_is_advice() -> None:
    keyring = Keyring.of(Settings(_env_file=None))
    with pytest.raises(SettingsError, match="run `sluice secrets new-key`"):
        keyring.encrypt(PLAIN)
    with pytest.raises(SecretUnreadable):
        keyring.decrypt(ring(new_key()).encrypt(PLAIN))
    with pytest.raises(SecretUnreadable):
        keyring.rotate(ring(new_key()).encrypt(PLAIN))


def test_keys_are_read_from_the_settings_newest_first() -> None:
    old, new = (Fernet.generate_key().decode() for _ in range(2))
    keyring = Keyring.of(Settings(_env_file=None, encryption_keys=f" {new} , {old}\n"))
    token = keyring.encrypt(PLAIN)
    assert Fernet(new).decrypt(token) == PLAIN.encode()
    assert keyring.decrypt(Fernet(old).encrypt(b"older").decode()) == Secret("older")


@pytest.mark.parametrize(
    ("keys", "position"),
    [
        ("recognisable", "key 1 of 1"),
        ("{good},recognisable", "key 2 of 2"),
        ("recognisable,{good}", "key 1 of 2"),
        ("{good},", "key 2 of 2"),
        (",{good}", "key 1 of 2"),
        ("{good},,{good}", "key 2 of 3"),
        ("re;cognisable{good}", "key 1 of 1"),  # base64 would pass over the semicolon
        ("{good}=", "key 1 of 1"),
        ("{good} {good}", "key 1 of 1"),
    ],
)
def test_a_malformed_key_is_named_by_its_position(keys: str, position: str) -> None:
    good = Fernet.generate_key().decode()
    settings = Settings(_env_file=None, encryption_keys=keys.format(good=good))
    with pytest.raises(SettingsError) as caught:
        Keyring.of(settings)
    message = str(caught.value)
    assert message.startswith(f"SLUICE_ENCRYPTION_KEYS: {position} is not a Fernet key")
    assert "\n" not in message
    assert good not in message
    assert "cognisable" not in message


def test_a_new_key_is_a_usable_one() -> None:
    first, second = new_key(), new_key()
    assert first != second
    assert ring(second, first).decrypt(ring(first).encrypt(PLAIN)) == Secret(PLAIN)


# Which key opens a call

ENVIRONMENT = Secret("from the environment")


def row(account_id: UUID | None, base_url: str | None, key: str | None) -> Provider:
    return Provider(
        id=UUID(int=1),
        name="row",
        provider="openai",
        model="gpt-6-luna",
        base_url=base_url,
        is_default=True,
        use_case=frozenset(),
        failover=frozenset(),
        max_tokens=1,
        context_tokens=1,
        capabilities=frozenset(),
        account_id=account_id,
        catalogue=None,
        priority=1,
        retires_at=None,
        successor=None,
        price_override=None,
        api_key_encrypted=key,
    )


def keys(**of: str) -> dict[tuple[PoolName, UUID | None], str]:
    """Return keys by whose they are; those of the other pool must never be taken."""
    owners = {"mine": MINE, "theirs": THEIRS, "all": None}
    found: dict[tuple[PoolName, UUID | None], str] = {
        ("anthropic", owner): "of the other pool" for owner in owners.values()
    }
    for owner, token in of.items():
        found["openai", owners[owner]] = token
    return found


ALL = keys(mine="MINE", theirs="THEIRS", all="ALL")
HERE = "https://llm.example.com/v1"
S = KeySource


@pytest.mark.parametrize(
    ("provider", "stored", "environment", "expected"),
    [
        # An account's own row, then its key, then everybody's.
        (row(MINE, None, "ROW"), ALL, ENVIRONMENT, (S.ACCOUNT_ROW, "ROW")),
        (row(MINE, None, None), ALL, ENVIRONMENT, (S.ACCOUNT, "MINE")),
        (row(MINE, None, None), keys(all="ALL"), ENVIRONMENT, (S.ENVIRONMENT, ENVIRONMENT)),
        (row(MINE, None, None), keys(all="ALL"), None, (S.DATABASE, "ALL")),
        (row(MINE, None, None), keys(theirs="THEIRS"), None, None),
        # Everybody's row: the account's key comes before the environment, that before the row.
        (row(None, None, "ROW"), ALL, ENVIRONMENT, (S.ACCOUNT, "MINE")),
        (row(None, None, "ROW"), keys(all="ALL"), ENVIRONMENT, (S.ENVIRONMENT, ENVIRONMENT)),
        (row(None, None, "ROW"), keys(all="ALL"), None, (S.ROW, "ROW")),
        (row(None, None, None), keys(all="ALL"), None, (S.DATABASE, "ALL")),
        (row(None, None, None), keys(all="ALL"), Secret(""), (S.DATABASE, "ALL")),
        (row(None, None, None), keys(theirs="THEIRS"), None, None),
        # Somebody else's server gets the key that was meant for it, and no other.
        (row(None, HERE, "ROW"), ALL, ENVIRONMENT, (S.ROW, "ROW")),
        (row(None, HERE, None), ALL, ENVIRONMENT, None),
        (row(None, "", None), ALL, ENVIRONMENT, None),
        (row(MINE, HERE, "ROW"), ALL, ENVIRONMENT, (S.ACCOUNT_ROW, "ROW")),
        (row(MINE, HERE, None), ALL, ENVIRONMENT, None),
        # Another account's row is never tried, and would not open anything.
        (row(THEIRS, HERE, "ROW"), ALL, ENVIRONMENT, None),
    ],
)
def test_which_key_opens_a_call(
    provider: Provider,
    stored: dict[tuple[PoolName, UUID | None], str],
    environment: Secret | None,
    expected: tuple[KeySource, Secret | str] | None,
) -> None:
    found = choose_key(provider, MINE, stored, environment)
    assert found == (ProviderKey(*expected) if expected else None)


def test_without_an_account_only_what_is_everybodys_opens() -> None:
    assert choose_key(row(None, None, None), None, ALL, None) == ProviderKey(S.DATABASE, "ALL")


def test_a_chosen_key_opens() -> None:
    keyring = ring(new_key())
    stored = ProviderKey(S.DATABASE, keyring.encrypt(PLAIN))
    given_in_plain = ProviderKey(S.ENVIRONMENT, SecretStr(PLAIN))
    for key in (stored, given_in_plain):
        assert key.open(keyring).get_secret_value() == PLAIN
        assert type(key.open(keyring)) is Secret


def test_the_environment_has_a_key_for_each_pool() -> None:
    settings = Settings(_env_file=None, openai_api_key="o", anthropic_api_key="a")
    assert environment_key(settings, "openai") == Secret("o")
    assert environment_key(settings, "anthropic") == Secret("a")


def test_the_catalogue_does_not_show_what_is_encrypted_either() -> None:
    catalogue = Catalogue((row(None, None, "TOKEN"),), {}, {("openai", None): "TOKEN"})
    assert "TOKEN" not in repr(catalogue) + repr(ProviderKey(S.ROW, "TOKEN"))
