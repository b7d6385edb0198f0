"""The commands for providers, use cases and accounts, as an operator or a script sees them."""

from __future__ import annotations

import os
import pty
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import Any
from uuid import UUID

import pytest
import redis
from sqlalchemy import Engine

from sluicegate.shared.catalogue import VERSION_KEY
from sluicegate.shared.secrets import Keyring, new_key
from sluicegate.shared.settings import Settings
from sluicegate.workers.local.sandbox_control import SandboxControl
from tests.command_line import Command
from tests.stand_in import StandIn

KEY = "sk-test-0123456789abcdef"


@pytest.fixture
def given(sandbox_settings: Settings) -> Settings:
    return sandbox_settings.model_copy(
        update={
            "encryption_keys": new_key(),
            "first_token_deadline_s": 1.0,
            "total_deadline_s": 2.0,
        }
    )


@pytest.fixture
def variables(given: Settings, environment: Callable[[Settings], dict[str, str]]) -> dict[str, str]:
    return environment(given)


@pytest.fixture
def sluice(given: Settings, command_line: Callable[[Settings], Command]) -> Command:
    return command_line(given)


def rows(engine: Engine, statement: str) -> list[Any]:
    with engine.connect() as connection:
        return list(connection.exec_driver_sql(statement).all())


def local(name: str, *more: str) -> tuple[str, ...]:
    """Return the arguments that add a row which needs no key."""
    return (
        *("provider", "add", name, "--pool", "openai", "--model", "qwen3"),
        *("--base-url", "http://127.0.0.1:8000/v1", "--context-tokens", "32768"),
        *("--input-price", "0.1", "--output-price", "0.4", *more),
    )


# Providers


def test_providers_are_listed_plain_when_piped(sluice: Command) -> None:
    head, *lines = sluice("provider", "list").out.splitlines()
    assert head.split("\t") == [
        *("name", "pool", "model", "use cases", "$/M in", "$/M out", "key", "active"),
    ]
    listed = {line.split("\t")[0]: line.split("\t")[1:] for line in lines}
    assert len(listed) == 8
    assert listed["openai-gpt4o-mini"] == [
        *("openai", "gpt-4o-mini", "general, voice, (default)", "0.15", "0.6"),
        *("environment", "yes"),
    ]
    assert "draft (failover)" in listed["openai-gpt-6-luna"][2]


def test_providers_as_json(sluice: Command) -> None:
    (mini,) = (
        one
        for one in sluice("provider", "list", "--json").json["providers"]
        if one["name"] == "openai-gpt4o-mini"
    )
    assert str(UUID(mini["id"])) == mini.pop("id")
    assert mini == {
        "name": "openai-gpt4o-mini",
        "account": None,
        "pool": "openai",
        "model": "gpt-4o-mini",
        "base_url": None,
        "is_active": True,
        "is_default": True,
        "use_cases": ["general", "voice"],
        "failover": [],
        "priority": 100,
        "max_tokens": 16_384,
        "context_tokens": 128_000,
        "capabilities": ["json_schema", "tools", "vision"],
        "input_usd_per_million": 0.15,
        "output_usd_per_million": 0.6,
        "price_override": None,
        "key": "environment",
        "requests_per_minute": None,
        "tokens_per_minute": None,
        "input_tokens_per_minute": None,
        "output_tokens_per_minute": None,
        "max_concurrent": None,
        "retires_at": "2027-01-14T00:00:00.000+00:00",
        "successor": "openai-gpt-6-luna",
        "catalogue": "original",
    }


