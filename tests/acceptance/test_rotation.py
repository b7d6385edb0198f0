"""Keys in the database alone, opened by real workers, and rotated while jobs run."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any
from uuid import UUID

import orjson
import pytest

from sluicegate.shared.celery_app import make_celery
from sluicegate.shared.secrets import Secret, new_key
from sluicegate.shared.settings import Settings
from sluicegate.workers.local.sandbox_control import SandboxControl
from tests.command_line import Command
from tests.dumping import dump
from tests.harness import FULL, Rig, Service, open_rig
from tests.polling import eventually

#: Jobs that each account adds when the workers are about to run out.
JOBS = 100 if FULL else 20
ACCOUNTS = ("acme", "globex", "default")

OLD, NEW = new_key(), new_key()
BOTH = Secret(f"{NEW.get_secret_value()},{OLD.get_secret_value()}")
KEYS = {name: f"sk-recognisable-{name}" for name in ACCOUNTS}
NEXT = "sk-recognisable-next"

Run = Callable[..., str]


@pytest.fixture
def rig(postgres: Any, valkey: str, sandbox: SandboxControl, tmp_path: Path) -> Iterator[Rig]:
    """Return a rig whose environment holds no key of a provider."""
    with (
        postgres.database(template=postgres.template) as url,
        open_rig(
            database_url=url,
            redis_url=valkey,
            sandbox=sandbox,
            folder=tmp_path,
            openai_api_key=None,
            anthropic_api_key=None,
            encryption_keys=OLD,
            jobs_in_flight=10,
        ) as rig,
    ):
        yield rig


@pytest.fixture
def sluice(rig: Rig, command_line: Callable[[Settings], Command]) -> Run:
    """Return a function that runs a command with some keys, and returns all it said."""

    def run(*arguments: str, encryption_keys: Secret = OLD, stdin: str = "") -> str:
        settings = rig.settings.model_copy(update={"encryption_keys": encryption_keys})
        done = command_line(settings)(*arguments, stdin=stdin)
        assert done.code == 0, done.err
        return done.out + done.err

    return run


def digest(key: str) -> str:
    return sha256(key.encode()).hexdigest()


def keys_of(rig: Rig, ids: list[UUID]) -> set[str]:
    """Return the digests of the keys that these jobs' calls came with."""
    return {call["key_sha256"] for calls in rig.calls(ids).values() for call in calls}


class Load:
    """Jobs of all accounts, so many that the workers are never idle while something is done."""

    def __init__(self, rig: Rig, sluice: Run) -> None:
        self._rig = rig
        self._sluice = sluice
        self.ids: dict[str, list[UUID]] = {name: [] for name in ACCOUNTS}

    @property
    def all_ids(self) -> list[UUID]:
        return [one for ids in self.ids.values() for one in ids]

    def go_on(self, until: Callable[[], object]) -> None:
        """Submit what is needed until something is so."""

        def step() -> object:
            states = self._rig.states(self.all_ids)
            if states.get("queued", 0) + states.get("running", 0) < 2 * JOBS:
                for name in ACCOUNTS:
                    self.ids[name] += self._rig.submit("general", JOBS, account=name)
            return until()

        eventually(step, 60)

    def run(self, *arguments: str, **options: Any) -> str:
        """Run a command while jobs run."""
        self.go_on(lambda: self._rig.states(self.all_ids).get("running"))
        said = self._sluice(*arguments, **options)
        self.go_on(lambda: self._rig.states(self.all_ids).get("running"))
        return said

    def hand_over(self, old: Service, **changes: Any) -> Service:
        """Start another worker beside one, and end that one, while jobs run."""
        new = self._rig.begin_worker("openai", ["general"], **changes)
        self.go_on(lambda: self._rig.in_flight(old) and self._rig.in_flight(new))
        old.signal(signal.SIGTERM)
        self.go_on(lambda: old.ended() is not None)
        assert old.ended() == 0, old.log
        return new


