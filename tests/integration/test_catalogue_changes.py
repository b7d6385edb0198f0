"""Changes of the catalogue: all or nothing, one at a time, and known to whoever runs."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
from sqlalchemy import Connection, Engine

from sluicegate.producers.client import Sluice
from sluicegate.shared.accounts import add_account
from sluicegate.shared.catalogue import announce, read
from sluicegate.shared.catalogue_changes import NOBODY, serving
from sluicegate.shared.connecting import catalogue_change
from sluicegate.shared.errors import InvalidJob, SettingsError, SluiceError, UnknownPrice
from sluicegate.shared.provider_changes import (
    ProviderChange,
    add_provider,
    list_providers,
    set_provider,
    switch_provider,
)
from sluicegate.shared.settings import Settings
from sluicegate.shared.use_case_changes import (
    UseCaseChange,
    add_use_case,
    set_use_case,
    switch_use_case,
)
from tests.polling import eventually

LUNA = "openai-gpt-6-luna"


@pytest.fixture(autouse=True)
def _environment(
    settings: Settings,
    environment: Callable[[Settings], dict[str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in environment(settings).items():
        monkeypatch.setenv(name, value)


def in_one(engine: Engine, work: Callable[[Connection], object]) -> None:
    """Do this in a transaction."""
    with engine.connect() as connection:
        connection.execution_options(isolation_level="READ COMMITTED")
        with connection.begin():
            work(connection)


def row(**fields: object) -> ProviderChange:
    given = {"model": "gpt-4o", "max_tokens": 100, "context_tokens": 1000, **fields}
    return ProviderChange.of(**given)


def names(engine: Engine, use_case: str) -> list[str]:
    with engine.connect() as connection:
        found = serving(read(connection), use_case, account_id=NOBODY, mode="current")
    return [one.name for one in found]


def test_a_client_that_runs_sees_a_change_although_it_keeps_its_reading(
    settings: Settings,
) -> None:
    patient = settings.model_copy(update={"catalogue_ttl_s": 3600.0})
    with Sluice(patient) as client:
        client.submit("draft", "hello")
        with catalogue_change() as line:
            add_use_case(line, "classify", UseCaseChange())

        def accepted() -> bool:
            try:
                return bool(client.submit("classify", "hello"))
            except InvalidJob:
                return False

        eventually(accepted, 5)
        with catalogue_change() as line:
            switch_use_case(line, "classify", active=False)
        eventually(lambda: not accepted(), 5)


def test_a_refused_change_leaves_nothing_behind(engine: Engine) -> None:
    with pytest.raises(SettingsError, match=r"provider: .*'nobody'"), catalogue_change() as line:
        add_use_case(line, "classify", UseCaseChange(), providers=[LUNA, "nobody"])

    def bare_voice(line: Connection) -> None:
        for name in (LUNA, "openai-gpt4o-mini"):
            set_provider(line, name, ProviderChange(is_default=False), account=None, mode="current")
        set_use_case(line, "voice", UseCaseChange(max_tokens=7), mode="current", providers=[])
        switch_provider(
            line, "anthropic-claude-haiku-5-5", active=False, account=None, mode="current"
        )

    with pytest.raises(SettingsError, match="no provider would be left for voice"):
        in_one(engine, bare_voice)
    with engine.connect() as connection:
        catalogue = read(connection)
    assert "classify" not in catalogue.use_cases
    assert catalogue.use_cases["voice"].max_tokens == 512
    assert {one.name for one in catalogue.providers if one.is_default} >= {LUNA}


def test_of_two_who_add_the_same_row_one_is_refused(engine: Engine) -> None:
    start = threading.Barrier(2)
    refused: list[SluiceError] = []

    def add() -> None:
        start.wait(10)
        try:
            in_one(engine, lambda line: add_provider(line, "twin", "openai", row(), account=None))
        except SettingsError as error:
            refused.append(error)

    threads = [threading.Thread(target=add) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [str(error).partition(";")[0] for error in refused] == ["name: 'twin' exists already"]


def test_two_who_change_a_row_at_once_both_have_their_way(engine: Engine) -> None:
    start = threading.Barrier(2)

    def change(given: ProviderChange) -> None:
        start.wait(10)
        in_one(
            engine,
            lambda line: set_provider(line, LUNA, given, account=None, mode="current"),
        )

    threads = [
        threading.Thread(target=change, args=(given,))
        for given in (ProviderChange(priority=3), ProviderChange(max_tokens=77))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with engine.connect() as connection:
        (luna,) = (one for one in read(connection).providers if one.name == LUNA)
    assert (luna.priority, luna.max_tokens) == (3, 77)


def test_a_price_that_is_emptied_is_the_lists_again(engine: Engine) -> None:
    own = ProviderChange.of(price_override={"input": 1.0, "output": 2.0})
    for change, version in ((own, "provider row"), (ProviderChange(price_override=None), "genai")):
        in_one(
            engine,
            lambda line, given=change: set_provider(  # type: ignore[misc]
                line, LUNA, given, account=None, mode="current"
            ),
        )
        with engine.connect() as connection:
            (luna,) = (one for one in list_providers(connection) if one.provider.name == LUNA)
            assert luna.provider.card.version.startswith(version)
    with engine.connect() as connection:
        emptied = connection.exec_driver_sql(
            "SELECT price_override IS NULL FROM llm_providers WHERE name = %s", (LUNA,)
        ).scalar()
    assert emptied is True


def test_a_price_that_nobody_knows_is_refused(engine: Engine) -> None:
    with pytest.raises(UnknownPrice, match="'qwen3' is not known"):
        in_one(
            engine,
            lambda line: add_provider(line, "q", "openai", row(model="qwen3"), account=None),
        )
    with pytest.raises(UnknownPrice, match="needs input and output"):
        in_one(
            engine,
            lambda line: add_provider(
                line, "q", "openai", row(price_override={"input": 1.0}), account=None
            ),
        )


def test_who_serves_a_use_case_is_replaced(engine: Engine) -> None:
    before = names(engine, "draft")
    assert before == ["anthropic-claude-haiku-5-5", LUNA]
    in_one(
        engine,
        lambda line: set_use_case(
            line, "draft", UseCaseChange(), mode="current", providers=["openai-gpt-6.1-sol"]
        ),
    )
    # Who stands in for it still does.
    assert names(engine, "draft") == ["openai-gpt-6.1-sol", LUNA]
    assert names(engine, "summary") == before


def test_parked_jobs_count_as_waiting(engine: Engine, settings: Settings) -> None:
    with Sluice(settings) as client:
        client.submit_many("draft", ["a", "b"], lane="bulk")
    with pytest.raises(SettingsError, match=r"2 in draft\.anthropic\.bulk"):
        in_one(
            engine,
            lambda line: switch_provider(
                line, "anthropic-claude-haiku-5-5", active=False, account=None, mode="current"
            ),
        )
    counted: list[int] = []
    in_one(engine, lambda line: counted.append(switch_use_case(line, "draft", active=False)))
    assert counted == [2]


def test_an_accounts_row_is_judged_by_what_the_account_has(engine: Engine) -> None:
    """Taking an account's row away bares nothing: everybody's row of that name is behind it."""
    in_one(engine, lambda line: add_account(line, "acme"))
    own = row(use_case=frozenset({"draft"}))
    in_one(engine, lambda line: add_provider(line, LUNA, "openai", own, account="acme"))
    in_one(
        engine,
        lambda line: switch_provider(line, LUNA, active=False, account="acme", mode="current"),
    )
    with engine.connect() as connection:
        entries = [one for one in list_providers(connection) if one.provider.name == LUNA]
    assert [(one.account, one.is_active) for one in entries] == [(None, True), ("acme", False)]


def test_whether_redis_has_heard_of_a_change_is_said(settings: Settings) -> None:
    assert announce(settings) is True
    away = Settings(_env_file=None, redis_url="redis://127.0.0.1:1/0")
    assert announce(away) is False
