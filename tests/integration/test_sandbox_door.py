"""The sandbox provider as a process and as an HTTP server."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sluicegate.workers.local.sandbox_control import SandboxControl, SandboxControlError
from tests.sandbox_clients import (
    DEADLINE_S,
    cleaned,
    connected,
    post,
    raw_request,
    running,
    serving,
)

both_wires = pytest.mark.parametrize("wire", ["openai", "anthropic"])


@pytest.fixture(scope="module")
def server() -> Iterator[SandboxControl]:
    with serving() as control:
        yield control


@pytest.fixture
def sandbox(server: SandboxControl) -> SandboxControl:
    return cleaned(server)


def test_pipelined_requests_are_answered_in_order(sandbox: SandboxControl) -> None:
    count = 40
    with connected(sandbox) as connection, connection.makefile("rb") as answers:
        connection.sendall(b"".join(raw_request(f"ECHO: {i}") for i in range(count)))
        for i in range(count):
            assert answers.readline() == b"HTTP/1.1 200 OK\r\n"
            headers = http.client.parse_headers(answers)
            answered = json.loads(answers.read(int(headers["content-length"])))
            assert answered["choices"][0]["message"]["content"] == str(i)


def test_a_request_in_small_pieces_is_one_request(sandbox: SandboxControl) -> None:
    with connected(sandbox) as connection:
        for byte in raw_request("ECHO: piecemeal"):
            connection.sendall(bytes([byte]))
        assert b"piecemeal" in connection.recv(100_000)
    assert sandbox.bill()["calls"] == 1


def test_a_client_that_waits_for_continue_is_asked_on(sandbox: SandboxControl) -> None:
    head, _, body = raw_request("ECHO: hi").partition(b"\r\n\r\n")
    with connected(sandbox) as connection:
        connection.sendall(head + b"\r\nexpect: 100-continue\r\n\r\n")
        assert connection.recv(1_000).startswith(b"HTTP/1.1 100 ")
        connection.sendall(body)
        assert connection.recv(100_000).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"this is not http\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\nlong: " + b"x" * 700_000, b"431"),
        (raw_request("hello")[:-1] + b"\x00", b"400"),
        (b"GET /v2/nothing HTTP/1.1\r\nhost: x\r\n\r\n", b"404"),
    ],
    ids=["garbage", "long head", "bad JSON", "no such path"],
)
def test_bad_requests_get_an_answer(sent: bytes, status: bytes, sandbox: SandboxControl) -> None:
    with connected(sandbox) as connection:
        try:
            connection.sendall(sent)
        except (BrokenPipeError, ConnectionResetError):
            assert status == b"431"  # it hung up on us in the middle
            return
        try:
            assert connection.recv(1_000).startswith(b"HTTP/1.1 " + status)
        except ConnectionResetError:
            assert status == b"431"


@both_wires
def test_a_body_above_32_mb_is_refused(wire: str, sandbox: SandboxControl) -> None:
    path = "/v1/chat/completions" if wire == "openai" else "/v1/messages"
    answered = json.loads(post(sandbox, path, {"x": "y" * 33 * 1024 * 1024}))
    assert "32 MB" in answered["error"]["message"]
    assert sandbox.calls()[0]["status"] == 413


def test_bad_settings_and_faults_are_refused_with_a_sentence(sandbox: SandboxControl) -> None:
    for changes in ({"latency_ms": -1}, {"speed": 1}, {"headers": {"x": "a\r\nb"}}):
        with pytest.raises(SandboxControlError, match=next(iter(changes))):
            sandbox.settings(**changes)
    with pytest.raises(SandboxControlError, match="fault"):
        sandbox.add_fault("no_such_fault")
    with pytest.raises(SandboxControlError, match="there is no fault rule 99"):
        sandbox.remove_fault(99)
    assert sandbox.settings()["latency_ms"] == 5
    with pytest.raises(TimeoutError, match="0 of 1 calls"):
        sandbox.wait_for_calls(1, 0.05)


def test_stopping_is_clean_also_with_calls_running(tmp_path: Path) -> None:
    log, port_file = tmp_path / "calls.jsonl", tmp_path / "port"
    options = ("--log", str(log), "--port-file", str(port_file), "--latency-ms", "0")
    with running(*options, "--tokens-per-s", "1") as (sandbox, process):
        assert f":{json.loads(port_file.read_text())['port']}" in sandbox.anthropic_base_url
        post(sandbox, "/v1/chat/completions", json.loads(raw_request("hi").split(b"\r\n\r\n")[1]))
        sandbox.add_fault("hang", prompt_contains="hang")
        with connected(sandbox) as streaming, connected(sandbox) as hanging:
            streaming.sendall(raw_request("TOKENS: 100", stream=True))
            hanging.sendall(raw_request("hang"))
            assert streaming.recv(1)
            sandbox.wait_for_calls(3, DEADLINE_S)
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=DEADLINE_S)
    assert (process.returncode, errors) == (0, b"")
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert sorted(line["seq"] for line in lines) == [1, 2, 3]
    billed = {line["seq"]: line["billed_nano_usd"] for line in lines}
    assert billed[1] > 0
    assert min(billed[2], billed[3]) == 0 < max(billed[2], billed[3])
    assert all(line["finished_at"] for line in lines)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--host", "0.0.0.0"], "--allow-remote"),
        (["--host", "example.org"], "--allow-remote"),
        (["--latency-ms", "-1"], "latency_ms"),
        (["--log", "/nowhere/at/all"], "/nowhere/at/all"),
    ],
)
def test_bad_options_are_one_sentence(options: list[str], says: str) -> None:
    command = [sys.executable, "-m", "sluicegate.workers.local.sandbox", *options]
    ended = subprocess.run(command, capture_output=True, timeout=DEADLINE_S, check=False)
    assert ended.returncode == 2
    assert says in ended.stderr.decode()
    assert b"Traceback" not in ended.stderr


def test_a_taken_port_is_one_sentence(sandbox: SandboxControl) -> None:
    port = sandbox.anthropic_base_url.rpartition(":")[2]
    command = [sys.executable, "-m", "sluicegate.workers.local.sandbox", "--port", port]
    ended = subprocess.run(command, capture_output=True, timeout=DEADLINE_S, check=False)
    assert ended.returncode == 1
    assert ended.stderr.decode().startswith(f"sandbox: cannot serve on 127.0.0.1:{port}")


def test_health(sandbox: SandboxControl) -> None:
    health = sandbox.health()
    assert health["ok"]
    assert health["pid"] != os.getpid()
    assert time.time() > health["up_s"] > 0