def test_a_provider_is_added_with_all_there_is_to_say(
    sluice: Command, engine: Engine, redis_client: redis.Redis, given: Settings
) -> None:
    outcome = sluice(
        *local("qwen", "--use-case", "draft,summary", "--failover", "general", "--default"),
        *("--max-tokens", "2000", "--capabilities", "tools,json_schema", "--priority", "7"),
        *("--cache-read-price", "0.05", "--requests-per-minute", "60"),
        *("--tokens-per-minute", "75000"),
        *("--input-tokens-per-minute", "70000", "--output-tokens-per-minute", "8000"),
        *("--max-concurrent", "4", "--retires-at", "2031-02-03", "--successor", "openai-gpt4o"),
        *("--key-stdin", "--json"),
        stdin=f"{KEY}\n",
    )
    added = outcome.json
    assert added["price_override"] == {"input": 100, "output": 400, "cache_read": 50}
    assert (added["key"], added["input_usd_per_million"]) == ("row", 0.1)
    (row,) = rows(engine, "SELECT * FROM llm_providers WHERE name = 'qwen'")
    assert (row.provider, row.model, row.base_url) == (
        *("openai", "qwen3", "http://127.0.0.1:8000/v1"),
    )
    assert (row.use_case, row.failover, row.is_default) == (
        ["draft", "summary"],
        ["general"],
        True,
    )
    assert (row.max_tokens, row.context_tokens, row.priority) == (2000, 32_768, 7)
    assert row.capabilities == ["json_schema", "tools"]
    assert (row.requests_per_minute, row.max_concurrent) == (60, 4)
    assert (row.tokens_per_minute, added["tokens_per_minute"]) == (75_000, 75_000)
    assert (row.input_tokens_per_minute, row.output_tokens_per_minute) == (70_000, 8000)
    assert (row.retires_at.isoformat(), row.successor) == (
        "2031-02-03T00:00:00+00:00",
        "openai-gpt4o",
    )
    assert (row.catalogue, row.account_id, row.is_active) == (None, None, True)
    assert KEY not in row.api_key_encrypted
    assert Keyring.of(given).decrypt(row.api_key_encrypted).get_secret_value() == KEY
    assert redis_client.get(given.redis_prefix + VERSION_KEY) is not None
    assert KEY not in sluice("provider", "show", "qwen", "--json").out + outcome.out + outcome.err