@pytest.mark.timeout(900 if FULL else 300)
def test_all_keys_change_under_load_and_no_job_fails(rig: Rig, sluice: Run) -> None:
    for name in ("acme", "globex"):
        sluice("account", "add", name)
        sluice("secrets", "set", "openai", "--account", name, stdin=KEYS[name])
    sluice("secrets", "set", "openai", stdin=KEYS["default"])
    rig.sandbox.settings(latency_ms=200)
    rig.start_sweep()
    load = Load(rig, sluice)

    # The new key comes to the workers, which read with both; everything is encrypted with it; the
    # old one goes.
    worker = rig.start_worker("openai", ["general"])
    worker = load.hand_over(worker, encryption_keys=BOTH)
    said = load.run("secrets", "rotate", encryption_keys=BOTH)
    assert "3 encrypted anew, 0 with the newest key already, 0 unreadable" in said
    worker = load.hand_over(worker, encryption_keys=NEW)
    rig.await_over(load.all_ids)
    for name, ids in load.ids.items():
        assert keys_of(rig, ids) == {digest(KEYS[name])}

    # The provider's own key is another one.
    load.run("secrets", "set", "openai", encryption_keys=NEW, stdin=NEXT)
    eventually(lambda: _opened_by(rig, NEXT), 60)
    rig.await_over(load.all_ids)
    rig.check_once(load.all_ids)
    for name in ("acme", "globex"):
        assert keys_of(rig, load.ids[name]) == {digest(KEYS[name])}
    assert keys_of(rig, load.ids["default"]) <= {digest(KEYS["default"]), digest(NEXT)}
    _check_nothing_shows(rig, worker.name)


def _opened_by(rig: Rig, key: str) -> bool:
    """Whether a call of everybody's comes with this key now."""
    probe = rig.submit("general", 1)
    rig.await_over(probe)
    return keys_of(rig, probe) == {digest(key)}


def _check_nothing_shows(rig: Rig, worker: str) -> None:
    app = make_celery(rig.settings)
    try:
        asked = app.control.inspect([f"{worker}@test"], timeout=10)
        told = [asked.conf(with_defaults=True), asked.stats(), asked.report()]
    finally:
        app.close()
    assert all(told)
    logs = "".join(path.read_text(errors="replace") for path in rig.folder.glob("*.log"))
    shown = orjson.dumps(told).decode() + logs + dump(rig.settings.database_dsn)
    assert "recognisable" not in shown
    for key in (OLD, NEW):
        assert key.get_secret_value() not in shown


def test_a_worker_without_the_key_fails_its_jobs_and_says_what_to_do(rig: Rig, sluice: Run) -> None:
    sluice("secrets", "set", "openai", stdin=KEYS["default"])
    rig.start_sweep()
    worker = rig.start_worker("openai", ["general"], encryption_keys=NEW)
    (job_id,) = rig.submit("general", 1)
    rig.await_over([job_id])
    (row,) = rig.rows("SELECT body FROM results WHERE job_id = %(id)s", id=job_id)
    error = row.body["error"]
    assert (row.body["state"], error["error_class"]) == ("failed", "auth")
    assert error["message"] == (
        "The worker cannot decrypt the openai key for every account: put what it was encrypted "
        "with into the worker's SLUICE_ENCRYPTION_KEYS and restart it, or set the key anew; "
        "then run `sluice job retry`; it is not tried again by itself"
    )
    assert rig.calls([job_id]) == {}
    assert rig.booked_nano_usd([job_id]) == 0
    rig.check_books([job_id])
    assert "cannot decrypt the openai key" in worker.log
    assert "Traceback" not in worker.log

    sluice("secrets", "set", "openai", encryption_keys=NEW, stdin=NEXT)

    eventually(lambda: _opened_by(rig, NEXT), 60)
    assert worker.ended() is None
    _check_nothing_shows(rig, worker.name)
