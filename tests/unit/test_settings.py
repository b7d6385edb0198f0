"""Settings: where they come from, what is refused and in which words, what is never shown."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError
from sqlalchemy import make_url

from sluicegate.shared.errors import SettingsError
from sluicegate.shared.settings import Settings, get_settings, load_settings


def test_defaults_need_nothing() -> None:
    settings = load_settings()
    assert settings == Settings(_env_file=None)
    assert settings.database_dsn == (
        "postgresql+psycopg://sluice@127.0.0.1:5432/sluice?options=-csearch_path%3Dsluicegate"
    )
    assert settings.openai_api_key is None


def test_the_environment_wins_over_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    Path(".env").write_text("SLUICE_GRACE_S=7\nSLUICE_CHUNK_SIZE=7\nOPENAI_API_KEY=sk-file\n")
    monkeypatch.setenv("SLUICE_GRACE_S", "8")
    settings = load_settings(max_attempts=2)
    assert (settings.grace_s, settings.chunk_size, settings.max_attempts) == (8, 7, 2)
    assert settings.openai_api_key is not None
    assert settings.openai_api_key.get_secret_value() == "sk-file"


def test_the_sdks_own_variables_have_no_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI", "ANTHROPIC"):
        monkeypatch.setenv(f"{name}_API_KEY", f"key of {name}")
        monkeypatch.setenv(f"{name}_BASE_URL", f"https://{name.lower()}.test")
        monkeypatch.setenv(f"SLUICE_{name}_API_KEY", "not this one")
    settings = load_settings()
    assert settings.anthropic_base_url == "https://anthropic.test"
    assert settings.openai_api_key is not None
    assert settings.openai_api_key.get_secret_value() == "key of OPENAI"


def test_an_empty_value_means_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLUICE_GRACE_S", "")
    monkeypatch.setenv("OPENAI_BASE_URL", "")
    assert load_settings() == Settings(_env_file=None)


@pytest.mark.parametrize(
    "given",
    [
        "postgres://u:p@h:1/d",
        "postgresql://u:p@h:1/d",
        "postgresql+psycopg://u:p@h:1/d",
    ],
)
def test_database_urls_as_people_write_them(given: str) -> None:
    settings = load_settings(database_url=given)
    assert settings.database_dsn.startswith("postgresql+psycopg://u:p@h:1/d?")


def test_our_schema_is_added_once_to_the_options_of_a_url() -> None:
    url = "postgresql://u:p@h:1/d?options=-c%20jit%3Doff&sslmode=require"
    first = load_settings(database_url=url, database_schema="crm_llm")
    assert make_url(first.database_dsn).query == {
        "options": "-c jit=off -csearch_path=crm_llm",
        "sslmode": "require",
    }
    again = load_settings(database_url=first.database_dsn, database_schema="crm_llm")
    assert again.database_dsn == first.database_dsn


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("SLUICE_DATABASE_URL", "mysql://h/d", "must look like postgresql://"),
        ("SLUICE_DATABASE_URL", "sluice", "must look like postgresql://"),
        ("SLUICE_DATABASE_URL", "postgresql://h:port/d", "must look like postgresql://"),
        ("SLUICE_DATABASE_URL", "postgresql://h:99999/d", "must look like postgresql://"),
        ("SLUICE_DATABASE_URL", "postgresql+asyncpg://h/d", "must look like postgresql://"),
        ("SLUICE_REDIS_URL", "127.0.0.1:6379", "must look like redis://"),
        ("SLUICE_REDIS_URL", "redis://[::1/0", "must look like redis://"),
        ("SLUICE_REDIS_PREFIX", "with space", "string should match"),
        ("SLUICE_GRACE_S", "soon", "valid number"),
        ("SLUICE_GRACE_S", "0", "greater than 0"),
        ("SLUICE_GRACE_S", "nan", "finite"),
        ("SLUICE_GRACE_S", "inf", "finite"),
        ("SLUICE_SPACING_S", "inf", "finite"),
        ("SLUICE_SPACING_S", "-1", "greater than or equal to 0"),
        ("SLUICE_JOBS_IN_FLIGHT", "0", "greater than or equal to 1"),
        ("SLUICE_JOBS_IN_FLIGHT", "2.5", "valid integer"),
        ("SLUICE_CHUNK_SIZE", "501", "less than or equal to 500"),
        ("SLUICE_MAX_ATTEMPTS", "21", "less than or equal to 20"),
        ("SLUICE_CATALOGUE", "newest", "'current' or 'original'"),
    ],
)
def test_a_bad_value_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, says: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(SettingsError) as caught:
        load_settings()
    message = str(caught.value)
    assert message.startswith(f"{variable}: ")
    assert says in message
    assert "\n" not in message
    assert caught.value.__suppress_context__


def test_a_bad_value_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLUICE_DATABASE_URL", "mysql://u:secret-password@h/d")
    with pytest.raises(SettingsError) as caught:
        load_settings()
    assert "secret-password" not in str(caught.value)


def test_secrets_are_not_shown() -> None:
    settings = load_settings(
        database_url="postgresql://u:secret-one@h/d",
        redis_url="redis://:secret-two@h:6379/0",
        openai_api_key="sk-secret-three",
        anthropic_api_key="sk-secret-four",
    )
    shown = repr(settings) + str(settings) + settings.model_dump_json()
    assert "secret-" not in shown
    assert "secret-one" in settings.database_dsn
    assert "secret-two" in settings.redis_dsn


def test_settings_do_not_change() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        load_settings().grace_s = 1  # type: ignore[misc]  # what is tested


def test_a_process_reads_them_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first = get_settings()
    monkeypatch.setenv("SLUICE_GRACE_S", "99")
    assert get_settings() is first


def test_seconds_are_named_so() -> None:
    for name in Settings.model_fields:
        if any(word in name for word in ("timeout", "deadline", "interval", "grace", "ttl")):
            assert name.endswith("_s"), name