def test_what_the_price_list_knows_need_not_be_said(sluice: Command) -> None:
    added = sluice("provider", "add", "four", "--pool", "openai", "--model", "gpt-4o", "--json")
    assert added.json["context_tokens"] == 128_000
    assert added.json["max_tokens"] == 4096
    assert added.json["price_override"] is None
    assert added.json["input_usd_per_million"] == 2.5
    assert "serves no use case yet; jobs reach it by the model four" in added.err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--base-url", "ftp://x/v1"), "base_url: must look like https://host/path"),
        (("--base-url", "http://:80"), "base_url: must look like"),
        (("--base-url", "https://x/v1?a=b"), "base_url: must look like"),
        (("--base-url", "https://me:secret@x/v1"), "base_url: must not hold a password"),
        (("--use-case", "draft,nope"), "use_case: 'nope' is not known; there are complex, draft"),
        (("--failover", "nope"), "failover: 'nope' is not known"),
        (("--max-tokens", "-1"), "max_tokens: "),
        (("--max-tokens", "40000"), "max_tokens: 40000 is more than context_tokens"),
        (("--context-tokens", "99999999999"), "context_tokens: "),
        (("--capabilities", "smell"), "capabilities: 'smell' is not known; there are vision"),
        (("--priority", "-1"), "priority: "),
        (("--requests-per-minute", "0"), "requests_per_minute: "),
        (("--tokens-per-minute", "0"), "tokens_per_minute: "),
        (("--input-tokens-per-minute", "0"), "input_tokens_per_minute: "),
        (("--output-tokens-per-minute", "0"), "output_tokens_per_minute: "),
        (("--max-concurrent", "0"), "max_concurrent: "),
        (("--retires-at", "soon"), "retires_at: 'soon' is not a date"),
        (("--successor", "nobody"), "successor: 'nobody' is not the name of another"),
        (("--successor", "qwen"), "successor: 'qwen' is not the name of another"),
        (("--input-price", "-1"), "price_override"),
        (("--input-price", "nan"), "price_override"),
        (("--account", "nobody"), "account: there is no account 'nobody'"),
        (("--model", ""), "model: "),
        (("--key", KEY), "No such option: --key"),
        (("--key-stdin",), "no key was given"),
    ],
)
def test_a_bad_row_is_refused_in_one_line(
    sluice: Command, engine: Engine, more: tuple[str, ...], said: str
) -> None:
    outcome = sluice(*local("qwen", *more))
    assert (outcome.code, outcome.out) == (2, "")
    assert said in outcome.err
    assert outcome.err.startswith("sluice: ")
    assert outcome.err.count("\n") == 1
    assert not rows(engine, "SELECT 1 FROM llm_providers WHERE name = 'qwen'")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (local("a b"), "name: must be 1 to 128 letters"),
        (local("openai-gpt4o"), "name: 'openai-gpt4o' exists already; change it with"),
        (("provider", "add", "x", "--pool", "cohere", "--model", "m"), "--pool"),
        (("provider", "add", "x", "--pool", "openai"), "--model"),
        (("provider", "add", "x", "--pool", "openai", "--model", "m"), "context_tokens: "),
        (
            (
                *("provider", "add", "x", "--pool", "openai", "--model", "m"),
                "--context-tokens",
                "9",
            ),
            "price: the price of openai model 'm' is not known; set one",
        ),
        (
            ("provider", "set", "openai-gpt4o", "--input-price", "1"),
            "price: give both --input-price and --output-price",
        ),
        (("provider", "set", "openai-gpt4o", "--clear", "model"), "clear: 'model' cannot be"),
        (("provider", "set", "openai-gpt4o", "--model", "m-9"), "price: the price of openai"),
        (("usecase", "add", "Draft"), "name: must be 1 to 32 small letters"),
        (("usecase", "add", "draft"), "name: 'draft' exists already"),
        (("usecase", "add", "a.b"), "name: must be"),
        (("usecase", "add", "new", "--max-tokens", "0"), "max_tokens: "),
        (("usecase", "add", "new", "--prefer", "best"), "--prefer"),
        (("usecase", "add", "new", "--unknown-policy", "cry"), "--unknown-policy"),
        (("usecase", "add", "new", "--description", "a\nb"), "description: must be text on one"),
        (("usecase", "add", "new", "--provider", "nobody"), "provider: there is no provider"),
        (("usecase", "set", "draft", "--provider", "nobody"), "provider: there is no provider"),
        (("usecase", "set", "draft"), "nothing to change; name an option, see --help"),
        (("usecase", "set", "draft", "--force"), "nothing to change"),
        (("provider", "set", "openai-gpt4o"), "nothing to change"),
        (("provider", "show", "openai-gpt4o", "--account", "nobody"), "account: there is no"),
        (("provider", "test", "openai-gpt4o", "--account", "nobody"), "account: there is no"),
        (("account", "set", "default"), "nothing to change"),
        (("job", "list", "--account", "nobody"), "account: there is no account 'nobody'"),
        (("account", "set", "default", "--time-zone", "Mars/North"), "is not an IANA time zone"),
        (("account", "set", "default", "--rename", "x"), "keeps its name"),
        (("account", "add", "default"), "exists already"),
    ],
)
def test_bad_input_is_one_line_and_code_2(
    sluice: Command, engine: Engine, arguments: tuple[str, ...], said: str
) -> None:
    outcome = sluice(*arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert said in outcome.err
    assert outcome.err.startswith("sluice: ")
    assert outcome.err.count("\n") == 1
    # A use case whose provider is not there is not added without one.
    assert not rows(engine, "SELECT 1 FROM use_cases WHERE name = 'new'")


@pytest.mark.parametrize(
    "arguments",
    [
        ("provider", "show", "nobody"),
        ("provider", "set", "nobody", "--priority", "1"),
        ("provider", "disable", "nobody"),
        ("provider", "enable", "nobody"),
        ("provider", "test", "nobody"),
        ("usecase", "show", "nobody"),
        ("usecase", "set", "nobody", "--max-tokens", "5"),
        ("usecase", "disable", "nobody"),
        ("account", "show", "nobody"),
        ("account", "set", "nobody", "--inactive"),
    ],
)
def test_what_is_not_there_is_one_line_and_code_1(
    sluice: Command, arguments: tuple[str, ...]
) -> None:
    outcome = sluice(*arguments)
    assert (outcome.code, outcome.out) == (1, "")
    assert "'nobody'" in outcome.err
    assert outcome.err.count("\n") == 1


def test_set_changes_what_is_given_and_nothing_else(sluice: Command) -> None:
    before = sluice("provider", "show", "openai-gpt4o-mini", "--json").json
    changed = sluice(
        *("provider", "set", "openai-gpt4o-mini", "--priority", "5", "--no-default", "--json")
    ).json
    assert changed == {**before, "priority": 5, "is_default": False}
    priced = sluice(
        *("provider", "set", "openai-gpt4o-mini", "--input-price", "1", "--output-price", "2"),
        "--json",
    ).json
    assert priced["price_override"] == {"input": 1000, "output": 2000}
    dearer = sluice("provider", "set", "openai-gpt4o-mini", "--output-price", "3", "--json").json
    assert dearer["price_override"] == {"input": 1000, "output": 3000}
    cleared = sluice(
        *("provider", "set", "openai-gpt4o-mini", "--clear", "price,retires-at,successor"),
        "--json",
    ).json
    assert cleared == {**changed, "retires_at": None, "successor": None}


def test_a_key_comes_and_goes(sluice: Command, engine: Engine) -> None:
    assert sluice(*local("qwen", "--use-case", "draft")).code == 0
    assert sluice("provider", "show", "qwen", "--json").json["key"] is None
    assert sluice("provider", "set", "qwen", "--key-stdin", stdin=KEY).code == 0
    assert sluice("provider", "show", "qwen", "--json").json["key"] == "row"
    assert sluice("provider", "set", "qwen", "--clear", "key", "--json").json["key"] is None
    (row,) = rows(engine, "SELECT api_key_encrypted FROM llm_providers WHERE name = 'qwen'")
    assert row.api_key_encrypted is None


def test_workers_that_cannot_decrypt_a_new_key_are_named(
    sluice: Command, engine: Engine, given: Settings
) -> None:
    worker = (
        "INSERT INTO workers (id, name, pool, lane, queues, keyring) VALUES"
        " (gen_random_uuid(), '{0}', '{0}', 'bulk', '{{}}', '{{{1}}}') RETURNING 1"
    )
    (newest,) = Keyring.of(given).fingerprints
    rows(engine, worker.format("anthropic", ""))
    rows(engine, worker.format("openai", f"00000000,{newest}"))
    assert sluice(*local("one", "--use-case", "draft", "--key-stdin"), stdin=KEY).err == ""
    rows(engine, "UPDATE workers SET keyring = '{}' RETURNING 1")
    said = (
        "sluice: openai cannot decrypt what the newest key encrypts, so jobs that need it fail "
        "there: give these workers this SLUICE_ENCRYPTION_KEYS, and restart them\n"
    )
    assert sluice(*local("two", "--use-case", "draft", "--key-stdin"), stdin=KEY).err == said
    assert sluice("provider", "set", "two", "--key-stdin", stdin=KEY).err == said
    assert sluice("provider", "set", "two", "--priority", "3").err == ""


def test_a_key_is_not_stored_without_something_to_encrypt_it(
    sluice: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SLUICE_ENCRYPTION_KEYS")
    outcome = sluice(*local("qwen", "--key-stdin"), stdin=KEY)
    assert outcome.code == 2
    assert "SLUICE_ENCRYPTION_KEYS" in outcome.err


def test_the_last_provider_of_a_use_case_is_not_disabled_by_mistake(sluice: Command) -> None:
    for name in ("openai-gpt-6-luna", "openai-gpt4o-mini"):
        # As nothing is the default any more, a use case has what serves it and nothing else.
        assert sluice("provider", "set", name, "--no-default").code == 0
    assert sluice("provider", "disable", "anthropic-claude-sonnet-5-5").code == 0
    refused = sluice("provider", "disable", "openai-gpt-6.1-sol")
    assert (refused.code, refused.out) == (2, "")
    assert "no provider would be left for complex, vision; give it another" in refused.err
    assert "--force" in refused.err
    assert sluice("provider", "show", "openai-gpt-6.1-sol", "--json").json["is_active"]
    refused = sluice("provider", "set", "openai-gpt-6.1-sol", "--use-case", "draft")
    assert "no provider would be left for vision" in refused.err
    forced = sluice("provider", "disable", "openai-gpt-6.1-sol", "--force")
    assert (forced.code, forced.out.split("\t")[-1]) == (0, "disabled\n")
    enabled = sluice("provider", "enable", "openai-gpt-6.1-sol", "--json")
    assert enabled.json["is_active"]


def test_a_provider_that_waiting_jobs_need_is_not_disabled_by_mistake(
    sluice: Command, engine: Engine, redis_client: redis.Redis, given: Settings
) -> None:
    from sluicegate.producers.client import Sluice as Client

    with Client(given) as client:
        job = client.submit("voice", "hello")
    refused = sluice("provider", "disable", "openai-gpt-6-luna")
    assert refused.code == 2
    assert "jobs that wait would fail" in refused.err
    assert "1 in voice.openai" in refused.err
    StandIn(engine=engine, client=redis_client, settings=given, job_id=job.id).answer("hello")
    assert sluice("provider", "disable", "openai-gpt-6-luna").code == 0


def test_an_accounts_own_row_stands_in_front_of_everybodys(sluice: Command) -> None:
    assert sluice("account", "add", "acme").code == 0
    own = ("provider", "add", "openai-gpt-6-luna", "--pool", "openai", "--account", "acme")
    assert sluice(*own, "--model", "gpt-4o", "--key-stdin", stdin=KEY).code == 0
    assert sluice(*own, "--model", "gpt-4o").code == 2  # one of a name
    mine = sluice("provider", "show", "openai-gpt-6-luna", "--account", "acme", "--json").json
    assert (mine["account"], mine["model"], mine["key"]) == ("acme", "gpt-4o", "account_row")
    assert sluice("provider", "show", "openai-gpt-6-luna", "--json").json["model"] == "gpt-6-luna"
    changed = sluice(
        *("provider", "set", "openai-gpt-6-luna", "--account", "acme", "--priority", "3", "--json")
    ).json
    assert (changed["account"], changed["priority"]) == ("acme", 3)
    assert "openai-gpt-6-luna (of acme)\topenai\tgpt-4o\t" in sluice("provider", "list").out
    names = [one["account"] for one in sluice("provider", "list", "--json").json["providers"]]
    assert names == [None] * 8 + ["acme"]
    assert sluice("account", "show", "acme", "--json").json["providers"] == ["openai-gpt-6-luna"]


def test_a_change_says_when_redis_cannot_spread_it(
    sluice: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLUICE_REDIS_URL", "redis://127.0.0.1:1/0")
    outcome = sluice("usecase", "add", "classify")
    assert outcome.code == 0
    assert outcome.err == (
        "sluice: Redis did not answer, so running processes see the change within 30 s "
        "(SLUICE_CATALOGUE_TTL_S)\n"
    )


# A call


@pytest.mark.parametrize("stream", [(), ("--stream",)])
def test_a_test_makes_one_paid_call(
    sluice: Command, sandbox: SandboxControl, engine: Engine, stream: tuple[str, ...]
) -> None:
    outcome = sluice("provider", "test", "anthropic-claude-haiku-5-5", *stream, "--json")
    said = outcome.json
    assert outcome.err == "sluice: this call is paid, and booked to no account\n"
    (call,) = sandbox.calls()
    assert call["billed_nano_usd"] == said["cost_nano_usd"] > 0
    assert (said["provider"], said["key"]) == ("anthropic-claude-haiku-5-5", "environment")
    assert said["usage"]["output"] <= 64
    assert said["duration_ms"] >= 5
    assert (said["first_token_ms"] is not None) == bool(stream) == call["stream"]
    assert not rows(engine, "SELECT 1 FROM cost_entries")


def test_a_test_for_people(sluice: Command) -> None:
    outcome = sluice("provider", "test", "openai-gpt-6-luna", "--stream")
    shown = dict(line.split("\t") for line in outcome.out.splitlines())
    assert list(shown) == ["model", "duration", "first token", "tokens", "cost", "answer"]
    assert shown["model"].startswith("gpt-6-luna")
    assert shown["cost"].startswith("$0.0")


def _closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("http_401", "Incorrect API key"),
        ("http_404", "The model does not exist"),
        ("hang", "(timeout)"),
    ],
)
@pytest.mark.parametrize("stream", [(), ("--stream",)])
def test_a_test_that_fails_says_why_in_one_line(
    sluice: Command, sandbox: SandboxControl, fault: str, said: str, stream: tuple[str, ...]
) -> None:
    sandbox.add_fault(fault)
    outcome = sluice("provider", "test", "openai-gpt-6-luna", *stream)
    assert (outcome.code, outcome.out) == (1, "")
    _paid, problem = outcome.err.splitlines()
    assert problem.startswith("sluice: openai-gpt-6-luna: ")
    assert said in problem


def test_a_test_where_nobody_listens(sluice: Command) -> None:
    url = f"http://127.0.0.1:{_closed_port()}/v1"
    assert sluice(*local("away", "--base-url", url)).code == 0
    outcome = sluice("provider", "test", "away")
    assert outcome.code == 1
    assert "sluice: away: " in outcome.err
    assert "no connection" in outcome.err.lower()


def test_a_row_with_an_address_of_its_own_is_called_there_with_its_own_key(
    sluice: Command, sandbox: SandboxControl, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{_closed_port()}/v1")
    added = sluice(
        *local("custom", "--base-url", sandbox.openai_base_url, "--model", "gpt-4o-mini"),
        "--key-stdin",
        stdin=KEY,
    )
    assert added.code == 0, added
    said = sluice("provider", "test", "custom", "--json").json
    assert said["key"] == "row"
    # By the row's own price: 100 and 400 nano-USD a token.
    assert said["cost_nano_usd"] == 100 * said["usage"]["input"] + 400 * said["usage"]["output"]


def test_a_row_elsewhere_is_not_given_the_fleets_key(sluice: Command) -> None:
    assert sluice(*local("elsewhere", "--base-url", "https://api.example.com/v1")).code == 0
    outcome = sluice("provider", "test", "elsewhere")
    assert outcome.code == 1
    assert "There is no openai key" in outcome.err


def test_a_test_goes_by_the_accounts_own_row(sluice: Command, sandbox: SandboxControl) -> None:
    assert sluice("account", "add", "acme").code == 0
    own = ("provider", "add", "openai-gpt-6-luna", "--pool", "openai", "--account", "acme")
    assert sluice(*own, "--model", "gpt-4o").code == 0
    sluice("provider", "test", "openai-gpt-6-luna", "--account", "acme")
    sluice("provider", "test", "openai-gpt-6-luna")
    sluice("provider", "test", "openai-gpt4o-mini", "--account", "acme")
    assert [call["model"] for call in sandbox.calls()] == ["gpt-4o", "gpt-6-luna", "gpt-4o-mini"]


# Use cases


def test_use_cases_are_listed_with_their_providers_in_order(sluice: Command) -> None:
    head, *lines = sluice("usecase", "list").out.splitlines()
    assert head.split("\t") == [
        *("name", "description", "prefer", "max tokens", "unknown", "active", "providers"),
    ]
    listed = {line.split("\t")[0]: line.split("\t")[1:] for line in lines}
    assert listed["voice"][1:] == [
        *("fastest", "512", "retry_once", "yes"),
        "openai-gpt-6-luna, anthropic-claude-haiku-5-5",
    ]
    names = [one["name"] for one in sluice("usecase", "list", "--json").json["use_cases"]]
    assert names == ["complex", "draft", "general", "summary", "vision", "voice"]


def test_use_cases_go_by_the_catalogue_that_is_set(
    sluice: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLUICE_CATALOGUE", "original")
    shown = sluice("usecase", "show", "draft", "--json").json
    assert shown["providers"][0] == {
        "name": "anthropic-claude-haiku-4-5",
        "pool": "anthropic",
        "model": "claude-haiku-4-5",
    }


def test_a_use_case_is_added_changed_and_switched(sluice: Command, engine: Engine) -> None:
    added = sluice(
        *("usecase", "add", "classify", "--description", "Sort mails.", "--prefer", "cheapest"),
        *("--max-tokens", "64", "--unknown-policy", "fail"),
        *("--provider", "openai-gpt-6-luna,anthropic-claude-haiku-5-5", "--json"),
    ).json
    names = {one["name"] for one in added.pop("providers")}
    assert names == {"openai-gpt-6-luna", "anthropic-claude-haiku-5-5"}
    assert added == {
        "name": "classify",
        "description": "Sort mails.",
        "prefer": "cheapest",
        "max_tokens": 64,
        "unknown_policy": "fail",
        "is_active": True,
    }
    changed = sluice(
        *("usecase", "set", "classify", "--provider", "openai-gpt-6-luna", "--prefer", "fastest"),
        "--json",
    ).json
    assert changed["prefer"] == "fastest"
    assert changed["max_tokens"] == 64
    assert [one["name"] for one in changed["providers"]] == ["openai-gpt-6-luna"]
    (haiku,) = rows(
        engine, "SELECT use_case FROM llm_providers WHERE name = 'anthropic-claude-haiku-5-5'"
    )
    assert haiku.use_case == ["draft", "summary"]
    off = sluice("usecase", "disable", "classify")
    assert off.out == "classify\tdisabled\topenai-gpt-6-luna\n"
    shown = dict(
        line.split("\t") for line in sluice("usecase", "show", "classify").out.splitlines()
    )
    assert (shown["active"], shown["description"]) == ("no", "Sort mails.")
    assert sluice("usecase", "enable", "classify", "--json").json["is_active"]


def test_a_use_case_without_providers_is_served_by_the_default(sluice: Command) -> None:
    outcome = sluice("usecase", "add", "classify")
    assert outcome == (0, "classify\tactive\topenai-gpt-6-luna\n", "")
    for name in ("openai-gpt-6-luna", "openai-gpt4o-mini"):
        assert sluice("provider", "set", name, "--no-default", "--force").code == 0
    outcome = sluice("usecase", "add", "sort")
    assert outcome.out == "sort\tactive\t\n"
    assert "no provider serves it; `sluice provider set NAME --use-case sort`" in outcome.err


def test_a_disabled_use_case_takes_no_jobs(
    sluice: Command, given: Settings, engine: Engine, redis_client: redis.Redis
) -> None:
    from sluicegate.producers.client import Sluice as Client

    with Client(given) as client:
        client.submit("voice", "hello")
    outcome = sluice("usecase", "disable", "voice")
    assert outcome.err == "sluice: 1 of its jobs wait, and will be done\n"
    refused = sluice("submit", "voice", "hello")
    assert refused.code == 2
    assert refused.err.startswith("sluice: use_case: 'voice' is disabled; there are complex, draft")
    assert sluice("usecase", "enable", "voice").code == 0


# Accounts


def test_an_account_and_what_it_has(
    sluice: Command, engine: Engine, redis_client: redis.Redis, given: Settings
) -> None:
    from sluicegate.producers.client import Sluice as Client

    added = sluice("account", "add", "acme", "--time-zone", "Europe/Berlin", "--json").json
    with Client(given) as client:
        job = client.submit("voice", "hello", account="acme")
        client.submit("voice", "hello", account="acme")
    worker = StandIn(engine=engine, client=redis_client, settings=given, job_id=job.id)
    worker.answer("hello", cost_nano_usd=1_500_000)
    assert sluice("secrets", "set", "openai", "--account", "acme", stdin=KEY).code == 0
    shown = sluice("account", "show", "acme", "--json").json
    assert {name: shown[name] for name in added} == added
    assert shown["jobs"] == {"queued": 1, "succeeded": 1}
    assert shown["keys"] == ["openai"]
    assert sluice("account", "show", added["id"], "--json").json == shown
    plain = dict(line.split("\t") for line in sluice("account", "show", "acme").out.splitlines())
    assert plain["jobs"] == "1 queued, 1 succeeded"
    assert (plain["time zone"], plain["own keys"]) == ("Europe/Berlin", "openai")
    assert plain["own providers"] == "none"


def test_an_accounts_money_by_its_own_months(sluice: Command, engine: Engine) -> None:
    # It is a new month in Kiritimati 26 hours before it is one in Pago Pago.
    added = sluice("account", "add", "acme", "--time-zone", "Pacific/Kiritimati", "--json").json
    entry = (
        "INSERT INTO cost_entries (attempt_id, job_id, account_id, use_case, provider_id, provider,"
        " model, kind, amount_nano_usd, baseline_nano_usd, price_version, dispatched_at) SELECT"
        f" gen_random_uuid(), gen_random_uuid(), '{added['id']}', 'draft', gen_random_uuid(), 'p',"
        " 'm', 'actual', {amount}, 0, 'v', date_trunc('month', now() AT TIME ZONE"
        " 'Pacific/Kiritimati') AT TIME ZONE 'Pacific/Kiritimati' + interval '{shift}' RETURNING 1"
    )
    rows(engine, entry.format(amount=1_000, shift="-1 second"))
    rows(engine, entry.format(amount=20_000, shift="0"))
    rows(engine, entry.format(amount=300_000, shift="1 second"))
    shown = sluice("account", "show", "acme", "--json").json
    assert (shown["cost_month_nano_usd"], shown["cost_nano_usd"]) == (320_000, 321_000)


def test_an_account_is_changed(sluice: Command) -> None:
    added = sluice("account", "add", "acme", "--json").json
    changed = sluice(
        *("account", "set", "acme", "--rename", "globex", "--time-zone", "Asia/Tokyo"),
        *("--inactive", "--json"),
    ).json
    assert changed == {
        "id": added["id"],
        "name": "globex",
        "time_zone": "Asia/Tokyo",
        "is_active": False,
    }
    refused = sluice("submit", "draft", "hello", "--account", "globex")
    assert refused.code == 2
    assert "there is no active account 'globex'" in refused.err
    shown = sluice("account", "list").out.splitlines()
    assert [line.split("\t")[-1] for line in shown if line.startswith("globex")] == ["no"]
    assert sluice("account", "set", "globex", "--active").out.split("\t")[-1] == "active\n"
    sluice("account", "add", "other")
    assert "exists already" in sluice("account", "set", "other", "--rename", "globex").err


@pytest.mark.parametrize("group", ["provider", "usecase", "account"])
def test_a_terminal_gets_a_table(variables: dict[str, str], group: str) -> None:
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "sluicegate.cli", group, "list"], env=variables, stdout=theirs
    ) as process:
        os.close(theirs)
        shown = b""
        try:
            while chunk := os.read(ours, 4096):
                shown += chunk
        except OSError:  # what Linux says at the end of a terminal
            pass
        os.close(ours)
    assert process.returncode == 0
    assert "┃" in shown.decode()
