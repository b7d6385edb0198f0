"""Clients that send too much, too slowly, too often or never listen are shown the door."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from select import select
from typing import Any

import httpx2
import pytest

from tests.harness import Rig
from tests.http_servers import HttpServer, make_key, start_http
from tests.polling import eventually

LIMITS: dict[str, Any] = {
    "http_max_body_bytes": 200_000,
    "http_head_timeout_s": 1.0,
    "http_body_timeout_s": 1.0,
    "http_keep_alive_s": 0.3,
    "http_max_connections": 40,
    "http_rate_per_s": 5.0,
    "http_rate_burst": 20,
    "http_stall_timeout_s": 0.5,
    # Nobody works here.
    "http_queue_age_s": 3600.0,
    "http_cors_origins": "https://crm.example.com, https://other.example.com",
}


@pytest.fixture(scope="module")
def server(module_rig: Rig) -> HttpServer:
    return start_http(module_rig, **LIMITS)


@pytest.fixture(scope="module")
def narrow(module_rig: Rig) -> HttpServer:
    """Return a server with one place for streams and waits."""
    return start_http(module_rig, http_max_streams=1)


@pytest.fixture
def fresh(server: HttpServer, rig: Rig) -> dict[str, str]:
    """Return the headers of a caller that nobody has heard of yet."""
    return {"Authorization": f"Bearer {make_key(rig.settings)}"}


@contextmanager
def line_to(server: HttpServer) -> Iterator[socket.socket]:
    port = int(server.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), 20) as line:
        yield line


def rest_of(line: socket.socket) -> bytes:
    pieces = []
    while piece := line.recv(65_536):
        pieces.append(piece)
    return b"".join(pieces)


def error_of(answer: bytes) -> tuple[int, str]:
    head, _, body = answer.partition(b"\r\n\r\n")
    error = json.loads(body)["error"]
    assert set(error) == {"code", "message", "field", "jobId", "requestId"}
    return int(head.split()[1]), error["code"]


def test_a_body_that_is_too_long(server: HttpServer, fresh: dict[str, str]) -> None:
    long = json.dumps({"prompt": "x" * 200_000})
    told = httpx2.post(f"{server.url}/api/llm", content=long, headers=fresh)
    assert (told.status_code, told.json()["error"]["code"]) == (413, "body_too_large")

    def pieces() -> Iterator[bytes]:
        for _ in range(30):
            yield b" " * 10_000

    untold = httpx2.post(f"{server.url}/api/llm", content=pieces(), headers=fresh)
    assert (untold.status_code, untold.json()["error"]["code"]) == (413, "body_too_large")


def test_headers_that_come_slowly(server: HttpServer) -> None:
    with line_to(server) as line:
        line.sendall(b"GET /health/live HTTP/1.1\r\n")
        for _ in range(3):
            line.sendall(b"X: y\r\n")
            time.sleep(0.1)  # a slow client: not a wait for anything
        before = time.monotonic()
        assert error_of(rest_of(line)) == (408, "headers_too_slow")
        assert time.monotonic() - before < 5


def test_a_connection_that_says_nothing(server: HttpServer) -> None:
    with line_to(server) as line:
        assert rest_of(line) == b""


def test_headers_that_do_not_end(server: HttpServer) -> None:
    with line_to(server) as line:
        line.sendall(b"GET /health/live HTTP/1.1\r\n" + b"X-Long: " + b"y" * 70_000)
        assert error_of(rest_of(line)) == (431, "headers_too_large")


def test_what_is_no_http(server: HttpServer) -> None:
    with line_to(server) as line:
        line.sendall(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n")
        assert error_of(rest_of(line)) == (400, "invalid_request")


def test_a_body_that_comes_slowly(server: HttpServer, fresh: dict[str, str]) -> None:
    with line_to(server) as line:
        head = f"Authorization: {fresh['Authorization']}\r\nContent-Length: 50\r\nHost: x\r\n\r\n"
        line.sendall(f"POST /api/llm HTTP/1.1\r\n{head}".encode() + b'{"prompt"')
        assert error_of(rest_of(line)) == (408, "body_too_slow")


def test_a_kept_connection_serves_many(server: HttpServer) -> None:
    with line_to(server) as line:
        for _ in range(3):
            line.sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
            answer = b""
            while not answer.endswith(b'{"status":"live"}'):
                answer += line.recv(65_536)
            assert answer.startswith(b"HTTP/1.1 200")


def test_too_many_connections(server: HttpServer) -> None:
    port = int(server.url.rpartition(":")[2])
    lines = [socket.create_connection(("127.0.0.1", port), 20) for _ in range(41)]
    try:
        assert error_of(rest_of(lines[-1])) == (503, "too_many_connections")
    finally:
        for line in lines:
            line.close()
    eventually(lambda: httpx2.get(f"{server.url}/health/live").is_success)


def test_requests_that_come_too_often(server: HttpServer, fresh: dict[str, str], rig: Rig) -> None:
    with httpx2.Client(base_url=server.url, headers=fresh) as client:
        before = time.monotonic()
        answers = [client.get("/api/budget") for _ in range(60)]
        took_s = time.monotonic() - before
        served = [answer for answer in answers if answer.is_success]
        refused = [answer for answer in answers if answer.status_code == 429]
        assert len(served) + len(refused) == 60
        assert len(served) <= 20 + 5 * took_s + 1
        assert refused
        assert refused[-1].json()["error"]["code"] == "rate_limited"
        assert int(refused[-1].headers["Retry-After"]) >= 1
        # Others are not held up, and the caller is let in again.
        other = {"Authorization": f"Bearer {make_key(rig.settings)}"}
        assert httpx2.get(f"{server.url}/api/budget", headers=other).is_success
        eventually(lambda: client.get("/api/budget").is_success)


def test_silence_is_filled_and_streams_are_counted(rig: Rig) -> None:
    server = start_http(rig, http_max_streams=2, http_keep_alive_s=0.3)
    with httpx2.Client(base_url=server.url, headers=server.headers, timeout=30) as client:
        url = client.post("/api/llm", json={"prompt": "a", "wait": 0}).headers["Location"]
        with client.stream("GET", f"{url}/events") as one:
            texts = one.iter_text()
            assert next(texts).startswith(": ")
            with client.stream("GET", f"{url}/events"):
                third = client.get(f"{url}/events", timeout=5)
                assert third.status_code == 503
                assert third.json()["error"]["code"] == "too_many_streams"
                assert "Retry-After" in third.headers

        def let_in() -> bool:
            with client.stream("GET", f"{url}/events") as again:
                return again.status_code == 200

        eventually(let_in)


MESSAGE: dict[str, Any] = {
    "model": "sluice/draft",
    "messages": [{"role": "user", "content": "a"}],
}


def submitted(client: httpx2.Client) -> str:
    """Return the id of a job, once there is a place for its request."""

    def job_id() -> str | None:
        answer = client.post("/api/llm", json={"prompt": "a", "wait": 0})
        return answer.json()["id"] if answer.is_success else None

    found = eventually(job_id)
    assert found is not None
    return found


def test_a_full_server_stores_no_job(narrow: HttpServer, rig: Rig) -> None:
    with httpx2.Client(base_url=narrow.url, headers=narrow.headers, timeout=20) as client:
        job_id = submitted(client)
        before = len(rig.rows("SELECT id FROM jobs"))
        with client.stream("GET", f"/api/llm/jobs/{job_id}/events"):
            for path in ("/api/llm", "/v1/chat/completions", "/v1/messages"):
                body = {"prompt": "a"} if path == "/api/llm" else MESSAGE | {"max_tokens": 9}
                for more in ({"stream": True}, {}):
                    refused = client.post(path, json=body | more)
                    assert refused.status_code == 503, refused.text
                    assert "1 streams and waiting requests" in refused.text
                    assert "Retry-After" in refused.headers
        assert len(rig.rows("SELECT id FROM jobs")) == before
    rig.client.cancel(job_id)


@pytest.mark.parametrize("waits", ["/api/llm", "/v1/messages", "/api/jobs/{id}/result?wait=60"])
def test_a_wait_counts_and_ends_with_its_client(narrow: HttpServer, rig: Rig, waits: str) -> None:
    """Nobody works here: without that, it would go on for a minute and more."""
    with httpx2.Client(base_url=narrow.url, headers=narrow.headers, timeout=20) as client:
        job_id = submitted(client)

        def status() -> int:
            return client.get(f"/api/jobs/{job_id}/result?wait=0").status_code

        asked: dict[str, Any] = {"prompt": "a", "wait": 300}
        if waits.startswith("/v1"):
            asked = MESSAGE | {"max_tokens": 9}
        body = b"" if "jobs" in waits else json.dumps(asked).encode()
        method = "POST" if body else "GET"
        head = f"{method} {waits.format(id=job_id)} HTTP/1.1\r\nHost: x\r\n"
        head += f"Authorization: {client.headers['Authorization']}\r\n"
        head += f"Content-Length: {len(body)}\r\n\r\n"
        with line_to(narrow) as line:
            line.sendall(head.encode() + body)

            def is_waiting() -> bool:
                if status() == 503:
                    return True
                if select([line], [], [], 0)[0]:
                    # Refused, for the look at the status had the place just then.
                    assert b"too_many_streams" in line.recv(65_536) or "/v1" in waits
                    line.sendall(head.encode() + body)
                return False

            eventually(is_waiting)
        eventually(lambda: status() == 200, 20)
    for row in rig.rows("SELECT id FROM jobs WHERE state = 'queued'"):
        rig.client.cancel(row.id)


def connections_of(server: HttpServer) -> int:
    """How many connections the process holds, those that nobody reads from any more among them."""
    port = int(server.url.rpartition(":")[2])
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    fields = [line.split() for line in lines]
    return sum(
        one[1].endswith(f":{port:04X}") and one[3] == "01" and one[9] != "0" for one in fields
    )


def answer_of(line: socket.socket) -> bytes:
    """Read the next answer, which is JSON of a length that is told."""
    with line.makefile("rb") as lines:
        head = b"".join(iter(lines.readline, b"\r\n"))
        length = int(head.lower().partition(b"content-length: ")[2].split()[0])
        return head + lines.read(length)


def test_a_body_that_nobody_waits_for(server: HttpServer) -> None:
    with line_to(server) as line:
        line.sendall(b"POST /api/llm HTTP/1.1\r\nHost: x\r\nContent-Length: 9999999\r\n\r\nx")
        assert answer_of(line).startswith(b"HTTP/1.1 401")
        line.sendall(b"y")
        assert rest_of(line) == b""


def test_a_body_that_comes_after_its_answer(server: HttpServer) -> None:
    """The client reads the answer, and may go on with the connection."""
    with line_to(server) as line:
        line.sendall(b"POST /api/llm HTTP/1.1\r\nHost: x\r\nContent-Length: 300000\r\n\r\n")
        assert answer_of(line).startswith(b"HTTP/1.1 401")
        line.sendall(b"x" * 300_000 + b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
        assert answer_of(line).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("times", [1000, 40])
def test_answers_that_nobody_reads(server: HttpServer, times: int) -> None:
    with line_to(server) as line:
        line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        eventually(lambda: connections_of(server) == 1)
        with suppress(TimeoutError, ConnectionError):
            line.settimeout(1)
            line.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * times)
            if times == 40:
                line.sendall(b"GET /health/live HTTP/1.1\r\nConnection: close\r\n\r\n")
        eventually(lambda: connections_of(server) == 0, 20)


def test_a_stream_that_nobody_reads(server: HttpServer, fresh: dict[str, str], rig: Rig) -> None:
    with httpx2.Client(base_url=server.url, headers=fresh, timeout=30) as client:
        url = client.post("/api/llm", json={"prompt": "a", "wait": 0}).headers["Location"]
    head = f"Authorization: {fresh['Authorization']}\r\nHost: x\r\n\r\n"
    with line_to(server) as line:
        line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        eventually(lambda: connections_of(server) == 1)
        with suppress(TimeoutError, ConnectionError):
            line.settimeout(1)
            line.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 40)
            line.sendall(f"GET {url}/events HTTP/1.1\r\n{head}".encode())
        eventually(lambda: connections_of(server) == 0, 20)


def test_a_stream_ends_when_it_is_old(rig: Rig) -> None:
    server = start_http(rig, http_stream_max_s=0.5)
    with httpx2.Client(base_url=server.url, headers=server.headers, timeout=20) as client:
        url = client.post("/api/llm", json={"prompt": "a", "wait": 0}).headers["Location"]
        for path in (f"{url}/events", f"/api/jobs/{url.rpartition('/')[2]}/events"):
            assert client.get(path).text == "retry: 1000\n\n"


def test_a_body_with_more_than_anybody_needs(server: HttpServer, fresh: dict[str, str]) -> None:
    body = json.dumps({"prompt": "a", **{f"k{n}": 1 for n in range(15_000)}}, separators=(",", ":"))
    for path in ("/api/llm", "/v1/chat/completions", "/v1/messages"):
        many = httpx2.post(f"{server.url}{path}", content="[" * 30_000, headers=fresh)
        assert (many.status_code, "25,000 values" in many.text) == (400, True)
    unknown = httpx2.post(f"{server.url}/api/llm", content=body, headers=fresh)
    assert (unknown.status_code, "k0" in unknown.text) == (400, True)
    foreign = json.loads(body) | {"model": "sluice/none", "messages": [{"role": "user"}]}
    foreign.pop("prompt")
    assert httpx2.post(f"{server.url}/v1/chat/completions", json=foreign, headers=fresh).is_error


def test_a_queue_that_is_too_old(rig: Rig) -> None:
    """Nobody works here: what waits gets older."""
    server = start_http(rig, http_queue_age_s=1.0)
    body = {"prompt": "a", "useCase": "summary", "wait": 0}
    with httpx2.Client(base_url=server.url, headers=server.headers, timeout=30) as client:
        (first, *_) = [client.post("/api/llm", json=body)]
        assert first.status_code == 202

        def refused() -> httpx2.Response | None:
            answer = client.post("/api/llm", json=body)
            is_old = answer.status_code == 429
            return answer if is_old and "queue" in answer.json()["error"]["code"] else None

        answer = eventually(refused)
        assert answer is not None
        assert int(answer.headers["Retry-After"]) >= 1
        assert "summary" in answer.json()["error"]["message"]
    for row in rig.rows("SELECT id FROM jobs WHERE state = 'queued'"):
        rig.client.cancel(row.id)


def test_only_pages_of_these_origins_may_call(server: HttpServer) -> None:
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x-a"}
    for origin, allowed in (("https://crm.example.com", True), ("https://evil.example", False)):
        preflight = httpx2.request(
            "OPTIONS", f"{server.url}/api/llm", headers={**asked, "Origin": origin}
        )
        assert ("access-control-allow-origin" in preflight.headers) == allowed
        answer = httpx2.get(f"{server.url}/health/live", headers={"Origin": origin})
        assert ("access-control-allow-origin" in answer.headers) == allowed


def test_unless_configured_no_page_may(rig: Rig) -> None:
    server = start_http(rig)
    headers = {"Origin": "https://crm.example.com", "Access-Control-Request-Method": "POST"}
    for method in ("OPTIONS", "GET"):
        answer = httpx2.request(method, f"{server.url}/health/live", headers=headers)
        assert not [name for name in answer.headers if name.startswith("access-control")]
