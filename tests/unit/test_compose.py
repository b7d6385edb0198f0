"""`docker-compose.yml`: parses, starts what exists, watches everything, holds no secret."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from sluicegate.shared.jobs import Lane
from sluicegate.shared.queues import POOLS
from sluicegate.shared.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docker-compose.yml").read_text()
COMPOSE = yaml.safe_load(TEXT)
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = {name for name, service in SERVICES.items() if service["image"] == "sluicegate"}
WORKERS = {
    f"worker-{pool}" + ("-bulk" if lane is Lane.BULK else ""): ["sluice", "worker", pool]
    + (["--lane", "bulk"] if lane is Lane.BULK else [])
    for pool in POOLS
    for lane in Lane
}
PROGRAMS = {
    "sluice": [sys.executable, "-m", "sluicegate.cli"],
    "celery": [sys.executable, "-m", "celery"],
}


def test_the_services() -> None:
    assert set(SERVICES) == {"postgres", "redis", "migrate", "sweep", "http", "flower", *WORKERS}
    for name, command in WORKERS.items():
        assert SERVICES[name]["command"] == command


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_each_service_is_watched(name: str) -> None:
    check = SERVICES[name]["healthcheck"]
    kind, *words = check["test"]
    assert kind in ("CMD", "CMD-SHELL")
    assert words
    for limit in ("interval", "timeout", "start_period"):
        assert re.fullmatch(r"\d+s", check[limit])
    if words[:2] == ["python", "-c"]:
        compile(words[2], name, "exec")


# The workers' commands differ in what they are told only; the test above knows each.
@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("worker-openai-bulk", "worker"),
        ("sweep", "sweep"),
        ("migrate", "upgrade"),
        ("flower", "flower"),
        ("http", "http"),
    ],
)
def test_each_command_exists(name: str, command: str) -> None:
    program, *words = SERVICES[name]["command"]
    run = subprocess.run(
        [*PROGRAMS[program], *words, "--help"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert re.search(rf"Usage: .*\b{command}\b", run.stdout)


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_each_service_starts_after_what_it_needs(name: str) -> None:
    wanted = {
        "postgres": {},
        "redis": {},
        "migrate": {"postgres": "service_healthy"},
    }.get(name, {"migrate": "service_completed_successfully", "redis": "service_healthy"})
    needs = SERVICES[name].get("depends_on", {})
    assert {other: need["condition"] for other, need in needs.items()} == wanted


@pytest.mark.parametrize("name", sorted(OURS - {"flower"}))
def test_running_calls_may_end(name: str) -> None:
    grace_s = Settings.model_fields["grace_s"].default
    assert int(SERVICES[name]["stop_grace_period"].removesuffix("s")) > grace_s


def test_redis_forgets_nothing() -> None:
    config = SERVICES["redis"]["command"][-1]
    assert "maxmemory-policy noeviction\n" in config
    assert "appendonly yes\n" in config
    assert "redis:/data" in SERVICES["redis"]["volumes"]


def test_what_is_published_is_so_on_this_machine_only() -> None:
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert published == {"flower": ["127.0.0.1:5555:5555"], "http": ["127.0.0.1:3002:3002"]}


def test_it_holds_no_secret() -> None:
    from_env_file = re.compile(r"\$\{[A-Z_]+:\?[^}]+\}")
    secrets = {
        f"{name}: {variable}": value
        for name, service in SERVICES.items()
        for variable, value in service.get("environment", {}).items()
        if re.search("PASSWORD|KEY|AUTH|URL", variable)
    }
    assert secrets
    for name, value in secrets.items():
        in_url = value.rpartition("@")[0].rpartition("/")[2].partition(":")[2]
        secret = in_url if "URL" in name else value
        assert secret == "" or from_env_file.fullmatch(secret), name
    assert re.findall(r"requirepass (.*)", TEXT) == ["$$REDIS_PASSWORD"]


def test_the_image_runs_as_a_normal_user_and_installs_by_hash() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    final = dockerfile.rpartition("\nFROM ")[2]
    assert re.search(r"(?m)^USER (?!root)", final)
    assert "--require-hashes" in dockerfile
    kept = {
        line.removeprefix("!")
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    copied = {
        word
        for line in re.findall(r"(?m)^COPY (?!--from)(.*)$", dockerfile)
        for word in line.split()[:-1]
    }
    assert copied == kept
