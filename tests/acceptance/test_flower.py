"""Flower shows workers, queues and tasks by name, and what it is told to do is done."""

from __future__ import annotations

import base64
import html
import json
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit
from uuid import UUID, uuid4

import pytest
from pydantic import SecretStr

from sluicegate.shared.errors import JobCancelled, SettingsError
from sluicegate.shared.settings import Settings
from sluicegate.workers.local.flower import Flower
from sluicegate.workers.local.flower_guard import is_own
from tests.harness import Rig, Service, environment_of
from tests.polling import eventually

START_S = 60
#: Flower switches the workers' events on some seconds after its start, and every five seconds.
SEEN_S = 30
#: In a prompt, it makes the call last until somebody ends it.
ENDLESS = "Never answer."
BACKLOG = 40


@dataclass(frozen=True)
class Client:
    """A program that talks to a Flower."""

    url: str
    login: str | None = None

    def ask(self, path: str, *, post: bool = False, **headers: str) -> tuple[int, str]:
        """Return the status and the text of an answer."""
        if self.login is not None:
            headers["Authorization"] = f"Basic {base64.b64encode(self.login.encode()).decode()}"
        request = urllib.request.Request(
            self.url + path, data=b"" if post else None, headers=headers
        )
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as refusal:
            with refusal:
                return refusal.code, refusal.read().decode()

    def json(self, path: str) -> Any:
        """Return what its API says."""
        status, text = self.ask(path)
        assert status == 200, text
        return json.loads(text)

    def page(self, path: str) -> str:
        """Return the text that a page shows."""
        status, text = self.ask(path)
        assert status == 200, text
        return html.unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", text)))

    def post(self, path: str, status: int = 200) -> str:
        """Return the answer to a command."""
        found, text = self.ask(path, post=True)
        assert found == status, text
        return text


@pytest.fixture(autouse=True, scope="module")
def _no_settings_of_its_own() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("FLOWER_BASIC_AUTH", raising=False)
        yield


@pytest.fixture(scope="module")
def workers(module_rig: Rig) -> Iterator[dict[str, Service]]:
    """Start a worker that is busy with one job, and one that takes what comes."""
    keys = {
        "openai_api_key": SecretStr(f"sk-{uuid4().hex}"),
        "anthropic_api_key": SecretStr(f"sk-ant-{uuid4().hex}"),
        "encryption_keys": SecretStr(base64.urlsafe_b64encode(uuid4().bytes * 2).decode()),
    }
    module_rig.settings = module_rig.settings.model_copy(update=keys)
    started = {
        "busy": module_rig.begin_worker("openai", ["voice"], jobs_in_flight=1),
        "free": module_rig.begin_worker("anthropic", ["draft", "summary"]),
    }
    for worker in started.values():
        module_rig.await_worker(worker)
    yield started
    started["busy"].kill()  # its endless calls would use up the grace period


@pytest.fixture(scope="module")
def run_flower(module_rig: Rig, workers: dict[str, Service]) -> Iterator[Callable[..., Client]]:
    """Return a function that starts a Flower as `sluice up` does; it has seen the workers."""
    started: list[Service] = []

    def run(login: str | None = None) -> Client:
        flower = Flower.at("0")
        child = flower.child(environment_of(module_rig.settings), stage=0)
        log_path = module_rig.folder / f"flower-{len(started)}.log"
        service = Service("flower", list(child.argv), dict(child.env or {}), log_path)
        started.append(service)
        client = Client(flower.url, login)

        def ready() -> bool:
            if service.ended() is not None:
                pytest.fail(service.log)
            return child.ready is not None and child.ready()

        eventually(ready, START_S)
        seen = {f"{worker.name}@test" for worker in workers.values()}
        eventually(lambda: seen <= set(client.json("/api/workers?refresh=1")), START_S)
        return client

    yield run
    for service in started:
        service.end()


@pytest.fixture(scope="module")
def flower(run_flower: Callable[..., Client]) -> Client:
    """Start the Flower that this module's tests share."""
    return run_flower()


@pytest.fixture
def name(workers: dict[str, Service]) -> str:
    """Return the name of the worker that takes what comes."""
    return f"{workers['free'].name}@test"


@pytest.fixture
def hang(rig: Rig) -> None:
    """Let no prompt with ENDLESS be answered."""
    rig.sandbox.add_fault("hang", prompt_contains=ENDLESS)


def _watched(rig: Rig, flower: Client) -> None:
    """Wait until Flower hears of new tasks."""

    def heard() -> bool:
        (job_id,) = rig.submit("draft", 1)
        rig.await_over([job_id])
        return bool(flower.json("/api/tasks?limit=1"))

    eventually(heard, SEEN_S)


def _info(flower: Client, job_id: UUID, state: str) -> dict[str, Any]:
    """Return what Flower knows of a task once it is in this state."""

    def reached() -> dict[str, Any]:
        found: dict[str, Any] = flower.json(f"/api/task/info/{job_id}")
        assert found["state"] == state, found
        return found

    return eventually(reached, SEEN_S)


def test_workers_are_shown_by_name(flower: Client, workers: dict[str, Service], name: str) -> None:
    told = flower.json("/api/workers?refresh=1")
    assert {f"{worker.name}@test" for worker in workers.values()} <= set(told)
    worker = told[name]
    assert {queue["name"] for queue in worker["active_queues"]} == {
        "draft.anthropic",
        "summary.anthropic",
    }
    assert worker["registered"] == ["sluicegate.run_jobs"]
    assert worker["stats"]["pid"] == workers["free"].pid
    assert worker["stats"]["pool"]["implementation"] == "sluicegate.workers.pool:TaskPool"

    eventually(lambda: flower.json("/api/workers?status=1").get(name), SEEN_S)
    assert name in flower.page("/workers")
    page = flower.page(f"/worker/{quote(name)}")
    for words in (name, "workers.pool:TaskPool", "draft.anthropic", "sluicegate.run_jobs"):
        assert words in page


@pytest.mark.usefixtures("hang")
def test_queues_are_shown_with_their_lengths(
    flower: Client, workers: dict[str, Service], rig: Rig
) -> None:
    rig.submit("voice", BACKLOG, text=ENDLESS)
    eventually(lambda: rig.in_flight(workers["busy"]), SEEN_S)

    def lengths() -> dict[str, int]:
        queues = flower.json("/api/queues/length")["active_queues"]
        return {queue["name"]: queue["messages"] for queue in queues}

    def agreed() -> bool:
        waiting = rig.waiting("voice", "openai")
        expected = {"voice.openai": waiting, "draft.anthropic": 0, "summary.anthropic": 0}
        assert lengths().items() >= expected.items()
        assert f"voice.openai {waiting}" in flower.page("/broker")
        return 0 < waiting < BACKLOG

    eventually(agreed, SEEN_S)


@pytest.mark.usefixtures("hang")
def test_a_running_task_is_shown_and_revoked(flower: Client, rig: Rig, name: str) -> None:
    _watched(rig, flower)
    handle = rig.client.submit("draft", ENDLESS)
    running = _info(flower, handle.id, "STARTED")
    assert running["name"] == "sluicegate.run_jobs"
    assert running["args"] == str(handle.id)
    assert running["routing_key"] == "draft.anthropic"
    assert running["worker"] == name
    page = flower.page(f"/task/{handle.id}")
    for words in (str(handle.id), "sluicegate.run_jobs", "draft.anthropic", name, "STARTED"):
        assert words in page

    def active() -> bool:
        told = flower.json(f"/api/workers?refresh=1&workername={quote(name)}")[name]
        assert told["stats"]["pool"]["running"] >= 1
        return str(handle.id) in [task["id"] for task in told["active"]]

    eventually(active, SEEN_S)
    eventually(lambda: str(handle.id) in flower.page(f"/worker/{quote(name)}"), SEEN_S)

    flower.post(f"/api/task/revoke/{handle.id}?terminate=true")
    with pytest.raises(JobCancelled):
        handle.result(timeout=30)
    assert rig.states([handle.id]) == {"cancelled": 1}
    assert _info(flower, handle.id, "REVOKED")["routing_key"] == "draft.anthropic"


def test_a_finished_task_is_shown(flower: Client, rig: Rig, name: str) -> None:
    _watched(rig, flower)
    secret = uuid4().hex
    handle = rig.client.submit("summary", f"Summarise: {secret}")
    answer = handle.result(timeout=30).text
    done = _info(flower, handle.id, "SUCCESS")
    assert (done["args"], done["kwargs"]) == (str(handle.id), "{}")
    assert (done["routing_key"], done["worker"]) == ("summary.anthropic", name)
    assert done["runtime"] > 0
    column = quote("columns[0][data]") + "=name&" + quote("order[0][column]") + "=0"
    listed = flower.ask(f"/tasks/datatable?draw=1&start=0&length=1000&{column}")[1]
    assert str(handle.id) in [task["uuid"] for task in json.loads(listed)["data"]]
    assert "UUID" in flower.page("/tasks")
    shown = [flower.page(f"/task/{handle.id}"), flower.ask("/api/tasks")[1], listed]
    for text in shown:
        assert str(handle.id) in text
        assert secret not in text
        assert answer not in text


def test_the_pool_grows_and_shrinks(flower: Client, name: str) -> None:
    def size() -> int:
        told = flower.json(f"/api/workers?refresh=1&workername={quote(name)}")[name]
        return int(told["stats"]["pool"]["max-concurrency"])

    before = size()
    flower.post(f"/api/worker/pool/grow/{quote(name)}?n=3")
    assert eventually(lambda: size() == before + 3)
    flower.post(f"/api/worker/pool/shrink/{quote(name)}?n=3")
    assert eventually(lambda: size() == before)
    assert "needs at least one" in flower.post(f"/api/worker/pool/shrink/{quote(name)}?n=99", 403)


def _secrets(settings: Settings) -> dict[str, str]:
    """What nobody may read, by the setting's name."""
    found = {}
    for field in Settings.model_fields:
        value = getattr(settings, field)
        if isinstance(value, SecretStr):
            plain = value.get_secret_value()
            found[field] = urlsplit(plain).password if "://" in plain else plain
    return {field: value for field, value in found.items() if value}


def test_no_secret_is_shown(flower: Client, rig: Rig, workers: dict[str, Service]) -> None:
    secrets = _secrets(rig.settings)
    assert {"openai_api_key", "anthropic_api_key", "encryption_keys"} <= set(secrets)
    shown = {
        path: flower.ask(path)[1]
        for path in (
            "/api/workers?refresh=1",
            *(f"/worker/{quote(worker.name)}@test" for worker in workers.values()),
            "/workers",
            "/broker",
            "/tasks",
            "/api/tasks",
            "/metrics",
        )
    }
    assert "broker_transport_options" in shown["/api/workers?refresh=1"]
    for path, text in shown.items():
        for field, secret in secrets.items():
            assert secret not in text, f"{path} shows {field}"
    told = "".join(path.read_text() for path in rig.folder.glob("flower-*.log"))
    assert not [field for field, secret in secrets.items() if secret in told]


def test_pages_of_others_are_refused(flower: Client, name: str) -> None:
    path = f"/api/worker/pool/grow/{quote(name)}"
    assert flower.ask(path, post=True, Origin="https://example.org")[0] == 403
    assert flower.ask("/api/workers", Origin="null")[0] == 403
    assert flower.ask("/api/workers", Host="example.org:5555")[0] == 403
    assert flower.ask("/api/workers", Origin=flower.url)[0] == 200


@pytest.mark.parametrize(
    ("host", "origin", "own"),
    [
        ("127.0.0.1:5555", None, True),
        ("127.0.0.1:5555", "http://127.0.0.1:5555", True),
        ("localhost:5555", "http://localhost:5555", True),
        ("[::1]:5555", None, True),
        ("localhost", None, True),
        ("127.0.0.1:5555", "http://127.0.0.1:8000", False),
        ("127.0.0.1:5555", "https://example.org", False),
        ("127.0.0.1:5555", "null", False),
        ("example.org:5555", "http://example.org:5555", False),
        ("[", None, False),
        ("", None, False),
    ],
)
def test_whose_page_asks(host: str, origin: str | None, own: bool) -> None:
    assert is_own(host, origin) is own


def test_with_authentication_nobody_else_gets_in(
    run_flower: Callable[..., Client], monkeypatch: pytest.MonkeyPatch
) -> None:
    login = f"operator:{uuid4().hex}"
    monkeypatch.setenv("FLOWER_BASIC_AUTH", login)
    flower = run_flower(login)
    for path in ("/api/workers", "/workers", "/broker", "/api/tasks"):
        assert flower.ask(path)[0] == 200
        assert Client(flower.url).ask(path)[0] == 401
        assert Client(flower.url, "operator:wrong").ask(path)[0] == 401


def test_who_may_open_it_is_read_from_the_env_file_too(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("FLOWER_BASIC_AUTH=operator:secret\nOPENAI_API_KEY=x\n")
    flower = Flower.at("0.0.0.0:0")
    child = flower.child({}, stage=0)
    assert child.env is not None
    assert child.env["FLOWER_BASIC_AUTH"] == "operator:secret"
    assert "FLOWER_UNAUTHENTICATED_API" not in child.env
    assert "operator:secret" not in repr(flower)


@pytest.mark.parametrize(
    ("address", "login", "sentence"),
    [
        ("0.0.0.0:5555", None, r"others reach 0\.0\.0\.0.*set FLOWER_BASIC_AUTH=user:password"),
        ("[::]:5555", None, "others reach ::"),
        ("example.org:5555", None, r"others reach example\.org"),
        ("5555", "operator", "FLOWER_BASIC_AUTH: must look like user:password"),
        ("5555", "", "FLOWER_BASIC_AUTH: must look like user:password"),
        ("5555", "one:secret,two:", "FLOWER_BASIC_AUTH: must look like user:password"),
        ("web", None, "'web' is not PORT or HOST:PORT"),
        ("127.0.0.1:", None, "is not PORT or HOST:PORT"),
        ("65536", None, "'65536' is not PORT or HOST:PORT"),
        ("-1", None, "'-1' is not PORT or HOST:PORT"),
    ],
)
def test_where_it_may_not_listen(
    monkeypatch: pytest.MonkeyPatch, address: str, login: str | None, sentence: str
) -> None:
    if login is not None:
        monkeypatch.setenv("FLOWER_BASIC_AUTH", login)
    with pytest.raises(SettingsError, match=sentence) as refused:
        Flower.at(address)
    assert "secret" not in str(refused.value)


def test_shut_down_lets_a_worker_end_its_work(flower: Client, rig: Rig) -> None:
    worker = rig.start_worker("openai", ["general"])
    name = f"{worker.name}@test"
    eventually(lambda: name in flower.json("/api/workers?refresh=1"), SEEN_S)
    rig.sandbox.settings(first_token_ms=50, tokens_per_s=200)
    (job_id,) = rig.submit("general", 1, text="Write.\nTOKENS: 400", stream=True)
    eventually(lambda: rig.in_flight(worker), SEEN_S)
    flower.post(f"/api/worker/shutdown/{quote(name)}")
    assert worker.wait(30) == 0, worker.log
    assert rig.states([job_id]) == {"succeeded": 1}
    flower.post("/api/worker/shutdown/nobody@test", 404)
